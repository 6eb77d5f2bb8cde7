#include "auth/policy/policy.h"
#include "catch.h"

#include <nlohmann/json.hpp>

#include <random>

using namespace postern;
using namespace postern::auth::policy;
using nlohmann::json;

namespace {

Node user_node(std::string name, std::string address, std::string login) {
  return Node{.id = "n-" + name, .name = name, .addresses = {*Address::parse(address)}, .login = std::move(login), .tags = {}};
}
Node tagged_node(std::string name, std::string address, std::vector<std::string> tags) {
  return Node{.id = "n-" + name, .name = name, .addresses = {*Address::parse(address)}, .login = {}, .tags = std::move(tags)};
}

Network small_network() {
  Network n{{
      user_node("a1", "100.64.0.1", "ann@example.com"),
      user_node("a2", "100.64.0.2", "ann@example.com"),
      user_node("b1", "100.64.0.3", "bea@example.org"),
      user_node("r1", "100.64.0.4", "root@example.com"),
      tagged_node("s1", "100.64.0.10", {"tag:s"}),
      tagged_node("t1", "100.64.0.11", {"tag:s", "tag:t"}),
      tagged_node("u1", "100.64.0.12", {"tag:u"}),
  }};
  n.nodes[1].addresses.push_back(*Address::parse("fd7a::2"));
  n.nodes[4].addresses.push_back(*Address::parse("fd7a::10"));
  n.nodes[0].attributes = {{"node:os", "macos"}};
  n.nodes[6].attributes = {{"node:os", "linux"}};
  return n;
}
const Network network = small_network();

const Node& node(const std::string& name) {
  for (const auto& n : network.nodes)
    if (n.name == name) return n;
  throw std::runtime_error{name};
}

/// Random policies that load, of the words that the network knows.
class Generator {
 public:
  explicit Generator(unsigned seed) : random_{seed} {}

  std::string policy() {
    json p = {{"groups", {{"group:g", {"ann@example.com", "bea@example.org"}}}},
              {"tagOwners", {{"tag:s", json::array()}, {"tag:t", json::array()}, {"tag:u", json::array()}}},
              {"postures", {{"posture:mac", {"node:os == 'macos'"}}, {"posture:os", {"node:os IS SET"}}}},
              {"ssh", json::array()}};
    if (below(8) != 0) {
      p["grants"] = json::array();
      for (unsigned i = below(4); i > 0; i--) p["grants"].push_back(grant());
    }
    if (below(3) == 0) p["acls"] = json::array({{{"action", "accept"}, {"src", some(network_words)}, {"dst", {one(network_words) + ":" + one({"22", "*", "80", "1-100"})}}}});
    for (unsigned i = 1 + below(8); i > 0; i--) p["ssh"].push_back(rule());
    return p.dump(1);
  }

 private:
  unsigned below(unsigned n) { return static_cast<unsigned>(random_() % n); }
  std::string one(const std::vector<std::string>& words) { return words[below(static_cast<unsigned>(words.size()))]; }
  json some(const std::vector<std::string>& words) {
    json out = json::array();
    for (unsigned i = 1 + below(2); i > 0; i--) out.push_back(one(words));
    return out;
  }
  void posture(json& r) {
    if (below(4) == 0) r["srcPosture"] = some({"posture:mac", "posture:os"});
  }
  json grant() {
    json g = {{"src", some(network_words)}, {"dst", some(network_words)}, {"ip", some({"*", "22", "tcp:22", "udp:22", "80", "tcp:1-1000"})}};
    if (below(6) == 0) g["via"] = {"tag:u"};
    posture(g);
    return g;
  }
  json rule() {
    const bool check = below(3) == 0, tags = !check && below(3) == 0;
    json r = {{"action", check ? "check" : "accept"},
              {"src", some(tags ? std::vector<std::string>{"tag:s", "tag:t", "autogroup:tagged", "ann@example.com"} : std::vector<std::string>{"ann@example.com", "group:g", "autogroup:member", "user:*@example.com"})},
              {"dst", some(tags ? std::vector<std::string>{"tag:s", "tag:u", "autogroup:tagged"} : std::vector<std::string>{"tag:s", "tag:t", "autogroup:self", "autogroup:member", "autogroup:tagged"})},
              {"users", some({"root", "ann", "toor", "autogroup:nonroot", "localpart:*@example.com", "localpart:*@example.org", "group:x"})}};
    if (below(5) == 0) r["acceptEnv"] = {"A"};
    posture(r);
    return r;
  }

  const std::vector<std::string> network_words{"*", "ann@example.com", "group:g", "tag:s", "tag:u", "autogroup:member", "autogroup:tagged", "100.64.0.0/30", "100.64.0.11", "fd7a::/64", "100.64.0.1-100.64.0.10", "user:*@example.org"};
  std::mt19937 random_;
};

}  // namespace

TEST_CASE("explain names the rule that decide takes, whatever the policy", "[auth][policy][explain]") {
  std::size_t policies = 0, allowed = 0, by_network = 0;
  for (unsigned seed = 1; seed <= 400; seed++) {
    const std::string text = Generator{seed}.policy();
    const auto policy = Policy::load(text, "p");
    if (!policy) {
      INFO(text);
      FAIL(policy.error().front().text());
    }
    policies++;
    for (const Node& source : network.nodes) {
      for (const Node& destination : network.nodes) {
        for (const std::string_view user : {"root", "ann", "bea", "toor", "zoe", "0"}) {
          for (const std::optional<std::uint32_t> uid : {std::optional<std::uint32_t>{}, std::optional<std::uint32_t>{0}, std::optional<std::uint32_t>{1000}}) {
            const Question question{source, source.addresses.back(), destination, user, uid};
            const auto alone = policy->decide(network, question, false);
            const auto told = policy->explain(network, question, false);
            const auto it = std::find_if(told.rules.begin(), told.rules.end(), [](const RuleTrace& r) { return r.decides; });
            INFO("seed " << seed << ": " << source.name << " -> " << destination.name << " as " << user << "\n" << text);
            REQUIRE((alone.outcome != Outcome::deny) == (it != told.rules.end()));
            if (it != told.rules.end()) {
              REQUIRE(it->rule.text() == alone.rule.text());
              REQUIRE(it->action == alone.outcome);
              REQUIRE((it->src && it->dst && it->user && it->posture));
              allowed++;
            }
            const auto both = policy->decide(network, question, true);
            REQUIRE((both.outcome != Outcome::deny) == (alone.outcome != Outcome::deny && told.network_open));
            by_network += alone.outcome != Outcome::deny && both.outcome == Outcome::deny;
          }
        }
      }
    }
  }
  CHECK(policies == 400);
  CHECK(allowed > 10'000);
  CHECK(by_network > 1'000);
}

TEST_CASE("explain says of each rule why it did or did not match, in the order of evaluation", "[auth][policy][explain]") {
  const auto policy = Policy::load(R"({"groups": {"group:g": ["ann@example.com"]}, "tagOwners": {"tag:s": [], "tag:u": []}, "postures": {"posture:mac": ["node:os == 'macos'"]},
 "grants": [{"src": ["group:g"], "dst": ["tag:s"], "ip": ["tcp:22"]}],
 "ssh": [
  {"action": "accept", "src": ["group:g"], "dst": ["tag:s"], "users": ["ubuntu"]},
  {"action": "accept", "src": ["bea@example.org", "group:g"], "dst": ["tag:s"], "users": ["autogroup:nonroot"]},
  {"action": "check", "src": ["group:g"], "dst": ["tag:u"], "users": ["root"], "srcPosture": ["posture:mac"]},
  {"action": "accept", "src": ["group:g"], "dst": ["tag:s"], "users": ["zoe"]},
 ]})",
                                   "p");
  REQUIRE(policy);
  const auto told = policy->explain(network, {node("a2"), node("a2").addresses[0], node("s1"), "zoe", 1000});
  REQUIRE(told.rules.size() == 4);
  CHECK(told.rules[0].field == "ssh[2]");  // check comes first
  CHECK(told.rules[0].why == "dst does not name s1 (tag:s); users do not allow \"zoe\"; the device does not meet posture:mac");
  CHECK(told.rules[1].why == "users do not allow \"zoe\"");
  CHECK(told.rules[2].why == "src \"group:g\", dst \"tag:s\", user \"autogroup:nonroot\"");
  CHECK(told.rules[2].decides);
  CHECK(told.rules[2].rule.text() == "p:5:3");
  CHECK(told.rules[3].why == "src \"group:g\", dst \"tag:s\", user \"zoe\"; an earlier rule has decided");
  CHECK_FALSE(told.rules[3].decides);
  CHECK(told.network_open);
  CHECK(told.network_rule.text() == "p:2:13");
  CHECK(told.network_why == "grants[0] opens port 22: src \"group:g\", dst \"tag:s\"");
  const auto toor = policy->explain(network, {node("a2"), node("a2").addresses[0], node("s1"), "toor", 0});
  CHECK(toor.rules[2].why == "users do not allow \"toor\" (uid 0: only a rule that writes this name out does)");
  CHECK(policy->explain(network, {node("b1"), node("b1").addresses[0], node("s1"), "zoe", 1000}).network_why ==
        "no acl or grant opens port 22 from b1 (bea@example.org) to s1 (tag:s)");
}

TEST_CASE("an app grant's limits reach the sessions between its sources and destinations, and narrow each other", "[auth][policy][explain]") {
  const auto load = [](const std::string& grants, const std::string& capability) {
    LoadOptions options;
    options.session_capability = capability;
    auto policy = Policy::load(R"({"tagOwners": {"tag:s": [], "tag:u": []}, "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}, )" + grants +
                                   R"(], "ssh": [{"action": "accept", "src": ["autogroup:member"], "dst": ["tag:s", "tag:u"], "users": ["root"]}]})",
                               "p", options);
    if (!policy) FAIL(policy.error().front().text());
    return std::move(*policy);
  };
  const std::string grants = R"({"src": ["ann@example.com"], "dst": ["tag:s"], "app": {"postern.internal/cap/ssh": [{"sftp": "read-only", "maxDuration": "8h"}]}},
    {"src": ["*"], "dst": ["tag:s"], "app": {"postern.internal/cap/ssh": [{"maxDuration": "1h"}, {"pty": false}], "example.com/cap/other": [{}]}})";
  const auto policy = load(grants, "postern.internal/cap/ssh");
  const auto rules = [](const Policy& p, const std::string& from, const std::string& to) {
    return p.decide(network, {node(from), node(from).addresses[0], node(to), "root", std::nullopt}).session_rules;
  };
  CHECK(rules(policy, "a1", "s1").sftp == SessionRules::Sftp::read_only);
  CHECK(rules(policy, "a1", "s1").max_duration == std::optional<std::chrono::seconds>{std::chrono::hours{1}});
  CHECK_FALSE(rules(policy, "a1", "s1").pty);
  CHECK(rules(policy, "b1", "s1").sftp == SessionRules::Sftp::full);
  CHECK(rules(policy, "b1", "s1").max_duration == std::optional<std::chrono::seconds>{std::chrono::hours{1}});
  CHECK(rules(policy, "a1", "u1") == SessionRules{});
  CHECK(rules(load(grants, "other.example/cap/x"), "a1", "s1") == SessionRules{});
  // They only narrow: a posture that is not met, or another address of the same node, does not shake them off; and one for people whom
  // nobody can tell is refused.
  const auto strict = Policy::load(R"({"tagOwners": {"tag:s": []}, "postures": {"posture:x": ["custom:x == true"]}, "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]},
    {"src": ["ann@example.com"], "dst": ["tag:s"], "srcPosture": ["posture:x"], "app": {"postern.internal/cap/ssh": [{"pty": false}]}},
    {"src": ["100.64.0.3"], "dst": ["100.64.0.10"], "app": {"postern.internal/cap/ssh": [{"sftp": "none"}]}}],
    "ssh": [{"action": "accept", "src": ["autogroup:member"], "dst": ["tag:s"], "users": ["root"]}]})", "p");
  REQUIRE(strict);
  CHECK_FALSE(rules(*strict, "a1", "s1").pty);
  Node two = node("b1");
  two.addresses.push_back(*Address::parse("fd7a::3"));
  CHECK(strict->decide(network, {two, two.addresses[1], node("s1"), "root", std::nullopt}).session_rules.sftp == SessionRules::Sftp::none);
  for (const std::string who : {"group:x@example.com", "autogroup:admin"}) {
    const auto vain = Policy::load(R"({"grants": [{"src": [")" + who + R"("], "dst": ["*"], "app": {"postern.internal/cap/ssh": [{"pty": false}]}}]})", "p");
    REQUIRE_FALSE(vain);
    CHECK(vain.error().front().message.find("would hold for nobody") != std::string::npos);
  }
  const auto bad = Policy::load("{\"grants\": [{\"src\": [\"*\"], \"dst\": [\"*\"],\n \"app\": {\"postern.internal/cap/ssh\": [{\"sftpp\": 1}]}}]}", "p");
  REQUIRE_FALSE(bad);
  CHECK(bad.error().front().place.line == 2);
}
