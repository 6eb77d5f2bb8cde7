#pragma once

#include "base/expected.h"

#include <sys/types.h>

#include <cstddef>
#include <string>
#include <vector>

struct sock_filter;

/// The sandbox of postern-net, in two steps: the zygote enters the first once; each worker, forked from it, enters the second before
/// it receives the client's socket. Nothing here can be left again, and each step proves itself by reading back.
/// Re-test as root: build/dev/bin/sshd_net_test '[sandbox]'.
namespace postern::sshd::net {

struct ZygoteSandbox {
  bool as_root = false;
  uid_t uid = 0;           ///< as root: becomes this
  gid_t gid = 0;
  std::string empty_root;  ///< an existing empty folder
};

/// Empty network, mount, ipc and uts namespaces (one set for all workers), the empty folder as root, own uid and gid without further
/// groups, no capability in any set, no_new_privs, not dumpable. As root whatever fails is an error, namespaces excepted
/// (a container may forbid them: then chroot(2), and the result names them). As an ordinary user the same in a user namespace; where the kernel
/// forbids that, the result names what is missing. The value: what is missing, ", "-separated.
/// Call single-threaded. Descriptors that are open stay open: they are the caller's.
Expected<std::string> enter_zygote_sandbox(const ZygoteSandbox& settings);

/// The system call allow-list of a worker, compiled once in the zygote (libseccomp needs no file, but time and memory).
///
/// Not in it: open, socket, connect, ptrace, kill, tgkill, execve, clone, fork, setuid and all else; a call of those kills the process
/// (SIGSYS). open*, stat*, access and readlink of files fail with EACCES instead, because libraries try them (locale, time zone).
class SystemCallFilter {
 public:
  static Expected<SystemCallFilter> compile();
  SystemCallFilter(SystemCallFilter&&) noexcept;
  SystemCallFilter& operator=(SystemCallFilter&&) = delete;
  ~SystemCallFilter();
  /// For this process, for good.
  Expected<Done> install() const;

 private:
  SystemCallFilter();
  std::vector<sock_filter> program_;
};

struct WorkerLimits {
  std::size_t descriptors = 5120;                ///< 3 a session, one a forwarding (Connection::max_forwards), and 2
  std::size_t data_bytes = 512u * 1024 * 1024;   ///< heap and other private memory; not under AddressSanitizer
};

/// The worker's step: resource limits (no processes, no file sizes, no core), then the filter.
Expected<Done> enter_worker_sandbox(const SystemCallFilter& filter, const WorkerLimits& limits = {});

}  // namespace postern::sshd::net
