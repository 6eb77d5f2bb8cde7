#pragma once

#include "base/seqpacket.h"

#include <cstdint>

// postern-net <-> postern-session, one socketpair a connection, from the verdict on.
//
// net parses what strangers send, so session takes every message of it as hostile: known types, exact sizes, bounded text,
// no descriptors ever from net; anything else ends the connection (kill net, HUP the programs).
// session is trusted by net.
//
// Channel numbers are net's (0 .. 65535, never reused within a connection while open). Forwardings are numbered likewise and apart from
// channels; those that somebody else began (a listener of ours was connected to) have a number of session's, from first_incoming on.
namespace postern::sshd::channel {

inline constexpr std::uint16_t version = 1;
inline constexpr std::size_t max_message = 192 * 1024;  ///< bytes after the header
inline constexpr std::size_t max_command = 128 * 1024;
inline constexpr std::size_t max_env_name = 256;
inline constexpr std::size_t max_env_value = 128 * 1024;     ///< execve(2) takes no longer string
inline constexpr std::size_t max_env_bytes = 1024 * 1024;    ///< names and values of a channel: it keeps them until its program starts
inline constexpr std::size_t max_env_count = 128;  ///< per channel
inline constexpr std::uint32_t first_incoming = 0x80000000;

enum class Type : std::uint16_t {
  // net -> session. "answered": session replies with answer_ok or answer_no for that channel, in order.
  open = 1,           ///< ChannelRef: a new session channel (answered)
  pty = 2,            ///< Pty (answered)
  env = 3,            ///< Env, tail = name then value (answered)
  start = 4,          ///< Start, tail = command or subsystem name; answered by started or answer_no
  window_change = 5,  ///< WindowChange
  signal = 6,         ///< Signal
  send_break = 7,     ///< ChannelRef (answered)
  closed = 8,         ///< ChannelRef: the client closed the channel, and what it had sent is in the program's input, which net has closed
  ask_sign = 9,       ///< net::AskSign, for a rekey: session forwards it to the broker; answered by signature
  activity = 10,      ///< Activity: bytes moved on a session channel since the last one; only when watch_activity asked for it
  forward_connect = 11,  ///< ForwardTarget; answered by forward_ready or forward_failed
  forward_listen = 12,   ///< ForwardTarget, `number` is a request's; answered by forward_listening
  forward_cancel = 13,   ///< ForwardTarget as it was listened on; answered by forward_listening
  forward_closed = 14,   ///< ForwardClosed: a forwarding is over, or the client refused one that came in
  agent = 15,            ///< ChannelRef: auth-agent-req@openssh.com (answered)
  x11 = 16,              ///< X11 (answered)
  ask_signal = 17,       ///< Signal (answered): its client wants to know
  closed_after_eof = 18, ///< as closed, and the client's EOF had come before
  ended = 19,            ///< ChannelRef: after exited and the end of the outputs, net closed the channel

  // session -> net
  answer_ok = 20,    ///< Answer
  answer_no = 21,    ///< Answer
  started = 22,      ///< Started + descriptors
  exited = 23,       ///< Exited: send exit-status or exit-signal now; output still in the pipes follows, then EOF, CLOSE
  signature = 24,    ///< net::Signature
  disconnect = 25,   ///< Disconnect: show the text on every open session channel's stderr, then SSH_MSG_DISCONNECT and exit
  watch_activity = 27,  ///< WatchActivity: from now on, tell when bytes move
  forward_ready = 28,      ///< ForwardReady + the connected socket, non-blocking
  forward_failed = 29,     ///< ForwardFailed
  forward_listening = 30,  ///< ForwardListening
  forward_incoming = 31,   ///< ForwardIncoming + the accepted socket, non-blocking: open a channel to the client
  forward_end = 32,        ///< ForwardEnd: close all forwardings
};

struct ChannelRef {
  std::uint32_t channel = 0;
};
struct Answer {
  std::uint32_t channel = 0;
  std::uint32_t spare = 0;
};
struct Pty {
  std::uint32_t channel = 0;
  std::uint32_t cols = 0, rows = 0, xpixels = 0, ypixels = 0;
  FixedText<64> term;
  FixedText<1024> modes;  ///< RFC 4254 section 8, encoded, as the client sent it
};
/// Tail: name (name_length bytes), then value.
struct Env {
  std::uint32_t channel = 0;
  std::uint32_t name_length = 0;
};
enum class StartKind : std::uint32_t { shell = 0, exec = 1, subsystem = 2 };
struct Start {
  std::uint32_t channel = 0;
  StartKind kind = StartKind::shell;
};
struct WindowChange {
  std::uint32_t channel = 0;
  std::uint32_t cols = 0, rows = 0, xpixels = 0, ypixels = 0;
};
struct Signal {
  std::uint32_t channel = 0;
  FixedText<16> name;  ///< RFC 4254 section 6.10, without "SIG"
};

/// Descriptors, in this order, for those whose flag is set: one that is both input and output (an unrecorded pty's leader), or
/// input (write end), output (read end), error (read end). All non-blocking. EOF on input: net closes it.
struct Started {
  std::uint32_t channel = 0;
  std::uint8_t combined = 0;  ///< 1: one descriptor for both directions
  std::uint8_t input = 0;
  std::uint8_t output = 0;
  std::uint8_t error = 0;
  std::uint8_t pty = 0;       ///< the program has a terminal, whether the descriptors are its leader or (recorded) pipes to it
  std::uint8_t spare[3] = {};
};
struct Exited {
  std::uint32_t channel = 0;
  std::uint32_t by_signal = 0;    ///< 1: `name` and `core`, else `status`
  std::uint32_t status = 0;       ///< 0..255
  std::uint32_t core = 0;
  FixedText<32> name;             ///< "TERM"
  std::uint32_t close_now = 0;    ///< 1: do not wait for EOF of the outputs beyond what is readable now (a pty whose program left children)
};
struct Disconnect {
  FixedText<1024> text;
};
/// Of an unrecorded session the program's own descriptors are net's, so net alone sees bytes move. It can lie: to keep its own connection,
/// which its client could do by typing, or to end it.
struct WatchActivity {
  std::uint32_t interval_ms = 0;  ///< report the first byte at once, then at most once in so long
};
struct Activity {
  std::uint32_t spare = 0;
};

// Forwardings (RFC 4254 section 7, OpenSSH's PROTOCOL 2.4, RFC 9987's agent and RFC 4254 section 6.3's X11). net knows only what its client
// asked for; session asks the rules, and a process that runs as the user connects or listens.
enum class ForwardKind : std::uint32_t { tcp = 0, unix_socket = 1, agent = 2, x11 = 3 };
struct ForwardTarget {
  std::uint32_t number = 0;
  ForwardKind kind = ForwardKind::tcp;  ///< tcp or unix_socket
  std::uint32_t port = 0;               ///< 0 .. 65535; of a socket 0
  FixedText<256> target;                ///< host or listen address as the client wrote it, or a path
};
struct ForwardReady {
  std::uint32_t number = 0;
};
struct ForwardFailed {
  std::uint32_t number = 0;
  std::uint32_t reason = 0;  ///< of SSH_MSG_CHANNEL_OPEN_FAILURE (RFC 4254 section 5.1)
  FixedText<256> text;
};
struct ForwardListening {
  std::uint32_t number = 0;  ///< the request's
  std::uint32_t ok = 0;
  std::uint32_t port = 0;    ///< where it listens
};
struct ForwardIncoming {
  std::uint32_t number = 0;
  ForwardKind kind = ForwardKind::tcp;
  std::uint32_t port = 0;           ///< it listens there
  std::uint32_t origin_port = 0;
  FixedText<256> target;            ///< the listen address or path as the client wrote it
  FixedText<64> origin;             ///< numeric address
};
/// The counts are for the log: net can lie about them as it can about what it shows its client.
struct ForwardClosed {
  std::uint32_t number = 0;
  std::uint32_t spare = 0;
  std::uint64_t from_client = 0, to_client = 0;  ///< bytes
};
struct ForwardEnd {
  std::uint32_t spare = 0;
};
struct X11 {
  std::uint32_t channel = 0;
  std::uint32_t single = 0;  ///< 1: one connection, then no more
  std::uint32_t screen = 0;
  FixedText<64> protocol;    ///< "MIT-MAGIC-COOKIE-1"
  FixedText<256> cookie;     ///< hexadecimal
};

}  // namespace postern::sshd::channel
