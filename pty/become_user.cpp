#include "pty/become_user.h"

#include <grp.h>
#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace postern::pty {
namespace {

Unexpected<Error> not_proved(const char* what) { return Unexpected{Error{EPERM, std::string{"become the user: "} + what}}; }

std::vector<gid_t> sorted(std::vector<gid_t> groups) {
  std::sort(groups.begin(), groups.end());
  groups.erase(std::unique(groups.begin(), groups.end()), groups.end());
  return groups;
}

}  // namespace

Expected<Done> prove_user(const LocalUser& user, bool check_groups) {
  uid_t ruid, euid, suid;
  gid_t rgid, egid, sgid;
  if (::getresuid(&ruid, &euid, &suid) != 0 || ::getresgid(&rgid, &egid, &sgid) != 0) return Unexpected{system_error("read own ids")};
  if (ruid != user.uid || euid != user.uid || suid != user.uid) return not_proved("a user id is another");
  if (rgid != user.gid || egid != user.gid || sgid != user.gid) return not_proved("a group id is another");
  if (check_groups) {
    const int n = ::getgroups(0, nullptr);
    std::vector<gid_t> now(n > 0 ? static_cast<std::size_t>(n) : 0);
    if (n < 0 || ::getgroups(n, now.data()) != n) return Unexpected{system_error("read own groups")};
    if (sorted(now) != sorted(user.groups)) return not_proved("the supplementary groups are others");
  }
  if (user.uid == 0) return Done{};
  // Through the system calls themselves: what libc remembers is not what the kernel does.
  if (::syscall(SYS_setuid, 0) == 0 || ::syscall(SYS_setresuid, -1, 0, -1) == 0 || ::syscall(SYS_setreuid, 0, -1) == 0)
    return not_proved("root can be had back");
  if (user.gid != 0 && std::find(user.groups.begin(), user.groups.end(), 0) == user.groups.end() && ::syscall(SYS_setgid, 0) == 0)
    return not_proved("group root can be had back");
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  if (::syscall(SYS_capget, &header, data) != 0) return Unexpected{system_error("read own capabilities")};
  if ((data[0].effective | data[1].effective | data[0].permitted | data[1].permitted) != 0) return not_proved("a capability is left");
  return Done{};
}

Expected<Done> become_user(const LocalUser& user) {
  if (user.uid == static_cast<uid_t>(-1) || user.gid == static_cast<gid_t>(-1)) return not_proved("(uid_t)-1 is no user");
  if (::geteuid() != 0) return prove_user(user, false);
  if (::prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0) != 0) return Unexpected{system_error("drop keepcaps")};
  if (::setgroups(user.groups.size(), user.groups.data()) != 0) return Unexpected{system_error("set the user's groups")};
  if (::setresgid(user.gid, user.gid, user.gid) != 0) return Unexpected{system_error("set the user's group id")};
  if (::setresuid(user.uid, user.uid, user.uid) != 0) return Unexpected{system_error("set the user's id")};
  return prove_user(user, true);
}

}  // namespace postern::pty
