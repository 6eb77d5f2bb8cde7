#include "sshd/broker/processes.h"

#include "base/processes.h"

#include <signal.h>
#include <sys/stat.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace postern::sshd::broker {
namespace {

// Members may fork while they are killed: stopped first, then killed, again and again. The broker must not hang on a fork bomb.
constexpr int most_rounds = 50;
// And what sleeps in the kernel (a dead NFS server) stays whatever is sent to it, and may be looked at only so often: /proc is large.
constexpr int most_same = 3;

template <class Members>
void kill_all(Members members) {
  std::vector<pid_t> before;
  for (int round = 0, same = 0; round < most_rounds && same < most_same; round++) {
    std::vector<pid_t> pids = members();
    if (pids.empty()) return;
    same = pids == before ? same + 1 : 0;
    for (const pid_t p : pids) ::kill(p, SIGSTOP);
    for (const pid_t p : pids) ::kill(p, SIGKILL);
    before = std::move(pids);
  }
}

void kill_cgroup(const std::string& cgroup) {
  if (write_to(cgroup + "/cgroup.kill", "1")) return;  // Linux 5.14
  kill_all([&] { return members_of_cgroup(cgroup); });
}

std::string leaf_of(const std::string& connection, const std::string& cgroup) { return cgroup + "/postern/" + connection; }

/// Device and inode; nothing: it cannot be seen, or is gone.
std::optional<std::pair<dev_t, ino_t>> program_of(pid_t pid) {
  struct stat st {};
  if (::stat(("/proc/" + std::to_string(pid) + "/exe").c_str(), &st) != 0) return std::nullopt;
  return std::pair{st.st_dev, st.st_ino};
}

}  // namespace

void kill_programs(const std::string& connection, const std::string& cgroup, pid_t session) {
  if (!cgroup.empty()) kill_cgroup(leaf_of(connection, cgroup));
  if (session <= 1) return;
  const std::string now = cgroup_of(session);
  const auto slash = now.rfind('/');
  const std::string_view name = slash == std::string::npos ? std::string_view{} : std::string_view{now}.substr(slash + 1);
  // logind's: "session-12.scope". Never the service's own group, which holds everybody.
  if (now != cgroup && name.starts_with("session-") && name.ends_with(".scope")) kill_cgroup(now);
  kill_all([session] { return descendants_of(session); });
}

bool has_programs(const std::string& connection, const std::string& cgroup, pid_t session) {
  if (!cgroup.empty() && !members_of_cgroup(leaf_of(connection, cgroup)).empty()) return true;
  if (session <= 1) return false;
  const auto own = program_of(session);
  const auto all = descendants_of(session);
  return std::any_of(all.begin(), all.end(), [&own](pid_t pid) { return !own || program_of(pid) != own; });
}

}  // namespace postern::sshd::broker
