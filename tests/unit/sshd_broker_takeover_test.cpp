#include "catch.h"

#include "sshd/broker/takeover.h"
#include "temp_dir.h"

#include <boost/asio/io_context.hpp>

#include <sys/socket.h>
#include <sys/stat.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

using namespace postern;
using namespace postern::sshd::broker;

TEST_CASE("a takeover redirects these addresses' port and nothing else, and replaces what was there", "[broker][takeover]") {
  CHECK(Takeover::script({}) == "table inet postern_takeover\ndelete table inet postern_takeover\n");
  CHECK(Takeover::script({{*Endpoint::parse("100.64.0.1:22", 22), 22022}, {*Endpoint::parse("[fd7a::1]:22", 22), 22022}}) ==
        "table inet postern_takeover\ndelete table inet postern_takeover\ntable inet postern_takeover {\n  chain prerouting {\n"
        "    type nat hook prerouting priority dstnat; policy accept;\n"
        "    ip daddr 100.64.0.1 tcp dport 22 dnat ip to 100.64.0.1:22022\n"
        "    ip6 daddr fd7a::1 tcp dport 22 dnat ip6 to [fd7a::1]:22022\n  }\n}\n");
}

namespace {
/// A stand-in for nft that keeps what it is told, and for the kernel that it would tell.
struct Nft : TempDir {
  std::vector<std::string> kernel{"dnat, handle 2"};
  std::optional<Error> kernel_fails;
  Nft() { is("cat >" + file("told")); }
  void is(const std::string& command) const {
    std::ofstream{path / "nft"} << "#!/bin/sh\nexec " << command << "\n";
    ::chmod(file("nft").c_str(), 0700);
  }
  Takeover takeover(std::chrono::milliseconds timeout = std::chrono::seconds{5}) const { return Takeover{file("nft"), timeout, file("takeover"), [this] { return rules(); }}; }
  Expected<std::vector<std::string>> rules() const { return kernel_fails ? Expected<std::vector<std::string>>{Unexpected{*kernel_fails}} : kernel; }
  bool was_told() const { return std::filesystem::remove(path / "told"); }
};
const std::vector<Takeover::Redirect> one{{*Endpoint::parse("100.64.0.1:22", 22), 22022}};
}  // namespace

TEST_CASE("the table of a run that was killed goes when the next one takes nothing over", "[broker][takeover]") {
  const Nft nft;
  REQUIRE(nft.takeover().set(one));  // and no more is heard of it
  REQUIRE(nft.was_told());
  auto next = nft.takeover();
  CHECK(next.set({}));
  CHECK(nft.was_told());
  CHECK(next.set({}));
  CHECK_FALSE(nft.was_told());
  CHECK(nft.takeover().set({}));  // a machine without a table never has nft run
  CHECK_FALSE(nft.was_told());
}

TEST_CASE("a takeover that cannot be remembered is not begun", "[broker][takeover]") {
  const Nft nft;
  Takeover takeover{nft.file("nft"), std::chrono::seconds{5}, nft.file("nowhere/takeover")};
  CHECK_FALSE(takeover.set(one));
  CHECK_FALSE(nft.was_told());
}

TEST_CASE("an nft that takes too long is ended and named", "[broker][takeover]") {
  const Nft nft;
  nft.is("sleep 60");
  const auto set = nft.takeover(std::chrono::milliseconds{100}).set(one);
  REQUIRE_FALSE(set);
  CHECK(set.error().doing.find("did not end in 100 ms") != std::string::npos);
}

TEST_CASE("after an nft that was ended it is not known what stands: what stood before is set again", "[broker][takeover]") {
  const Nft nft;
  auto takeover = nft.takeover(std::chrono::seconds{2});
  REQUIRE(takeover.set(one));
  REQUIRE(nft.was_told());
  nft.is("sleep 60");
  CHECK_FALSE(takeover.set({}));
  nft.is("cat >" + nft.file("told"));
  CHECK(takeover.set(one));
  CHECK(nft.was_told());
}

TEST_CASE("an nft that is not there is named", "[broker][takeover]") {
  const Nft nft;
  Takeover takeover{"/nonexistent/nft", std::chrono::seconds{5}, nft.file("takeover")};
  CHECK(takeover.set({}));  // nothing to do
  const auto set = takeover.set(one);
  REQUIRE_FALSE(set);
  CHECK(set.error().doing.find("/nonexistent/nft") != std::string::npos);
}

TEST_CASE("a takeover that somebody else took away is noticed, and set again", "[broker][takeover]") {
  Nft nft;
  auto takeover = nft.takeover();
  const auto stands = [&] {
    const auto s = takeover.stands();
    return s && *s;
  };
  nft.kernel.clear();
  CHECK(stands());  // nothing was set, nothing is missed
  nft.kernel = {"dnat, handle 2"};
  REQUIRE(takeover.set(one));
  REQUIRE(nft.was_told());
  CHECK(stands());
  CHECK(takeover.set(one));
  CHECK_FALSE(nft.was_told());
  SECTION("flushed") { nft.kernel.clear(); }
  SECTION("changed, as a restored ruleset of another day is") { nft.kernel = {"dnat to another address, handle 2"}; }
  SECTION("with more in it") { nft.kernel.push_back("drop, handle 3"); }
  CHECK_FALSE(stands());
  nft.kernel = {"dnat, handle 7"};
  CHECK(takeover.set(one));
  CHECK(nft.was_told());
  CHECK(stands());
  REQUIRE(takeover.set({}));
  nft.kernel.clear();
  CHECK(stands());
}

TEST_CASE("a takeover that was taken away before it was looked at is noticed as well", "[broker][takeover]") {
  Nft nft;
  nft.kernel.clear();
  auto takeover = nft.takeover();
  REQUIRE(takeover.set(one));
  const auto stands = takeover.stands();
  REQUIRE(stands);
  CHECK_FALSE(*stands);
}

TEST_CASE("a kernel that does not tell of a takeover is no reason to set it again", "[broker][takeover]") {
  Nft nft;
  auto takeover = nft.takeover();
  REQUIRE(takeover.set(one));
  REQUIRE(nft.was_told());
  nft.kernel_fails = Error{EPERM, "ask"};
  CHECK_FALSE(takeover.stands());
  CHECK(takeover.set(one));
  CHECK_FALSE(nft.was_told());
}

TEST_CASE("many notices of nftables are one look, soon; the next look waits a little", "[broker][takeover]") {
  using namespace std::chrono_literals;
  boost::asio::io_context io;
  int ends[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
  const UniqueFd kernel{ends[1]};
  const auto notices = [&](int n) {
    for (int i = 0; i < n; i++) REQUIRE(::send(kernel.get(), "any", 3, 0) == 3);
  };
  int looks = 0;
  auto watch = std::make_unique<RulesetWatch>(io, UniqueFd{ends[0]}, [&] {
    looks++;
    io.stop();
  });
  const auto run = [&](std::chrono::milliseconds time) {
    io.restart();
    const auto begin = std::chrono::steady_clock::now();
    io.run_for(time);
    return std::chrono::steady_clock::now() - begin;
  };
  run(300ms);
  CHECK(looks == 0);
  notices(5);
  CHECK(run(10s) < 900ms);
  CHECK(looks == 1);
  notices(5);
  CHECK(run(10s) > 500ms);
  CHECK(looks == 2);
  run(1500ms);
  CHECK(looks == 2);
  notices(1);
  run(50ms);
  watch.reset();
  run(1500ms);
  CHECK(looks == 2);
}
