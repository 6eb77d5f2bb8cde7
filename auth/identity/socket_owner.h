#pragma once

#include "base/address.h"
#include "base/expected.h"

#include <sys/types.h>

#include <chrono>
#include <optional>

namespace postern::auth::identity {

/// The user who owns the TCP socket of this machine with that local and that remote endpoint, exactly (both as that socket sees them), from the kernel
/// (sock_diag(7)). Of a connection from this machine to this machine there are two sockets: for the client's, `local` is what accept(2) calls the peer.
///
/// Nothing: this network namespace has no such socket that is connected and that a process holds; also of one bound to an interface (SO_BINDTODEVICE), and of
/// any when the kernel has no tcp_diag, which it tells in the same way. Errors: the kernel could not be asked or answered something else within `timeout`.
///
/// The owner is who created the socket (fsuid), not who holds it now: it stays when the socket is inherited or passed on, and when its holder changes users.
/// fchown(2) changes it, which needs CAP_CHOWN over both uids: nobody gets another's by it (the tests ask). So a uid is worth as much as the least careful
/// program of that user: a setuid-root one, or a proxy that runs as root, connects as root. In a user namespace, users without a name there are all 65534
/// (/proc/sys/kernel/overflowuid).
///
/// The answer is of the moment. It is about an accepted connection only if that one, asked afterwards (TCP_INFO), is still TCP_ESTABLISHED: its pair can be
/// another's once it has ended, and a second socket can take the pair of one that is bound to an interface. That resets the first one's accepted end, whose
/// bytes can still be read then (measured, Linux 6.18).
///
/// Needs no rights. The kernel answers within send(2), about 10 us in all; the first question of a boot may load a module there, which `timeout` does not bound.
Expected<std::optional<uid_t>> socket_owner(const Endpoint& local, const Endpoint& remote, std::chrono::milliseconds timeout);

}  // namespace postern::auth::identity
