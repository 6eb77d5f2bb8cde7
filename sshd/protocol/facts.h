#pragma once

#include "base/expected.h"
#include "base/id.h"
#include "base/seqpacket.h"
#include "base/unique_fd.h"

#include <array>
#include <cstddef>
#include <cstdint>

namespace postern::sshd {

inline constexpr std::size_t max_recorders = 16;
inline constexpr std::size_t max_accept_env = 64;

/// Everything that is true of one allowed connection, as the broker decided it. Written once, into a sealed memfd
/// (F_SEAL_WRITE | GROW | SHRINK | SEAL), and given to postern-session: it cannot change afterwards, whoever holds it. After a
/// restart of the broker the session brings it back (sshd/protocol/session.h, Register).
///
/// Trusted: made by the broker only. Fixed size, trivially copyable; all text is UTF-8 without control characters.
struct ConnectionFacts {
  static constexpr std::uint32_t expected_magic = 0x50535446;  // "PSTF"
  std::uint32_t magic = expected_magic;
  std::uint32_t size = 0;      ///< sizeof(ConnectionFacts) of the writer
  std::uint16_t version = 4;   ///< of this layout; a reader takes its own version and the one before
  std::uint16_t spare = 0;
  std::uint64_t policy_version = 0;  ///< counts loads of the policy in the broker that decided

  std::array<std::uint8_t, 16> connection_id{};
  FixedText<64> exchange_hash;  ///< binary: the SSH session id (RFC 4253 section 7.2); empty until the first signature
  std::int64_t accepted_at = 0; ///< Unix time, seconds

  FixedText<64> peer_address;    ///< numeric, no zone: "100.64.0.1", "fd7a::1"
  std::uint16_t peer_port = 0;
  FixedText<64> server_address;
  std::uint16_t server_port = 0;
  FixedText<128> node_id;        ///< of the peer
  FixedText<256> node_name;
  FixedText<256> login;          ///< user@domain; empty for a tagged node
  FixedText<1024> tags;          ///< "tag:a,tag:b"; empty for a user's node
  FixedText<128> server_node_id; ///< ours

  FixedText<256> rule;           ///< place of the rule that decided: "policy.hujson:12:5"
  FixedText<256> ssh_user;       ///< as the client typed it
  FixedText<64> local_user;      ///< the account
  std::uint32_t uid = 0;         ///< of the account, as the session found it and the broker approved it

  FixedText<128> recorder_tag;   ///< the rule's; a node that joins or leaves under it changes nothing
  std::uint8_t record = 0;            ///< 1: sessions are recorded
  std::uint8_t enforce_recorder = 0;  ///< 1: no recording, no session (fail closed)
  std::uint8_t kill_on_disconnect = 0;  ///< 1: what a connection started ends with it, `setsid` and `nohup` or not
  std::uint8_t spare2 = 0;
  std::uint32_t recorder_count = 0;
  std::array<FixedText<64>, max_recorders> recorders;  ///< "127.0.2.1:80", "[fd7a::1]:80", in the order of choice
  std::uint32_t accept_env_count = 0;
  std::array<FixedText<128>, max_accept_env> accept_env;  ///< globs of `*` and `?`

  // What a session needs of posternd.toml.
  std::uint32_t sessions_per_connection = 10;
  std::uint32_t orphan_limit_seconds = 300;   ///< without a broker
  std::uint32_t recorder_grace_ms = 10'000;   ///< fail closed, in mid-session: time without any recorder
  std::uint32_t recorder_start_ms = 1'000;    ///< fail closed, at the start: time for a recorder to commit the header
  FixedText<107> relay_socket;                ///< path of postern-relay's session socket
  FixedText<107> registration_socket;         ///< path where a session finds a new broker
  FixedText<64> pam_service;                  ///< "postern"
  FixedText<256> pam_confdir;                 ///< pam_start_confdir(3) folder; empty = the system's (tests bring their own stack)
  FixedText<256> sftp_server;                 ///< path of OpenSSH's sftp-server; empty = no sftp

  /// The rules of our own that hold for this connection (auth/policy/session_rules.h, docs/POLICY.md). The defaults change nothing.
  struct Rules {
    static constexpr std::uint32_t no_limit = 0xffffffff;
    enum class Sftp : std::uint8_t { full = 0, read_only = 1, none = 2 };
    FixedText<1024> command;  ///< runs instead of what the client asks for; empty: nothing is forced
    std::uint32_t max_duration_seconds = no_limit;
    std::uint32_t idle_timeout_seconds = no_limit;
    std::uint32_t max_sessions = no_limit;  ///< sessions_per_connection holds as well
    std::uint8_t record_input = 0;
    Sftp sftp = Sftp::full;
    std::uint8_t no_pty = 0;
    std::uint8_t spare = 0;

    bool operator==(const Rules& other) const noexcept;
    bool valid() const noexcept;
  } rules;
  std::uint32_t padding = 0;

  /// What of forwardings is allowed, enforceRecorder considered. The defaults allow all.
  struct Forwarding {
    std::uint8_t local = 1, remote = 1, agent = 1, x11 = 1;  ///< 0: none at all
    FixedText<4096> local_targets, remote_targets;           ///< forward_targets.h; empty: every target

    bool operator==(const Forwarding& other) const noexcept;
    bool valid() const noexcept;
  } forwarding;
  // [forwarding] of posternd.toml; a connection keeps what it began with.
  std::uint8_t gateway_ports = 0;   ///< 1: a client chooses the address that -R listens on; 0: loopback whatever it says
  std::uint8_t unlink_sockets = 0;  ///< 1: a socket file in the way of -R is removed (StreamLocalBindUnlink)
  std::uint16_t spare3 = 0;
  std::uint32_t forwards_per_connection = 1024;
  std::uint32_t forward_connect_ms = 30'000;
  FixedText<256> xauth;             ///< path of xauth(1); empty: no X11
  std::uint32_t padding2 = 0;       ///< version 3 ended with it

  /// Since version 4: times of posternd.toml; a connection keeps what it began with.
  std::uint32_t hang_up_ms = 10'000;  ///< the client is gone: for programs that got SIGHUP, before they are left to themselves (as sshd leaves them)
  std::uint32_t farewell_ms = 600;    ///< revoked: for net to show the text (DESIGN section 1 "Revoke")
  std::uint32_t kill_ms = 2'000;      ///< then for the programs, between SIGTERM and SIGKILL
  std::uint32_t sign_ms = 30'000;     ///< for a signature: a rekey while the broker restarts

  Id id() const { return Id{connection_id}; }
};
static_assert(std::is_trivially_copyable_v<ConnectionFacts>);
/// Version 3 ended where the times begin.
inline constexpr std::size_t facts_version_3_size = 22'704;
static_assert(offsetof(ConnectionFacts, hang_up_ms) == facts_version_3_size);

/// A sealed memfd that holds `facts`.
Expected<UniqueFd> seal_facts(const ConnectionFacts& facts);

/// Reads and checks one: seals, size, magic, version (N and N-1: 4 and 3), every length. EBADMSG for anything else.
Expected<ConnectionFacts> read_facts(int memfd);

}  // namespace postern::sshd
