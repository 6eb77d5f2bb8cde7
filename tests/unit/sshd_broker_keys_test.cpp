#include "catch.h"

#include "sshd/broker/host_keys.h"

#include <boost/asio/io_context.hpp>

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

using namespace postern;
using namespace postern::sshd;
using namespace postern::sshd::broker;

namespace {
struct TempDir {
  std::string path;
  TempDir() {
    char name[] = "/tmp/postern-keys-XXXXXX";
    path = ::mkdtemp(name);
  }
  ~TempDir() { std::filesystem::remove_all(path); }
};

std::string sign(HostKeys& keys, std::uint32_t key, net::Digest digest, const std::string& data) {
  boost::asio::io_context io;
  auto work = boost::asio::make_work_guard(io);
  net::AskSign ask;
  ask.key = key;
  ask.digest = digest;
  REQUIRE(ask.data.set(data));
  std::string got;
  keys.sign(ask, io.get_executor(), [&](std::string blob) {
    got = std::move(blob);
    work.reset();
  });
  io.run();
  return got;
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
  const std::string file = dir.path + "/ssh_host_ed25519.pem";
  REQUIRE(::chmod(file.c_str(), 0644) == 0);
  const auto again = HostKeys::load_or_make(dir.path);
  REQUIRE_FALSE(again);
  CHECK(again.error().doing.find(file) != std::string::npos);
}

TEST_CASE("a damaged host key is refused and not replaced", "[broker][keys]") {
  TempDir dir;
  REQUIRE(HostKeys::load_or_make(dir.path));
  const std::string file = dir.path + "/ssh_host_rsa.pem";
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
  CHECK(sign(**keys, 3, net::Digest::none, hash).empty());    // no such key
}
