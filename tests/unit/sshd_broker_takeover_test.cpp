#include "catch.h"

#include "sshd/broker/takeover.h"

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

TEST_CASE("an nft that is not there is named", "[broker][takeover]") {
  Takeover takeover{"/nonexistent/nft"};
  CHECK(takeover.set({}));  // nothing to do
  const auto set = takeover.set({{*Endpoint::parse("100.64.0.1:22", 22), 22022}});
  REQUIRE_FALSE(set);
  CHECK(set.error().doing.find("/nonexistent/nft") != std::string::npos);
}
