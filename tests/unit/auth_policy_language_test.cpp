// Tailscale's language, row by row: research/tailscale-ssh.md sections 3 (grammar, meaning, order, compilation, refusals, Headscale),
// and 4.1 (rule matching). Section 4.7 (acceptEnv) is in auth_policy_decide_test.cpp.
#include "auth/policy/policy.h"
#include "auth/policy/posture.h"
#include "auth/policy/ranges.h"
#include "base/go_duration.h"
#include "catch.h"

#include <algorithm>
#include <fstream>
#include <iterator>

using namespace postern;
using namespace postern::auth::policy;
using namespace std::chrono_literals;

namespace {

Node user_node(std::string name, std::string address, std::string login) {
  return Node{.id = "n-" + name, .name = name, .addresses = {*Address::parse(address)}, .login = std::move(login), .tags = {}};
}
Node tagged_node(std::string name, std::string address, std::vector<std::string> tags) {
  return Node{.id = "n-" + name, .name = name, .addresses = {*Address::parse(address)}, .login = {}, .tags = std::move(tags)};
}

const Network network{{
    user_node("odin-laptop", "100.64.0.1", "odin@example.com"),
    user_node("odin-phone", "100.64.0.2", "odin@example.com"),
    user_node("thor-laptop", "100.64.0.3", "thor@example.org"),
    user_node("freya-laptop", "100.64.0.4", "freya@example.com"),
    user_node("root-laptop", "100.64.0.5", "root@example.com"),
    user_node("plus-laptop", "100.64.0.6", "dave+ssh@example.com"),
    tagged_node("server", "100.64.0.10", {"tag:server"}),
    tagged_node("db", "100.64.0.11", {"tag:db"}),
    tagged_node("ci", "100.64.0.12", {"tag:ci"}),
}};

const Node& node(const std::string& name) {
  for (const auto& n : network.nodes)
    if (n.name == name) return n;
  throw std::runtime_error{name};
}

const std::string head = R"("groups": {"group:gods": ["odin@example.com", "thor@example.org"], "group:none": []}, "hosts": {"srv": "100.64.0.10", "lan": "100.64.0.0/28"},
  "tagOwners": {"tag:server": [], "tag:db": [], "tag:ci": [], "tag:unused": [], "tag:recorder": []},)";

const LoadOptions ours{.domains = {"example.com"}};

Expected<Policy, std::vector<Problem>> try_load(const std::string& members) { return Policy::load("{" + head + members + "}", "p", ours); }

Policy load(const std::string& members) {
  auto policy = try_load(members);
  if (!policy) FAIL(policy.error().front().text());
  return std::move(*policy);
}

/// The first problem's sentence, or "".
std::string refusal(const std::string& members) {
  const auto policy = try_load(members);
  if (policy) return "";
  CHECK(policy.error().front().place.line >= 1);
  return policy.error().front().message;
}

std::string list(const std::string& words) {
  std::string out = "[";
  for (std::size_t at = 0; at < words.size();) {
    const auto end = std::min(words.find(' ', at), words.size());
    out += (out.size() > 1 ? ", " : "") + std::string{"\""} + words.substr(at, end - at) + "\"";
    at = end + 1;
  }
  return out + "]";
}

/// An ssh rule: words of the lists separated by blanks.
std::string rule(const std::string& action, const std::string& src, const std::string& dst, const std::string& users, const std::string& more = "") {
  return "{\"action\": \"" + action + "\", \"src\": " + list(src) + ", \"dst\": " + list(dst) + ", \"users\": " + list(users) + more + "}";
}
std::string ssh(const std::string& rules) { return "\"ssh\": [" + rules + "]"; }

Verdict ask(const Policy& policy, const std::string& source, const std::string& destination, std::string_view user, std::optional<std::uint32_t> uid = std::nullopt) {
  return policy.decide(network, {node(source), node(source).addresses.front(), node(destination), user, uid});
}
std::string outcome(const Policy& policy, const std::string& source, const std::string& destination, std::string_view user) {
  switch (ask(policy, source, destination, user).outcome) {
    case Outcome::accept: return "accept";
    case Outcome::check: return "check";
    case Outcome::deny: break;
  }
  return "deny";
}
/// Who may be `user` on `destination`, by node name.
std::string who(const Policy& policy, const std::string& destination, std::string_view user) {
  std::string out;
  for (const auto& n : network.nodes)
    if (outcome(policy, n.name, destination, user) != "deny") out += (out.empty() ? "" : " ") + n.name;
  return out;
}

}  // namespace

TEST_CASE("section 3.1: the whole grammar loads", "[auth][policy][language]") {
  const auto policy = try_load(R"(
    // a comment
    "postures": {"posture:mac": ["node:os IN ['macos']", "node:tsVersion >= '1.40'"]}, /* another */
    "ipsets": {"ipset:office": ["10.1.0.0/16", "add 10.2.0.1-10.2.0.9", "remove host:srv"]},
    "autoApprovers": {"routes": {"10.0.0.0/24": ["group:gods", "tag:server"]}, "exitNode": ["tag:ci"]},
    "nodeAttrs": [{"target": ["*"], "attr": ["funnel"], "app": {"tailscale.com/app-connectors": []}}],
    "derpMap": {"Regions": {}}, "randomizeClientPort": true, "disableIPv4": false, "OneCGNATRoute": "mac-never",
    "acls": [{"action": "accept", "src": ["*"], "proto": "tcp", "dst": ["*:22"], "srcPosture": ["posture:mac"]}],
    "grants": [{"src": ["group:gods"], "dst": ["tag:server"], "ip": ["tcp:22", "udp:*"], "app": {"example.com/cap/x": [{}]}, "via": []},
               {"src": ["ipset:office"], "dst": ["ipset:office", "autogroup:internet"], "ip": ["*"], "via": ["tag:ci"]}],
    "ssh": [{"action": "check", "src": ["odin@example.com", "group:gods", "autogroup:member", "user:*@example.com"], "dst": ["tag:server", "autogroup:self"],
             "users": ["deploy", "root", "autogroup:nonroot", "localpart:*@example.com"], "checkPeriod": "20m", "acceptEnv": ["GIT_*", "A?"],
             "srcPosture": ["posture:mac"], "recorder": ["tag:recorder"], "enforceRecorder": true},
            {"action": "accept", "src": ["tag:ci", "autogroup:tagged"], "dst": ["tag:server", "autogroup:tagged"], "users": ["root"]}],
    "tests": [{"src": "odin@example.com", "proto": "tcp", "accept": ["tag:server:22"], "deny": ["1.2.3.4:22"]}],
    "sshTests": [{"src": "odin@example.com", "dst": ["tag:server"], "accept": ["root"], "check": ["deploy"], "deny": []}],)");
  if (!policy) FAIL(policy.error().front().text());
  SUCCEED();
}

TEST_CASE("section 3.1: an unknown member of what bears on access is an error, wherever it stands", "[auth][policy][language]") {
  CHECK(refusal(R"("acl": [])") == "unknown member \"acl\"");
  CHECK(refusal(ssh(rule("accept", "group:gods", "tag:server", "root", R"(, "hours": "9-17")"))) == "unknown member \"hours\"");
  CHECK(refusal(R"("grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"], "until": "x"}])") == "unknown member \"until\"");
  CHECK(refusal(R"("acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"], "srcPostures": []}])") == "unknown member \"srcPostures\"");
  CHECK(refusal(R"("sshTests": [{"src": "odin@example.com", "dst": ["tag:server"], "refuse": ["root"]}])") == "unknown member \"refuse\"");
  CHECK(refusal(R"("tests": [{"src": "odin@example.com", "accepts": []}])") == "unknown member \"accepts\"");
  CHECK(refusal(R"("acls": [{"#ha-meta": {"name": "x"}, "action": "accept", "src": ["*"], "dst": ["*:*"]}])").empty());
}

TEST_CASE("names of members may be written with capitals, as older files have them, and not twice", "[auth][policy][language]") {
  const auto policy = load(R"("ACLs": [{"Action": "accept", "Users": ["group:gods"], "Ports": ["tag:server:22"]}],
    "SSH": [{"Action": "accept", "Src": ["group:gods"], "DST": ["tag:server"], "Users": ["root"]}])");
  CHECK(who(policy, "server", "root") == "odin-laptop odin-phone thor-laptop");
  CHECK(refusal(R"("acls": [], "ACLs": [])") == "the name \"ACLs\" appears twice in this object");
  CHECK(refusal(ssh(R"({"action": "accept", "Action": "check", "src": [], "dst": [], "users": ["root"]})")) == "the name \"Action\" appears twice in this object");
  CHECK(refusal(R"("acls": [{"action": "accept", "src": [], "users": [], "dst": []}])") == "\"users\" is the old name of \"src\", and both are here");
}

TEST_CASE("section 3.2, whole block: no rule, no way in", "[auth][policy][language]") {
  for (const std::string none : {"\"ssh\": []", "\"ssh\": null", "\"acls\": null"}) CHECK(who(load(none), "server", "root").empty());
}

TEST_CASE("section 3.2, src: who is a source", "[auth][policy][language]") {
  const auto sources = [](const std::string& src) { return who(load(ssh(rule("accept", src, "tag:server", "deploy"))), "server", "deploy"); };
  CHECK(sources("odin@example.com") == "odin-laptop odin-phone");
  CHECK(sources("nobody@example.com").empty());
  CHECK(sources("group:gods") == "odin-laptop odin-phone thor-laptop");
  CHECK(sources("group:none").empty());
  CHECK(sources("tag:ci") == "ci");
  CHECK(sources("tag:unused").empty());
  CHECK(sources("autogroup:member") == "odin-laptop odin-phone thor-laptop freya-laptop root-laptop plus-laptop");
  CHECK(sources("autogroup:members") == sources("autogroup:member"));
  CHECK(sources("autogroup:tagged") == "server db ci");
  CHECK(sources("user:*@example.com") == "odin-laptop odin-phone freya-laptop root-laptop plus-laptop");
  // Who has a role, shares a node in, or is in a group of the identity provider is not known here: they let in nobody, and load says so.
  for (const std::string unknown : {"autogroup:admin", "autogroup:owner", "autogroup:it-admin", "autogroup:network-admin", "autogroup:billing-admin", "autogroup:auditor",
                                    "autogroup:shared", "group:sec@example.com"}) {
    INFO(unknown);
    CHECK(sources(unknown).empty());
    const auto policy = load(ssh(rule("accept", unknown, "tag:server", "deploy")));
    CHECK(std::any_of(policy.warnings().begin(), policy.warnings().end(), [&](const Problem& p) { return p.message.find(unknown) != std::string::npos; }));
  }
}

TEST_CASE("section 3.2, src and dst: what may not stand there", "[auth][policy][language]") {
  for (const std::string src : {"*", "100.64.0.10", "100.64.0.0/24", "srv", "odin", "autogroup:self", "autogroup:internet", "autogroup:nonroot", "ipset:x", "svc:x"})
    CHECK(refusal(ssh(rule("accept", src, "tag:server", "root"))) == "[ssh] \"" + src + "\" is not allowed in src");
  for (const std::string dst : {"*", "100.64.0.10", "100.64.0.0/24", "srv", "lan", "group:gods", "autogroup:internet", "autogroup:nonroot", "user:*@example.com"})
    CHECK(refusal(ssh(rule("accept", "group:gods", dst, "root"))) == "invalid dst \"" + dst + "\"");
  CHECK(refusal(ssh(rule("accept", "group:gods", "tag:server:22", "root"))) == "tag not found: \"tag:server:22\"");
  CHECK(refusal(ssh(rule("accept", "tag:nope", "tag:server", "root"))) == "tag not found: \"tag:nope\"");
  CHECK(refusal(ssh(rule("accept", "group:nope", "tag:server", "root"))) == "group not found: \"group:nope\"");
}

TEST_CASE("section 3.2, dst: own devices, tags, a single user", "[auth][policy][language]") {
  const auto self = load(ssh(rule("accept", "autogroup:member", "autogroup:self", "root")));
  CHECK(who(self, "odin-laptop", "root") == "odin-laptop odin-phone");
  CHECK(who(self, "thor-laptop", "root") == "thor-laptop");
  CHECK(who(self, "server", "root").empty());
  const auto same = load(ssh(rule("accept", "thor@example.org", "thor@example.org", "root")));
  CHECK(who(same, "thor-laptop", "root") == "thor-laptop");
  for (const std::string src : {"odin@example.com", "group:gods", "autogroup:member", "thor@example.org odin@example.com", "tag:ci", "autogroup:tagged"})
    CHECK(refusal(ssh(rule("accept", src, "thor@example.org", "root"))) == "users in dst are only allowed from the same user");
  const auto many = load(ssh(rule("accept", "thor@example.org", "tag:server tag:db tag:unused", "root")));
  CHECK(who(many, "server", "root") == "thor-laptop");
  CHECK(who(many, "db", "root") == "thor-laptop");
  CHECK(who(many, "ci", "root").empty());
  CHECK(who(load(ssh(rule("accept", "autogroup:tagged", "tag:server", "root"))), "server", "root") == "server db ci");
}

TEST_CASE("section 3.2, check: never from tags", "[auth][policy][language]") {
  for (const std::string src : {"tag:ci", "autogroup:tagged", "group:gods tag:ci"})
    CHECK(refusal(ssh(rule("check", src, "tag:server", "root"))) == "[ssh] \"check\" action does not support tags in src");
}

TEST_CASE("section 3.2, users: root must be named, nonroot is all but uid 0", "[auth][policy][language]") {
  const auto nonroot = load(ssh(rule("accept", "group:gods", "tag:server", "autogroup:nonroot")));
  CHECK(outcome(nonroot, "odin-laptop", "server", "anybody") == "accept");
  CHECK(outcome(nonroot, "odin-laptop", "server", "root") == "deny");
  CHECK(ask(nonroot, "odin-laptop", "server", "toor", 0).outcome == Outcome::deny);
  const auto both = load(ssh(rule("accept", "group:gods", "tag:server", "root autogroup:nonroot")));
  CHECK(outcome(both, "odin-laptop", "server", "root") == "accept");
  CHECK(outcome(both, "odin-laptop", "server", "ubuntu") == "accept");
  const auto one = load(ssh(rule("accept", "group:gods", "tag:server", "ubuntu")));
  CHECK(outcome(one, "odin-laptop", "server", "ubuntu") == "accept");
  CHECK(outcome(one, "odin-laptop", "server", "Ubuntu") == "deny");
  CHECK(outcome(one, "odin-laptop", "server", "root") == "deny");
  for (const std::string odd : {"group:foo", "tag:foo", "autogroup:member", "autogroup:self", "autogroup:tagged", "autogroup:internet", "localpart:", "localpart:foo",
                                "localpart:foo@example.com", "localpart:*@", "\xf0\x9f\x9a\xaa", "\xd9\x85"}) {
    INFO(odd);
    const auto policy = load(ssh(rule("accept", "autogroup:member", "tag:server", odd)));
    CHECK(outcome(policy, "odin-laptop", "server", "odin") == "deny");
    CHECK(outcome(policy, "odin-laptop", "server", "root") == "deny");
  }
}

TEST_CASE("section 3.2, localpart: the name before the @, of users of that domain only", "[auth][policy][language]") {
  const auto policy = load(ssh(rule("accept", "autogroup:member", "tag:server", "localpart:*@example.com")));
  CHECK(who(policy, "server", "odin") == "odin-laptop odin-phone");
  CHECK(who(policy, "server", "freya") == "freya-laptop");
  CHECK(who(policy, "server", "thor").empty());
  CHECK(who(policy, "server", "dave+ssh") == "plus-laptop");
  CHECK(who(policy, "server", "dave").empty());
  CHECK(ask(policy, "odin-laptop", "server", "odin").local_user == "odin");
  // A login that begins with root@ does not make root of anybody, nor does an account of uid 0: only a rule that writes it out does.
  CHECK(who(policy, "server", "root").empty());
  CHECK(ask(policy, "odin-laptop", "server", "odin", 0).outcome == Outcome::deny);
  const auto more = load(ssh(rule("accept", "autogroup:member", "tag:server", "localpart:*@example.com ubuntu")));
  CHECK(who(more, "server", "ubuntu") == "odin-laptop odin-phone thor-laptop freya-laptop root-laptop plus-laptop");
  for (const std::string domain : {"example.org", "EXAMPLE.COM", "*", "nonexistent.example.com"}) {
    CHECK(refusal(ssh(rule("accept", "autogroup:member", "tag:server", "localpart:*@" + domain))) ==
          domain + " is not associated with this Tailnet and cannot be used in user:*@<domain> expressions");
    CHECK(refusal(ssh(rule("accept", "user:*@" + domain, "tag:server", "root"))) ==
          "[ssh] " + domain + " is not associated with this Tailnet and cannot be used in user:*@<domain> expressions");
  }
  // Where the network's domains are not known (Headscale), each will do, and "*" is none.
  CHECK(Policy::load("{" + head + ssh(rule("accept", "user:*@example.org", "tag:server", "localpart:*@example.org")) + "}", "p"));
  CHECK_FALSE(Policy::load("{" + head + ssh(rule("accept", "autogroup:member", "tag:server", "localpart:*@*")) + "}", "p"));
}

TEST_CASE("section 3.4, localpart: a source that is no destination is let in on its own node, by the whole rule", "[auth][policy][language]") {
  const auto policy = load(ssh(rule("accept", "autogroup:member", "tag:server", "localpart:*@example.com ubuntu")));
  CHECK(who(policy, "odin-laptop", "odin") == "odin-laptop");  // not from odin's other device
  CHECK(who(policy, "thor-laptop", "ubuntu") == "thor-laptop");
  CHECK(who(policy, "thor-laptop", "thor").empty());
  CHECK(who(policy, "db", "ubuntu").empty());
  CHECK(who(load(ssh(rule("accept", "tag:ci", "tag:server", "localpart:*@example.com ubuntu"))), "ci", "ubuntu") == "ci");
  const auto check = load(ssh(rule("check", "autogroup:member", "tag:server", "localpart:*@example.com")));
  CHECK(outcome(check, "odin-laptop", "odin-laptop", "odin") == "check");
  for (const auto& plain : {rule("accept", "autogroup:member", "tag:server", "odin"), rule("accept", "autogroup:member", "tag:server", "localpart:*@"),
                            rule("accept", "user:*@example.com", "tag:server", "autogroup:nonroot")})
    CHECK(who(load(ssh(plain)), "odin-laptop", "odin").empty());
  CHECK(who(load(ssh(rule("accept", "autogroup:member", "autogroup:self", "localpart:*@example.com"))), "odin-laptop", "odin") == "odin-laptop odin-phone");
}

TEST_CASE("section 3.2, checkPeriod: 12 hours, what is written, or always", "[auth][policy][language]") {
  const auto period = [](const std::string& value) {
    return ask(load(ssh(rule("check", "group:gods", "tag:server", "root", value.empty() ? "" : ", \"checkPeriod\": " + value))), "odin-laptop", "server", "root").check_period;
  };
  for (const std::string standard : {"", "null", "\"\""}) CHECK(period(standard) == std::optional<std::chrono::seconds>{12h});
  CHECK(period("\"20m\"") == std::optional<std::chrono::seconds>{20min});
  CHECK(period("\"1h30m\"") == std::optional<std::chrono::seconds>{90min});
  CHECK(period("\"30s\"") == std::optional<std::chrono::seconds>{30s});
  CHECK(period("\"168h\"") == std::optional<std::chrono::seconds>{168h});
  CHECK(period("\"always\"") == std::nullopt);
  CHECK(period("\"0s\"") == std::nullopt);  // nothing earlier counts
  CHECK(period("\"0.5s\"") == std::nullopt);
  const auto accept = load(ssh(rule("accept", "group:gods", "tag:server", "root", R"(, "checkPeriod": "1h")")));
  CHECK(outcome(accept, "odin-laptop", "server", "root") == "accept");
  CHECK(ask(accept, "odin-laptop", "server", "root").check_period == std::nullopt);
  CHECK(std::any_of(accept.warnings().begin(), accept.warnings().end(), [](const Problem& p) { return p.message.find("checkPeriod without") == 0; }));
}

TEST_CASE("section 3.2, srcPosture: a rule takes only devices that meet one of its postures", "[auth][policy][language]") {
  const std::string postures = R"("postures": {"posture:mac": ["node:os == 'macos'", "node:tsVersion >= '1.40'"], "posture:trusted": ["custom:tier == 'trusted'"]},)";
  const auto ssh_rules = ssh(rule("accept", "odin@example.com", "tag:server", "root", R"(, "srcPosture": ["posture:mac", "posture:trusted"])"));
  const auto policy = load(postures + ssh_rules);
  const auto with = [&](const Policy& p, std::map<std::string, Attribute> attributes) {
    Node source = node("odin-laptop");
    source.attributes = std::move(attributes);
    return p.decide(network, {source, source.addresses.front(), node("server"), "root", std::nullopt});
  };
  CHECK(with(policy, {}).denial == Denial::posture);
  CHECK(with(policy, {{"node:os", "macos"}, {"node:tsVersion", "1.100.2"}}).outcome == Outcome::accept);
  CHECK(with(policy, {{"node:os", "macos"}, {"node:tsVersion", "1.9"}}).outcome == Outcome::deny);
  CHECK(with(policy, {{"node:os", "macos"}}).outcome == Outcome::deny);
  CHECK(with(policy, {{"custom:tier", "trusted"}}).outcome == Outcome::accept);
  // A later rule may still decide; an earlier one whose posture is not met does not stop it.
  const auto fallback = load(postures + ssh(rule("accept", "odin@example.com", "tag:server", "root", R"(, "srcPosture": ["posture:mac"], "acceptEnv": ["A"])") + "," +
                                            rule("accept", "odin@example.com", "tag:server", "root")));
  CHECK(with(fallback, {{"node:os", "linux"}}).outcome == Outcome::accept);
  CHECK(with(fallback, {{"node:os", "linux"}}).accept_env.empty());
  // Of a device of which nothing is known nobody can say which rule decides: the first may ask for a check or a recorder that the second does not.
  CHECK(with(fallback, {}).denial == Denial::posture);
  CHECK(with(fallback, {{"node:os", "macos"}, {"node:tsVersion", "1.40"}}).accept_env == std::vector<std::string>{"A"});
  // The default holds for rules without one of their own, of every kind.
  const auto standard = load(postures + R"("defaultSrcPosture": ["posture:trusted"],)" + ssh(rule("accept", "odin@example.com", "tag:server", "root")));
  CHECK(with(standard, {}).outcome == Outcome::deny);
  CHECK(with(standard, {{"node:os", "linux"}}).outcome == Outcome::deny);
  CHECK(with(standard, {{"custom:tier", "trusted"}}).outcome == Outcome::accept);
  for (const std::string none : {"[]", "null"})
    CHECK(with(load(postures + R"("defaultSrcPosture": ["posture:trusted"],)" + ssh(rule("accept", "odin@example.com", "tag:server", "root", ", \"srcPosture\": " + none))), {}).outcome ==
          Outcome::deny);
  const auto own = load(postures + R"("defaultSrcPosture": ["posture:trusted"],)" + ssh(rule("accept", "odin@example.com", "tag:server", "root", R"(, "srcPosture": ["posture:mac"])")));
  CHECK(with(own, {{"custom:tier", "trusted"}}).outcome == Outcome::deny);
  const auto grants = load(postures + R"("grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"], "srcPosture": ["posture:mac"]}],)" + ssh(rule("accept", "odin@example.com", "tag:server", "root")));
  CHECK(with(grants, {}).denial == Denial::no_network_rule);
  CHECK(with(grants, {{"node:os", "macos"}, {"node:tsVersion", "1.40"}}).outcome == Outcome::accept);
  CHECK(refusal(ssh(rule("accept", "odin@example.com", "tag:server", "root", R"(, "srcPosture": ["posture:none"])"))) == "posture not found: \"posture:none\"");
  for (const std::string no_list : {"\"\"", "false", "{}", "\"posture:mac\""})
    CHECK(refusal(postures + ssh(rule("accept", "odin@example.com", "tag:server", "root", ", \"srcPosture\": " + no_list))).find("must be an array of strings") == 0);
  CHECK(refusal(R"("defaultSrcPosture": ["posture:none"])") == "posture not found: \"posture:none\"");
  CHECK(refusal(R"("postures": {"posture:a": ["node:os = 'x'"]})").find("invalid posture condition") == 0);
  CHECK(refusal(R"("postures": {"posture:a": []})") == "a posture must have a condition");
  CHECK(refusal(R"("postures": {"mac": ["node:os == 'x'"]})") == "posture names must start with 'posture:'");
}

TEST_CASE("section 3.2, recorder: the nodes of the tag, lowest address first", "[auth][policy][language]") {
  Network with = network;
  with.nodes.push_back(tagged_node("rec-b", "100.64.0.31", {"tag:recorder"}));
  with.nodes.push_back(tagged_node("rec-a", "100.64.0.30", {"tag:recorder"}));
  const auto policy = load(ssh(rule("accept", "group:gods", "tag:server", "root", R"(, "recorder": ["tag:recorder"], "enforceRecorder": true)")));
  const auto verdict = policy.decide(with, {node("odin-laptop"), *Address::parse("100.64.0.1"), node("server"), "root", std::nullopt});
  CHECK(verdict.enforce_recorder);
  REQUIRE(verdict.recorders.size() == 2);
  CHECK(verdict.recorders[0].name == "rec-a");
  // Two rules of one scope: the first listed wins.
  const auto two = load(ssh(rule("accept", "group:gods", "tag:server", "root", R"(, "recorder": ["tag:recorder"])") + "," + rule("accept", "group:gods", "tag:server", "root")));
  CHECK(ask(two, "odin-laptop", "server", "root").record);
}

TEST_CASE("section 3.2: the default policy of a new network is its own devices, by check, nonroot and root", "[auth][policy][language]") {
  std::ifstream shipped{POSTERN_PACKAGING "/policy.hujson"};
  const std::string text{std::istreambuf_iterator<char>{shipped}, {}};
  auto loaded = Policy::load(text, "policy.hujson");
  if (!loaded) FAIL(loaded.error().front().text());
  const Policy policy = std::move(*loaded);
  CHECK(policy.warnings().empty());
  CHECK(outcome(policy, "odin-laptop", "odin-phone", "root") == "check");
  CHECK(outcome(policy, "odin-laptop", "odin-phone", "odin") == "check");
  CHECK(outcome(policy, "odin-laptop", "thor-laptop", "odin") == "deny");
  CHECK(outcome(policy, "odin-laptop", "server", "odin") == "deny");
}

TEST_CASE("section 3.3: check before accept, then the order of the file, nothing is merged", "[auth][policy][language]") {
  const auto both = ssh(rule("accept", "group:gods", "tag:server", "root", R"(, "acceptEnv": ["A"])") + "," +
                        rule("check", "group:gods", "tag:server", "root", R"(, "acceptEnv": ["B"])") + "," + rule("accept", "group:gods", "tag:server", "ubuntu"));
  const auto policy = load(both);
  CHECK(outcome(policy, "odin-laptop", "server", "root") == "check");
  CHECK(ask(policy, "odin-laptop", "server", "root").accept_env == std::vector<std::string>{"B"});
  CHECK(outcome(policy, "odin-laptop", "server", "ubuntu") == "accept");
  const auto accept = load(ssh(rule("accept", "group:gods", "tag:server", "root", R"(, "acceptEnv": ["TERM"])") + "," +
                               rule("accept", "group:gods", "tag:server", "root", R"(, "acceptEnv": ["LC_*"])")));
  CHECK(ask(accept, "odin-laptop", "server", "root").accept_env == std::vector<std::string>{"TERM"});
  // A rule in which root is not named does not stop the search for one in which it is (capture ssh-f3).
  const auto f3 = load(ssh(rule("accept", "autogroup:member", "tag:server", "localpart:*@example.com") + "," + rule("accept", "autogroup:member", "tag:server", "root")));
  CHECK(outcome(f3, "odin-laptop", "server", "root") == "accept");
  CHECK(outcome(f3, "odin-laptop", "odin-laptop", "root") == "deny");
}

TEST_CASE("section 3.5: what the service refuses, in its words", "[auth][policy][language]") {
  const auto with = [](const std::string& name, const std::string& value) {
    std::string out = "\"ssh\": [{";
    for (const auto& [n, v] :
         std::vector<std::pair<std::string, std::string>>{{"action", "\"check\""}, {"src", "[\"group:gods\"]"}, {"dst", "[\"tag:server\"]"}, {"users", "[\"root\"]"}})
      if (n != name) out += "\"" + n + "\": " + v + ", ";
    return refusal(out + (value.empty() ? "" : "\"" + name + "\": " + value) + "}]");
  };
  for (const std::string bad : {"deny", "Accept", "ACCEPT"}) CHECK(with("action", "\"" + bad + "\"") == "\"" + bad + "\" is not a valid action");
  for (const std::string none : {"", "null", "\"\"", "\"  \""}) CHECK(with("action", none) == "action must be specified");
  CHECK(with("action", "\" check \"").empty());
  for (const std::string none : {"", "null", "[]"}) CHECK(with("users", none) == "users must be specified");
  CHECK(with("users", R"([""])") == "user \"\" is not valid");
  CHECK(with("users", R"(["root", "  "])") == "user \"\" is not valid");
  CHECK(with("users", R"(["root", "*"])") == "user \"*\" is not valid");
  CHECK(with("acceptEnv", R"([""])") == "acceptEnv values cannot be empty");
  CHECK(with("checkPeriod", "\"-1m\"") == "checkPeriod -1m0s must be a positive duration");
  CHECK(with("checkPeriod", "\"168h0m1s\"") == "checkPeriod 168h0m1s is above the max (168h)");
  CHECK(with("checkPeriod", "\"200h\"") == "checkPeriod 200h0m0s is above the max (168h)");
  CHECK(with("checkPeriod", "\"abc\"") == "time: invalid duration \"abc\"");
  CHECK(with("checkPeriod", "\"10\"") == "time: missing unit in duration \"10\"");
  CHECK(with("checkPeriod", "\"1d\"") == "time: unknown unit \"d\" in duration \"1d\"");
  CHECK(with("checkPeriod", "12") == "must be a duration (\"12h\") or \"always\", not a number");
  CHECK(with("dst", R"(["srv"])") == "invalid dst \"srv\"");
  for (const std::string fine : {"", "null", "[]"}) {
    CHECK(with("src", fine).empty());
    CHECK(with("dst", fine).empty());
    CHECK(with("acceptEnv", fine).empty());
  }
  for (const std::string fine : {"\"30s\"", "\"0s\"", "null", "\"168h\"", "\"always\""}) CHECK(with("checkPeriod", fine).empty());
  CHECK(with("acceptEnv", R"(["**", "*X", "X*Y", "*X*"])").empty());
  CHECK(with("src", R"([" odin@example.com\t"])").empty());
  CHECK(with("dst", R"(["tag:server "])").empty());
  CHECK(with("users", R"(["\troot", "\ud83d\ude80"])").empty());

  const auto whole = [](const std::string& text) {
    const auto policy = Policy::load(text, "p");
    return policy ? "" : policy.error().front().field + ": " + policy.error().front().message;
  };
  CHECK(whole(R"({"groups": {"group:a": ["group:b"], "group:b": ["group:a"]}})") == "groups[\"group:a\"]: \"group:b\": group members cannot be recursive");
  CHECK(whole("{\"tagOwners\": {\"tag:\xd1\x81\": []}}") == "tagOwners[\"tag:\xd1\x81\"]: tag names must start with a letter, after 'tag:'");
  CHECK(whole(R"({"tagOwners": {"tag:a": ["tag:b"], "tag:b": ["tag:a", "tag:b"]}})").empty());
}

TEST_CASE("section 3.5: acls and grants are refused in the service's words", "[auth][policy][language]") {
  const auto acl = [](const std::string& src, const std::string& dst, const std::string& more = "") {
    return refusal(R"("acls": [{"action": "accept", "src": [")" + src + R"("], "dst": [")" + dst + "\"]" + more + "}]");
  };
  CHECK(acl("tag:nonexistent", "*:*") == "src=tag not found: \"tag:nonexistent\"");
  CHECK(acl("*", "tag:nonexistent:22") == "dst=\"tag:nonexistent\": tag not found: \"tag:nonexistent\"");
  CHECK(acl("*", "autogroup:self") == "dst=\"autogroup:self\": port range \"self\": invalid first integer");
  CHECK(acl("*", "tag:server:ssh") == "dst=\"tag:server:ssh\": port range \"ssh\": invalid first integer");
  CHECK(acl("autogroup:self", "*:*") == "\"autogroup:self\" not valid on the src side of a rule");
  CHECK(acl("tag:ci", "autogroup:self:22") == "autogroup:self can only be used with users, groups, or supported autogroups");
  CHECK(acl("*", "autogroup:self:22").empty());
  CHECK(acl("autogroup:danger-all", "*:*").empty());
  CHECK(acl("*", "autogroup:danger-all:*") == "cannot use autogroup:danger-all as a dst");
  CHECK(acl("*", "*:22", R"(, "proto": "icmp")") == "this protocol has no ports, only \"*\" can stand there");
  CHECK(acl("*", "*:*", R"(, "proto": "ICMP")").empty());
  CHECK(acl("*", "*:*", R"(, "proto": "06")") == "\"06\" is not a protocol");
  CHECK(acl("*", "*:*", R"(, "proto": "*")") == "\"*\" is not a protocol");
  const auto grant = [](const std::string& src, const std::string& dst, const std::string& what) {
    return refusal(R"("grants": [{"src": [")" + src + R"("], "dst": [")" + dst + "\"], " + what + "}]");
  };
  for (const std::string none : {"\"ip\": []", "\"app\": {}", "\"ip\": null, \"app\": null"}) CHECK(grant("*", "*", none) == "ip and app can not both be empty");
  CHECK(grant("*", "autogroup:self", "\"ip\": [\"*\"]") == "autogroup:self can only be used with users, groups, or supported autogroups");
  CHECK(grant("autogroup:member", "autogroup:self", "\"ip\": [\"*\"]").empty());
  CHECK(grant("*", "0.0.0.0/0", "\"ip\": [\"*\"]") == "dst \"0.0.0.0/0\": to allow all IP addresses, use \"*\" or \"autogroup:internet\"");
  CHECK(grant("*", "*", R"("ip": ["*"], "via": ["group:gods"])") == "via can only be a tag");
  CHECK(grant("*", "*", R"("ip": ["*"], "via": ["tag:none"])") == "tag \"tag:none\" not found");
  CHECK(grant("*", "*", R"("app": {"https://x/y": [{}]})") == "capability name must have the form {domain}/{path}");
  CHECK(grant("*", "*", R"("app": {"nodomain": [{}]})") == "capability name must have the form {domain}/{path}");
  CHECK(grant("*", "autogroup:internet", R"("app": {"x.com/y": [{}]})") == "cannot use app grants with autogroup:internet");
  CHECK(grant("*", "*", R"("app": {"x.com/y": {}})") == "must be an array of objects, not an object");
  CHECK(grant("user:*@example.com", "user:*@example.com", "\"ip\": [\"*\"]").empty());
}

TEST_CASE("a grant with via opens nothing at the node itself, one for an app opens no port", "[auth][policy][language]") {
  const auto rules = ssh(rule("accept", "group:gods", "tag:server", "root"));
  const auto open = [&](const std::string& grant) { return outcome(load("\"grants\": [" + grant + "]," + rules), "odin-laptop", "server", "root") == "accept"; };
  CHECK(open(R"({"src": ["*"], "dst": ["*"], "ip": ["22"]})"));
  CHECK_FALSE(open(R"({"src": ["*"], "dst": ["*"], "ip": ["22"], "via": ["tag:ci"]})"));
  CHECK_FALSE(open(R"({"src": ["*"], "dst": ["*"], "app": {"x.com/y": [{}]}})"));
  CHECK(open(R"({"src": ["*"], "dst": ["host:srv"], "ip": ["tcp:22"]})"));
  CHECK_FALSE(open(R"({"src": ["*"], "dst": ["svc:web"], "ip": ["tcp:22"]})"));
}

TEST_CASE("ipsets add and remove addresses, name each other, and never in a circle", "[auth][policy][language]") {
  const auto rules = ssh(rule("accept", "group:gods", "tag:server tag:db", "root"));
  const auto open = [&](const std::string& sets, const std::string& to) {
    return outcome(load("\"ipsets\": {" + sets + R"(}, "grants": [{"src": ["*"], "dst": ["ipset:x"], "ip": ["22"]}],)" + rules), "odin-laptop", to, "root") == "accept";
  };
  CHECK(open(R"("ipset:x": ["100.64.0.0/24"])", "server"));
  CHECK_FALSE(open(R"("ipset:x": ["100.64.0.0/24", "remove host:srv"])", "server"));
  CHECK(open(R"("ipset:x": ["100.64.0.0/24", "remove host:srv"])", "db"));
  CHECK(open(R"("ipset:x": ["add ipset:y", "remove 100.64.0.10"], "ipset:y": ["100.64.0.10-100.64.0.11"])", "db"));
  CHECK_FALSE(open(R"("ipset:x": ["add ipset:y", "remove 100.64.0.10"], "ipset:y": ["100.64.0.10-100.64.0.11"])", "server"));
  CHECK_FALSE(open(R"("ipset:x": ["autogroup:internet"])", "server"));
  CHECK(refusal(R"("ipsets": {"ipset:a": ["ipset:b"], "ipset:b": ["add ipset:a"]})") == "ipsets cannot be circular: \"ipset:a\"");
  CHECK(refusal(R"("ipsets": {"ipset:a": ["ipset:c"]})") == "ipset not found: \"ipset:c\"");
  CHECK(refusal(R"("ipsets": {"ipset:a": ["tag:server"]})") == "\"tag:server\" cannot be in an ipset");
  std::string chain = "\"ipsets\": {", back = chain;  // forwards and backwards: far too deep, and no crash
  for (int i = 0; i < 20'000; i++) {
    chain += "\"ipset:s" + std::to_string(i) + "\": [\"ipset:s" + std::to_string(i + 1) + "\"], ";
    back += "\"ipset:s" + std::to_string(i + 1) + "\": [\"ipset:s" + std::to_string(i) + "\"], ";
  }
  CHECK(refusal(chain + "\"ipset:s20000\": []}").find("ipsets within each other") == 0);
  CHECK(refusal(back + "\"ipset:s0\": []}").empty());  // each is there when the next one names it
  std::string growing = "\"ipsets\": {\"ipset:0\": []";
  for (int i = 1; i < 3000; i++)
    growing += ", \"ipset:" + std::to_string(i) + "\": [\"ipset:" + std::to_string(i - 1) + "\", \"10." + std::to_string(i / 128) + "." + std::to_string(i % 128 * 2) + ".1\"]";
  CHECK(refusal(growing + "}") == "the ipsets hold too many addresses");
  CHECK(refusal(R"("ipsets": {"a": []})") == "ipset names must start with 'ipset:'");
  CHECK(refusal(R"("grants": [{"src": ["ipset:none"], "dst": ["*"], "ip": ["*"]}])") == "src=ipset not found: \"ipset:none\"");
}

TEST_CASE("sections that say nothing of access are looked at for form and do nothing", "[auth][policy][language]") {
  CHECK(refusal(R"("nodeAttrs": {})") == "must be an array, not an object");
  CHECK(refusal(R"("nodeAttrs": [{"target": "x"}])") == "must be an array of strings, not a string");
  CHECK(refusal(R"("autoApprovers": {"routes": {"nowhere": []}})") == "\"nowhere\" is not an IP address or prefix");
  CHECK(refusal(R"("autoApprovers": {"exitNode": "tag:x"})") == "must be an array of strings, not a string");
  CHECK(refusal(R"("randomizeClientPort": "yes")") == "must be true or false, not a string");
  CHECK(refusal(R"("derpMap": [])") == "must be an object, not an array");
}

TEST_CASE("section 3.5, sshTests: what they name, what they find", "[auth][policy][language]") {
  const std::string rules = ssh(rule("accept", "thor@example.org", "tag:server", "root") + "," + rule("check", "odin@example.com", "tag:server", "root ubuntu") + "," +
                                rule("accept", "autogroup:member", "autogroup:self", "autogroup:nonroot") + "," +
                                rule("accept", "autogroup:member", "tag:db", "localpart:*@example.com")) + ",";
  const auto run = [&](const std::string& entry) {
    const auto policy = try_load(rules + "\"sshTests\": [{" + entry + "}]");
    if (!policy) return policy.error().front().message;
    const auto report = policy->run_tests(network);
    CHECK((report.passed == 1) == report.failed.empty());
    return report.failed.empty() ? std::string{} : report.failed.front().message;
  };
  const auto passes = [&](const std::string& entry) { return run(entry).empty(); };
  const auto fails = [&](const std::string& entry) { return run(entry).substr(0, 14) == "test(s) failed"; };
  CHECK(passes(R"("src": "thor@example.org", "dst": ["tag:server"], "accept": ["root"])"));
  CHECK(fails(R"("src": "thor@example.org", "dst": ["tag:server"], "accept": ["ubuntu"])"));
  CHECK(passes(R"("src": "thor@example.org", "dst": ["tag:server"], "deny": ["ubuntu"])"));
  CHECK(fails(R"("src": "thor@example.org", "dst": ["tag:server"], "deny": ["root"])"));
  CHECK(passes(R"("src": "odin@example.com", "dst": ["tag:server"], "accept": ["root"])"));  // a check rule lets in, too
  CHECK(passes(R"("src": "odin@example.com", "dst": ["tag:server"], "check": ["root", "ubuntu"])"));
  CHECK(fails(R"("src": "thor@example.org", "dst": ["tag:server"], "check": ["root"])"));
  CHECK(fails(R"("src": "odin@example.com", "dst": ["tag:server"], "deny": ["root"])"));
  CHECK(fails(R"("src": "thor@example.org", "dst": ["tag:server"], "accept": ["root"], "deny": ["root"])"));
  CHECK(fails(R"("src": "thor@example.org", "dst": ["tag:server"])"));
  CHECK(fails(R"("src": "thor@example.org", "dst": ["tag:server"], "accept": [""])"));
  CHECK(fails(R"("src": "thor@example.org", "dst": [], "accept": ["root"])"));
  CHECK(fails(R"("dst": ["tag:server"], "accept": ["root"])"));
  CHECK(passes(R"("src": "thor@example.org", "dst": ["tag:server", "tag:server"], "accept": ["root"])"));
  CHECK(passes(R"("src": "thor@example.org", "dst": ["srv"], "accept": ["root"])"));
  CHECK(passes(R"("src": "thor@example.org", "dst": ["100.64.0.10"], "accept": ["root"])"));
  CHECK(passes(R"("src": "100.64.0.3", "dst": ["tag:server"], "accept": ["root"])"));
  CHECK(fails(R"("src": "100.64.0.99", "dst": ["tag:server"], "accept": ["root"])"));
  CHECK(fails(R"("src": "group:gods", "dst": ["tag:server"], "check": ["root"])"));  // all of them
  CHECK(passes(R"("src": "group:gods", "dst": ["tag:server"], "accept": ["root"])"));
  CHECK(fails(R"("src": "unknown@example.com", "dst": ["tag:server"], "deny": ["root"])"));
  CHECK(fails(R"("src": "thor@example.org", "dst": ["tag:unused"], "deny": ["root"])"));
  CHECK(passes(R"("src": "thor@example.org", "dst": ["thor@example.org"], "accept": ["alice"], "deny": ["root"])"));
  CHECK(passes(R"("src": "thor@example.org", "dst": ["odin@example.com"], "deny": ["root", "alice"])"));
  CHECK(passes(R"("src": "odin@example.com", "dst": ["tag:db"], "accept": ["odin"], "deny": ["thor"])"));
  CHECK(fails(R"("src": "thor@example.org", "dst": ["tag:db"], "accept": ["thor"])"));
  CHECK(passes(R"("src": "odin@example.com", "dst": ["autogroup:self"], "accept": ["odin"], "deny": ["root"])"));
  CHECK(run(R"("src": "thor@example.org", "dst": ["100.64.0.0/24"], "deny": ["root"])") == "SSH tests dst contains disallowed element \"100.64.0.0/24\"");
  CHECK(run(R"("src": "thor@example.org", "dst": ["autogroup:internet"], "deny": ["root"])") == "SSH tests dst contains disallowed element \"autogroup:internet\"");
  CHECK(run(R"("src": "thor@example.org", "dst": ["lan"], "deny": ["root"])") == "SSH tests dst contains disallowed element \"lan\"");
  CHECK(run(R"("src": "thor@example.org", "dst": ["tag:server:22"], "deny": ["root"])") == "SSH tests dst contains unknown tag \"tag:server:22\"");
  const auto where = try_load(rules + "\n\"sshTests\": [{\"src\": \"thor@example.org\", \"dst\": [\"tag:server\"],\n \"accept\": [\"root\", \"mallory\"]}]");
  REQUIRE(where);
  CHECK(where->run_tests(network).failed.front().text() ==
        "p:4:21: sshTests[0].accept[1]: test(s) failed: \"thor@example.org\" (thor-laptop) to \"tag:server\" (server) as \"mallory\": want accept, got deny");
  // The network rules play no part.
  CHECK(load("\"acls\": []," + rules + R"("sshTests": [{"src": "thor@example.org", "dst": ["tag:server"], "accept": ["root"]}])").run_tests(network).failed.empty());
  // Where only a part of the network is known, what cannot be tried is said, not failed.
  const auto part = load(rules + R"("sshTests": [{"src": "unknown@example.com", "dst": ["tag:server"], "deny": ["root"]}])").run_tests(network, false);
  CHECK(part.failed.empty());
  CHECK(part.left_out.size() == 1);
}

TEST_CASE("tests of acls and grants: host:port, one protocol, every source", "[auth][policy][language]") {
  const std::string rules = R"("grants": [{"src": ["group:gods"], "dst": ["tag:server"], "ip": ["tcp:22", "udp:53"]}, {"src": ["odin@example.com"], "dst": ["10.0.0.0/8"], "ip": ["443"]},
    {"src": ["odin@example.com"], "dst": ["autogroup:internet"], "ip": ["*"]}, {"src": ["odin@example.com"], "dst": ["tag:db"], "ip": ["icmp:*"]}],)";
  const auto run = [&](const std::string& entry) {
    const auto policy = try_load(rules + "\"tests\": [{" + entry + "}]");
    if (!policy) return policy.error().front().message;
    const auto report = policy->run_tests(network);
    return report.failed.empty() ? std::string{} : report.failed.front().message;
  };
  const auto passes = [&](const std::string& entry) { return run(entry).empty(); };
  const auto fails = [&](const std::string& entry) { return run(entry).substr(0, 14) == "test(s) failed"; };
  CHECK(passes(R"("src": "thor@example.org", "accept": ["tag:server:22", "srv:22", "100.64.0.10:22"], "deny": ["tag:server:80", "tag:db:22"])"));
  CHECK(passes(R"("user": "thor@example.org", "allow": ["tag:server:22"])"));
  CHECK(passes(R"("src": "thor@example.org", "accept": ["tag:server:53"])"));
  CHECK(fails(R"("src": "thor@example.org", "proto": "tcp", "accept": ["tag:server:53"])"));
  CHECK(passes(R"("src": "thor@example.org", "proto": "udp", "accept": ["tag:server:53"], "deny": ["tag:server:22"])"));
  CHECK(passes(R"("src": "odin@example.com", "accept": ["10.1.2.3:443", "8.8.8.8:53"], "deny": ["192.168.1.1:443"])"));
  CHECK(passes(R"("src": "thor@example.org", "deny": ["8.8.8.8:53"])"));
  CHECK(fails(R"("src": "odin@example.com", "deny": ["8.8.8.8:53"])"));
  CHECK(passes(R"("src": "odin@example.com", "proto": "icmp", "accept": ["tag:db:0"])"));
  CHECK(passes(R"("src": "group:gods", "accept": ["tag:server:22"])"));
  CHECK(fails(R"("src": "autogroup:member", "accept": ["tag:server:22"])"));
  CHECK(passes(R"("src": "tag:ci", "deny": ["tag:server:22"])"));
  for (const std::string bad : {"tag:server:*", "tag:server:1-100", "tag:server:22,80", "tag:server", "tag:phantom:22", "nobody@example.com:22", "group:phantom:22", "10.0.0.0/8:443", "tag:server:ssh"}) {
    INFO(bad);
    CHECK(fails("\"src\": \"thor@example.org\", \"deny\": [\"" + bad + "\"]"));
  }
  CHECK(fails(R"("src": "unknown@example.com", "deny": ["tag:server:22"])"));
  CHECK(fails(R"("src": "thor@example.org")"));
  CHECK(fails(R"("accept": ["tag:server:22"])"));
  // Nothing compared is nothing shown: a source without addresses, or of another family.
  Network odd = network;
  odd.nodes[2].addresses.clear();
  const auto thor = load(rules + R"("tests": [{"src": "thor@example.org", "accept": ["tag:server:22"]}])");
  CHECK(thor.run_tests(odd).failed.size() == 1);
  odd.nodes[2].addresses = {*Address::parse("fd7a::3")};
  CHECK(thor.run_tests(odd).failed.front().message.find("have no addresses of one family") != std::string::npos);
  CHECK(thor.run_tests(network, true, 0).left_out.size() == 1);  // no time for a single pair
  CHECK(run(R"("src": "thor@example.org", "proto": "x", "accept": ["tag:server:22"])") == "\"x\" is not a protocol");
}

TEST_CASE("a test's srcPostureAttrs stand for the device's", "[auth][policy][language]") {
  const auto policy = load(R"("postures": {"posture:mac": ["node:os == 'macos'"]},)" + ssh(rule("accept", "thor@example.org", "tag:server", "root", R"(, "srcPosture": ["posture:mac"])")) + R"(,
    "sshTests": [{"src": "thor@example.org", "dst": ["tag:server"], "accept": ["root"], "srcPostureAttrs": {"node:os": "macos"}},
                 {"src": "thor@example.org", "dst": ["tag:server"], "deny": ["root"], "srcPostureAttrs": {"node:os": "windows"}}])");
  const auto report = policy.run_tests(network);
  CHECK(report.failed.empty());
  CHECK(report.passed == 2);
}

TEST_CASE("where no network is known the file's tests run on one that has what it names", "[auth][policy][language]") {
  const auto policy = load(ssh(rule("accept", "thor@example.org", "tag:server", "root")) + R"(,
    "sshTests": [{"src": "thor@example.org", "dst": ["tag:server"], "accept": ["root"]}, {"src": "100.64.0.3", "dst": ["tag:server"], "accept": ["root"]},
                 {"src": "loki@example.com", "dst": ["tag:server"], "deny": ["root"]}, {"src": "loki@example.com", "dst": ["tag:server"], "accept": ["root"]}])");
  const auto report = policy.run_tests(policy.imagined_network(), false);
  CHECK(report.passed == 2);
  CHECK(report.failed.size() == 1);
  CHECK(report.left_out.size() == 1);
}

TEST_CASE("section 3.6: Headscale's names and checks", "[auth][policy][language]") {
  Network hs;
  hs.nodes = {user_node("a", "100.64.0.1", "alice@"), user_node("b", "100.64.0.2", "bob@"), tagged_node("s", "100.64.0.10", {"tag:server"})};
  const auto policy = Policy::load(R"({"groups": {"group:a": ["alice@"]}, "tagOwners": {"tag:server": ["alice@"]}, "acls": [{"action": "accept", "src": ["group:a"], "dst": ["tag:server:22"]}],
    "ssh": [{"action": "accept", "src": ["alice@"], "dst": ["tag:server"], "users": ["root"]}]})", "p");
  REQUIRE(policy);
  CHECK(policy->decide(hs, {hs.nodes[0], hs.nodes[0].addresses[0], hs.nodes[2], "root", std::nullopt}).outcome == Outcome::accept);
  CHECK(policy->decide(hs, {hs.nodes[1], hs.nodes[1].addresses[0], hs.nodes[2], "root", std::nullopt}).outcome == Outcome::deny);
  CHECK(refusal(ssh(rule("accept", "tag:ci", "autogroup:self", "root"))) ==
        "autogroup:self destination requires source to contain only users or groups, not tags or autogroup:tagged");
  CHECK(refusal(ssh(rule("accept", "tag:ci", "autogroup:member", "root"))) == "tags in SSH source cannot access autogroup:member (user-owned devices)");
}

// -- 4.1 ------------------------------------------------------------------------------------------------------------------------

TEST_CASE("section 4.1: rule matching", "[auth][policy][language]") {
  // 1, 3: a rule without sources matches nobody. 4, 16: one that takes the peer and not the name says so.
  CHECK(ask(load(ssh(rule("accept", "", "tag:server", "autogroup:nonroot"))), "odin-laptop", "server", "alice").denial == Denial::no_rule);
  const auto one = load(ssh(rule("accept", "odin@example.com", "tag:server", "bob")));
  CHECK(ask(one, "odin-laptop", "server", "alice").denial == Denial::user_not_permitted);
  CHECK(denial_text(Denial::user_not_permitted, "alice") == "tailnet policy does not permit you to SSH as user \"alice\"");
  // 7: a literal and nonroot in one rule. 8: its acceptEnv is in force.
  const auto both = load(ssh(rule("accept", "odin@example.com", "tag:server", "alice autogroup:nonroot", R"(, "acceptEnv": ["EXAMPLE", "?_?", "TEST_*"])")));
  CHECK(ask(both, "odin-laptop", "server", "alice").local_user == "alice");
  CHECK(ask(both, "odin-laptop", "server", "zoe").accept_env == std::vector<std::string>{"EXAMPLE", "?_?", "TEST_*"});
  // 12: the login decides. 13: nonroot is the same name. 14: the first match wins, with its own acceptEnv.
  CHECK(outcome(one, "thor-laptop", "server", "bob") == "deny");
  CHECK(ask(both, "odin-laptop", "server", "zoe").local_user == "zoe");
  const auto several = load(ssh(rule("accept", "thor@example.org", "tag:server", "bob", R"(, "acceptEnv": ["A"])") + "," +
                                rule("accept", "odin@example.com", "tag:server", "carol", R"(, "acceptEnv": ["B"])") + "," +
                                rule("accept", "odin@example.com", "tag:server", "bob", R"(, "acceptEnv": ["C"])") + "," +
                                rule("accept", "autogroup:member", "tag:server", "bob", R"(, "acceptEnv": ["D"])")));
  CHECK(ask(several, "odin-laptop", "server", "bob").accept_env == std::vector<std::string>{"C"});
  // 15: nothing at all.
  CHECK(ask(load("\"ssh\": []"), "odin-laptop", "server", "alice").denial == Denial::no_rule);
  CHECK(denial_text(Denial::no_rule, "alice") == "tailnet policy does not permit you to SSH to this node");
}

// -- parts ----------------------------------------------------------------------------------------------------------------------

TEST_CASE("durations are read and printed as Go does", "[auth][policy][language]") {
  const auto read = [](std::string_view text) {
    const auto d = parse_go_duration(text);
    return d.error.empty() ? go_duration_text(d.value) : d.error;
  };
  for (const auto& [text, wanted] : std::vector<std::pair<std::string, std::string>>{
           {"0", "0s"}, {"-0", "0s"}, {"12h", "12h0m0s"}, {"1h30m", "1h30m0s"}, {"1.5h", "1h30m0s"}, {"90s", "1m30s"}, {"300ms", "300ms"}, {"1.5ms", "1.5ms"}, {"2us", "2\xc2\xb5s"},
           {"2\xc2\xb5s", "2\xc2\xb5s"}, {"1ns", "1ns"}, {"-1m", "-1m0s"}, {"+5s", "5s"}, {".5s", "500ms"}, {"1.s", "1s"}, {"1h1m1.5s", "1h1m1.5s"}})
    CHECK(read(text) == wanted);
  for (const std::string bad : {"", "-", "abc", ".s", "9223372036854775808ns", "99999999999999999999h", "3000000h"})
    CHECK(read(bad) == "time: invalid duration \"" + bad + "\"");
}

TEST_CASE("posture conditions compare texts, versions, numbers and what is not set", "[auth][policy][language]") {
  const auto holds = [](const std::string& text, const std::map<std::string, Attribute>& attributes) {
    const auto parsed = parse_posture_condition(text);
    if (!parsed.condition) FAIL(text << ": " << parsed.error);
    return parsed.condition->holds(attributes);
  };
  const std::map<std::string, Attribute> mac{{"node:os", "macos"}, {"node:tsVersion", "1.40.2"}, {"node:tsAutoUpdate", true}, {"custom:score", 7.5}};
  for (const std::string yes : {"node:os == 'macos'", "node:os != 'linux'", "node:os IN ['linux', 'macos']", "node:os NOT IN ['linux']", "node:os IS SET", "custom:x NOT SET", "node:tsAutoUpdate",
                                "node:tsAutoUpdate == true", "node:tsVersion >= '1.9'", "node:tsVersion > '1.40'", "node:tsVersion < '1.100'", "node:tsVersion <= '1.40.2'", "custom:score > 7",
                                "custom:score<=7.5", "node:os=='macos'"}) {
    INFO(yes);
    CHECK(holds(yes, mac));
  }
  for (const std::string no : {"node:os == 'linux'", "node:os == 'MACOS'", "node:os IN ['linux']", "custom:x == 'a'", "custom:x != 'a'", "custom:x NOT IN ['a']", "custom:x", "node:os NOT SET", "custom:x IS SET",
                               "node:tsVersion >= '1.41'", "node:tsVersion > 1", "node:tsAutoUpdate == false", "node:os"}) {
    INFO(no);
    CHECK_FALSE(holds(no, mac));
  }
  for (const std::string bad : {"", "os == 'x'", "node:os =", "node:os = 'x'", "node:os == x", "node:os == 'x", "node:os IN 'x'", "node:os IN ['x'", "node:os == 'x' y", "node:os IS", "node:os > true", "== 'x'"}) {
    INFO(bad);
    CHECK_FALSE(parse_posture_condition(bad).condition);
    CHECK_FALSE(parse_posture_condition(bad).error.empty());
  }
}

TEST_CASE("ranges of addresses add up and take away, in both families, to the last address", "[auth][policy][language]") {
  const auto has = [](const AddressRanges& set, const char* address) { return set.contains(*Address::parse(address)); };
  auto set = *parse_address_range("10.0.0.1-10.0.0.9");
  CHECK(has(set, "10.0.0.1"));
  CHECK(has(set, "10.0.0.9"));
  CHECK_FALSE(has(set, "10.0.0.0"));
  CHECK_FALSE(has(set, "10.0.0.10"));
  CHECK_FALSE(has(set, "::a00:1"));
  set.add(*Prefix::parse("10.0.0.10/31"));  // touches
  CHECK(set.size() == 1);
  set.remove(*Prefix::parse("10.0.0.4/32"));
  CHECK(set.size() == 2);
  CHECK_FALSE(has(set, "10.0.0.4"));
  CHECK(has(set, "10.0.0.5"));
  AddressRanges all;
  all.add(*Prefix::parse("0.0.0.0/0"));
  all.add(*parse_address_range("::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"));
  CHECK(all.size() == 2);
  for (const char* end : {"0.0.0.0", "255.255.255.255", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}) CHECK(has(all, end));
  all.remove(*Prefix::parse("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"));
  CHECK_FALSE(has(all, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"));
  CHECK(has(all, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe"));
  all.remove(all);
  CHECK(all.empty());
  for (const std::string bad : {"10.0.0.9-10.0.0.1", "10.0.0.1-fd7a::1", "10.0.0.1", "10.0.0.1-x"}) CHECK_FALSE(parse_address_range(bad));
}
