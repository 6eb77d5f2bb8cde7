#include "auth/policy/policy.h"
#include "catch.h"

using namespace postern;
using namespace postern::auth::policy;

namespace {

std::vector<std::string> problems_of(std::string_view text) {
  const auto policy = Policy::load(text, "p");
  std::vector<std::string> out;
  if (policy) return out;
  CHECK_FALSE(policy.error().empty());
  for (const auto& p : policy.error()) out.push_back(p.place.text() + ": " + (p.field.empty() ? "" : p.field + ": ") + p.message);
  return out;
}

using Lines = std::vector<std::string>;

const std::string head =
    R"({"groups": {"group:eng": ["alice@example.com"]}, "hosts": {"srv": "100.64.0.16"}, "tagOwners": {"tag:server": ["group:eng"], "tag:recorder": []},
)";

/// The problem of one ssh rule whose members are `rule`, without the place.
std::string ssh_problem(const std::string& rule) {
  const auto all = problems_of(head + "\"ssh\": [{" + rule + "}]}");
  if (all.empty()) return "";
  return all.front().substr(all.front().find(": ") + 2);
}

std::string network_problem(const std::string& members) {
  const auto all = problems_of(head + members + "}");
  if (all.empty()) return "";
  return all.front().substr(all.front().find(": ") + 2);
}

/// Such a rule with one member replaced or added.
std::string rule_with(const std::string& name, const std::string& value) {
  std::string out;
  for (const auto& [n, v] : std::vector<std::pair<std::string, std::string>>{
           {"action", "\"accept\""}, {"src", "[\"group:eng\"]"}, {"dst", "[\"tag:server\"]"}, {"users", "[\"root\"]"}})
    if (n != name) out += "\"" + n + "\": " + v + ", ";
  return value.empty() ? out : out + "\"" + name + "\": " + value;
}

}  // namespace

TEST_CASE("an empty policy loads and a policy that is no object does not", "[auth][policy][load]") {
  CHECK(problems_of("{}").empty());
  CHECK(problems_of("{\"ssh\": null, \"groups\": null, \"acls\": [], \"tests\": [], \"postures\": {}}").empty());
  CHECK(problems_of("[]") == Lines{"p:1:1: must be an object, not an array"});
  CHECK(problems_of("{\"ssh\": {}}") == Lines{"p:1:9: ssh: must be an array, not an object"});
  CHECK(problems_of("{\"ssh\": [3]}") == Lines{"p:1:10: ssh[0]: must be an object, not a number"});
}

TEST_CASE("an unknown member is refused at its line and column", "[auth][policy][load]") {
  CHECK(problems_of("{\n  // c\n  \"sshh\": []\n}") == Lines{"p:3:3: sshh: unknown member \"sshh\""});
  const auto policy = Policy::load("{\n\"shh\": []}", "p");
  REQUIRE_FALSE(policy);
  CHECK(policy.error()[0].text() == "p:2:1: shh: unknown member \"shh\" (did you mean \"ssh\"?)");
  CHECK(problems_of("{\"ssh\": [{\"action\": \"accept\", \"users\": [\"root\"],\n   \"sourceip\": [\"1.2.3.4\"]}]}") ==
        Lines{"p:2:4: ssh[0].sourceip: unknown member \"sourceip\""});
  CHECK(network_problem(R"("grants": [{"ip": ["*"], "ports": []}])") == "grants[0].ports: unknown member \"ports\"");
}

TEST_CASE("all problems are told at once, in the order of the file", "[auth][policy][load]") {
  CHECK(problems_of("{\n\"ssh\": [\n {\"action\": \"deny\", \"users\": [\"*\"], \"check\": 1}\n],\n\"groups\": {\"group:a\": [\"group:b\"]}, \"ssh\": []\n}") ==
        Lines{"p:3:13: ssh[0].action: \"deny\" is not a valid action", "p:3:31: ssh[0].users[0]: user \"*\" is not valid",
              "p:3:37: ssh[0].check: unknown member \"check\"", "p:5:24: groups[\"group:a\"]: \"group:b\": group members cannot be recursive",
              "p:5:37: the name \"ssh\" appears twice in this object"});
}

TEST_CASE("a flood of problems is cut with a count", "[auth][policy][load]") {
  std::string text = "{\"ssh\": [";
  for (int i = 0; i < 1000; i++) text += "1,";
  const auto all = problems_of(text + "]}");
  CHECK(all.size() == 201);
  CHECK(all.back().find("800 more problems") != std::string::npos);
}

TEST_CASE("ssh rules are refused with the sentences of the real service", "[auth][policy][load]") {
  for (const std::string verb : {"deny", "Accept", "ACCEPT", "reject"})
    CHECK(ssh_problem(rule_with("action", "\"" + verb + "\"")) == "ssh[0].action: \"" + verb + "\" is not a valid action");
  CHECK(ssh_problem(rule_with("action", "\" accept\\t\"")).empty());
  for (const std::string none : {"\"\"", "\"  \"", "null", ""}) CHECK(ssh_problem(rule_with("action", none)) == "ssh[0].action: action must be specified");
  for (const std::string none : {"[]", "null", ""}) CHECK(ssh_problem(rule_with("users", none)) == "ssh[0].users: users must be specified");
  CHECK(ssh_problem(rule_with("users", "[\"root\", \"\"]")) == "ssh[0].users[1]: user \"\" is not valid");
  CHECK(ssh_problem(rule_with("users", "[\"root\", \"*\"]")) == "ssh[0].users[1]: user \"*\" is not valid");
  CHECK(ssh_problem(rule_with("users", "\"root\"")) == "ssh[0].users: must be an array of strings, not a string");
  CHECK(ssh_problem(rule_with("users", "[0]")) == "ssh[0].users[0]: must be a string, not a number");
  CHECK(ssh_problem(rule_with("acceptEnv", "[\"A\", \"\"]")) == "ssh[0].acceptEnv[1]: acceptEnv values cannot be empty");
  for (const std::string fine : {"null", "[]", "[\"**\"]"}) CHECK(ssh_problem(rule_with("acceptEnv", fine)).empty());
  std::string many;
  for (std::size_t i = 0; i < most_accept_env; i++) many += "\"A" + std::to_string(i) + "\",";
  CHECK(ssh_problem(rule_with("acceptEnv", "[" + many + "]")).empty());
  CHECK(ssh_problem(rule_with("acceptEnv", "[" + many + "\"B\", \"C\"]")) == "ssh[0].acceptEnv[64]: too many acceptEnv values");
  CHECK(ssh_problem(rule_with("acceptEnv", "[\"" + std::string(129, 'A') + "\"]")) == "ssh[0].acceptEnv[0]: an acceptEnv value is too long");
  for (const std::string dst : {"srv", "*", "100.64.0.16", "100.64.0.0/24", "group:eng", "autogroup:nonroot", "autogroup:internet", "", "server:22"})
    CHECK(ssh_problem(rule_with("dst", "[\"" + dst + "\"]")) == "ssh[0].dst[0]: invalid dst \"" + dst + "\"");
  for (const std::string src : {"srv", "*", "100.64.0.16", "autogroup:self", "autogroup:nonroot", "", "alice", "@x", "a@b@c", "al ice@x"})
    CHECK(ssh_problem(rule_with("src", "[\"" + src + "\"]")) == "ssh[0].src[0]: [ssh] \"" + src + "\" is not allowed in src");
  CHECK(ssh_problem(rule_with("dst", "[\"tag:server:22\"]")) == "ssh[0].dst[0]: tag not found: \"tag:server:22\"");
  CHECK(ssh_problem(rule_with("src", "[\"tag:none\"]")) == "ssh[0].src[0]: tag not found: \"tag:none\"");
  CHECK(ssh_problem(rule_with("src", "[\"group:none\"]")) == "ssh[0].src[0]: group not found: \"group:none\"");
  for (const std::string fine : {"[]", "null", ""}) {
    CHECK(ssh_problem(rule_with("src", fine)).empty());
    CHECK(ssh_problem(rule_with("dst", fine)).empty());
  }
  for (const std::string fine :
       {"group:foo", "tag:foo", "autogroup:member", "autogroup:self", "localpart:", "localpart:foo", "localpart:*@", "\\troot", "\xd9\x85"})
    CHECK(ssh_problem(rule_with("users", "[\"" + fine + "\"]")).empty());
}

TEST_CASE("sources and destinations that cannot stand together are refused", "[auth][policy][load]") {
  const auto pair = [](const std::string& src, const std::string& dst) {
    return ssh_problem("\"action\": \"accept\", \"users\": [\"root\"], \"src\": [" + src + "], \"dst\": [" + dst + "]");
  };
  CHECK(pair(R"("alice@example.com")", R"("alice@example.com")").empty());
  CHECK(pair(R"("bob@example.com")", R"("alice@example.com")") == "ssh[0].dst: users in dst are only allowed from the same user");
  CHECK(pair(R"("group:eng")", R"("alice@example.com")") == "ssh[0].dst: users in dst are only allowed from the same user");
  CHECK(pair(R"("autogroup:member")", R"("alice@example.com")") == "ssh[0].dst: users in dst are only allowed from the same user");
  CHECK(pair(R"("tag:server")", R"("alice@example.com")") == "ssh[0].dst: users in dst are only allowed from the same user");
  CHECK(pair(R"("tag:server")", R"("autogroup:self")") ==
        "ssh[0].dst: autogroup:self destination requires source to contain only users or groups, not tags or autogroup:tagged");
  CHECK(pair(R"("autogroup:tagged")", R"("autogroup:member")") == "ssh[0].dst: tags in SSH source cannot access autogroup:member (user-owned devices)");
  CHECK(pair(R"("autogroup:tagged", "tag:server")", R"("tag:server", "autogroup:tagged")").empty());
  CHECK(pair(R"("group:eng", "autogroup:member")", R"("autogroup:self", "autogroup:member")").empty());
}

TEST_CASE("groups, hosts and tags are checked for form", "[auth][policy][load]") {
  CHECK(problems_of(R"({"groups": {"group:b": ["group:a"], "group:a": []}})") ==
        Lines{"p:1:25: groups[\"group:b\"]: \"group:a\": group members cannot be recursive"});
  CHECK(problems_of(R"({"groups": {"eng": []}})") == Lines{"p:1:13: groups[\"eng\"]: group names must start with 'group:'"});
  CHECK(problems_of(R"({"groups": {"group:a": ["alice"]}})") == Lines{"p:1:25: groups[\"group:a\"]: \"alice\": group members must be users"});
  CHECK(problems_of(R"({"groups": {"group:a": ["tag:x"]}})").size() == 1);
  CHECK(problems_of(R"({"groups": {"group:a": ["*@example.com"]}})").size() == 1);
  CHECK(problems_of("{\"tagOwners\": {\"tag:\xc3\xa9\": []}}") ==
        Lines{"p:1:16: tagOwners[\"tag:\xc3\xa9\"]: tag names must start with a letter, after 'tag:'"});
  CHECK(problems_of(R"({"tagOwners": {"server": []}})").size() == 1);
  CHECK(problems_of(R"({"tagOwners": {"tag:a_b": []}})").size() == 1);
  CHECK(problems_of(R"({"tagOwners": {"tag:a": ["tag:b", "group:x", "bob"]}})").size() == 3);
  CHECK(problems_of(R"({"tagOwners": {"tag:a": ["tag:a", "autogroup:admin", "x@y"], "tag:b": null}})").empty());
  CHECK(problems_of(R"({"hosts": {"srv": "100.64.0.300"}})") == Lines{"p:1:19: hosts[\"srv\"]: \"100.64.0.300\" is not an IP address or prefix"});
  CHECK(problems_of(R"({"hosts": {"a:b": "1.1.1.1", "x@y": "1.1.1.1", "1.1.1.1": "1.1.1.1", "n": 5}})").size() == 4);
}

TEST_CASE("network rules are checked for form", "[auth][policy][load]") {
  const auto acl = [](const std::string& dst, const std::string& more = "") {
    return network_problem("\"acls\": [{\"action\": \"accept\", \"src\": [\"*\"], \"dst\": [\"" + dst + "\"]" + more + "}]");
  };
  for (const std::string fine : {"*:*", "tag:server:22", "srv:1-1024,22", "group:eng:*", "10.0.0.0/8:22", "fd7a::1:22", "[fd7a::1]:22", "autogroup:self:*",
                                 "autogroup:internet:*", "alice@example.com:22"})
    CHECK(acl(fine).empty());
  for (const std::string bad : {"tag:server", "srv", "*", "*:", "*:0", "*:65536", "*:9-1", "*:ssh", "*:22,", "*:1-", "*:-5", "*:+5"}) {
    INFO(bad);
    const auto ports = bad.substr(bad.rfind(':') + 1);
    const bool number = !ports.empty() && ports[0] >= '0' && ports[0] <= '9';
    CHECK(acl(bad) == "acls[0].dst[0]: dst=\"" + bad + "\": port range \"" + ports + "\": " + (number ? "invalid ports" : "invalid first integer"));
  }
  CHECK(acl("nowhere:22") == "acls[0].dst[0]: invalid dst \"nowhere\"");
  CHECK(acl("*:*", ", \"proto\": \"tcpp\"") == "acls[0].proto: \"tcpp\" is not a protocol");
  CHECK(acl("*:*", ", \"proto\": \"256\"") == "acls[0].proto: \"256\" is not a protocol");
  for (const std::string fine : {"tcp", "udp", "6", "sctp", ""}) CHECK(acl("*:*", ", \"proto\": \"" + fine + "\"").empty());
  CHECK(network_problem(R"("acls": [{"action": "drop", "src": [], "dst": []}])") == "acls[0].action: action=\"drop\" is not supported");
  CHECK(network_problem(R"("grants": [{"src": ["*"], "dst": ["*"]}])") == "grants[0]: ip and app can not both be empty");
  CHECK(network_problem(R"("grants": [{"src": ["*"], "dst": ["tag:server:22"], "ip": ["*"]}])") == "grants[0].dst[0]: dst=\"tag:server:22\": tag not found: \"tag:server:22\"");
  for (const std::string fine : {"*", "22", "tcp:22", "tcp:1-100", "udp:*", "6:22", "icmp:*", "1-100"})
    CHECK(network_problem(R"("grants": [{"src": ["*"], "dst": ["*"], "ip": [")" + fine + "\"]}]").empty());
  for (const std::string bad : {"", "tcp", "tcp:", "foo:22", "22,23", "0", "tcp:ssh"})
    CHECK(network_problem(R"("grants": [{"src": ["*"], "dst": ["*"], "ip": [")" + bad + "\"]}]") == "grants[0].ip[0]: invalid ip \"" + bad + "\"");
}

TEST_CASE("a rule takes one recorder tag, and must have it to be enforced", "[auth][policy][load]") {
  CHECK(ssh_problem(rule_with("recorder", "[\"tag:recorder\"]") + ", \"enforceRecorder\": true").empty());
  CHECK(ssh_problem(rule_with("recorder", "[\"tag:recorder\", \"tag:server\"]")) == "ssh[0].recorder[1]: a rule takes one recorder tag");
  CHECK(ssh_problem(rule_with("recorder", "[\"rec\"]")) == "ssh[0].recorder[0]: invalid recorder \"rec\"");
  CHECK(ssh_problem(rule_with("recorder", "[\"tag:none\"]")) == "ssh[0].recorder[0]: tag not found: \"tag:none\"");
  CHECK(ssh_problem(rule_with("recorder", "\"tag:recorder\"")) == "ssh[0].recorder: must be an array of strings, not a string");
  CHECK(ssh_problem(rule_with("enforceRecorder", "true")) == "ssh[0].enforceRecorder: enforceRecorder without a recorder");
  CHECK(ssh_problem(rule_with("enforceRecorder", "false")).empty());
  CHECK(ssh_problem(rule_with("enforceRecorder", "\"yes\"")) == "ssh[0].enforceRecorder: must be true or false, not a string");
}

TEST_CASE("an ssh rule that no network rule can ever open is told, others are not", "[auth][policy][load]") {
  const auto warnings = [](const std::string& network, const std::string& src = "\"group:eng\"", const std::string& dst = "\"tag:server\"") {
    const auto policy =
        Policy::load(head + network + "\"ssh\": [\n{\"action\": \"accept\", \"src\": [" + src + "], \"dst\": [" + dst + "], \"users\": [\"root\"]}]}", "p");
    if (!policy) FAIL(policy.error().front().text());
    Lines out;
    for (const auto& w : policy->warnings()) out.push_back(w.place.text() + ": " + w.message);
    return out;
  };
  CHECK(warnings("") == Lines{"p:2:1: the file has neither acls nor grants, so everybody may reach port 22, and the ssh rules alone decide"});
  const Lines unreachable{"p:3:1: no acl or grant opens port 22 for this rule"};
  const auto acl = [](const std::string& src, const std::string& dst) {
    return "\"acls\": [{\"action\": \"accept\", \"src\": [\"" + src + "\"], \"dst\": [\"" + dst + "\"]}],";
  };
  CHECK(warnings(acl("*", "tag:server:80")) == unreachable);
  CHECK(warnings(acl("*", "autogroup:self:22")) == unreachable);
  CHECK(warnings(acl("bob@example.com", "*:*")) == unreachable);
  CHECK(warnings(acl("tag:server", "*:*")) == unreachable);
  CHECK(warnings("\"grants\": [{\"src\": [\"*\"], \"dst\": [\"*\"], \"ip\": [\"udp:22\"]}],") == unreachable);
  for (const std::string src : {"*", "alice@example.com", "group:eng", "autogroup:member", "100.64.0.0/10", "srv"}) CHECK(warnings(acl(src, "*:22")).empty());
  for (const std::string dst : {"*:*", "tag:server:22", "autogroup:tagged:1-100", "srv:*"}) CHECK(warnings(acl("*", dst)).empty());
  CHECK(warnings(acl("alice@example.com", "alice@example.com:22"), "\"autogroup:member\"", "\"autogroup:self\"").empty());
}

TEST_CASE("a user name that no account can have is told", "[auth][policy][load]") {
  const auto policy = Policy::load(head + "\"ssh\": [{" + rule_with("users", "[\"root\", \"0\", \"group:x\", \"deploy\", \"\xd9\x85\"]") +
                                       "}], \"grants\": [{\"src\": [\"*\"], \"dst\": [\"*\"], \"ip\": [\"*\"]}]}",
                                   "p");
  REQUIRE(policy);
  REQUIRE(policy->warnings().size() == 2);
  CHECK(policy->warnings()[0].message == "\"0\" can never be the name of a local account");
  CHECK(policy->warnings()[1].message == "\"group:x\" can never be the name of a local account");
}
