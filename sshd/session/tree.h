#pragma once

#include "base/unique_fd.h"

#include <sys/types.h>

#include <string>
#include <vector>

namespace postern::sshd::session {

/// All processes that a connection's programs started, also those that left their session and ignore SIGHUP (setsid, nohup): what ends
/// when access is revoked or a required recorder is gone.
///
/// In a cgroup v2 leaf of their own, or in the scope that logind made for them (pam_systemd), where the kernel keeps count and kills
/// them as one (cgroup.kill, Linux 5.14). Elsewhere - an ordinary user, a read-only cgroup file system - by being their subreaper and
/// walking until nobody is left. What runs by order of another service (systemd-run, at, docker) is in neither: TRUST.md.
class ProcessTree {
 public:
  /// `id` names the leaf.
  ProcessTree(std::string id, bool as_root);
  ~ProcessTree();
  ProcessTree(const ProcessTree&) = delete;
  ProcessTree& operator=(const ProcessTree&) = delete;

  /// Call after pam_open_session(3), with the process that ran it: when that was moved into a scope, the scope is the tree. A PAM holder
  /// is spared where the tree is walked, and not in a scope: logind ends what it opened when the scope ends.
  void adopt_scope(pid_t pam_process);
  /// The leaf's folder, for fork_into(). Empty: there is no cgroup of our own, the subreaper or the scope does it.
  UniqueFd entrance();

  void signal_all(int signal);
  void kill_all();
  /// Those of ours whose session (setsid(2)) is `session`, which a program of ours began. `led`: nobody has reaped that program yet. Afterwards its number is
  /// nobody else's for as long as one of its session lives; so when a process has it again, none does.
  std::vector<pid_t> members_of_session(pid_t session, bool led);
  /// SIGHUP to them, but for those in `groups`, which have theirs.
  void hang_up_session(pid_t session, bool led, const std::vector<pid_t>& groups);
  bool empty();
  /// Leaves what still runs to itself (as sshd does at a normal end) and removes the leaf.
  void let_go();

  const char* kind() const noexcept { return leaf_.empty() ? "subreaper" : scope_ ? "scope" : "leaf"; }

  /// Removes leaves whose session died without let_go(); those of living sessions are locked. For the zygote, at its start.
  static void sweep();

 private:
  std::vector<pid_t> members();
  bool make_leaf();
  void settle();
  void kill_members();

  const std::string id_;
  std::string base_;    // ".../postern"
  std::string leaf_;    // ".../postern/<id>", or logind's scope
  std::string before_;  // own cgroup before PAM
  UniqueFd held_;       // the leaf, locked (flock(2)) against sweep()
  bool scope_ = false;
  bool made_ = false;
  pid_t spared_ = 0;
};

}  // namespace postern::sshd::session
