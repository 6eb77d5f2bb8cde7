#include "catch.h"
#include "sshd/protocol/facts.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>

using namespace postern;
using namespace postern::sshd;

namespace {

/// A sealed memfd with these bytes.
UniqueFd sealed(std::string_view bytes, int seals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) {
  UniqueFd fd{::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING)};
  REQUIRE(::write(fd.get(), bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  REQUIRE(::fcntl(fd.get(), F_ADD_SEALS, seals) == 0);
  return fd;
}

std::string bytes_of(const ConnectionFacts& facts) {
  std::string bytes(sizeof facts, '\0');
  std::memcpy(bytes.data(), &facts, sizeof facts);
  return bytes;
}

ConnectionFacts some() {
  ConnectionFacts f;
  f.size = sizeof f;
  REQUIRE(f.local_user.set("alice"));
  REQUIRE(f.sftp_server.set("/usr/lib/openssh/sftp-server"));
  REQUIRE(f.rules.command.set("/bin/menu"));
  f.rules.max_duration_seconds = 60;
  f.rules.max_sessions = 0;
  f.rules.sftp = ConnectionFacts::Rules::Sftp::none;
  f.rules.no_pty = 1;
  f.forwarding.agent = 0;
  f.kill_ms = 77;
  REQUIRE(f.forwarding.local_targets.set("db:5432\n\f"));
  return f;
}

/// The same as a broker of version 3 sealed it.
std::string version_3(ConnectionFacts f) {
  f.version = 3;
  f.size = facts_version_3_size;
  return bytes_of(f).substr(0, facts_version_3_size);
}

}  // namespace

TEST_CASE("facts come back as they were sealed, rules included", "[protocol][facts]") {
  const auto f = some();
  const auto fd = seal_facts(f);
  REQUIRE(fd);
  const auto back = read_facts(fd->get());
  REQUIRE(back);
  CHECK(back->version == 4);
  CHECK(back->local_user.get() == "alice");
  CHECK(back->rules == f.rules);
  CHECK_FALSE(back->rules == ConnectionFacts::Rules{});
  CHECK(back->forwarding == f.forwarding);
  CHECK_FALSE(back->forwarding == ConnectionFacts::Forwarding{});
  CHECK(back->kill_ms == 77);
}

TEST_CASE("facts of the version before read as facts with the times that its sessions had", "[protocol][facts]") {
  const auto back = read_facts(sealed(version_3(some())).get());
  REQUIRE(back);
  CHECK(back->version == 3);
  CHECK(back->local_user.get() == "alice");
  CHECK(back->sftp_server.get() == "/usr/lib/openssh/sftp-server");
  CHECK(back->rules == some().rules);
  CHECK(back->forwarding == some().forwarding);
  CHECK(back->hang_up_ms == 10'000);
  CHECK(back->farewell_ms == 600);
  CHECK(back->kill_ms == 2'000);
  CHECK(back->sign_ms == 30'000);
}

TEST_CASE("facts whose version, size or values are not ours are refused", "[protocol][facts]") {
  const auto refused = [](const std::string& bytes) { return !read_facts(sealed(bytes).get()); };
  const auto changed = [](auto&& change) {
    auto f = some();
    change(f);
    return bytes_of(f);
  };
  CHECK_FALSE(refused(bytes_of(some())));
  CHECK(refused(changed([](auto& f) { f.version = 5; })));
  CHECK(refused(changed([](auto& f) { f.version = 3; })));               // with the size of version 4
  CHECK(refused(changed([](auto& f) { f.size = facts_version_3_size; })));
  CHECK(refused(bytes_of(some()).substr(0, facts_version_3_size)));      // version 4, cut
  CHECK(refused(version_3(some()) + std::string(8, '\0')));
  CHECK(refused(bytes_of(some()) + "x"));
  CHECK(refused(""));
  CHECK(refused(changed([](auto& f) { f.magic++; })));
  CHECK(refused(changed([](auto& f) { f.rules.command.length = 1025; })));
  CHECK(refused(changed([](auto& f) { f.rules.sftp = static_cast<ConnectionFacts::Rules::Sftp>(3); })));
  CHECK(refused(changed([](auto& f) { f.rules.no_pty = 2; })));
  CHECK(refused(changed([](auto& f) { f.rules.record_input = 9; })));
  CHECK(refused(changed([](auto& f) { f.forwarding.local = 2; })));
  CHECK(refused(changed([](auto& f) { f.forwarding.remote_targets.length = 4097; })));
  CHECK(refused(changed([](auto& f) { f.gateway_ports = 2; })));
  CHECK(refused(changed([](auto& f) { f.rules.idle_timeout_seconds = 0; })));
  CHECK(refused(changed([](auto& f) { f.rules.max_duration_seconds = 0; })));
  CHECK_FALSE(read_facts(sealed(bytes_of(some()), F_SEAL_SHRINK).get()));
}

TEST_CASE("rules are compared by what they say, not by what a longer text left behind", "[protocol][facts]") {
  ConnectionFacts::Rules a, b;
  REQUIRE(a.command.set("a much longer one"));
  REQUIRE(a.command.set("b"));
  REQUIRE(b.command.set("b"));
  CHECK(a == b);
  for (const auto& change : std::vector<void (*)(ConnectionFacts::Rules&)>{
           [](auto& r) { r.max_duration_seconds = 5; }, [](auto& r) { r.idle_timeout_seconds = 5; }, [](auto& r) { r.max_sessions = 5; },
           [](auto& r) { r.record_input = 1; }, [](auto& r) { r.no_pty = 1; }, [](auto& r) { r.sftp = ConnectionFacts::Rules::Sftp::read_only; },
           [](auto& r) { r.command.length = 0; }}) {
    auto other = b;
    change(other);
    CHECK_FALSE(other == b);
  }
}
