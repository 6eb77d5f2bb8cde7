#include "catch.h"

#include "auth/policy/sources.h"

using namespace postern;
using namespace postern::auth::policy;
using namespace std::chrono_literals;

namespace {

constexpr auto login_cap = "postern.internal/cap/login";

struct Scene {
  Node alice{.id = "n1", .name = "alice-laptop", .addresses = {*Address::parse("100.64.0.1")}, .login = "alice@example.com", .tags = {}};
  Node server{.id = "s1", .name = "server", .addresses = {*Address::parse("100.64.0.9")}, .login = "", .tags = {"tag:server"}};
  Node recorder{.id = "r1", .name = "rec", .addresses = {*Address::parse("100.64.0.20")}, .login = "", .tags = {"tag:recorder"}};
  std::string problem;
  const std::chrono::system_clock::time_point now = std::chrono::system_clock::from_time_t(1'800'000'000);

  Network network() const { return Network{{alice, server, recorder}}; }
  Question question(std::string_view user, std::optional<std::uint32_t> uid = 1000) const {
    return {.source = alice, .source_address = alice.addresses[0], .destination = server, .ssh_user = user, .uid = uid};
  }
  Verdict granted(const std::string& json, std::string_view user, std::optional<std::uint32_t> uid = 1000) {
    alice.capabilities[login_cap] = json;
    problem.clear();
    return GrantedRules{login_cap, {}}.decide(network(), question(user, uid), problem);
  }
  Verdict compiled(const std::string& json, std::string_view user, std::optional<std::uint32_t> uid = 1000) {
    problem.clear();
    return CompiledRules{std::string{json}}.decide(question(user, uid), now, 12h, 80, problem);
  }
};

const std::string accept_all_forwards = R"("action":{"accept":true,"allowAgentForwarding":true,"allowLocalPortForwarding":true,"allowRemotePortForwarding":true})";

}  // namespace

TEST_CASE("a grant's login rules decide as a file's do", "[policy][sources]") {
  Scene s;
  const auto v = s.granted(R"([{"action":"accept","users":["dev"],"acceptEnv":["GIT_*"]},{"action":"accept","users":["autogroup:nonroot"],"recorder":["tag:recorder"],"enforceRecorder":true}])", "dev");
  INFO(s.problem);
  CHECK(v.outcome == Outcome::accept);
  CHECK(v.local_user == "dev");
  CHECK(v.accept_env == std::vector<std::string>{"GIT_*"});
  CHECK(v.rule.text().rfind("grant of alice@example.com:1:", 0) == 0);
  const auto other = s.granted(s.alice.capabilities[login_cap], "bob");
  CHECK(other.outcome == Outcome::accept);
  CHECK(other.rule.line == 2);
  CHECK(other.enforce_recorder);
  REQUIRE(other.recorders.size() == 1);
  CHECK(other.recorders[0].id == "r1");
  CHECK(s.granted(s.alice.capabilities[login_cap], "root", 0).denial == Denial::user_not_permitted);
  CHECK(s.granted(R"([{"action":"check","users":["root"],"checkPeriod":"2h"}])", "root", 0).outcome == Outcome::check);
}

TEST_CASE("a grant works between whatever nodes it names", "[policy][sources]") {
  Scene s;
  const std::string rule = R"([{"action":"accept","users":["dev"]}])";
  s.alice.login.clear();
  s.alice.tags = {"tag:ci"};
  CHECK(s.granted(rule, "dev").outcome == Outcome::accept);
  s.alice = Scene{}.alice;
  s.server.tags.clear();
  s.server.login = "bob@example.com";  // somebody else's own machine
  CHECK(s.granted(rule, "dev").outcome == Outcome::accept);
  s.server.login = "alice@example.com";
  CHECK(s.granted(rule, "dev").outcome == Outcome::accept);
}

TEST_CASE("without a grant, or with one that cannot be read, nobody is let in", "[policy][sources]") {
  Scene s;
  CHECK(GrantedRules{login_cap, {}}.decide(s.network(), s.question("dev"), s.problem).denial == Denial::no_rule);
  CHECK(s.problem.empty());
  for (const char* bad : {"", "{", "{}", "[1]", R"([{"action":"accept"}])", R"([{"users":["dev"]}])", R"([{"action":"accept","users":["dev"],"extra":1}])",
                          R"([{"action":"accept","users":["dev"],"src":["*"]}])", R"([{"action":"accept","users":["dev"],"dst":["tag:x"]}])",
                          R"([{"action":"accept","users":["dev"],"action":"check"}])", R"([{"action":"accept","users":["dev"]},{"action":"allow","users":["dev"]}])"}) {
    INFO(bad);
    CHECK(s.granted(bad, "dev").outcome == Outcome::deny);
    CHECK_FALSE(s.problem.empty());
  }
}

TEST_CASE("the network's compiled rules: the first that has the peer and the name decides", "[policy][sources]") {
  Scene s;
  const std::string rules = R"({"rules":[{"principals":[{"nodeIP":"100.64.0.8"}],"sshUsers":{"*":"="},)" + accept_all_forwards + R"(},
    {"principals":[{"nodeIP":"100.64.0.8"},{"nodeIP":"100.64.0.1"}],"sshUsers":{"dev":"deploy","root":"","*":"="},)" + accept_all_forwards + R"(,"acceptEnv":["LANG"]},
    {"principals":[{"userLogin":"alice@example.com"}],"sshUsers":{"root":"root"},)" + accept_all_forwards + "}]}";
  const auto dev = s.compiled(rules, "dev");
  INFO(s.problem);
  CHECK(dev.outcome == Outcome::accept);
  CHECK(dev.local_user == "deploy");
  CHECK(dev.accept_env == std::vector<std::string>{"LANG"});
  CHECK(dev.rule.text() == "SSHPolicy:2:1");
  CHECK(dev.session_rules == SessionRules{});
  CHECK(s.compiled(rules, "eve").local_user == "eve");
  CHECK(s.compiled(rules, "root", 0).rule.line == 3);
  CHECK(s.compiled(rules, "toor", 0).denial == Denial::user_not_permitted);  // another name of uid 0
  s.alice.tags = {"tag:ci"};
  s.alice.login = "alice@example.com";
  CHECK(s.compiled(rules, "root", 0).outcome == Outcome::deny);  // a tagged node has no user
}

TEST_CASE("compiled rules that reject, ask, expire, or that are not understood", "[policy][sources]") {
  Scene s;
  const auto rule = [&](const std::string& action, const std::string& more = "", const std::string& who = R"({"any":true})") {
    return R"({"rules":[{"principals":[)" + who + R"(],"sshUsers":{"*":"="},"action":)" + action + more + "}," +
           R"({"principals":[{"any":true}],"sshUsers":{"*":"="},)" + accept_all_forwards + "}]}";
  };
  CHECK(s.compiled(rule(R"({"reject":true})"), "dev").outcome == Outcome::deny);
  CHECK(s.compiled(rule(R"({"reject":true})"), "dev").rule.line == 1);
  const auto check = s.compiled(rule(R"({"holdAndDelegate":"https://unused/machine/ssh/action"})"), "dev");
  CHECK(check.outcome == Outcome::check);
  CHECK(check.check_period == 12h);
  CHECK(s.compiled(rule(R"({"accept":true})", R"(,"ruleExpires":"2020-01-01T00:00:00Z")"), "dev").rule.line == 2);
  CHECK(s.compiled(rule(R"({"accept":true})", R"(,"ruleExpires":"2999-01-01T00:00:00.5Z")"), "dev").rule.line == 1);
  CHECK(s.compiled(rule(R"({"accept":true})", R"(,"ruleExpires":"some day")"), "dev").rule.line == 2);
  CHECK(CompiledRules{rule(R"({"accept":true})", R"(,"ruleExpires":"2099-01-01T00:00:00Z")")}.next_expiry(s.now) == std::chrono::system_clock::from_time_t(4'070'908'800));
  CHECK_FALSE(CompiledRules{rule(R"({"accept":true})")}.next_expiry(s.now));
  for (const char* bad : {R"({"something":true})", R"({})", "1"}) CHECK(s.compiled(rule(bad), "dev").outcome == Outcome::deny);
  for (const char* who : {R"({"any":false})", R"({})", R"({"nodeIP":"100.64.0.2"})", R"({"any":true,"newKind":"x"})", R"({"userLogin":"bob@example.com"})", "1"})
    CHECK(s.compiled(rule(R"({"reject":true})", "", who), "dev").rule.line == 2);
  for (const char* text : {"", "[]", "{\"rules\":1}", "{\"rules\":[1]}", "null", "{}", "{\"rules\":null}"}) CHECK(s.compiled(text, "dev").outcome == Outcome::deny);
}

TEST_CASE("compiled rules limit what a session may do as the service compiled it", "[policy][sources]") {
  Scene s;
  const auto v = s.compiled(R"({"rules":[{"principals":[{"any":true}],"sshUsers":{"*":"="},"action":{"accept":true,"sessionDuration":3600000000000,"allowLocalPortForwarding":true,
    "recorders":["100.64.0.20:80","100.64.0.21:81"],"onRecordingFailure":{"TerminateSessionWithMessage":"stop"}}}]})", "dev");
  INFO(s.problem);
  CHECK(v.session_rules.max_duration == 1h);
  CHECK_FALSE(v.session_rules.agent_forwarding);
  CHECK(v.session_rules.local_forward.empty());
  CHECK(v.session_rules.remote_forward == SessionRules::TargetLists{std::vector<std::string>{}});
  CHECK(v.record);
  CHECK(v.enforce_recorder);
  REQUIRE(v.recorders.size() == 1);
  CHECK(v.recorders[0].addresses[0] == *Address::parse("100.64.0.20"));
}

TEST_CASE("of two sources both must allow, and the stricter holds", "[policy][sources]") {
  Scene s;
  const auto yes = [&](const std::string& user) { return s.granted(R"([{"action":"accept","users":[")" + user + R"("],"acceptEnv":["A","B"]}])", user); };
  auto a = yes("dev");
  auto b = yes("dev");
  b.accept_env = {"B", "C"};
  b.session_rules.max_duration = 1h;
  b.record = true;
  b.recorder_tag = "tag:recorder";
  const auto v = both(std::move(a), b);
  CHECK(v.outcome == Outcome::accept);
  CHECK(v.accept_env == std::vector<std::string>{"B"});
  CHECK(v.session_rules.max_duration == 1h);
  CHECK(v.record);
  CHECK(both(yes("dev"), yes("eve")).outcome == Outcome::deny);  // two accounts
  auto check = yes("dev");
  check.outcome = Outcome::check;
  check.check_period = 2h;
  CHECK(both(yes("dev"), check).outcome == Outcome::check);
  CHECK(both(yes("dev"), check).check_period == 2h);
  CHECK(both(std::move(check), yes("dev")).outcome == Outcome::check);
  Verdict no;
  no.denial = Denial::user_not_permitted;
  CHECK(both(yes("dev"), no).denial == Denial::user_not_permitted);
  CHECK(both(std::move(no), yes("dev")).outcome == Outcome::deny);
}
