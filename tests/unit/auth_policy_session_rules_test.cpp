#include "auth/policy/session_rules.h"
#include "catch.h"

#include <algorithm>
#include <random>
#include <utility>

using namespace postern::auth::policy;
using namespace std::chrono_literals;

namespace {

using Lines = std::vector<std::string>;
using Sftp = SessionRules::Sftp;

/// The rules that `text` is, and what is wrong with it as "line:column: field: message".
std::pair<SessionRules, Lines> read(std::string_view text) {
  hujson::Problems problems{"f"};
  const auto value = hujson::parse(text, problems);
  REQUIRE(value);
  auto rules = read_session_rules(*value, "app", problems);
  Lines lines;
  for (const auto& p : problems.take())
    lines.push_back(std::to_string(p.place.line) + ":" + std::to_string(p.place.column) + ": " + p.field + ": " + p.message);
  return {std::move(rules), std::move(lines)};
}

SessionRules good(std::string_view text) {
  auto [rules, lines] = read(text);
  INFO(text);
  CHECK(lines == Lines{});
  return rules;
}

/// The one thing that is wrong with the member `text` of an object that begins in column 2.
std::string wrong(std::string_view text) {
  const auto lines = read("[{" + std::string{text} + "}]").second;
  INFO(text);
  REQUIRE(lines.size() == 1);
  return lines[0];
}

/// Rules as they come out of a reader or of stricter(), every kind of value in every member.
class Generator {
 public:
  explicit Generator(unsigned seed) : random_{seed} {}
  SessionRules next() {
    SessionRules r;
    if (one_of(2) == 0) r.command = pick({"/bin/a", "/bin/b", "b"});
    if (one_of(6) == 0) {
      r.command.reset();
      r.command_conflict = true;
    }
    if (one_of(2) == 0) r.max_duration = std::chrono::seconds{1 + one_of(4)};
    if (one_of(2) == 0) r.idle_timeout = std::chrono::seconds{1 + one_of(4)};
    if (one_of(2) == 0) r.max_sessions = one_of(4);
    r.record_input = one_of(2) == 0;
    r.sftp = static_cast<Sftp>(one_of(3));
    r.pty = one_of(2) == 0;
    r.local_forward = lists();
    r.remote_forward = lists();
    r.agent_forwarding = one_of(2) == 0;
    r.x11_forwarding = one_of(2) == 0;
    for (const char* name : {"agentForwarding", "localForward", "remoteForward", "x11Forwarding"})
      if (one_of(2) == 0) r.named.emplace_back(name);
    return r;
  }

 private:
  unsigned one_of(unsigned n) { return static_cast<unsigned>(random_() % n); }
  std::string pick(std::initializer_list<const char*> from) { return *(from.begin() + one_of(static_cast<unsigned>(from.size()))); }
  SessionRules::TargetLists lists() {
    SessionRules::TargetLists all;
    for (unsigned n = one_of(3); n > 0; n--) {
      std::vector<std::string> one;
      for (unsigned m = one_of(3); m > 0; m--) one.push_back(pick({"a:1", "b:2", "c:3"}));
      std::sort(one.begin(), one.end());
      one.erase(std::unique(one.begin(), one.end()), one.end());
      all.push_back(std::move(one));
    }
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    return all;
  }
  std::mt19937 random_;
};

}  // namespace

TEST_CASE("every session rule is read", "[auth][policy][session_rules]") {
  const auto r = good(R"([{
    "command": "/usr/bin/backup --all", "maxDuration": "12h", "idleTimeout": "90s", "maxSessions": 3, "recordInput": true, "sftp": "read-only", "pty": false,
    "localForward": ["db:5432", "*:443", "10.0.0.0/8:*", "[fd7a::1]:8000-8999", "unix:/run/app/*.sock", "127.0.0.1:1", "[fd7a::/48]:*"],
    "remoteForward": [], "agentForwarding": false, "x11Forwarding": true,
  }])");
  CHECK(r.command == "/usr/bin/backup --all");
  CHECK_FALSE(r.command_conflict);
  CHECK(r.max_duration == 12h);
  CHECK(r.idle_timeout == 90s);
  CHECK(r.max_sessions == 3u);
  CHECK(r.record_input);
  CHECK(r.sftp == Sftp::read_only);
  CHECK_FALSE(r.pty);
  CHECK(r.local_forward ==
        SessionRules::TargetLists{{"*:443", "10.0.0.0/8:*", "127.0.0.1:1", "[fd7a::/48]:*", "[fd7a::1]:8000-8999", "db:5432", "unix:/run/app/*.sock"}});
  CHECK(r.remote_forward == SessionRules::TargetLists{{}});
  CHECK_FALSE(r.agent_forwarding);
  CHECK(r.x11_forwarding);
  CHECK(r.named == Lines{"agentForwarding", "localForward", "remoteForward", "x11Forwarding"});
}

TEST_CASE("a capability without members changes nothing", "[auth][policy][session_rules]") {
  CHECK(good("[]") == SessionRules{});
  CHECK(good("[{}, {}]") == SessionRules{});
  CHECK(SessionRules{}.members().empty());
}

TEST_CASE("the bounds of session rules hold, and their values pass", "[auth][policy][session_rules]") {
  CHECK(good(R"([{"maxDuration": "1s"}])").max_duration == 1s);
  CHECK(good(R"([{"maxDuration": "365d"}])").max_duration == 24h * 365);
  CHECK(good(R"([{"maxDuration": "2000ms"}])").max_duration == 2s);
  CHECK(good(R"([{"maxSessions": 0}])").max_sessions == 0u);
  CHECK(good(R"([{"maxSessions": 10000}])").max_sessions == 10000u);
  CHECK(good("[{\"command\": \"" + std::string(1024, 'x') + "\"}]").command->size() == 1024);
  CHECK(good(R"([{"command": "echo \"\u00e4\" # fine"}])").command == "echo \"\xc3\xa4\" # fine");
}

TEST_CASE("every session rule that is wrong has its place", "[auth][policy][session_rules]") {
  const std::string duration = "must be a duration";
  CHECK(read("{}").second == Lines{"1:1: app: must be an array of objects, not an object"});
  CHECK(read("\"x\"").second == Lines{"1:1: app: must be an array of objects, not a string"});
  CHECK(read("[{},\n 5]").second == Lines{"2:2: app[1]: must be an object, not a number"});
  CHECK(wrong(R"("maxduration": "5m")") == "1:3: app[0].maxduration: unknown session rule \"maxduration\"");
  CHECK(wrong(R"("max_duration": "5m")") == "1:3: app[0].max_duration: unknown session rule \"max_duration\"");
  CHECK(wrong(R"("nonsense": {"a": [1]})") == "1:3: app[0].nonsense: unknown session rule \"nonsense\"");
  CHECK(wrong(R"("command": "")") == "1:14: app[0].command: must not be empty");
  CHECK(wrong(R"("command": "  ")") == "1:14: app[0].command: must not be empty");
  CHECK(wrong(R"("command": null)") == "1:14: app[0].command: must be a string, not null");
  CHECK(wrong(R"("command": ["a", "b"])") == "1:14: app[0].command: must be a string, not an array");
  CHECK(wrong(R"("command": "a\nb")") == "1:14: app[0].command: holds a control character");
  CHECK(wrong("\"command\": \"" + std::string(1025, 'x') + "\"") == "1:14: app[0].command: is too long");
  for (const char* name : {"maxDuration", "idleTimeout"}) {
    const auto at = [&](const std::string& value) { return wrong("\"" + std::string{name} + "\": " + value); };
    const std::string place = std::string{"1:18: app[0]."} + name + ": ";
    CHECK(at("30") == place + "must be a string, not a number");
    CHECK(at("\"30\"") == place + "\"30\" is not a duration");
    CHECK(at("\"1h30m\"") == place + "\"1h30m\" is not a duration");
    CHECK(at("\"-5m\"") == place + "\"-5m\" is not a duration");
    CHECK(at("\"soon\\u0007\"") == place + "\"soon\\x07\" is not a duration");
    CHECK(at("\"0s\"") == place + "must be from 1s to 365d");
    CHECK(at("\"366d\"") == place + "must be from 1s to 365d");
    CHECK(at("\"1500ms\"") == place + "must be whole seconds");
  }
  for (const char* value : {"-1", "1.0", "1e1", "10001", "99999999999999999999", "0.5"})
    CHECK(wrong(std::string{"\"maxSessions\": "} + value) == "1:18: app[0].maxSessions: must be a whole number from 0 to 10000");
  CHECK(wrong(R"("maxSessions": "5")") == "1:18: app[0].maxSessions: must be a number, not a string");
  CHECK(wrong(R"("recordInput": "yes")") == "1:18: app[0].recordInput: must be true or false, not a string");
  CHECK(wrong(R"("recordInput": 1)") == "1:18: app[0].recordInput: must be true or false, not a number");
  CHECK(wrong(R"("sftp": "readonly")") == "1:11: app[0].sftp: \"readonly\" is not a value that sftp has");
  CHECK(wrong(R"("sftp": "read_only")") == "1:11: app[0].sftp: \"read_only\" is not a value that sftp has");
  CHECK(wrong(R"("sftp": false)") == "1:11: app[0].sftp: must be a string, not true or false");
  CHECK(wrong(R"("pty": null)") == "1:10: app[0].pty: must be true or false, not null");
  CHECK(wrong(R"("agentForwarding": "no")") == "1:22: app[0].agentForwarding: must be true or false, not a string");
  CHECK(wrong(R"("x11Forwarding": [])") == "1:20: app[0].x11Forwarding: must be true or false, not an array");
  CHECK(wrong(R"("localForward": "db:5432")") == "1:19: app[0].localForward: must be an array of strings, not a string");
  CHECK(wrong(R"("localForward": true)") == "1:19: app[0].localForward: must be an array of strings, not true or false");
  CHECK(wrong(R"("remoteForward": ["a:1", 5])") == "1:28: app[0].remoteForward[1]: must be a string, not a number");
}

TEST_CASE("a forwarding target that could not be meant is refused", "[auth][policy][session_rules]") {
  for (const char* target : {"", "db", "db:", ":22", "db:0", "db:65536", "db:9-8", "db:1-", "db:-1", "db:1-2-3", "db:http", "db: 1", " db:1", "db :1", "fd7a::1:22",
                             "[fd7a::1]", "[fd7a::1]22", "[fd7a::1:22", "[10.0.0.1]:22", "[db]:22", "fd7a::/48:22", "10.0.0.0/33:22", "10.0.0/8:22", "10.0.0:22",
                             "a..b:1", ".a:1", "a.:1", "*.example.com:1", "a/b:1", "unix:", "unix:relative", "unix:/a/../b", "unix:/a/..", "UNIX:/a"}) {
    INFO(target);
    const auto lines = read("[{\"localForward\": [\"" + std::string{target} + "\"]}]").second;
    REQUIRE(lines.size() == 1);
    CHECK(lines[0].substr(0, 31) == "1:20: app[0].localForward[0]: \"");
    CHECK(lines[0].find("\" is not a target: ") != std::string::npos);
  }
  CHECK(read("[{\"localForward\": [\"unix:/" + std::string(107, 'a') + "\"]}]").second.size() == 1);
  CHECK(good("[{\"localForward\": [\"unix:/" + std::string(106, 'a') + "\"]}]").local_forward.size() == 1);
  CHECK(good(R"([{"localForward": ["my_host-2.example.com:1", "*:*", "a:1", "a:1"]}])").local_forward ==
        SessionRules::TargetLists{{"*:*", "a:1", "my_host-2.example.com:1"}});
  std::string many = "\"a:1\"";
  for (int i = 0; i < 256; i++) many += ", \"a:1\"";
  CHECK(read("[{\"localForward\": [" + many + "]}]").second == Lines{"1:19: app[0].localForward: has too many targets"});
}

TEST_CASE("all that is wrong is told at once, in file order", "[auth][policy][session_rules]") {
  CHECK(read("[{\"sftp\": 1,\n  \"pty\": 2},\n {\"maxSessions\": -1, \"x\": 1}]").second ==
        Lines{"1:11: app[0].sftp: must be a string, not a number", "2:10: app[0].pty: must be true or false, not a number",
              "3:18: app[1].maxSessions: must be a whole number from 0 to 10000", "3:22: app[1].x: unknown session rule \"x\""});
}

TEST_CASE("a hint says how it is written", "[auth][policy][session_rules]") {
  const auto hint = [](std::string_view text) {
    hujson::Problems problems{"f"};
    (void)read_session_rules(*hujson::parse(text, problems), "app", problems);
    const auto all = problems.take();
    REQUIRE(all.size() == 1);
    return all[0].hint;
  };
  CHECK(hint(R"([{"max_duration": "5m"}])") == "write \"maxDuration\"");
  CHECK(hint(R"([{"PTY": false}])") == "write \"pty\"");
  CHECK(hint(R"([{"nonsense": 1}])").find("command, maxDuration, idleTimeout") != std::string::npos);
  CHECK(hint(R"([{"idleTimeout": "1h30m"}])") == "a whole number and s, m, h or d: \"90m\"");
  CHECK(hint(R"([{"sftp": "no"}])") == "\"full\", \"read-only\" or \"none\"");
  CHECK(hint(R"([{"localForward": ["fd7a::1:22"]}])").find("[fd7a::1]:22") != std::string::npos);
}

TEST_CASE("several objects of one capability narrow each other", "[auth][policy][session_rules]") {
  const auto r = good(R"([{"maxDuration": "2h", "sftp": "read-only", "pty": false}, {"maxDuration": "1h", "sftp": "full"}, {"sftp": "none", "recordInput": true}])");
  CHECK(r.max_duration == 1h);
  CHECK(r.sftp == Sftp::none);
  CHECK_FALSE(r.pty);
  CHECK(r.record_input);
}

TEST_CASE("two sources that force different commands leave no command that could be run", "[auth][policy][session_rules]") {
  SessionRules a, b, c;
  a.command = "/bin/a";
  b.command = "/bin/b";
  CHECK(stricter(a, a).command == "/bin/a");
  CHECK(stricter(a, c).command == "/bin/a");
  CHECK(stricter(c, a).command == "/bin/a");
  CHECK_FALSE(stricter(a, c).command_conflict);
  for (const auto& r : {stricter(a, b), stricter(b, a), stricter(stricter(a, b), a), stricter(stricter(a, b), c), stricter(a, stricter(b, a))}) {
    CHECK(r.command_conflict);
    CHECK_FALSE(r.command);
  }
  CHECK(good(R"([{"command": "x"}, {"command": "y"}])").command_conflict);
}

TEST_CASE("the stricter of two is what is tighter in each", "[auth][policy][session_rules]") {
  SessionRules a, b;
  a.max_duration = 1h;
  b.max_duration = 2h;
  a.max_sessions = 0;
  b.max_sessions = 5;
  b.idle_timeout = 5s;
  a.local_forward = {{"a:1"}};
  b.local_forward = {{"b:1"}};
  b.remote_forward = {{}};
  b.agent_forwarding = false;
  a.named = {"localForward"};
  b.named = {"agentForwarding", "localForward"};
  const auto r = stricter(a, b);
  CHECK(r.max_duration == 1h);
  CHECK(r.max_sessions == 0u);
  CHECK(r.idle_timeout == 5s);
  CHECK(r.local_forward == SessionRules::TargetLists{{"a:1"}, {"b:1"}});  // a target must stand in both
  CHECK(r.remote_forward == SessionRules::TargetLists{{}});
  CHECK_FALSE(r.agent_forwarding);
  CHECK(r.x11_forwarding);
  CHECK(r.named == Lines{"agentForwarding", "localForward"});
}

TEST_CASE("the order in which sources are read changes nothing", "[auth][policy][session_rules]") {
  Generator generate{20240607};
  for (int i = 0; i < 3000; i++) {
    const auto a = generate.next(), b = generate.next(), c = generate.next();
    REQUIRE(stricter(a, b) == stricter(b, a));
    REQUIRE(stricter(stricter(a, b), c) == stricter(a, stricter(b, c)));
    REQUIRE(stricter(a, a) == a);
    REQUIRE(stricter(stricter(a, b), b) == stricter(a, b));
    REQUIRE(stricter(SessionRules{}, a) == a);
  }
}

TEST_CASE("members are what differs from the default, as JSON that reads back as the same", "[auth][policy][session_rules]") {
  using Members = std::vector<std::pair<std::string, std::string>>;
  CHECK(good(R"([{"command": "say \"h\u00e4\" \\", "maxDuration": "5400s", "idleTimeout": "86400s", "maxSessions": 2, "recordInput": true, "sftp": "read-only",
                  "pty": false, "agentForwarding": false, "x11Forwarding": false}])")
            .members() == Members{{"command", "\"say \\\"h\xc3\xa4\\\" \\\\\""},
                                  {"maxDuration", "\"90m\""},
                                  {"idleTimeout", "\"1d\""},
                                  {"maxSessions", "2"},
                                  {"recordInput", "true"},
                                  {"sftp", "\"read-only\""},
                                  {"pty", "false"},
                                  {"agentForwarding", "false"},
                                  {"x11Forwarding", "false"},
                                  {"named", "[\"agentForwarding\",\"x11Forwarding\"]"}});
  CHECK(good(R"([{"localForward": ["b:1", "a:1"]}, {"localForward": ["c:1"], "remoteForward": []}])").members() ==
        Members{{"localForward", "[[\"a:1\",\"b:1\"],[\"c:1\"]]"}, {"remoteForward", "[[]]"}, {"named", "[\"localForward\",\"remoteForward\"]"}});
  CHECK(good(R"([{"command": "x"}, {"command": "y"}])").members() == Members{{"commandConflict", "true"}});

  // Without forwardings (several lists have no one object that they come from) the members are an object that reads back as the same.
  Generator generate{7};
  for (int i = 0; i < 500; i++) {
    auto r = generate.next();
    r.command_conflict = false;
    r.local_forward = r.remote_forward = {};
    r.named.clear();
    std::string text = "[{";
    for (const auto& [name, value] : r.members()) text += "\"" + name + "\": " + value + ", ";
    auto back = good(text + "}]");
    back.named.clear();
    REQUIRE(back == r);
  }
}

TEST_CASE("the settings of posternd.toml are the same rules under their own names", "[auth][policy][session_rules]") {
  const auto settings = session_rule_settings();
  CHECK(settings.front() == "command");
  CHECK(settings[1] == "max_duration");
  hujson::Problems problems{"f"};
  const auto table = hujson::parse(R"({"max_duration": "5m", "x11_forwarding": false, "record_input": true, "local_forward": ["a:1"]})", problems);
  const auto r = read_session_rule_settings(*table, "session_rules", problems);
  CHECK(problems.empty());
  CHECK(r.max_duration == 5min);
  CHECK_FALSE(r.x11_forwarding);
  CHECK(r.record_input);
  CHECK(r.named == Lines{"localForward", "x11Forwarding"});
  CHECK(r == good(R"([{"maxDuration": "5m", "x11Forwarding": false, "recordInput": true, "localForward": ["a:1"]}])"));
  (void)read_session_rule_settings(*hujson::parse(R"({"maxDuration": "5m", "idle_timeout": 5})", problems), "session_rules", problems);
  const auto all = problems.take();
  REQUIRE(all.size() == 2);
  CHECK(all[0].text() == "f:1:2: session_rules.maxDuration: unknown session rule \"maxDuration\" (write \"max_duration\")");
  CHECK(all[1].text().find("f:1:39: session_rules.idle_timeout: must be a string, not a number") == 0);
}
