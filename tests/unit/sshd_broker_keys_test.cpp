#include "catch.h"

#include "sshd/broker/host_keys.h"
#include "temp_dir.h"

#include <boost/asio/io_context.hpp>

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>

using namespace postern;
using namespace postern::sshd;
using namespace postern::sshd::broker;

namespace {
std::string sign_by_id(HostKeys& keys, std::uint32_t id, net::Digest digest, const std::string& data, net::Purpose purpose = net::Purpose::exchange_hash,
                       const std::string& session_id = "") {
  boost::asio::io_context io;
  auto work = boost::asio::make_work_guard(io);
  net::AskSign ask;
  ask.key = id;
  ask.digest = digest;
  ask.purpose = purpose;
  REQUIRE(ask.data.set(data));
  std::string got;
  const auto asker = std::make_shared<int>();
  keys.sign(ask, session_id, io.get_executor(), asker, [&](std::string blob) {
    got = std::move(blob);
    work.reset();
  });
  io.run();
  return got;
}

std::string sign(HostKeys& keys, std::size_t key, net::Digest digest, const std::string& data) {
  return sign_by_id(keys, net::key_id(keys.public_blob(key)), digest, data);
}

std::string made_by_ssh_keygen(const TempDir& dir, const std::string& name, const std::string& options) {
  const std::string file = dir.file(name);
  REQUIRE(std::system(("ssh-keygen -q -C a -N '' " + options + " -f " + file).c_str()) == 0);
  return file;
}

std::string first_two_words(const std::string& file) {
  std::ifstream in{file};
  std::string type, key;
  in >> type >> key;
  return type + " " + key;
}

std::string inode(const std::string& file) {
  struct stat st {};
  return ::stat(file.c_str(), &st) == 0 ? std::to_string(st.st_ino) : "";
}
}  // namespace

TEST_CASE("host keys are the same after a restart", "[broker][keys]") {
  TempDir dir;
  auto first = HostKeys::load_or_make(dir.path);
  REQUIRE(first);
  auto second = HostKeys::load_or_make(dir.path);
  REQUIRE(second);
  REQUIRE((*first)->count() == 3);
  for (std::size_t i = 0; i < 3; i++) CHECK((*first)->fingerprint(i) == (*second)->fingerprint(i));
  CHECK((*first)->public_line(0).rfind("ssh-ed25519 AAAA", 0) == 0);
  CHECK((*first)->public_line(1).rfind("ecdsa-sha2-nistp256 AAAA", 0) == 0);
  CHECK((*first)->public_line(2).rfind("ssh-rsa AAAA", 0) == 0);
}

TEST_CASE("a host key that others may read is refused by name", "[broker][keys]") {
  TempDir dir;
  REQUIRE(HostKeys::load_or_make(dir.path));
  const std::string file = dir.file("ssh_host_ed25519.pem");
  REQUIRE(::chmod(file.c_str(), 0644) == 0);
  const auto again = HostKeys::load_or_make(dir.path);
  REQUIRE_FALSE(again);
  CHECK(again.error().doing.find(file) != std::string::npos);
}

TEST_CASE("a damaged host key is refused and not replaced", "[broker][keys]") {
  TempDir dir;
  REQUIRE(HostKeys::load_or_make(dir.path));
  const std::string file = dir.file("ssh_host_rsa.pem");
  std::ofstream{file, std::ios::trunc} << "not a key\n";
  CHECK_FALSE(HostKeys::load_or_make(dir.path));
}

TEST_CASE("the broker signs an exchange hash and nothing else", "[broker][keys]") {
  CHECK(HostKeys::may_sign(std::string(32, 'a')));
  CHECK(HostKeys::may_sign(std::string(48, 'a')));
  CHECK(HostKeys::may_sign(std::string(64, 'a')));
  for (std::size_t n : {0, 1, 20, 31, 33, 47, 49, 63}) CHECK_FALSE(HostKeys::may_sign(std::string(n, 'a')));
  CHECK_FALSE(HostKeys::may_sign("SSHSIG" + std::string(58, 'a')));  // a 64-byte SSHSIG blob would pass as an exchange hash
}

TEST_CASE("each key signs in the form that its algorithm has on the wire", "[broker][keys]") {
  TempDir dir;
  auto keys = HostKeys::load_or_make(dir.path);
  REQUIRE(keys);
  const std::string hash(32, 'h');
  CHECK(sign(**keys, 0, net::Digest::none, hash).substr(4, 11) == "ssh-ed25519");
  CHECK(sign(**keys, 1, net::Digest::none, hash).substr(4, 19) == "ecdsa-sha2-nistp256");
  CHECK(sign(**keys, 2, net::Digest::sha512, hash).substr(4, 12) == "rsa-sha2-512");
  CHECK(sign(**keys, 2, net::Digest::sha256, hash).substr(4, 12) == "rsa-sha2-256");
  CHECK(sign(**keys, 2, net::Digest::none, hash).empty());    // ssh-rsa with SHA-1 is not made
  CHECK(sign(**keys, 0, net::Digest::sha512, hash).empty());
  CHECK(sign_by_id(**keys, 3, net::Digest::none, hash).empty());  // no such key
}

TEST_CASE("of many who want an RSA signature at once none is refused, who is logged in is first, and who has gone costs nothing", "[broker][keys]") {
  TempDir dir;
  auto keys = HostKeys::load({made_by_ssh_keygen(dir, "rsa", "-t rsa -b 3072")});
  REQUIRE(keys);
  boost::asio::io_context io;
  auto work = boost::asio::make_work_guard(io);
  net::AskSign ask;
  ask.key = net::key_id((*keys)->public_blob(0));
  ask.digest = net::Digest::sha512;
  REQUIRE(ask.data.set(std::string(32, 'h')));
  constexpr std::size_t many = 300;
  std::vector<std::size_t> order;
  const auto here = std::make_shared<int>();
  auto gone = std::make_shared<int>();
  const auto want = [&](std::size_t number, const std::string& session_id, const std::shared_ptr<int>& asker) {
    (*keys)->sign(ask, session_id, io.get_executor(), asker, [&, number](const std::string& blob) {
      CHECK_FALSE(blob.empty());
      order.push_back(number);
      if (order.size() == many + 1) work.reset();
    });
  };
  for (std::size_t n = 0; n < many; n++) want(n, "", here);
  for (std::size_t n = 0; n < many; n++) want(10'000 + n, "", gone);
  gone.reset();
  want(many, "a session", here);
  io.run();
  const auto live = std::find(order.begin(), order.end(), many);
  CHECK(live < order.begin() + many / 2);
  order.erase(live);
  CHECK(std::is_sorted(order.begin(), order.end()));
  CHECK(order.size() == many);
}

TEST_CASE("sshd's own host keys are taken as they are", "[broker][keys]") {
  TempDir dir;
  std::vector<std::string> files;
  for (const auto& [name, options] : {std::pair{"ed", "-t ed25519"}, std::pair{"rsa", "-t rsa -b 2048"}, std::pair{"e256", "-t ecdsa -b 256"}, std::pair{"e384", "-t ecdsa -b 384"},
                                      std::pair{"e521", "-t ecdsa -b 521"}, std::pair{"pem", "-t rsa -b 3072 -m PEM"}, std::pair{"pkcs8", "-t ecdsa -b 256 -m PKCS8"}})
    files.push_back(made_by_ssh_keygen(dir, name, options));
  const auto keys = HostKeys::load(files);
  REQUIRE(keys);
  REQUIRE((*keys)->count() == files.size());
  for (std::size_t i = 0; i < files.size(); i++) CHECK((*keys)->public_line(i) == first_two_words(files[i] + ".pub"));
  // As sshd: the first of a type is offered, of the others clients learn.
  CHECK((*keys)->use(0) == HostKeys::Use::offered);
  CHECK((*keys)->use(1) == HostKeys::Use::offered);
  CHECK((*keys)->use(2) == HostKeys::Use::offered);
  for (std::size_t i = 3; i < files.size(); i++) CHECK((*keys)->use(i) == HostKeys::Use::announced);
  const std::string hash(32, 'h');
  CHECK(sign(**keys, 0, net::Digest::none, hash).substr(4, 11) == "ssh-ed25519");
  CHECK(sign(**keys, 1, net::Digest::sha512, hash).substr(4, 12) == "rsa-sha2-512");
  CHECK(sign(**keys, 3, net::Digest::none, hash).substr(4, 19) == "ecdsa-sha2-nistp384");
  CHECK(sign(**keys, 4, net::Digest::none, hash).substr(4, 19) == "ecdsa-sha2-nistp521");
}

TEST_CASE("a host key that cannot be used is refused with its file and the reason", "[broker][keys]") {
  TempDir dir;
  const auto refused = [](const std::vector<std::string>& files, const std::string& why) {
    const auto keys = HostKeys::load(files);
    REQUIRE_FALSE(keys);
    INFO(keys.error().doing);
    CHECK(keys.error().doing.find(files.back()) != std::string::npos);
    CHECK(keys.error().doing.find(why) != std::string::npos);
  };
  const auto good = made_by_ssh_keygen(dir, "good", "-t ed25519");
  refused({good, good}, "the same as");
  refused({made_by_ssh_keygen(dir, "locked", "-t ed25519 -N secret")}, "passphrase");
  refused({made_by_ssh_keygen(dir, "short", "-t rsa -b 1024")}, "2048");
  refused({dir.file("not-there")}, "No such file");
  refused({dir.path.string()}, "no key file");
  const std::string cut = dir.file("cut");
  std::ifstream in{good};
  std::string text{std::istreambuf_iterator<char>{in}, {}};
  for (const std::size_t keep : {text.size() / 2, text.size() - 40, std::size_t{0}}) {
    std::ofstream{cut, std::ios::trunc} << text.substr(0, keep);
    ::chmod(cut.c_str(), 0600);
    refused({cut}, "host key");
  }
  REQUIRE(::chmod(good.c_str(), 0640) == 0);
  refused({good}, "others may read it");
}

TEST_CASE("keys are rotated in two steps and live connections keep theirs", "[broker][keys]") {
  TempDir dir;
  const auto before = HostKeys::load_or_make(dir.path);
  REQUIRE(before);
  CHECK(HostKeys::finish_rotation(dir.path).error().code == ENOENT);
  REQUIRE(HostKeys::prepare_rotation(dir.path));
  const auto next = inode(dir.file("ssh_host_rsa.next.pem"));
  REQUIRE(HostKeys::prepare_rotation(dir.path));  // once more changes nothing
  CHECK(inode(dir.file("ssh_host_rsa.next.pem")) == next);
  const auto during = HostKeys::load_or_make(dir.path);
  REQUIRE(during);
  REQUIRE((*during)->count() == 6);
  for (std::size_t i = 0; i < 3; i++) CHECK((*during)->public_blob(i) == (*before)->public_blob(i));
  for (std::size_t i = 3; i < 6; i++) CHECK((*during)->use(i) == HostKeys::Use::announced);
  REQUIRE(HostKeys::finish_rotation(dir.path));
  const auto after = HostKeys::load_or_make(dir.path);
  REQUIRE(after);
  REQUIRE((*after)->count() == 6);
  for (std::size_t i = 0; i < 3; i++) {
    CHECK((*after)->public_blob(i) == (*during)->public_blob(i + 3));
    CHECK((*after)->public_blob(i + 3) == (*before)->public_blob(i));
    CHECK((*after)->use(i + 3) == HostKeys::Use::retired);
  }
  // A worker of before asks for the key that its connection began with.
  CHECK_FALSE(sign_by_id(**after, net::key_id((*before)->public_blob(0)), net::Digest::none, std::string(32, 'h')).empty());
  for (const auto& file : std::filesystem::directory_iterator{dir.path}) {
    struct stat st {};
    REQUIRE(::stat(file.path().c_str(), &st) == 0);
    CHECK((st.st_mode & 0777) == 0600);
  }
}

TEST_CASE("possession of a key is proven for this connection and nothing else is signed by it", "[broker][keys]") {
  TempDir dir;
  const auto keys = HostKeys::load_or_make(dir.path);
  REQUIRE(keys);
  const auto id = net::key_id((*keys)->public_blob(0));
  const auto prove = [&](const std::string& data, const std::string& session_id) {
    return sign_by_id(**keys, id, net::Digest::none, data, net::Purpose::possession, session_id);
  };
  const std::string session(32, 's');
  CHECK(prove("", session).substr(4, 11) == "ssh-ed25519");
  CHECK(prove("", session) != prove("", std::string(32, 't')));
  CHECK(prove("", "").empty());                     // before the first key exchange
  CHECK(prove(std::string(32, 'x'), session).empty());  // what is proven is not net's to choose
  CHECK(sign_by_id(**keys, id, net::Digest::none, "", static_cast<net::Purpose>(7), session).empty());
}
