#pragma once

#include "base/seqpacket.h"
#include "sshd/protocol/net.h"

#include <cstdint>

// posternd <-> postern-session, one socketpair a session process (or, after a restart of the broker, a connection to the
// registration socket, on which the session speaks first). Both sides run as root and trust each other's origin, and still check
// sizes and order: a program of another version (N-1) may be at the other end.
//
// Order: lookup -> user -> grant + [facts, net socket, net pidfd] -> ready -> (sign, revoke, policy changes ...) until one closes.
namespace postern::sshd::session {

inline constexpr std::uint16_t version = 1;
inline constexpr std::uint16_t oldest_version = 1;  ///< a broker speaks N and N-1

enum class Type : std::uint16_t {
  // broker -> zygote
  zygote_hello = 1,   ///< ZygoteHello
  fork_session = 2,   ///< ForkSession + [session's end of its socketpair]; answer: forked
  // zygote -> broker
  zygote_ready = 10,  ///< ZygoteReady: NSS and the PAM modules are loaded
  forked = 11,        ///< Forked + [pidfd]
  session_died = 12,  ///< SessionDied

  // broker -> session
  lookup = 20,     ///< Lookup; answer: user
  grant = 21,      ///< Grant + [sealed facts memfd, socket to net, pidfd of net]; answer: ready
  deny = 22,       ///< empty: no login; the session exits
  signature = 23,  ///< net::Signature, answers ask_sign
  revoke = 24,     ///< Revoke: show the text, end net, then the whole process tree
  registered = 25, ///< Registered: answers register_session
  // session -> broker
  user = 30,       ///< User
  ready = 31,      ///< Ready: PAM account said yes; the broker may now send the verdict to net
  ask_sign = 32,   ///< net::AskSign, forwarded
  channels = 33,   ///< Channels: how many session channels are open, for `postern sessions ls`
  register_session = 34,  ///< Register + [sealed facts memfd, pidfd of the session, pidfd of net]
  event = 35,      ///< Event: for the broker's log (audit)
};

struct ZygoteHello {
  std::uint8_t as_root = 0;
  std::uint8_t spare[3] = {};
  FixedText<64> pam_service;
  FixedText<256> pam_confdir;
  FixedText<16> log_level;
};
struct ForkSession {
  std::uint64_t token = 0;
};
struct ZygoteReady {
  FixedText<512> warnings;  ///< e.g. no /etc/pam.d/postern: "other" is used
};
struct Forked {
  std::uint64_t token = 0;
  std::int32_t pid = 0;
  std::int32_t error = 0;
};
struct SessionDied {
  std::uint64_t token = 0;
  std::int32_t pid = 0;
  std::int32_t wait_status = 0;
};

/// Look an account up. The name is what the policy's rule maps to, already checked by is_mappable_user_name().
struct Lookup {
  FixedText<64> name;
};
struct User {
  std::uint32_t found = 0;
  std::uint32_t uid = 0;
  std::uint32_t gid = 0;
  FixedText<64> name;  ///< as NSS spells it; the broker refuses when it differs from what it asked
};
struct Grant {
  std::uint32_t spare = 0;
};
struct Ready {
  std::uint32_t ok = 0;
  FixedText<512> text;  ///< for the user when not ok: one clear line ("This account has expired.")
};
struct Revoke {
  std::uint32_t clear_up_ms = 0;  ///< not 0: many are being cut off; once the client is, nothing more is done until then, which costs CPU time
  FixedText<512> text;  ///< "Access revoked."
};
struct Registered {
  std::uint32_t ok = 0;
};
struct Register {
  std::int32_t session_pid = 0;
  std::int32_t net_pid = 0;
};
struct Channels {
  std::uint32_t open = 0;
};
struct Event {
  FixedText<64> name;    ///< session_start, session_end, recording_gap, recorder_lost ...
  FixedText<900> fields; ///< key=value, already safe for a log line
};

}  // namespace postern::sshd::session
