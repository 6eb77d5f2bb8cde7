#include "catch.h"
#include "sshd/broker/session_rules.h"

using namespace postern;
using namespace postern::sshd;
using namespace postern::sshd::broker;
using namespace std::chrono_literals;

namespace {
using auth::policy::SessionRules;

Node node(std::string capability = {}, std::string name = "postern.internal/cap/ssh") {
  Node n;
  n.name = "alice";
  if (!capability.empty()) n.capabilities.emplace(std::move(name), std::move(capability));
  return n;
}
}  // namespace

TEST_CASE("the policy, the network and this host's settings narrow each other", "[broker][session_rules]") {
  SessionRules granted;
  granted.max_duration = 2h;
  granted.pty = false;
  Config config;
  config.session_rules.max_duration = 3h;
  config.session_rules.sftp = SessionRules::Sftp::read_only;
  const auto rules = effective_rules(granted, node(R"([{"maxDuration": "1h", "sftp": "full"}, {"maxSessions": 2}])"), config);
  REQUIRE(rules);
  CHECK(rules->max_duration == 1h);
  CHECK_FALSE(rules->pty);
  CHECK(rules->sftp == SessionRules::Sftp::read_only);
  CHECK(rules->max_sessions == 2u);
  CHECK(*effective_rules({}, node(), Config{}) == SessionRules{});
}

TEST_CASE("only the capability that the settings name counts", "[broker][session_rules]") {
  Config config;
  CHECK(*effective_rules({}, node(R"([{"pty": false}])", "example.com/cap/ssh"), config) == SessionRules{});
  CHECK(*effective_rules({}, node("not read at all", "example.com/cap/ssh"), config) == SessionRules{});
  config.policy.session_capability = "example.com/cap/ssh";
  CHECK_FALSE(effective_rules({}, node(R"([{"pty": false}])", "example.com/cap/ssh"), config)->pty);
}

TEST_CASE("a capability that cannot be read is an error with its place, never no rule", "[broker][session_rules]") {
  const auto why = [](const std::string& capability) {
    const auto rules = effective_rules({}, node(capability), Config{});
    REQUIRE_FALSE(rules);
    return rules.error().doing;
  };
  CHECK(why("[{\"sftp\": \"no\"}]") == "capability:1:11: postern.internal/cap/ssh[0].sftp: \"no\" is not a value that sftp has (\"full\", \"read-only\" or \"none\")");
  CHECK(why("[{\"sftp\": ").find("capability:1:") == 0);
  CHECK(why("{}").find("must be an array of objects") != std::string::npos);
  CHECK(why("[{\"newRule\": 1}]").find("unknown session rule") != std::string::npos);
  CHECK(why("[{\"pty\": false, \"pty\": true}]").find("capability:1:17") == 0);
  CHECK(why(std::string(200, '[') + std::string(200, ']')).find("capability:1:") == 0);
}

TEST_CASE("rules go into the facts as they are", "[broker][session_rules]") {
  ConnectionFacts::Rules f;
  REQUIRE(write_rules({}, f));
  CHECK(f == ConnectionFacts::Rules{});
  SessionRules r;
  r.command = std::string(1024, 'x');
  r.max_duration = auth::policy::max_session_limit;
  r.idle_timeout = 1s;
  r.max_sessions = 0;
  r.record_input = true;
  r.sftp = SessionRules::Sftp::none;
  r.pty = false;
  REQUIRE(write_rules(r, f));
  CHECK(f.command.get() == *r.command);
  CHECK(f.max_duration_seconds == 365 * 86'400);
  CHECK(f.idle_timeout_seconds == 1);
  CHECK(f.max_sessions == 0);
  CHECK(f.record_input == 1);
  CHECK(f.sftp == ConnectionFacts::Rules::Sftp::none);
  CHECK(f.no_pty == 1);
  CHECK(f.valid());
  r.command = std::string(1025, 'x');
  CHECK_FALSE(write_rules(r, f));
}

TEST_CASE("every command that the reader takes fits the facts", "[broker][session_rules]") {
  CHECK(auth::policy::max_forced_command == sizeof(ConnectionFacts::Rules{}.command.text));
}

TEST_CASE("where nothing is said every forwarding is allowed, and none under enforceRecorder", "[broker][session_rules]") {
  ConnectionFacts::Forwarding f;
  REQUIRE(write_forwarding({}, false, f));
  CHECK(f == ConnectionFacts::Forwarding{});
  REQUIRE(write_forwarding({}, true, f));
  CHECK((f.local == 0 && f.remote == 0 && f.agent == 0 && f.x11 == 0));
}

TEST_CASE("under enforceRecorder what a source names is allowed, within what it says", "[broker][session_rules]") {
  SessionRules r;
  r.local_forward = {{"db:5432"}};
  r.agent_forwarding = false;
  r.named = {"agentForwarding", "localForward"};
  ConnectionFacts::Forwarding f;
  REQUIRE(write_forwarding(r, true, f));
  CHECK((f.local == 1 && f.remote == 0 && f.agent == 0 && f.x11 == 0));
  CHECK(f.local_targets.get() == "db:5432\n\f");
  REQUIRE(write_forwarding(r, false, f));
  CHECK((f.remote == 1 && f.x11 == 1));
}

TEST_CASE("targets that do not fit the facts are no targets", "[broker][session_rules]") {
  SessionRules r;
  ConnectionFacts::Forwarding f;
  for (int i = 0; i < 300; i++) r.remote_forward.resize(1), r.remote_forward[0].push_back("host-" + std::to_string(i) + ".example.com:80");
  CHECK_FALSE(write_forwarding(r, false, f));
}
