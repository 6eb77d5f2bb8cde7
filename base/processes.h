#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace postern {

/// What the kernel says of processes (proc(5), cgroups(7), pidfd_open(2)). Linux only. All may fail quietly: what cannot be seen is
/// nothing, empty or false.

/// The pid behind a pidfd; -1 when that process is gone. Nothing: `fd` is no pidfd.
std::optional<pid_t> pid_of(int fd);

/// Folder of a process's cgroup v2; empty when there is none that we can see. The mount is found by mountinfo: hybrid hosts have it at
/// /sys/fs/cgroup/unified.
std::string cgroup_of(pid_t pid);

/// The processes in a cgroup (without those of groups below it).
std::vector<pid_t> members_of_cgroup(const std::string& cgroup);

/// All living descendants of `root`, by /proc; zombies are left out.
std::vector<pid_t> descendants_of(pid_t root);

/// One write(2) to a file of a pseudo file system; true when all was taken.
bool write_to(const std::string& path, std::string_view text);

}  // namespace postern
