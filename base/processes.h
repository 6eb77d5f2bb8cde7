#pragma once

#include <sys/types.h>

#include <cstdint>
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

/// Of /proc/PID/stat (proc(5)).
struct ProcessStat {
  char state = 0;                ///< 'R', 'S', … 'Z': has ended, and nobody has waited for it
  pid_t parent = 0;
  std::uint64_t start_time = 0;  ///< clock ticks after boot: with boot_id() and the pid it names a process for good
  bool living() const noexcept { return state != 'Z' && state != 'X'; }
};
/// Nothing: there is no such process, not any more, or not for us (hidepid).
std::optional<ProcessStat> stat_of(pid_t pid);

/// random(4), /proc/sys/kernel/random/boot_id.
std::string boot_id();

/// All living descendants of `root`, by /proc; zombies are left out.
std::vector<pid_t> descendants_of(pid_t root);

/// One write(2) to a file of a pseudo file system; true when all was taken.
bool write_to(const std::string& path, std::string_view text);

/// fork(2) straight into the cgroup of which `cgroup` is the folder (-1: into our own). Moving there afterwards makes the kernel wait for all of its CPUs
/// now and then, 10 to 30 ms (cgroup_threadgroup_rwsem); it is done only where there is no CLONE_INTO_CGROUP (before Linux 5.7, or hidden by a
/// container). `sibling`: the child is our parent's (CLONE_PARENT). For processes with one thread; pthread_atfork(3) handlers do not run.
struct Forked {
  pid_t pid = -1;        ///< 0: the child; -1: errno says why not
  int cgroup_error = 0;  ///< in the child: why it is not in the cgroup
};
Forked fork_into(int cgroup, bool sibling = false);

/// Gives the kernel back what this process has used and uses no more: free pages of the heap, and the deep end of the stack (sntrup761 and
/// ML-KEM keep their polynomials there, PAM modules their buffers). About 0.2 ms; for when a process has settled down to wait.
void release_unused_memory();

}  // namespace postern
