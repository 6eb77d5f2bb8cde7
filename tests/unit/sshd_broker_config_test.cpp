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

TEST_CASE("where rules come from is the file unless it is said, and each source is known by name", "[broker][config]") {
  const auto c = parse_config(listen, "p.toml");
  REQUIRE(c);
  CHECK(c->policy.source == std::vector{PolicySource::file});
  CHECK_FALSE(c->tailscaled.ssh_policy);
  const std::string tailscaled = "[identity]\nprovider = \"tailscaled\"\n";
  const auto all = parse_config(tailscaled + "[policy]\nsource = [\"tailnet\", \"grants\", \"file\"]\nlogin_capability = \"example.com/cap/login\"\ntailnet_check_period = \"1h\"\n", "p.toml");
  REQUIRE(all);
  CHECK(all->policy.source == std::vector{PolicySource::tailnet, PolicySource::grants, PolicySource::file});
  CHECK(all->tailscaled.ssh_policy);
  CHECK(all->listen.addresses.empty());  // the network's own
  CHECK(all->policy.tailnet_check_period == 1h);
  for (const std::string wrong : {"source = []", "source = [\"acl\"]", "source = \"file\"", "source = [\"tailnet\"]", "login_capability = \"login\""}) {
    INFO(wrong);
    CHECK(problems_of(listen + "[policy]\n" + wrong + "\n").size() == 1);
  }
  CHECK(problems_of("[log]\nlevel = \"info\"\n").size() == 1);  // static, and no address
  CHECK(problems_of(tailscaled + "[listen]\nport = 22\ntakeover = \"nft\"\ntakeover_port = 22\n").size() == 1);
  CHECK(problems_of(tailscaled + "[listen]\ntakeover = \"iptables\"\n").size() == 1);
}

TEST_CASE("penalties and what may come before a login have OpenSSH's defaults and can be set", "[broker][config]") {
  const auto c = parse_config(listen, "p.toml");
  REQUIRE(c);
  CHECK(c->limits.penalties.auth_failed == 5s);
  CHECK(c->limits.penalties.no_auth == 1s);
  CHECK(c->limits.penalties.key_scan == 100ms);
  CHECK(c->limits.penalties.grace_exceeded == 10s);
  CHECK(c->limits.penalties.min == 15s);
  CHECK(c->limits.penalties.max == 600s);
  CHECK(c->limits.penalties.sources == 65'536);
  CHECK(c->limits.penalty_exempt.empty());
  CHECK(c->limits.bytes_before_login == 128 * 1024);
  CHECK(c->limits.packets_before_login == 500);
  const auto set = parse_config(listen + "[limits]\npenalty_auth_failed = \"0ms\"\npenalty_exempt = [\"10.0.0.0/8\", \"fd7a::1\"]\nbytes_before_login = \"1MiB\"\n", "p.toml");
  REQUIRE(set);
  CHECK(set->limits.penalties.auth_failed == 0s);
  REQUIRE(set->limits.penalty_exempt.size() == 2);
  CHECK(set->limits.penalty_exempt[0].contains(Address::parse("10.1.2.3").value()));
  CHECK(set->limits.bytes_before_login == 1024 * 1024);
  for (const std::string wrong : {"penalty_min = \"20m\"", "penalty_exempt = [\"ten\"]", "penalty_exempt = \"10.0.0.0/8\"", "packets_before_login = 1", "bytes_before_login = \"1KiB\"", "penalty_no_auth = 1"}) {
    INFO(wrong);
    CHECK(problems_of(listen + "[limits]\n" + wrong + "\n").size() == 1);
  }
}

TEST_CASE("key exchanges by amount and by time are off until they are set, and not without end", "[broker][config]") {
  const auto none = parse_config(listen, "p.toml");
  REQUIRE(none);
  CHECK((none->ssh.rekey_bytes == 0 && none->ssh.rekey_interval == 0s));
  const auto set = parse_config(listen + "[ssh]\nrekey_bytes = \"1GiB\"\nrekey_interval = \"1h\"\n", "p.toml");
  REQUIRE(set);
  CHECK((set->ssh.rekey_bytes == std::uint64_t{1} << 30 && set->ssh.rekey_interval == 1h));
  CHECK(parse_config(listen + "[ssh]\nrekey_bytes = \"0B\"\nrekey_interval = \"0s\"\n", "p.toml"));
  for (const auto wrong : {"rekey_bytes = \"63KiB\"", "rekey_bytes = 1000000", "rekey_interval = \"999ms\"", "rekey_interval = \"8d\""})
    CHECK(problems_of(listen + "[ssh]\n" + wrong + "\n").size() == 1);
}

TEST_CASE("durations are a number and a unit", "[broker][config]") {
  CHECK(parse_duration("250ms") == 250ms);
  CHECK(parse_duration("10s") == 10s);
  CHECK(parse_duration("5m") == 5min);
  CHECK(parse_duration("2h") == 2h);
  for (const char* bad : {"", "10", "s", "-1s", "1 s", "1.5s", "10S", "99999999999999999s"}) CHECK_FALSE(parse_duration(bad));
}

TEST_CASE("session rules of the whole host are read by their names in the settings", "[broker][config]") {
  const auto c = parse_config(listen + "[session_rules]\ncommand = \"/bin/menu\"\nmax_duration = \"12h\"\nmax_sessions = 2\nsftp = \"read-only\"\npty = false\n"
                                       "local_forward = [\"db:5432\"]\n", "p.toml");
  REQUIRE(c);
  CHECK(c->session_rules.command == "/bin/menu");
  CHECK(c->session_rules.max_duration == 12h);
  CHECK_FALSE(c->session_rules.idle_timeout);
  CHECK(c->session_rules.max_sessions == 2u);
  CHECK(c->session_rules.sftp == auth::policy::SessionRules::Sftp::read_only);
  CHECK_FALSE(c->session_rules.pty);
  CHECK(c->session_rules.local_forward == auth::policy::SessionRules::TargetLists{{"db:5432"}});
  CHECK(c->session_rules.named == std::vector<std::string>{"localForward"});
  CHECK(parse_config(listen, "p.toml")->session_rules == auth::policy::SessionRules{});
}

TEST_CASE("a session rule that is wrong in the settings is named with its place", "[broker][config]") {
  const auto p = problems_of(listen + "[session_rules]\nmax_duration = 30\nidle_timeout = \"1h30m\"\nmax_sessions = 2.5\nsftp = true\npty = 1979-05-27\nmaxSessions = 5\n"
                                      "remote_forward = [\"x\", 7]\n");
  REQUIRE(p.size() == 8);
  CHECK(p[0] == "p.toml:4:16: session_rules.max_duration: must be a string, not a number");
  CHECK(p[1].find("p.toml:5:16: session_rules.idle_timeout: \"1h30m\" is not a duration") == 0);
  CHECK(p[2] == "p.toml:6:16: session_rules.max_sessions: must be a whole number from 0 to 10000");
  CHECK(p[3] == "p.toml:7:8: session_rules.sftp: must be a string, not true or false");
  CHECK(p[4] == "p.toml:8:7: session_rules.pty: must be a text, a number, true, false or a list");
  CHECK(p[5].find("p.toml:9:15: session_rules.maxSessions: is not a setting (settings of [session_rules]: ") == 0);
  CHECK(p[6].find("p.toml:10:19: session_rules.remote_forward[0]: \"x\" is not a target") == 0);
  CHECK(p[7] == "p.toml:10:24: session_rules.remote_forward[1]: must be a string, not a number");
}

TEST_CASE("the capability's name and the network's domains go to the policy", "[broker][config]") {
  const auto c = parse_config(listen + "[policy]\nsession_capability = \"example.com/cap/ssh\"\ndomains = [\"example.com\", \"github\"]\n", "p.toml");
  REQUIRE(c);
  CHECK(load_options(*c).session_capability == "example.com/cap/ssh");
  CHECK(load_options(*c).domains == std::vector<std::string>{"example.com", "github"});
  const auto plain = parse_config(listen, "p.toml");
  CHECK(load_options(*plain).session_capability == "postern.internal/cap/ssh");
  CHECK(load_options(*plain).domains.empty());
  for (const char* bad : {"session_capability = \"\"", "session_capability = \"ssh\"", "session_capability = \"a b/c\"", "domains = \"example.com\"",
                          "domains = [\"\"]", "domains = [\"a@example.com\"]", "domains = [\".example.com\"]", "domains = [5]"}) {
    INFO(bad);
    CHECK(problems_of(listen + "[policy]\n" + bad + "\n").size() == 1);
  }
}
