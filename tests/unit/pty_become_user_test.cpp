#include "pty/become_user.h"

#include "catch.h"

#include <sys/wait.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

using namespace postern;

namespace {

/// Runs this test binary again, in a mode in which it becomes a user and reports what it then is as JSON on stdout.
nlohmann::json report_of_child(const std::string& request) {
  char self[4096] = {};
  REQUIRE(::readlink("/proc/self/exe", self, sizeof self - 1) > 0);
  int out[2];
  REQUIRE(::pipe(out) == 0);
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::dup2(out[1], 1);
    ::setenv("POSTERN_BECOME_USER", request.c_str(), 1);
    ::execl(self, self, "[.become_user_child]", nullptr);
    ::_exit(127);
  }
  ::close(out[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = ::read(out[0], buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<std::size_t>(n));
  ::close(out[0]);
  int status = 0;
  ::waitpid(pid, &status, 0);
  const auto begin = text.find('{');
  REQUIRE(begin != std::string::npos);
  return nlohmann::json::parse(text.substr(begin, text.find("\n", begin) - begin));
}

}  // namespace

TEST_CASE("[child] becomes a user and reports its ids", "[.become_user_child]") {
  const char* request = std::getenv("POSTERN_BECOME_USER");
  if (request == nullptr) return;
  const auto wanted = nlohmann::json::parse(request);
  pty::LocalUser user;
  user.uid = wanted["uid"];
  user.gid = wanted["gid"];
  user.groups = wanted["groups"].get<std::vector<gid_t>>();
  const auto became = pty::become_user(user);
  nlohmann::json report{{"ok", became.has_value()}};
  uid_t r, e, s;
  ::getresuid(&r, &e, &s);
  report["uids"] = {r, e, s};
  gid_t rg, eg, sg;
  ::getresgid(&rg, &eg, &sg);
  report["gids"] = {rg, eg, sg};
  std::vector<gid_t> groups(static_cast<std::size_t>(::getgroups(0, nullptr)));
  if (!groups.empty() && ::getgroups(static_cast<int>(groups.size()), groups.data()) < 0) groups.clear();
  report["groups"] = groups;
  report["root_again"] = ::setuid(0) == 0 || ::seteuid(0) == 0;
  report["reads_shadow"] = std::ifstream{"/etc/shadow"}.good();
  std::ifstream status{"/proc/self/status"};
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("CapEff:") || line.starts_with("CapPrm:")) report[line.substr(0, 6)] = line.substr(8);
  const std::string line = "\n" + report.dump() + "\n";
  REQUIRE(::write(1, line.data(), line.size()) > 0);
  ::_exit(0);
}

TEST_CASE("become_user leaves no id, group or capability of root, and no way back", "[become_user]") {
  if (::geteuid() != 0) {
    WARN("needs root: become another user");
    return;
  }
  const auto report = report_of_child(R"({"uid":65534,"gid":65534,"groups":[65534,100,20]})");
  CHECK(report["ok"] == true);
  CHECK(report["uids"] == nlohmann::json({65534, 65534, 65534}));
  CHECK(report["gids"] == nlohmann::json({65534, 65534, 65534}));
  auto groups = report["groups"].get<std::vector<gid_t>>();
  std::sort(groups.begin(), groups.end());
  CHECK(groups == std::vector<gid_t>{20, 100, 65534});
  CHECK(report["root_again"] == false);
  CHECK(report["reads_shadow"] == false);
  CHECK(report["CapEff"] == "0000000000000000");
  CHECK(report["CapPrm"] == "0000000000000000");
}

TEST_CASE("become_user without supplementary groups leaves none", "[become_user]") {
  if (::geteuid() != 0) {
    WARN("needs root: become another user");
    return;
  }
  const auto report = report_of_child(R"({"uid":65534,"gid":65534,"groups":[]})");
  CHECK(report["ok"] == true);
  CHECK(report["groups"].empty());
}

TEST_CASE("become_user refuses uid -1, which the kernel takes as 'no change'", "[become_user]") {
  const auto report = report_of_child(R"({"uid":4294967295,"gid":65534,"groups":[]})");
  CHECK(report["ok"] == false);
}

TEST_CASE("become_user as an ordinary user refuses anybody else", "[become_user]") {
  if (::geteuid() == 0) {
    pty::LocalUser nobody;
    nobody.uid = nobody.gid = 65534;
    CHECK_FALSE(pty::prove_user(nobody, true));  // root is not that user, and the proof says so
    return;
  }
  pty::LocalUser root;
  CHECK_FALSE(pty::become_user(root));
}
