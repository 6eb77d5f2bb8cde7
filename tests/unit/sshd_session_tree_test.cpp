// The cgroup leaf of a connection. As root with a cgroup v2 that can be written; elsewhere there is no leaf and nothing to check.

#include "base/processes.h"
#include "catch.h"

#include "base/id.h"
#include "sshd/session/tree.h"

#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

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
