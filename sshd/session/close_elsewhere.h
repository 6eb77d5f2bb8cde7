#pragma once

#include "base/unique_fd.h"

#include <vector>

namespace postern::sshd::session {

/// Closes descriptors whose last reference must not be this process's to drop, and leaves `fds` empty; false, and as they were, when it
/// cannot now.
///
/// close(2) of the last reference to a TCP socket waits for its queue for as long as SO_LINGER says, non-blocking or not, and a unix socket may
/// hold such a one in a queue (SCM_RIGHTS): whoever made the socket could stop us for days. A process that exits does not linger
/// (PF_EXITING: Linux net/ipv4/af_inet.c inet_release()), so a throw-away child keeps them until we have closed ours, and exits.
/// Re-test: tests/integration/hostile -k linger.
[[nodiscard]] bool close_elsewhere(std::vector<UniqueFd>& fds);

/// Sockets only can wait in close(2): those of unix, and of TCP while somebody else may set SO_LINGER.
bool may_block_in_close(int fd);

}  // namespace postern::sshd::session
