// The cgroup leaf of a connection. As root with a cgroup v2 that can be written; elsewhere there is no leaf and nothing to check.

#include "base/processes.h"
#include "catch.h"

#include "base/id.h"
#include "sshd/session/tree.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

using postern::sshd::session::ProcessTree;

namespace {

/// Anywhere in the machine's cgroup v2 mounts.
bool leaf_exists(const std::string& id) {
  namespace fs = std::filesystem;
  std::ifstream mounts{"/proc/self/mountinfo"};
  for (std::string line; std::getline(mounts, line);) {
    const auto dash = line.find(" - cgroup2 ");
    if (dash == std::string::npos) continue;
    std::istringstream fields{line};
    std::string skipped, mount;
    fields >> skipped >> skipped >> skipped >> skipped >> mount;
    std::error_code ec;
    for (fs::recursive_directory_iterator i{mount, fs::directory_options::skip_permission_denied, ec}, end; !ec && i != end; i.increment(ec))
      if (i->path().filename() == id) return true;
  }
  return false;
}

bool can_enter(const postern::UniqueFd& entrance) {
  const auto child = postern::fork_into(entrance.get());
  if (child.pid == 0) ::_exit(child.cgroup_error);
  int status = 0;
  ::waitpid(child.pid, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

TEST_CASE("a zygote that starts does not take the cgroup of a session whose program has not begun", "[session][tree]") {
  ProcessTree tree{postern::Id::random().text(), ::geteuid() == 0};
  if (std::string{tree.kind()} != "leaf") return;
  const auto entrance = tree.entrance();
  REQUIRE(entrance);
  ProcessTree::sweep();
  CHECK(can_enter(entrance));
}

TEST_CASE("a zygote that starts removes the cgroup of a session that died", "[session][tree]") {
  if (::geteuid() != 0) return;
  const std::string id = postern::Id::random().text();
  const pid_t child = ::fork();
  if (child == 0) {
    const auto* const tree = new ProcessTree{id, true};  // killed before it could let go of it
    ::_exit(std::string{tree->kind()} == "leaf" ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return;
  REQUIRE(leaf_exists(id));
  ProcessTree::sweep();
  CHECK_FALSE(leaf_exists(id));
}

TEST_CASE("a session is hung up without its leader, in whatever process groups, and what has left it is not", "[session][tree]") {
  ProcessTree tree{postern::Id::random().text(), false};  // makes us the subreaper
  int told[2];
  REQUIRE(::pipe(told) == 0);
  const auto tell = [&](int kind) {
    const pid_t said[2] = {kind, ::getpid()};
    if (::write(told[1], said, sizeof said) != sizeof said) ::_exit(1);
  };
  const pid_t leader = ::fork();
  if (leader == 0) {
    ::setsid();
    for (int kind = 0; kind < 3; kind++)
      if (::fork() == 0) {
        if (kind == 1) ::setpgid(0, 0);
        if (kind == 2) ::setsid();
        tell(kind);
        for (;;) ::pause();
      }
    ::_exit(0);
  }
  pid_t members[3] = {};
  for (int i = 0; i < 3; i++) {
    pid_t said[2];
    REQUIRE(::read(told[0], said, sizeof said) == sizeof said);
    members[said[0]] = said[1];
  }
  int status = 0;
  REQUIRE(::waitpid(leader, &status, 0) == leader);
  auto found = tree.members_of_session(leader, false);
  std::sort(found.begin(), found.end());
  std::vector<pid_t> expected{members[0], members[1]};
  std::sort(expected.begin(), expected.end());
  CHECK(found == expected);
  CHECK(tree.members_of_session(0, false).empty());

  tree.hang_up_session(leader, false, {members[1]});
  REQUIRE(::waitpid(members[0], &status, 0) == members[0]);
  CHECK((WIFSIGNALED(status) && WTERMSIG(status) == SIGHUP));
  CHECK(::waitpid(members[1], &status, WNOHANG) == 0);  // its group had it already
  tree.hang_up_session(leader, false, {});
  REQUIRE(::waitpid(members[1], &status, 0) == members[1]);
  CHECK((WIFSIGNALED(status) && WTERMSIG(status) == SIGHUP));
  CHECK(tree.members_of_session(leader, false).empty());
  CHECK(::waitpid(members[2], &status, WNOHANG) == 0);
  // A session's number that is a living process's again is another's.
  CHECK(tree.members_of_session(members[2], false).empty());
  CHECK(tree.members_of_session(members[2], true) == std::vector<pid_t>{members[2]});
  ::kill(members[2], SIGKILL);
  ::waitpid(members[2], &status, 0);
  ::close(told[0]);
  ::close(told[1]);
}
