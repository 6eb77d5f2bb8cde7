#include "catch.h"

#include "sshd/broker/config.h"

using namespace postern;
using namespace postern::sshd::broker;
using namespace std::chrono_literals;

namespace {
std::vector<std::string> problems_of(std::string_view text) {
  std::vector<std::string> out;
  const auto parsed = parse_config(text, "p.toml");
  if (!parsed)
    for (const auto& p : parsed.error()) out.push_back(p.text());
  return out;
}
const std::string listen = "[listen]\naddresses = [\"127.0.0.2:2222\", \"[::1]\"]\n";
}  // namespace

TEST_CASE("the addresses to listen on are all that must be set", "[broker][config]") {
  const auto c = parse_config(listen, "p.toml");
  REQUIRE(c);
  REQUIRE(c->listen.addresses.size() == 2);
  CHECK(c->listen.addresses[0].text() == "127.0.0.2:2222");
  CHECK(c->listen.addresses[1].text() == "[::1]:22");
  CHECK(c->limits.login_grace_time == 30s);
  CHECK(c->policy.require_network_rule);
}

TEST_CASE("every problem of the settings is named at once with its line and column", "[broker][config]") {
  const auto p = problems_of("[listen]\naddresses = [\"localhost:22\"]\n[limits]\nlogin_grace_time = 30\nauth_attempts = 0\n[limit]\nx = 1\n[log]\nlevel = \"loud\"\n");
  REQUIRE(p.size() == 5);
  CHECK(p[0].find("p.toml:2:14: listen.addresses[0]: must be address:port") == 0);
  CHECK(p[1].find("p.toml:4:20: limits.login_grace_time: must be a duration") == 0);
  CHECK(p[2].find("p.toml:5:17: limits.auth_attempts: must be a whole number from 1 to 100") == 0);
  CHECK(p[3].find("p.toml:6:") == 0);
  CHECK(p[3].find("is not a setting") != std::string::npos);
  CHECK(p[4].find("p.toml:9:9: log.level: is not a value") == 0);
}

TEST_CASE("a misspelt key is refused, not ignored", "[broker][config]") {
  const auto p = problems_of(listen + "[policy]\nrequire_network_rules = false\n");
  REQUIRE(p.size() == 1);
  CHECK(p[0].find("policy.require_network_rules: is not a setting") != std::string::npos);
}

TEST_CASE("settings that are not TOML name the place", "[broker][config]") {
  const auto p = problems_of("[listen\naddresses = 1\n");
  REQUIRE(p.size() == 1);
  CHECK(p[0].find("p.toml:1:") == 0);
}

TEST_CASE("a number where a string belongs is refused", "[broker][config]") {
  CHECK(problems_of(listen + "[relay]\nsocket = 5\n").size() == 1);
  CHECK(problems_of(listen + "[relay]\nsocket = \"relative\"\n").size() == 1);
  CHECK(problems_of(listen + "[relay]\nsocket = \"/" + std::string(108, 'x') + "\"\n").size() == 1);
  CHECK(problems_of(listen + "[ssh]\nversion_string = \"a b\"\n").size() == 1);
}

TEST_CASE("durations are a number and a unit", "[broker][config]") {
  CHECK(parse_duration("250ms") == 250ms);
  CHECK(parse_duration("10s") == 10s);
  CHECK(parse_duration("5m") == 5min);
  CHECK(parse_duration("2h") == 2h);
  for (const char* bad : {"", "10", "s", "-1s", "1 s", "1.5s", "10S", "99999999999999999s"}) CHECK_FALSE(parse_duration(bad));
}
