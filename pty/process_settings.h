#pragma once

#include <sys/resource.h>
#include <sys/types.h>

#include <array>

namespace postern::pty {

/// What PAM's session modules change of a process and its programs inherit (pam_limits, pam_umask): limits, nice value, umask.
/// postern-session saves its own before pam_open_session(3), keeps what PAM made of them for the user's programs, and takes its own
/// back: a `nofile` or `cpu` limit meant for the user must not hit the process that records them.
struct ProcessSettings {
  std::array<rlimit, RLIM_NLIMITS> limits{};
  int nice = 0;
  mode_t umask = 022;

  static ProcessSettings of_this_process();
  /// Makes them this process's; false when one could not be set (as an ordinary user a hard limit does not go up again).
  bool apply() const;
};

}  // namespace postern::pty
