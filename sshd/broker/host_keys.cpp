#include "sshd/broker/host_keys.h"

#include "base/unique_fd.h"
#include "sshd/protocol/ssh_wire.h"

#include <boost/asio/post.hpp>

#include <openssl/bn.h>
#include <openssl/core_names.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/param_build.h>
#include <openssl/pem.h>
#include <openssl/rsa.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <deque>
#include <mutex>
#include <set>

namespace postern::sshd::broker {
namespace {

struct KeyFree {
  void operator()(EVP_PKEY* k) const { EVP_PKEY_free(k); }
};
using KeyPtr = std::shared_ptr<EVP_PKEY>;

std::string_view curve_of(EVP_PKEY* key) {
  switch (EVP_PKEY_get_bits(key)) {
    case 256: return "nistp256";
    case 384: return "nistp384";
    case 521: return "nistp521";
    default: return {};
  }
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
      const std::string curve{curve_of(key)};
      if (curve.empty()) return {};
      put_string(out, "ecdsa-sha2-" + curve);
      put_string(out, curve);
      put_string(out, {reinterpret_cast<char*>(point), length});
      return out;
    }
    case EVP_PKEY_RSA: {
      if (EVP_PKEY_get_bits(key) < 2048 || EVP_PKEY_get_bits(key) > 8192) return {};
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
  } else if (type == EVP_PKEY_EC && digest == net::Digest::none) {  // RFC 5656 section 6.2.1: the curve says it
    const std::string_view curve = curve_of(key);
    md = curve == "nistp521" ? EVP_sha512() : curve == "nistp384" ? EVP_sha384() : EVP_sha256();
    name = curve == "nistp521" ? "ecdsa-sha2-nistp521" : curve == "nistp384" ? "ecdsa-sha2-nistp384" : "ecdsa-sha2-nistp256";
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

constexpr std::size_t max_key_file = 32 * 1024;

struct ParamFree {
  void operator()(OSSL_PARAM_BLD* b) const { OSSL_PARAM_BLD_free(b); }
  void operator()(OSSL_PARAM* p) const { OSSL_PARAM_free(p); }
  void operator()(EVP_PKEY_CTX* c) const { EVP_PKEY_CTX_free(c); }
};

/// A key pair of numbers and texts; nullptr when OpenSSL does not take them.
class KeyBuilder {
 public:
  void number(const char* name, std::string_view big_endian) {
    BIGNUM* n = BN_secure_new();
    if (n != nullptr) BN_bin2bn(reinterpret_cast<const unsigned char*>(big_endian.data()), static_cast<int>(big_endian.size()), n);
    good_ = good_ && n != nullptr && OSSL_PARAM_BLD_push_BN(builder_.get(), name, n) == 1;
    numbers_.emplace_back(n, &BN_clear_free);
  }
  void text(const char* name, const char* value) { good_ = good_ && OSSL_PARAM_BLD_push_utf8_string(builder_.get(), name, value, 0) == 1; }
  void octets(const char* name, std::string_view value) { good_ = good_ && OSSL_PARAM_BLD_push_octet_string(builder_.get(), name, value.data(), value.size()) == 1; }
  EVP_PKEY* make(const char* type) {
    std::unique_ptr<OSSL_PARAM, ParamFree> parameters{good_ ? OSSL_PARAM_BLD_to_param(builder_.get()) : nullptr};
    std::unique_ptr<EVP_PKEY_CTX, ParamFree> context{EVP_PKEY_CTX_new_from_name(nullptr, type, nullptr)};
    EVP_PKEY* key = nullptr;
    if (!parameters || !context || EVP_PKEY_fromdata_init(context.get()) != 1 || EVP_PKEY_fromdata(context.get(), &key, EVP_PKEY_KEYPAIR, parameters.get()) != 1)
      return nullptr;
    return key;
  }

 private:
  std::unique_ptr<OSSL_PARAM_BLD, ParamFree> builder_{OSSL_PARAM_BLD_new()};
  std::vector<std::unique_ptr<BIGNUM, decltype(&BN_clear_free)>> numbers_;
  bool good_ = builder_ != nullptr;
};

/// `body`: between the BEGIN and END lines of "OPENSSH PRIVATE KEY", decoded. `why` says what is wrong.
EVP_PKEY* openssh_key(std::string_view body, std::string& why) {
  constexpr std::string_view magic{"openssh-key-v1\0", 15};
  why = "damaged";
  if (body.substr(0, magic.size()) != magic) return nullptr;
  WireView outer{body.substr(magic.size())};
  const auto cipher = outer.text();
  outer.text();  // key derivation
  outer.text();
  const auto keys = outer.u32();
  outer.text();  // public half
  WireView r{outer.text()};
  if (!outer.ok() || keys != 1) return nullptr;
  if (cipher != "none") {
    why = "it has a passphrase (ssh-keygen -p takes it off)";
    return nullptr;
  }
  const auto check = r.u32();
  if (check != r.u32()) return nullptr;
  const auto type = r.text();
  if (type == "ssh-ed25519") {
    r.text();
    const auto pair = r.text();
    if (!r.ok() || pair.size() != 64) return nullptr;
    return EVP_PKEY_new_raw_private_key(EVP_PKEY_ED25519, nullptr, reinterpret_cast<const unsigned char*>(pair.data()), 32);
  }
  KeyBuilder builder;
  if (type == "ssh-rsa") {
    const auto n = r.text(), e = r.text(), d = r.text(), inverse = r.text(), p = r.text(), q = r.text();
    if (!r.ok()) return nullptr;
    builder.number(OSSL_PKEY_PARAM_RSA_N, n);
    builder.number(OSSL_PKEY_PARAM_RSA_E, e);
    builder.number(OSSL_PKEY_PARAM_RSA_D, d);
    builder.number(OSSL_PKEY_PARAM_RSA_FACTOR1, p);
    builder.number(OSSL_PKEY_PARAM_RSA_FACTOR2, q);
    builder.number(OSSL_PKEY_PARAM_RSA_COEFFICIENT1, inverse);
    // Without the two exponents OpenSSL computes without the Chinese remainder theorem: four times slower.
    const auto modulo = [&](const char* name, std::string_view factor) {
      std::unique_ptr<BN_CTX, decltype(&BN_CTX_free)> context{BN_CTX_secure_new(), &BN_CTX_free};
      const auto number = [](std::string_view bytes) {
        return std::unique_ptr<BIGNUM, decltype(&BN_clear_free)>{BN_bin2bn(reinterpret_cast<const unsigned char*>(bytes.data()), static_cast<int>(bytes.size()), nullptr), &BN_clear_free};
      };
      const auto exponent = number(d), below = number(factor);
      if (!context || !exponent || !below || BN_is_zero(below.get())) return;
      BN_sub_word(below.get(), 1);
      BN_mod(exponent.get(), exponent.get(), below.get(), context.get());
      std::string bytes(static_cast<std::size_t>(BN_num_bytes(exponent.get())), '\0');
      BN_bn2bin(exponent.get(), reinterpret_cast<unsigned char*>(bytes.data()));
      builder.number(name, bytes);
      OPENSSL_cleanse(bytes.data(), bytes.size());
    };
    modulo(OSSL_PKEY_PARAM_RSA_EXPONENT1, p);
    modulo(OSSL_PKEY_PARAM_RSA_EXPONENT2, q);
    return builder.make("RSA");
  }
  if (type.substr(0, 19) == "ecdsa-sha2-nistp256" || type.substr(0, 19) == "ecdsa-sha2-nistp384" || type.substr(0, 19) == "ecdsa-sha2-nistp521") {
    const auto curve = r.text(), point = r.text(), number = r.text();
    if (!r.ok() || curve != type.substr(11)) return nullptr;
    builder.text(OSSL_PKEY_PARAM_GROUP_NAME, curve == "nistp256" ? "P-256" : curve == "nistp384" ? "P-384" : "P-521");
    builder.octets(OSSL_PKEY_PARAM_PUB_KEY, point);
    builder.number(OSSL_PKEY_PARAM_PRIV_KEY, number);
    return builder.make("EC");
  }
  why = "its type \"" + std::string{type.substr(0, 64)} + "\" is none of ssh-ed25519, ssh-rsa, ecdsa-sha2-nistp256, -nistp384, -nistp521";
  return nullptr;
}

Expected<KeyPtr> read_key(const std::string& path) {
  const UniqueFd fd{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)};
  if (!fd) return Unexpected{system_error("open host key " + path)};
  struct stat st {};
  if (::fstat(fd.get(), &st) != 0) return Unexpected{system_error("stat host key " + path)};
  const auto bad = [&](const std::string& why) { return Unexpected{Error{EINVAL, "host key " + path + ": " + why}}; };
  if (!S_ISREG(st.st_mode) || st.st_size > static_cast<off_t>(max_key_file)) return bad("no key file");
  if ((st.st_mode & 077) != 0 || st.st_uid != ::geteuid())
    return Unexpected{Error{EPERM, "host key " + path + ": others may read it or it is not ours (chmod 600, chown)"}};
  std::string text(static_cast<std::size_t>(st.st_size), '\0');
  for (std::size_t at = 0; at < text.size();) {
    const ssize_t n = ::read(fd.get(), text.data() + at, text.size() - at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return bad("cut off");
    at += static_cast<std::size_t>(n);
  }
  std::unique_ptr<BIO, decltype(&BIO_free)> source{BIO_new_mem_buf(text.data(), static_cast<int>(text.size())), &BIO_free};
  EVP_PKEY* key = nullptr;
  std::string why;
  if (text.find("-----BEGIN OPENSSH PRIVATE KEY-----") != std::string::npos) {
    char *name = nullptr, *header = nullptr;
    unsigned char* body = nullptr;
    long length = 0;
    if (source && PEM_read_bio(source.get(), &name, &header, &body, &length) == 1) {
      key = openssh_key({reinterpret_cast<char*>(body), static_cast<std::size_t>(length)}, why);
      OPENSSL_clear_free(body, static_cast<std::size_t>(length));
    }
    OPENSSL_free(name);
    OPENSSL_free(header);
  } else if (source) {
    key = PEM_read_bio_PrivateKey(source.get(), nullptr, nullptr, const_cast<char*>(""));
  }
  OPENSSL_cleanse(text.data(), text.size());
  if (key == nullptr) return bad(why.empty() ? openssl_error("not a private key in PEM or OpenSSH's format, or it has a passphrase") : why);
  return KeyPtr{key, KeyFree{}};
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
  std::string path;
  std::string blob;
  Use use;
};

namespace {

constexpr std::pair<const char*, const char*> own_keys[] = {{"ssh_host_ed25519", "ED25519"}, {"ssh_host_ecdsa", "EC"}, {"ssh_host_rsa", "RSA"}};

bool there(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

Expected<Done> check_folder(const std::string& dir) {
  struct stat st {};
  if (::stat(dir.c_str(), &st) != 0) return Unexpected{system_error("stat host key folder " + dir)};
  if (!S_ISDIR(st.st_mode) || (st.st_mode & 022) != 0 || (st.st_uid != ::geteuid() && st.st_uid != 0))
    return Unexpected{Error{EPERM, "host key folder " + dir + ": others may write it, or it is not ours"}};
  return Done{};
}

Expected<Done> sync_folder(const std::string& dir) {
  const UniqueFd fd{::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  if (!fd || ::fsync(fd.get()) != 0) return Unexpected{system_error("write host key folder " + dir)};
  return Done{};
}

}  // namespace

struct HostKeys::RsaQueue {
  std::mutex mutex;
  std::deque<std::function<void()>> live, before_login;

  void add(bool is_live, std::function<void()> job) {
    const std::lock_guard lock{mutex};
    (is_live ? live : before_login).push_back(std::move(job));
  }
  void run_one() {
    std::function<void()> job;
    {
      const std::lock_guard lock{mutex};
      auto& queue = live.empty() ? before_login : live;
      if (queue.empty()) return;
      job = std::move(queue.front());
      queue.pop_front();
    }
    job();
  }
};

HostKeys::HostKeys() : rsa_{std::make_unique<boost::asio::thread_pool>(1)}, rsa_waiting_{std::make_shared<RsaQueue>()} {}
HostKeys::~HostKeys() {
  rsa_->stop();
  rsa_->join();
}

Expected<Done> HostKeys::add(const std::string& path, Use use) {
  auto key = read_key(path);
  if (!key) return Unexpected{key.error()};
  std::string blob = public_blob_of(key->get());
  if (blob.empty() || blob.size() > net::max_public_key_blob)
    return Unexpected{Error{EINVAL, "host key " + path + ": not ed25519, ECDSA (P-256, P-384, P-521) or RSA of 2048 to 8192 bits"}};
  for (const auto& k : keys_)
    if (net::key_id(k.blob) == net::key_id(blob)) return Unexpected{Error{EEXIST, "host key " + path + ": the same as " + k.path}};
  keys_.push_back({*key, path, std::move(blob), use});
  return Done{};
}

Expected<std::unique_ptr<HostKeys>> HostKeys::load_or_make(const std::string& dir) {
  if (::mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST) return Unexpected{system_error("make host key folder " + dir)};
  if (auto good = check_folder(dir); !good) return Unexpected{good.error()};
  std::unique_ptr<HostKeys> keys{new HostKeys};
  const std::string base = dir + "/";
  for (const auto& [name, type] : own_keys) {
    const std::string path = base + name + ".pem";
    if (!there(path))
      if (auto made = make_key(path, type); !made) return Unexpected{made.error()};
    if (auto added = keys->add(path, Use::offered); !added) return Unexpected{added.error()};
  }
  for (const auto& [suffix, use] : {std::pair{".next.pem", Use::announced}, std::pair{".old.pem", Use::retired}})
    for (const auto& [name, type] : own_keys)
      if (const std::string path = base + name + suffix; there(path))
        if (auto added = keys->add(path, use); !added) return Unexpected{added.error()};
  return keys;
}

Expected<std::unique_ptr<HostKeys>> HostKeys::load(const std::vector<std::string>& files) {
  std::unique_ptr<HostKeys> keys{new HostKeys};
  std::set<int> types;
  for (const auto& path : files) {
    if (auto added = keys->add(path, Use::offered); !added) return Unexpected{added.error()};
    Key& key = keys->keys_.back();
    if (!types.insert(EVP_PKEY_get_base_id(key.key.get())).second) key.use = Use::announced;
  }
  return keys;
}

Expected<Done> HostKeys::prepare_rotation(const std::string& dir) {
  if (auto good = check_folder(dir); !good) return good;
  for (const auto& [name, type] : own_keys) {
    const std::string path = dir + "/" + name + ".next.pem";
    if (there(path)) continue;
    if (auto made = make_key(path, type); !made) return Unexpected{made.error()};
  }
  return sync_folder(dir);
}

Expected<Done> HostKeys::finish_rotation(const std::string& dir) {
  if (auto good = check_folder(dir); !good) return good;
  const std::string base = dir + "/";
  bool any = false;
  for (const auto& [name, type] : own_keys) {
    const std::string path = base + name + ".pem", next = base + name + ".next.pem", old = base + name + ".old.pem", spare = old + ".new";
    if (!there(next)) continue;
    any = true;
    // At no moment is there none, and a crash in between leaves the old one or the new one.
    ::unlink(spare.c_str());
    if (::link(path.c_str(), spare.c_str()) != 0 || ::rename(spare.c_str(), old.c_str()) != 0 || ::rename(next.c_str(), path.c_str()) != 0)
      return Unexpected{system_error("rotate host key " + path)};
  }
  if (!any) return Unexpected{Error{ENOENT, "there are no keys to come in " + dir}};
  return sync_folder(dir);
}

std::size_t HostKeys::count() const noexcept { return keys_.size(); }

HostKeys::Use HostKeys::use(std::size_t key) const { return keys_[key].use; }

std::string HostKeys::path(std::size_t key) const { return keys_[key].path; }

int HostKeys::bits(std::size_t key) const { return EVP_PKEY_get_base_id(keys_[key].key.get()) == EVP_PKEY_ED25519 ? 256 : EVP_PKEY_get_bits(keys_[key].key.get()); }

const HostKeys::Key* HostKeys::find(std::uint32_t id) const {
  for (const auto& key : keys_)
    if (net::key_id(key.blob) == id) return &key;
  return nullptr;
}

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

void HostKeys::sign(const net::AskSign& ask, std::string_view session_id, boost::asio::any_io_executor executor, std::weak_ptr<const void> asker,
                    OnSigned done) {
  const Key* const key = find(ask.key);
  std::string data{ask.data.get()};
  if (!ask.data.valid() || key == nullptr) return done({});
  if (ask.purpose == net::Purpose::possession) {
    if (!data.empty() || session_id.empty()) return done({});
    put_string(data, "hostkeys-prove-00@openssh.com");
    put_string(data, session_id);
    put_string(data, key->blob);
  } else if (ask.purpose != net::Purpose::exchange_hash || !may_sign(data)) {
    return done({});
  }
  if (EVP_PKEY_get_base_id(key->key.get()) != EVP_PKEY_RSA) return done(sign_with(key->key.get(), ask.digest, data));
  rsa_waiting_->add(!session_id.empty(), [key = key->key, digest = ask.digest, data, executor, asker = std::move(asker), done = std::move(done)] {
    if (asker.expired()) return;
    boost::asio::post(executor, [done, blob = sign_with(key.get(), digest, data)] { done(blob); });
  });
  boost::asio::post(*rsa_, [waiting = rsa_waiting_] { waiting->run_one(); });
}

}  // namespace postern::sshd::broker
