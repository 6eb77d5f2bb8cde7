#include "sshd/session/tree.h"

#include "base/processes.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace postern::sshd::session {
ProcessTree::ProcessTree(std::string id, bool as_root) : id_{std::move(id)} {
  if (as_root) before_ = cgroup_of(::getpid());
  settle();
}

void ProcessTree::settle() {
  if (!before_.empty()) {
    base_ = before_ + "/postern";
    leaf_ = base_ + "/" + id_;
    if (make_leaf()) return;
    leaf_.clear();
  }
  ::prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
}

ProcessTree::~ProcessTree() { let_go(); }

bool ProcessTree::make_leaf() {
  if (::mkdir(base_.c_str(), 0755) != 0 && errno != EEXIST) return false;
  for (int i = 0; i < 10; i++) {
    if (::mkdir(leaf_.c_str(), 0755) != 0 && errno != EEXIST) return false;
    // Held for as long as we live, because sweep() removes empty leaves and ours is empty until the program is in it: a zygote that
    // started just then made "cannot enter the session's cgroup: No such device" of a login (seen in bench/failover).
    UniqueFd held{::open(leaf_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    if (!held && errno == ENOENT) continue;
    if (!held || ::flock(held.get(), LOCK_SH) != 0) return false;
    if (::access((leaf_ + "/cgroup.procs").c_str(), W_OK) != 0) {
      if (errno == ENOENT) continue;  // swept before it was held
      return false;
    }
    held_ = std::move(held);
    made_ = true;
    return true;
  }
  return false;
}

void ProcessTree::adopt_scope(pid_t pam_process) {
  spared_ = pam_process;
  if (before_.empty()) return;
  const std::string now = cgroup_of(pam_process);
  if (now.empty() || now == before_) return;
  if (made_) ::rmdir(leaf_.c_str());
  made_ = false;
  held_.reset();
  leaf_ = now;
  scope_ = true;
}

UniqueFd ProcessTree::entrance() {
  if (leaf_.empty() || scope_) return {};  // in the scope: children are born there
  const auto open_leaf = [this] { return UniqueFd{::open(leaf_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)}; };
  UniqueFd fd = open_leaf();
  // Somebody tidied up by hand.
  if (!fd && errno == ENOENT && make_leaf()) fd = open_leaf();
  return fd;
}

std::vector<pid_t> ProcessTree::members() {
  std::vector<pid_t> pids = leaf_.empty() ? descendants_of(::getpid()) : members_of_cgroup(leaf_);
  std::erase(pids, ::getpid());
  if (!scope_) std::erase(pids, spared_);
  return pids;
}

void ProcessTree::signal_all(int signal) {
  for (const pid_t p : members()) ::kill(p, signal);
}

std::vector<pid_t> ProcessTree::members_of_session(pid_t session, bool led) {
  if (session <= 0 || (!led && (::kill(session, 0) == 0 || errno == EPERM))) return {};
  auto pids = members();
  std::erase_if(pids, [session](pid_t p) { return ::getsid(p) != session; });
  return pids;
}

void ProcessTree::hang_up_session(pid_t session, bool led, const std::vector<pid_t>& groups) {
  for (const pid_t p : members_of_session(session, led)) {
    // Held while it is looked at again, so that the number cannot have become another's in between.
    const UniqueFd held{static_cast<int>(::syscall(SYS_pidfd_open, p, 0))};
    if (!held || ::getsid(p) != session || std::find(groups.begin(), groups.end(), ::getpgid(p)) != groups.end()) continue;
    ::syscall(SYS_pidfd_send_signal, held.get(), SIGHUP, nullptr, 0);
    ::syscall(SYS_pidfd_send_signal, held.get(), SIGCONT, nullptr, 0);  // stopped, it would never see it
  }
}

void ProcessTree::kill_all() {
  // Not ourselves.
  if (scope_) write_to(before_ + "/cgroup.procs", "0");
  kill_members();
  // What is started later, on a connection that stays, is born where we are now.
  if (std::exchange(scope_, false)) settle();
}

void ProcessTree::kill_members() {
  if (!leaf_.empty() && write_to(leaf_ + "/cgroup.kill", "1")) return;
  // No cgroup.kill (before Linux 5.14) or no cgroup: again and again, because members fork. SIGSTOP first, so that a fork bomb holds still.
  for (int round = 0; round < 100; round++) {
    const auto pids = members();
    if (pids.empty()) return;
    for (const pid_t p : pids) ::kill(p, SIGSTOP);
    for (const pid_t p : pids) ::kill(p, SIGKILL);
    if (round > 2) ::usleep(1'000);
  }
}

bool ProcessTree::empty() { return members().empty(); }

void ProcessTree::let_go() {
  if (leaf_.empty() || scope_ || !made_) return;
  made_ = false;
  held_.reset();
  for (int i = 0; i < 20; i++) {
    if (::rmdir(leaf_.c_str()) == 0 || errno == ENOENT) return;
    // Programs that outlive their connection (screen, nohup) go on in one common place, so that leaves do not pile up.
    const std::string left = base_ + "/left-behind";
    ::mkdir(left.c_str(), 0755);
    for (const pid_t p : members_of_cgroup(leaf_)) write_to(left + "/cgroup.procs", std::to_string(p));
    ::usleep(2'000);  // the killed ones are being torn down
  }
}

void ProcessTree::sweep() {
  const std::string own = cgroup_of(::getpid());
  if (own.empty()) return;
  const std::string base = own + "/postern";
  DIR* folder = ::opendir(base.c_str());
  if (folder == nullptr) return;
  while (const dirent* e = ::readdir(folder)) {
    const std::string name{e->d_name};
    if (name.size() != 26) continue;
    const std::string leaf = base + "/" + name;
    const UniqueFd held{::open(leaf.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    // A living session holds its leaf, also while no program is in it yet (make_leaf).
    if (held && ::flock(held.get(), LOCK_EX | LOCK_NB) == 0) ::rmdir(leaf.c_str());  // fails where programs live on
  }
  ::closedir(folder);
}

}  // namespace postern::sshd::session
