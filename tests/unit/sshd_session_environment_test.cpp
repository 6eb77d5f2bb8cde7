#include "sshd/session/environment.h"

#include "auth/pam/pam.h"
#include "sshd/session/channel.h"
#include "tests/tools/session_harness.h"

#include "catch.h"

#include <algorithm>
#include <csignal>
#include <fstream>

using namespace postern;
using namespace postern::sshd::session;

namespace {
sshd::ConnectionFacts facts_accepting(std::initializer_list<const char*> globs) {
  sshd::ConnectionFacts f;
  for (const char* g : globs) (void)f.accept_env[f.accept_env_count++].set(g);
  (void)f.peer_address.set("192.0.2.1");
  (void)f.server_address.set("192.0.2.2");
  f.peer_port = 1000;
  f.server_port = 22;
  return f;
}
}  // namespace

TEST_CASE("a variable is accepted by the rule's globs, LANG and LC_* always", "[environment]") {
  const auto none = facts_accepting({});
  CHECK(accepts_environment(none, "LANG", "de_DE.UTF-8"));
  CHECK(accepts_environment(none, "LC_ALL", "C"));
  CHECK_FALSE(accepts_environment(none, "EDITOR", "vi"));
  const auto some = facts_accepting({"GIT_*", "F?O"});
  CHECK(accepts_environment(some, "GIT_AUTHOR_NAME", "Alice"));
  CHECK(accepts_environment(some, "FOO", "1"));
  CHECK_FALSE(accepts_environment(some, "FOOO", "1"));
  CHECK_FALSE(accepts_environment(some, "git_x", "1"));
}

TEST_CASE("no glob lets a variable through that loads code or is the server's to say", "[environment]") {
  const auto all = facts_accepting({"*"});
  for (const char* name : {"LD_PRELOAD", "ld_preload", "Ld_Library_Path", "DYLD_INSERT_LIBRARIES", "BASH_ENV", "ENV", "SHELLOPTS", "PS4", "IFS",
                           "PATH", "GCONV_PATH", "GLIBC_TUNABLES", "MALLOC_CHECK_", "NODE_OPTIONS", "PYTHONPATH", "PERL5LIB", "RUBYOPT",
                           "LOCPATH", "NLSPATH", "TERMINFO", "TERMINFO_DIRS", "TERMCAP", "SSH_CONNECTION", "SSH_AUTH_SOCK",
                           "XDG_RUNTIME_DIR", "HOME", "USER", "SHELL", "BASHOPTS"}) {
    INFO(name);
    CHECK_FALSE(accepts_environment(all, name, "x"));
  }
  CHECK(accepts_environment(all, "EDITOR", "vi"));
  CHECK(accepts_environment(all, "TZ", "Europe/Berlin"));
  CHECK_FALSE(accepts_environment(all, "TZ", "/home/a/zone"));
  CHECK_FALSE(accepts_environment(all, "TZ", ":/etc/x"));
  CHECK_FALSE(accepts_environment(all, "TZ", "../x"));
}

TEST_CASE("names and values that no shell has are refused", "[environment]") {
  const auto all = facts_accepting({"*"});
  for (const std::string& name : {std::string{}, std::string{"A=B"}, std::string{"A B"}, std::string{"BASH_FUNC_x%%"}, std::string{"A\0B", 3},
                                  std::string{"\xc3\xa4"}, std::string{"A\n"}, std::string{"A-B"}})
    CHECK_FALSE(accepts_environment(all, name, "x"));
  CHECK_FALSE(accepts_environment(all, "FOO", std::string_view{"a\0b", 3}));
}

TEST_CASE("globs match whole names", "[environment]") {
  CHECK(glob_matches("*", ""));
  CHECK(glob_matches("a*b*c", "aXbYbZc"));
  CHECK_FALSE(glob_matches("a*b*c", "aXbYbZ"));
  CHECK_FALSE(glob_matches("a", "aa"));
  CHECK(glob_matches("??", "ab"));
  CHECK_FALSE(glob_matches("", "a"));
  CHECK_FALSE(glob_matches("*a*a*a*a*a*b", std::string(200, 'a')));
}

TEST_CASE("the server's variables win over the client's, and PAM's over the basic ones", "[environment]") {
  const auto facts = facts_accepting({"*"});
  pty::LocalUser user;
  user.name = "alice";
  user.home = "/home/alice";
  user.uid = 1000;
  const auto env = make_environment({facts, user, {{"TERM", "evil"}, {"FOO", "1"}}, {"PATH=/opt/bin:/bin", "LANG=C.UTF-8", "SSH_TTY=/x"}, "/dev/pts/1", "xterm"});
  const auto has = [&](const std::string& e) { return std::count(env.begin(), env.end(), e) == 1; };
  CHECK(has("USER=alice"));
  CHECK(has("LOGNAME=alice"));
  CHECK(has("SHELL=/bin/sh"));
  CHECK(has("PATH=/opt/bin:/bin"));
  CHECK(has("TERM=xterm"));
  CHECK(has("FOO=1"));
  CHECK(has("LANG=C.UTF-8"));
  CHECK(has("MAIL=/var/mail/alice"));
  CHECK(has("SSH_TTY=/dev/pts/1"));
  CHECK(has("SSH_CLIENT=192.0.2.1 1000 22"));
  CHECK(has("SSH_CONNECTION=192.0.2.1 1000 192.0.2.2 22"));
}

TEST_CASE("signals have the names of RFC 4254", "[channel]") {
  CHECK(signal_number("TERM") == SIGTERM);
  CHECK(signal_number("STOP") == 0);
  CHECK(signal_number("") == 0);
  CHECK(signal_name(SIGKILL) == "KILL");
  CHECK(signal_name(SIGBUS) == "SIG@openssh.com");
}

TEST_CASE("all modules of a PAM service are found, through includes and long lines", "[pam]") {
  test::TemporaryFolder folder;
  std::ofstream{folder.path + "/postern"} << "# a comment\naccount required pam_a.so\n@include common\nsession [success=ok default=bad] pam_b.so x\n"
                                              "session include deep\nauth substack deep\n-session optional \\\n  pam_c.so\n";
  std::ofstream{folder.path + "/common"} << "account required pam_a.so\n@include common\nsession optional pam_d.so # why\n";
  std::ofstream{folder.path + "/deep"} << "session required /opt/pam_e.so\n";
  std::ofstream{folder.path + "/other"} << "auth required pam_f.so\n";
  bool found = false;
  const auto modules = auth::pam::modules_of("postern", folder.path, found);
  CHECK(found);
  CHECK(modules == std::vector<std::string>{"pam_a.so", "pam_d.so", "pam_b.so", "/opt/pam_e.so", "pam_c.so", "pam_f.so"});
  const auto other = auth::pam::modules_of("absent", folder.path, found);
  CHECK_FALSE(found);
  CHECK(other == std::vector<std::string>{"pam_f.so"});
  const auto warnings = auth::pam::warm_up("absent", folder.path);
  REQUIRE_FALSE(warnings.empty());
  CHECK(warnings[0].find("\"other\" is used") != std::string::npos);
}
