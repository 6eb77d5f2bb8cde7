#pragma once

#include <sys/types.h>

#include <optional>
#include <string>

namespace postern::sshd::broker {

/// What the kernel says of our own processes (proc(5), cgroups(7)), and the last resort against programs that a session left running.
/// Never asks about strangers' processes by name or number: every pid here comes from a pidfd.

/// The pid behind a pidfd; -1 when that process is gone. Nothing: `fd` is no pidfd.
std::optional<pid_t> pid_of(int fd);

/// Folder of a process's cgroup v2; empty when there is none that we can see.
std::string cgroup_of(pid_t pid);

/// SIGKILL to all programs of a connection's session that did not end them itself: its cgroup leaf (`postern/<connection>` below
/// `cgroup`, see sshd/session/tree.h), the scope that logind made for it, or, where there is neither, its descendants.
/// `session` = its pid while it lives, -1 when it is gone (then only the leaf can be found). The session itself is the caller's.
void kill_programs(const std::string& connection, const std::string& cgroup, pid_t session);

}  // namespace postern::sshd::broker
