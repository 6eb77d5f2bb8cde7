#include "catch.h"

#include "sshd/broker/takeover.h"
#include "temp_dir.h"

#include <sys/stat.h>

#include <filesystem>
#include <fstream>

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
/// A stand-in for nft that keeps what it is told.
struct Nft : TempDir {
  Nft() { is("cat >" + file("told")); }
  void is(const std::string& command) const {
    std::ofstream{path / "nft"} << "#!/bin/sh\nexec " << command << "\n";
    ::chmod(file("nft").c_str(), 0700);
  }
  Takeover takeover(std::chrono::milliseconds timeout = std::chrono::seconds{5}) const { return Takeover{file("nft"), timeout, file("takeover")}; }
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
