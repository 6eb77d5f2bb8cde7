#pragma once

#include "base/processes.h"

#include <sys/types.h>

#include <string>

namespace postern::sshd::broker {

/// The last resort against programs that a session left running. Never asks about strangers' processes by name or number: every pid here
/// comes from a pidfd.

/// SIGKILL to all programs of a connection's session that did not end them itself: its cgroup leaf (`postern/<connection>` below
/// `cgroup`, see sshd/session/tree.h), the scope that logind made for it, or, where there is neither, its descendants.
/// `session` = its pid while it lives, -1 when it is gone (then only the leaf can be found). The session itself is the caller's.
void kill_programs(const std::string& connection, const std::string& cgroup, pid_t session);

/// Is there any that kill_programs() would kill, but for the session's own helpers (PAM's holder), which run its program?
bool has_programs(const std::string& connection, const std::string& cgroup, pid_t session);

}  // namespace postern::sshd::broker
