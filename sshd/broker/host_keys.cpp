#include "sshd/broker/host_keys.h"

#include "base/unique_fd.h"

#include <boost/asio/post.hpp>

#include <openssl/bn.h>
#include <openssl/core_names.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rsa.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

namespace postern::sshd::broker {
namespace {

struct KeyFree {
  void operator()(EVP_PKEY* k) const { EVP_PKEY_free(k); }
};
using KeyPtr = std::shared_ptr<EVP_PKEY>;

void put_u32(std::string& out, std::size_t n) {
  for (int shift = 24; shift >= 0; shift -= 8) out += static_cast<char>(n >> shift & 0xff);
}
void put_string(std::string& out, std::string_view s) {
  put_u32(out, s.size());
  out += s;
}
// RFC 4251 section 5: mpint, big-endian, a zero byte in front when the top bit is set.
void put_mpint(std::string& out, const BIGNUM* n) {
  std::string bytes(static_cast<std::size_t>(BN_num_bytes(n)), '\0');
  BN_bn2bin(n, reinterpret_cast<unsigned char*>(bytes.data()));
  if (!bytes.empty() && (static_cast<unsigned char>(bytes[0]) & 0x80) != 0) bytes.insert(bytes.begin(), '\0');
  put_string(out, bytes);
}

std::string base64(std::string_view in) {
  std::string out(4 * ((in.size() + 2) / 3), '\0');
  EVP_EncodeBlock(reinterpret_cast<unsigned char*>(out.data()), reinterpret_cast<const unsigned char*>(in.data()), static_cast<int>(in.size()));
  return out;
}

std::string openssl_error(const std::string& doing) {
  char text[256] = "unknown";
  if (const unsigned long code = ERR_get_error(); code != 0) ERR_error_string_n(code, text, sizeof text);
  ERR_clear_error();
  return doing + ": " + text;
}

BIGNUM* number_of(EVP_PKEY* key, const char* name) {
  BIGNUM* n = nullptr;
  return EVP_PKEY_get_bn_param(key, name, &n) == 1 ? n : nullptr;
}

std::string public_blob_of(EVP_PKEY* key) {
  std::string out;
  switch (EVP_PKEY_get_base_id(key)) {
    case EVP_PKEY_ED25519: {
      unsigned char raw[32];
      std::size_t length = sizeof raw;
      if (EVP_PKEY_get_raw_public_key(key, raw, &length) != 1) return {};
      put_string(out, "ssh-ed25519");
      put_string(out, {reinterpret_cast<char*>(raw), length});
      return out;
    }
    case EVP_PKEY_EC: {
      unsigned char point[133];
      std::size_t length = 0;
      if (EVP_PKEY_get_octet_string_param(key, OSSL_PKEY_PARAM_PUB_KEY, point, sizeof point, &length) != 1) return {};
      put_string(out, "ecdsa-sha2-nistp256");
      put_string(out, "nistp256");
      put_string(out, {reinterpret_cast<char*>(point), length});
      return out;
    }
    case EVP_PKEY_RSA: {
      BIGNUM* e = number_of(key, OSSL_PKEY_PARAM_RSA_E);
      BIGNUM* n = number_of(key, OSSL_PKEY_PARAM_RSA_N);
      if (e != nullptr && n != nullptr) {
        put_string(out, "ssh-rsa");
        put_mpint(out, e);
        put_mpint(out, n);
      }
      BN_free(e);
      BN_free(n);
      return out;
    }
    default:
      return {};
  }
}

std::string sign_with(EVP_PKEY* key, net::Digest digest, std::string_view data) {
  const EVP_MD* md = nullptr;
  std::string_view name;
  const int type = EVP_PKEY_get_base_id(key);
  if (type == EVP_PKEY_ED25519 && digest == net::Digest::none) {
    name = "ssh-ed25519";
  } else if (type == EVP_PKEY_EC && (digest == net::Digest::none || digest == net::Digest::sha256)) {
    md = EVP_sha256();
    name = "ecdsa-sha2-nistp256";
  } else if (type == EVP_PKEY_RSA && digest == net::Digest::sha512) {
    md = EVP_sha512();
    name = "rsa-sha2-512";
  } else if (type == EVP_PKEY_RSA && digest == net::Digest::sha256) {
    md = EVP_sha256();
    name = "rsa-sha2-256";
  } else {
    return {};
  }
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context{EVP_MD_CTX_new(), &EVP_MD_CTX_free};
  const auto* bytes = reinterpret_cast<const unsigned char*>(data.data());
  std::size_t length = 0;
  if (!context || EVP_DigestSignInit(context.get(), nullptr, md, nullptr, key) != 1 ||
      EVP_DigestSign(context.get(), nullptr, &length, bytes, data.size()) != 1)
    return {};
  std::string raw(length, '\0');
  if (EVP_DigestSign(context.get(), reinterpret_cast<unsigned char*>(raw.data()), &length, bytes, data.size()) != 1) return {};
  raw.resize(length);
  if (type == EVP_PKEY_EC) {  // DER -> RFC 5656 section 3.1.2: two mpints
    const auto* der = reinterpret_cast<const unsigned char*>(raw.data());
    ECDSA_SIG* sig = d2i_ECDSA_SIG(nullptr, &der, static_cast<long>(raw.size()));
    if (sig == nullptr) return {};
    std::string pair;
    put_mpint(pair, ECDSA_SIG_get0_r(sig));
    put_mpint(pair, ECDSA_SIG_get0_s(sig));
    ECDSA_SIG_free(sig);
    raw = std::move(pair);
  }
  std::string out;
  put_string(out, name);
  put_string(out, raw);
  return out;
}

Expected<KeyPtr> read_key(const std::string& path) {
  const UniqueFd fd{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW)};
  if (!fd) return Unexpected{system_error("open host key " + path)};
  struct stat st {};
  if (::fstat(fd.get(), &st) != 0) return Unexpected{system_error("stat host key " + path)};
  if ((st.st_mode & 077) != 0 || st.st_uid != ::geteuid())
    return Unexpected{Error{EPERM, "host key " + path + ": others may read it or it is not ours (chmod 600, chown)"}};
  std::unique_ptr<FILE, int (*)(FILE*)> file{::fdopen(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 3), "r"), &::fclose};
  if (!file) return Unexpected{system_error("open host key " + path)};
  KeyPtr key{PEM_read_PrivateKey(file.get(), nullptr, nullptr, const_cast<char*>("")), KeyFree{}};
  if (!key) return Unexpected{Error{EINVAL, openssl_error("read host key " + path)}};
  return key;
}

Expected<KeyPtr> make_key(const std::string& path, const char* type) {
  EVP_PKEY* made = nullptr;
  const std::string_view t{type};
  if (t == "RSA") made = EVP_RSA_gen(3072);
  else if (t == "EC") made = EVP_EC_gen("P-256");
  else made = EVP_PKEY_Q_keygen(nullptr, nullptr, type);
  if (made == nullptr) return Unexpected{Error{EINVAL, openssl_error("make host key " + path)}};
  KeyPtr key{made, KeyFree{}};
  const std::string temporary = path + ".new";
  ::unlink(temporary.c_str());
  UniqueFd fd{::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600)};
  if (!fd) return Unexpected{system_error("write host key " + temporary)};
  std::unique_ptr<FILE, int (*)(FILE*)> file{::fdopen(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 3), "w"), &::fclose};
  if (!file || PEM_write_PKCS8PrivateKey(file.get(), key.get(), nullptr, nullptr, 0, nullptr, nullptr) != 1 || ::fflush(file.get()) != 0 ||
      ::fsync(fd.get()) != 0 || ::rename(temporary.c_str(), path.c_str()) != 0)
    return Unexpected{system_error("write host key " + path)};
  return key;
}

}  // namespace

struct HostKeys::Key {
  KeyPtr key;
  std::string blob;
  bool rsa;
};

HostKeys::HostKeys() : rsa_{std::make_unique<boost::asio::thread_pool>(1)}, rsa_waiting_{std::make_shared<std::atomic<int>>(0)} {}
HostKeys::~HostKeys() { rsa_->join(); }

Expected<std::unique_ptr<HostKeys>> HostKeys::load_or_make(const std::string& dir) {
  if (::mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST) return Unexpected{system_error("make host key folder " + dir)};
  struct stat st {};
  if (::stat(dir.c_str(), &st) != 0) return Unexpected{system_error("stat host key folder " + dir)};
  if (!S_ISDIR(st.st_mode) || (st.st_mode & 022) != 0 || (st.st_uid != ::geteuid() && st.st_uid != 0))
    return Unexpected{Error{EPERM, "host key folder " + dir + ": others may write it, or it is not ours"}};
  std::unique_ptr<HostKeys> keys{new HostKeys};
  static constexpr std::pair<const char*, const char*> wanted[] = {{"ssh_host_ed25519.pem", "ED25519"}, {"ssh_host_ecdsa.pem", "EC"}, {"ssh_host_rsa.pem", "RSA"}};
  for (const auto& [name, type] : wanted) {
    const std::string path = dir + "/" + name;
    auto key = ::access(path.c_str(), F_OK) == 0 ? read_key(path) : make_key(path, type);
    if (!key) return Unexpected{key.error()};
    std::string blob = public_blob_of(key->get());
    if (blob.empty() || blob.size() > net::max_public_key_blob) return Unexpected{Error{EINVAL, "host key " + path + ": not ed25519, ECDSA P-256 or RSA"}};
    keys->keys_.push_back({*key, std::move(blob), EVP_PKEY_get_base_id(key->get()) == EVP_PKEY_RSA});
  }
  return keys;
}

std::size_t HostKeys::count() const noexcept { return keys_.size(); }

const std::string& HostKeys::public_blob(std::size_t key) const { return keys_[key].blob; }

std::string HostKeys::public_line(std::size_t key) const {
  const std::string& blob = keys_[key].blob;
  const std::size_t length = static_cast<unsigned char>(blob[3]);  // a type's name is short
  return blob.substr(4, length) + " " + base64(blob);
}

std::string HostKeys::fingerprint(std::size_t key) const {
  unsigned char digest[32];
  unsigned int length = sizeof digest;
  const std::string& blob = keys_[key].blob;
  EVP_Digest(blob.data(), blob.size(), digest, &length, EVP_sha256(), nullptr);
  std::string out = base64({reinterpret_cast<char*>(digest), sizeof digest});
  while (!out.empty() && out.back() == '=') out.pop_back();
  return "SHA256:" + out;
}

bool HostKeys::may_sign(std::string_view data) noexcept {
  return (data.size() == 32 || data.size() == 48 || data.size() == 64) && data.substr(0, 6) != "SSHSIG";
}

void HostKeys::sign(const net::AskSign& ask, boost::asio::any_io_executor executor, Done done) {
  const std::string data{ask.data.get()};
  if (!ask.data.valid() || ask.key >= keys_.size() || !may_sign(data)) return done({});
  const Key& key = keys_[ask.key];
  if (!key.rsa) return done(sign_with(key.key.get(), ask.digest, data));
  if (rsa_waiting_->fetch_add(1) >= max_rsa_queue) {
    rsa_waiting_->fetch_sub(1);
    return done({});
  }
  boost::asio::post(*rsa_, [key = key.key, digest = ask.digest, data, executor, done = std::move(done), waiting = rsa_waiting_] {
    std::string blob = sign_with(key.get(), digest, data);
    waiting->fetch_sub(1);
    boost::asio::post(executor, [done, blob = std::move(blob)] { done(blob); });
  });
}

}  // namespace postern::sshd::broker
