#pragma once

#include "auth/pam/pam.h"
#include "base/expected.h"
#include "base/unique_fd.h"
#include "pty/launch.h"
#include "sshd/session/forward_helper.h"

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace postern::sshd::session {

/// After the login: what it needed is given back (release_unused_memory).
inline constexpr std::chrono::milliseconds settle_time{300};

/// What opening a PAM session left for the user's programs.
struct PamResult {
  bool opened = false;
  bool same_user = true;
  std::string reason;  ///< for the log, when not opened
  std::vector<gid_t> groups;
  std::vector<std::string> environment;
  std::string texts;
};

/// Can this process raise a hard limit again that a module lowered? As root with CAP_SYS_RESOURCE, which containers often lack.
bool can_raise_limits();

/// pam_setcred and pam_open_session in this process.
PamResult open_pam(auth::pam::PamSession& pam);

/// PAM's session in a process of its own, for hosts where limits that pam_limits lowers cannot be raised again: they would hit the
/// process that records (DESIGN section 1 "PAM"). It also forks the user's programs, so that they inherit all that modules left (limits,
/// keyring, login uid, cgroup), with CLONE_PARENT: they are postern-session's own children all the same.
///
/// Nothing but postern-session talks to it. Closes PAM and ends when its socket closes.
class PamHolder {
 public:
  /// Forks it; `result` is what PAM said. `log_in` records a login on a terminal, in the program's process before it is the user's.
  static Expected<std::unique_ptr<PamHolder>> start(auth::pam::PamSession& pam, std::function<void(const std::string& path)> log_in,
                                                    PamResult& result);
  ~PamHolder();
  PamHolder(const PamHolder&) = delete;
  PamHolder& operator=(const PamHolder&) = delete;

  /// pty::launch() there. `login_path`: terminal to record a login on, or empty.
  Expected<pid_t> launch(const pty::Launch& what, const std::string& login_path);
  /// helper::start() there: a child of postern-session's, too. `local` and `remote`: settings.local and remote, encoded.
  Expected<std::pair<UniqueFd, pid_t>> start_helper(const helper::Settings& settings, std::string_view local, std::string_view remote);
  pid_t pid() const noexcept { return pid_; }
  /// Lets it close PAM, and waits for that.
  void end();

 private:
  PamHolder() = default;
  Expected<pid_t> launched();
  UniqueFd socket_;
  pid_t pid_ = 0;
};

}  // namespace postern::sshd::session
