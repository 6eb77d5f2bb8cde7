#pragma once

#include "base/seqpacket.h"
#include "base/unique_fd.h"
#include "pty/become_user.h"
#include "pty/process_settings.h"
#include "sshd/protocol/channel.h"
#include "sshd/protocol/forward_targets.h"

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <utility>

// postern-session <-> its forward helper: both ends are one program, so one version.
namespace postern::sshd::session::helper {

inline constexpr std::uint16_t version = 1;

enum class Type : std::uint16_t {
  // session -> helper; `id`s are session's
  connect = 1,  ///< Target; answered by connected or failed, in any order
  listen = 2,   ///< Target; answered by listening or failed
  cancel = 3,   ///< Ref: ends a listener
  agent = 4,    ///< Ref: a socket for ssh-agent; answered by listening or failed
  x11 = 5,      ///< X11; answered by listening (port: the display's) or failed, once xauth(1) has run
  // helper -> session
  connected = 20,  ///< Ref + [socket]
  failed = 21,     ///< Failed
  listening = 22,  ///< Listening
  incoming = 23,   ///< Incoming + [socket]: somebody connected to the listener `id`
};

struct Ref {
  std::uint32_t id = 0;
};
struct Target {
  std::uint32_t id = 0;
  channel::ForwardKind kind = channel::ForwardKind::tcp;
  std::uint32_t port = 0;
  FixedText<256> target;
};
struct X11 {
  std::uint32_t id = 0;
  std::uint32_t screen = 0;
  FixedText<64> protocol;
  FixedText<256> cookie;
};
struct Failed {
  std::uint32_t id = 0;
  std::uint32_t reason = 2;  ///< of SSH_MSG_CHANNEL_OPEN_FAILURE
  FixedText<256> text;
};
struct Listening {
  std::uint32_t id = 0;
  std::uint32_t port = 0;
  FixedText<108> path;  ///< of the agent's socket
};
struct Incoming {
  std::uint32_t id = 0;
  std::uint32_t port = 0;
  FixedText<64> origin;
};

struct Settings {
  pty::LocalUser user;
  std::optional<pty::ProcessSettings> process;  ///< what PAM left of limits
  int cgroup = -1;  ///< open folder of the one that it is to live in
  ForwardTargets local, remote;
  bool gateway_ports = false;
  bool unlink_sockets = false;
  std::chrono::milliseconds connect_limit{30'000};
  std::string xauth;  ///< path
};

/// In a process of its own: what connects and listens for one connection's forwardings, as the user and with nothing but its socket open, so that
/// the kernel's permissions (and nftables' owner matches) hold for forwardings as for the user's programs. Names are looked up in it, too,
/// each in a thread of its own: NSS modules and answers of strangers' name servers have no business in a process of root.
///
/// It keeps the rules itself (a forbidden address gets no SYN), and postern-session asks the kernel again who is at the other end of what it
/// is given. Ends, and removes what it made in the file system, when the socket closes.
/// Re-test as root: tests/integration/forwarding.
[[noreturn]] void serve(UniqueFd socket, const Settings& settings);
/// serve() in a child.
Expected<std::pair<UniqueFd, pid_t>> start(const Settings& settings);

}  // namespace postern::sshd::session::helper
