#include "catch.h"
#include "sshd/protocol/forward_targets.h"

using namespace postern;
using namespace postern::sshd;

namespace {
using Lists = std::vector<std::vector<std::string>>;

ForwardTargets targets(const Lists& lists) {
  const auto t = ForwardTargets::decode(ForwardTargets::encode(lists));
  REQUIRE(t);
  return *t;
}
Address at(const char* text) { return *Address::parse(text); }
}  // namespace

TEST_CASE("without a list every target is allowed, with an empty one none", "[protocol][forward_targets]") {
  CHECK_FALSE(targets({}).limited());
  CHECK(targets({}).allows("db", at("10.0.0.1"), 1));
  CHECK(targets({}).allows_socket("/run/x"));
  CHECK(targets({}).may_allow_sockets());
  CHECK(targets({{}}).limited());
  CHECK_FALSE(targets({{}}).may_allow("db", 1));
  CHECK_FALSE(targets({{}}).allows("127.0.0.1", at("127.0.0.1"), 22));
  CHECK_FALSE(targets({{}}).allows_socket("/run/x"));
  CHECK_FALSE(targets({{}}).may_allow_sockets());
}

TEST_CASE("a name matches what the client wrote, whatever its address", "[protocol][forward_targets]") {
  const auto t = targets({{"db.example.com:5432"}});
  CHECK(t.allows("db.example.com", at("10.0.0.1"), 5432));
  CHECK(t.allows("DB.Example.COM.", at("fd7a::1"), 5432));
  CHECK_FALSE(t.allows("10.0.0.1", at("10.0.0.1"), 5432));
  CHECK_FALSE(t.allows("db.example.com", at("10.0.0.1"), 5433));
  CHECK_FALSE(t.allows("b.example.com", at("10.0.0.1"), 5432));
  CHECK_FALSE(t.may_allow("other", 5432));
}

TEST_CASE("an address or prefix matches what is connected to, whatever the client wrote", "[protocol][forward_targets]") {
  const auto t = targets({{"10.0.0.0/8:*", "[fd7a::/48]:8000-8999"}});
  CHECK(t.allows("db", at("10.200.0.1"), 1));
  CHECK(t.allows("db", at("::ffff:10.0.0.1"), 65535));
  CHECK_FALSE(t.allows("10.0.0.1", at("11.0.0.1"), 1));
  CHECK(t.allows("x", at("fd7a::9"), 8000));
  CHECK(t.allows("x", at("fd7a::9"), 8999));
  CHECK_FALSE(t.allows("x", at("fd7a::9"), 7999));
  CHECK_FALSE(t.allows("x", at("fd7a:0:1::9"), 8000));
  CHECK(t.may_allow("any-name", 9000));  // it may have an address in 10.0.0.0/8
  CHECK_FALSE(t.may_allow("192.0.2.1", 9000));
  CHECK_FALSE(targets({{"10.0.0.1:22"}}).may_allow("any-name", 23));
}

TEST_CASE("a target stands in every list or it is not allowed", "[protocol][forward_targets]") {
  const auto t = targets({{"*:22", "*:80"}, {"10.0.0.0/8:*"}, {"a:*", "b:*"}});
  CHECK(t.allows("a", at("10.0.0.1"), 22));
  CHECK_FALSE(t.allows("c", at("10.0.0.1"), 22));
  CHECK_FALSE(t.allows("a", at("11.0.0.1"), 22));
  CHECK_FALSE(t.allows("a", at("10.0.0.1"), 23));
  CHECK_FALSE(targets({{"*:*"}, {}}).allows("a", at("10.0.0.1"), 22));
}

TEST_CASE("sockets are matched by their path, a star within one folder", "[protocol][forward_targets]") {
  const auto t = targets({{"unix:/run/app/*.sock", "*:*"}});
  CHECK(t.allows_socket("/run/app/a.sock"));
  CHECK_FALSE(t.allows_socket("/run/app/x/a.sock"));
  CHECK_FALSE(t.allows_socket("/run/app/../docker.sock"));
  CHECK_FALSE(t.allows_socket("/run/docker.sock"));
  CHECK_FALSE(targets({{"*:*"}}).may_allow_sockets());
  CHECK_FALSE(targets({{"unix:/run/x"}}).may_allow("x", 1));
}

TEST_CASE("what is no list of targets is refused whole", "[protocol][forward_targets]") {
  for (const std::string text : {"a:1\n", "a:1", "a:1\f", "a\n\f", ":1\n\f", "a:0\n\f", "a:9-1\n\f", "a:70000\n\f", "unix:run\n\f", "\n\f", "\f\f\n"}) {
    CAPTURE(text);
    CHECK_FALSE(ForwardTargets::decode(text));
  }
  CHECK(ForwardTargets::decode("\f\f"));
}
