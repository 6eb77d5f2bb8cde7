#include "sshd/broker/processes.h"

#include "base/processes.h"

#include <signal.h>

#include <string_view>
#include <utility>
#include <vector>

namespace postern::sshd::broker {
namespace {

// Members may fork while they are killed: stopped first, then killed, again and again. The broker must not hang on a fork bomb.
constexpr int most_rounds = 50;
// And what sleeps in the kernel (a dead NFS server) stays whatever is sent to it, and may be looked at only so often: /proc is large.
constexpr int most_same = 3;

/// Was there anybody?
template <class Members>
bool kill_all(Members members) {
  std::vector<pid_t> before;
  for (int round = 0, same = 0; round < most_rounds && same < most_same; round++) {
    std::vector<pid_t> pids = members();
    if (pids.empty()) return round > 0;
    same = pids == before ? same + 1 : 0;
    for (const pid_t p : pids) ::kill(p, SIGSTOP);
    for (const pid_t p : pids) ::kill(p, SIGKILL);
    before = std::move(pids);
  }
  return true;
}

bool kill_cgroup(const std::string& cgroup) {
  const bool somebody = !members_of_cgroup(cgroup).empty();
  if (write_to(cgroup + "/cgroup.kill", "1")) return somebody;  // Linux 5.14
  return kill_all([&] { return members_of_cgroup(cgroup); });
}

}  // namespace

bool kill_programs(const std::string& connection, const std::string& cgroup, pid_t session) {
  bool somebody = !cgroup.empty() && kill_cgroup(cgroup + "/postern/" + connection);
  if (session <= 1) return somebody;
  const std::string now = cgroup_of(session);
  const auto slash = now.rfind('/');
  const std::string_view name = slash == std::string::npos ? std::string_view{} : std::string_view{now}.substr(slash + 1);
  // logind's: "session-12.scope". Never the service's own group, which holds everybody.
  if (now != cgroup && name.starts_with("session-") && name.ends_with(".scope")) somebody = kill_cgroup(now) || somebody;
  return kill_all([session] { return descendants_of(session); }) || somebody;
}

}  // namespace postern::sshd::broker
