#include "catch.h"

#include "sshd/broker/penalties.h"

#include <string>

using namespace postern;
using namespace postern::sshd::broker;
using namespace std::chrono_literals;

namespace {
const Penalties::Clock::time_point start{1000s};
Address address(const char* text) { return Address::parse(text).value(); }
}  // namespace

TEST_CASE("who mistypes a name twice is not refused, who is denied four times at once is", "[broker][penalties]") {
  Penalties p{{}};
  CHECK_FALSE(p.add("a", Offence::auth_failed, start));
  CHECK_FALSE(p.add("a", Offence::auth_failed, start + 1s));
  CHECK_FALSE(p.refused("a", start + 1s));
  CHECK_FALSE(p.add("a", Offence::auth_failed, start + 2s));  // 15 s but for the 2 that have gone
  CHECK_FALSE(p.refused("a", start + 2s));
  const auto refused = p.add("a", Offence::auth_failed, start + 3s);
  REQUIRE(refused);
  CHECK(*refused == 17s);
  CHECK(p.refused("a", start + 3s));
  CHECK_FALSE(p.refused("b", start + 3s));
}

TEST_CASE("what was added runs down, and then the source may come again", "[broker][penalties]") {
  Penalties p{{}};
  for (int i = 0; i < 3; i++) p.add("a", Offence::auth_failed, start);
  CHECK(p.refused("a", start + 14s));  // refused until the end, also below the min by now
  CHECK_FALSE(p.refused("a", start + 15s));
  CHECK_FALSE(p.add("a", Offence::auth_failed, start + 15s));  // begins anew
  CHECK_FALSE(p.refused("a", start + 15s));
  CHECK(p.size() == 1);
}

TEST_CASE("a login forgives what its source did before it, and lifts no refusal", "[broker][penalties]") {
  Penalties p{{}};
  for (int i = 0; i < 100; i++) {
    CHECK_FALSE(p.add("a", Offence::no_auth, start));  // a look at the host keys before each login
    CHECK_FALSE(p.add("a", Offence::auth_failed, start));
    p.forgive("a");
  }
  CHECK(p.size() == 0);
  p.refuse("a", 60s, start);
  p.forgive("a");
  CHECK(p.refused("a", start + 59s));
  p.forgive("b");
  CHECK(p.size() == 1);
}

TEST_CASE("who fails slowly enough is never refused", "[broker][penalties]") {
  Penalties p{{}};
  for (int i = 0; i < 1000; i++) {
    CHECK_FALSE(p.add("a", Offence::auth_failed, start + i * 5s));
    CHECK_FALSE(p.add("scanner", Offence::no_auth, start + i * 1s));
  }
}

TEST_CASE("each offence has its own time, and no time is no penalty", "[broker][penalties]") {
  Penalties p{{.auth_failed = 0ms, .no_auth = 1s, .grace_exceeded = 10s, .min = 10s, .max = 60s, .sources = 10}};
  for (int i = 0; i < 100; i++) CHECK_FALSE(p.add("denied", Offence::auth_failed, start));
  CHECK(p.size() == 0);
  for (int i = 0; i < 9; i++) CHECK_FALSE(p.add("scanner", Offence::no_auth, start));
  CHECK(p.add("scanner", Offence::no_auth, start));
  CHECK(p.add("slow", Offence::grace_exceeded, start));
}

TEST_CASE("penalties add up to the max and no further", "[broker][penalties]") {
  Penalties p{{}};
  for (int i = 0; i < 10'000; i++) p.add("a", Offence::grace_exceeded, start);
  CHECK(p.refused("a", start + 599s));
  CHECK_FALSE(p.refused("a", start + 600s));
}

TEST_CASE("a crash is refused at once, and not for less than was due anyway", "[broker][penalties]") {
  Penalties p{{}};
  p.refuse("a", 1s, start);
  CHECK(p.refused("a", start));
  CHECK_FALSE(p.refused("a", start + 1s));
  p.refuse("b", 0ms, start);
  CHECK_FALSE(p.refused("b", start));
  p.refuse("c", 1h, start);
  p.refuse("c", 1s, start);
  p.add("c", Offence::no_auth, start);
  CHECK(p.refused("c", start + 59min));
  CHECK_FALSE(p.refused("c", start + 61min));
}

TEST_CASE("the table of penalties has its size, whoever comes", "[broker][penalties]") {
  Penalties p{{.sources = 100}};
  for (int i = 0; i < 3; i++) p.add("long", Offence::auth_failed, start + 1s);
  for (int i = 0; i < 100'000; i++) p.add("stranger " + std::to_string(i), Offence::no_auth, start + 1s);
  CHECK(p.size() == 100);
  CHECK(p.refused("long", start + 2s));  // nearest its end goes first
  p.add("later", Offence::no_auth, start + 1h);
  CHECK(p.size() == 1);
  Penalties none{{.sources = 0}};
  for (int i = 0; i < 10; i++) none.add("a", Offence::grace_exceeded, start);
  none.refuse("a", 1h, start);
  CHECK_FALSE(none.refused("a", start));
}

TEST_CASE("a node counts once for all its addresses, a stranger by address, of IPv6 by its /64", "[broker][penalties]") {
  Node node;
  node.id = "n1";
  node.addresses = {address("100.64.0.1"), address("fd7a::1")};
  CHECK(source_of(&node, node.addresses[0]) == source_of(&node, node.addresses[1]));
  CHECK(source_of(nullptr, address("192.0.2.1")) != source_of(nullptr, address("192.0.2.2")));
  CHECK(source_of(nullptr, address("2001:db8:1:2::1")) == source_of(nullptr, address("2001:db8:1:2:ffff::1")));
  CHECK(source_of(nullptr, address("2001:db8:1:2::1")) != source_of(nullptr, address("2001:db8:1:3::1")));
  CHECK(source_of(nullptr, address("2001:db8:1:2::1")) == "2001:0db8:0001:0002::/64");
  node.id = "192.0.2.1";
  CHECK(source_of(&node, address("192.0.2.1")) != source_of(nullptr, address("192.0.2.1")));
}

TEST_CASE("lines that a stranger causes are limited, and what was left out is counted", "[broker][penalties]") {
  LogLimit limit{3, 1};
  for (int i = 0; i < 3; i++) CHECK(limit.pass(start) == 0u);
  for (int i = 0; i < 5; i++) CHECK_FALSE(limit.pass(start));
  CHECK(limit.pass(start + 1s) == 5u);
  CHECK_FALSE(limit.pass(start + 1s));
  CHECK(limit.pass(start + 1h) == 1u);
}
