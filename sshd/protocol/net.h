#pragma once

#include "base/seqpacket.h"

#include <array>
#include <cstdint>
#include <string_view>

// posternd <-> postern-net. Until the verdict, net talks to the broker only, over one socketpair a worker; with the verdict it
// gets a socket to its session (sshd/protocol/channel.h) and this one is closed by both.
//
// postern-net parses what strangers send, so the broker takes every message of it as hostile: fixed sizes, known types, an order
// (see `Phase` in sshd/broker), no descriptors ever. Anything else ends the connection.
namespace postern::sshd::net {

inline constexpr std::uint16_t version = 1;

enum class Type : std::uint16_t {
  // broker -> zygote
  zygote_hello = 1,  ///< ZygoteHello; first message
  fork_worker = 2,   ///< ForkWorker + [worker's end of its socketpair]; answer: forked
  // zygote -> broker
  zygote_ready = 10,  ///< ZygoteReady; the libssh self-test passed, the sandbox stands
  forked = 11,        ///< Forked + [pidfd]
  worker_died = 12,   ///< WorkerDied

  // broker -> worker
  serve = 20,      ///< Serve + [the client's TCP socket]
  signature = 21,  ///< Signature, answers ask_sign
  verdict = 22,    ///< Verdict; when accepted + [socket to the session]
  // worker -> broker
  ask_sign = 30,   ///< AskSign
  ask_login = 31,  ///< AskLogin
  note = 32,       ///< Note: for the log only
};

inline constexpr std::size_t max_host_keys = 8;           ///< offered ones, and those that clients learn beside them
inline constexpr std::size_t max_public_key_blob = 1024;  ///< RSA 4096: 535 bytes
inline constexpr std::size_t max_signature_blob = 1024;   ///< RSA 4096: 532 bytes

/// SSH wire form of a public key (RFC 4253 section 6.6). The private half never leaves the broker.
struct HostKeyPublic {
  FixedText<max_public_key_blob> blob;
};

/// Names a host key in AskSign: FNV-1a of its public blob. No index, because a worker and its connection outlive a change of the keys.
constexpr std::uint32_t key_id(std::string_view blob) noexcept {
  std::uint32_t hash = 2166136261U;
  for (const char c : blob) hash = (hash ^ static_cast<unsigned char>(c)) * 16777619U;
  return hash;
}

/// Which algorithms a client is offered ([ssh] algorithms). The values are of a message.
enum class Algorithms : std::uint8_t {
  compatible = 0,
  strict = 1,  ///< only those of which nobody warns
  legacy = 2,  ///< also what clients need that know neither curve25519 nor group16
};

/// What the zygote needs before its first fork. As root it unshares (net, mount, ipc, uts), enters an empty root and becomes
/// uid/gid; as an ordinary user (`as_root` 0) it does what the kernel lets it and says in ZygoteReady what is missing.
struct ZygoteHello {
  std::uint8_t as_root = 0;
  Algorithms algorithms = Algorithms::compatible;
  std::uint8_t spare[2] = {};
  std::uint32_t uid = 0;  ///< postern-net
  std::uint32_t gid = 0;
  std::uint32_t key_count = 0;  ///< the first of each type is offered; clients learn the others (hostkeys-00@openssh.com)
  std::array<HostKeyPublic, max_host_keys> keys;
  FixedText<64> version_string;  ///< software version after "SSH-2.0-"
  FixedText<256> empty_root;     ///< an existing empty folder, root-owned, mode 0555
  FixedText<16> log_level;
};

struct ForkWorker {
  std::uint64_t token = 0;  ///< echoed in Forked and WorkerDied
};
struct ZygoteReady {
  FixedText<512> missing;  ///< what the sandbox lacks, ", "-separated; empty as root
};
struct Forked {
  std::uint64_t token = 0;
  std::int32_t pid = 0;
  std::int32_t error = 0;  ///< errno of fork, 0 = it worked
};
struct WorkerDied {
  std::uint64_t token = 0;
  std::int32_t pid = 0;
  std::int32_t wait_status = 0;  ///< wait(2)
};

struct Serve {
  std::uint32_t login_grace_ms = 30'000;
  std::uint32_t max_auth_attempts = 6;
  std::uint32_t max_bytes = 128 * 1024;  ///< from the client, before its login
  std::uint32_t max_packets = 500;       ///< likewise
  FixedText<64> peer_address;  ///< for net's log lines only
  std::uint16_t peer_port = 0;
  std::uint16_t spare = 0;
  std::uint32_t client_alive_interval_ms = 0;  ///< 0: the client is not asked
  std::uint32_t client_alive_count_max = 3;
  std::uint32_t rekey_seconds = 0;  ///< 0 = none
  std::uint64_t rekey_bytes = 0;    ///< 0 = the cipher's own limit
  std::uint32_t sign_ms = 30'000;   ///< for a signature
  std::uint32_t spare2 = 0;
};

enum class Digest : std::uint8_t { none = 0, sha256 = 1, sha384 = 2, sha512 = 3 };

/// exchange_hash: RFC 4253 section 8; `data` = exactly 32, 48 or 64 bytes. The first one of a connection is its session id.
/// possession: OpenSSH PROTOCOL 2.5 (hostkeys-prove-00@openssh.com), after the login; `data` is empty, the broker puts together what is signed.
enum class Purpose : std::uint8_t { exchange_hash = 0, possession = 1 };
struct AskSign {
  std::uint32_t key = 0;  ///< key_id()
  Digest digest = Digest::none;  ///< none: the key type says it (ed25519, ecdsa); rsa: sha256 or sha512
  Purpose purpose = Purpose::exchange_hash;
  std::uint8_t spare[2] = {};
  FixedText<64> data;
};
struct Signature {
  FixedText<max_signature_blob> blob;  ///< SSH wire form; empty = refused
};

enum class Method : std::uint32_t { none = 0, password = 1, publickey = 2, keyboard_interactive = 3 };

/// The one question: may this peer be `ssh_user` here? Once a connection; the name is pinned by it.
struct AskLogin {
  Method method = Method::none;
  FixedText<256> ssh_user;
  FixedText<255> client_version;  ///< the client's identification line, for the log
};
struct Verdict {
  std::uint32_t accepted = 0;
  FixedText<1024> text;  ///< to show as a banner (one clear line); may be empty when accepted
};
struct Note {
  FixedText<256> text;
};

}  // namespace postern::sshd::net
