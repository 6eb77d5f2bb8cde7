#pragma once

#include "base/expected.h"
#include "base/unique_fd.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

// Framing of the local sockets between our own processes: AF_UNIX SOCK_SEQPACKET, one message a datagram, descriptors by
// SCM_RIGHTS. Boost 1.74 has no local::seq_packet_protocol, so this is ours.
//
// A message = Header, a fixed-size body (a trivially copyable struct named in sshd/protocol/*.h), and for the few types that
// allow it a tail of bytes (a command, an environment value). What was cut (MSG_TRUNC, MSG_CTRUNC), has the wrong version,
// type or size is fatal to the connection that sent it: receive() reports it as an error and hands nothing out.
namespace postern {

/// Most descriptors one message may carry.
inline constexpr std::size_t max_message_fds = 8;

struct MessageHeader {
  std::uint16_t version = 0;  ///< of the protocol the two speak
  std::uint16_t type = 0;     ///< of that protocol's enum
  std::uint32_t size = 0;     ///< bytes after the header
};

/// A received message. `bytes` = what follows the header.
struct Message {
  std::uint16_t version = 0;
  std::uint16_t type = 0;
  std::vector<std::byte> bytes;
  std::vector<UniqueFd> fds;

  /// The body, when the message is exactly one Body (no tail); otherwise nothing.
  template <class Body>
  std::optional<Body> body() const {
    static_assert(std::is_trivially_copyable_v<Body>);
    if (bytes.size() != sizeof(Body)) return std::nullopt;
    Body b;
    std::memcpy(&b, bytes.data(), sizeof b);
    return b;
  }
  /// The body and the bytes after it, when there is at least a whole Body.
  template <class Body>
  std::optional<std::pair<Body, std::string_view>> body_and_tail() const {
    static_assert(std::is_trivially_copyable_v<Body>);
    if (bytes.size() < sizeof(Body)) return std::nullopt;
    Body b;
    std::memcpy(&b, bytes.data(), sizeof b);
    return std::pair{b, std::string_view{reinterpret_cast<const char*>(bytes.data()) + sizeof b, bytes.size() - sizeof b}};
  }
};

/// A connected pair, close-on-exec and non-blocking, with SO_SNDBUF large enough for `largest` bytes a message.
Expected<std::pair<UniqueFd, UniqueFd>> seqpacket_pair(std::size_t largest = 64 * 1024);

/// Sends one message. `code` of the error is EAGAIN when the socket is full, EPIPE when the peer is gone.
/// The descriptors stay the caller's.
Expected<Done> send_message(int socket, std::uint16_t version, std::uint16_t type, std::span<const std::byte> body,
                            std::string_view tail = {}, std::span<const int> fds = {});

template <class Body>
Expected<Done> send_body(int socket, std::uint16_t version, std::uint16_t type, const Body& body, std::string_view tail = {},
                         std::span<const int> fds = {}) {
  static_assert(std::is_trivially_copyable_v<Body>);
  return send_message(socket, version, type, std::as_bytes(std::span{&body, 1}), tail, fds);
}

/// Receives one message, whatever blocking mode the socket is in. Nothing (an empty optional) at end of file. Errors: EAGAIN when there is none yet; EBADMSG
/// for one that was truncated, lost descriptors, brought more than it may, or whose header does not fit it. `largest` = bytes after the header. The
/// descriptors of a message that is refused go to `refused`, for who must not close them itself; without it they are closed.
Expected<std::optional<Message>> receive_message(int socket, std::size_t largest = 64 * 1024, std::vector<UniqueFd>* refused = nullptr);

/// Fixed-length text in a body: `length` bytes of `text`, no terminator. get() is bounded whatever a peer wrote.
template <std::size_t N>
struct FixedText {
  std::uint32_t length = 0;
  char text[N] = {};

  /// False, and left empty, when `s` does not fit.
  [[nodiscard]] bool set(std::string_view s) noexcept {
    length = 0;
    if (s.size() > N) return false;
    if (!s.empty()) std::memcpy(text, s.data(), s.size());
    length = static_cast<std::uint32_t>(s.size());
    return true;
  }
  std::string_view get() const noexcept { return {text, length <= N ? length : 0}; }
  bool valid() const noexcept { return length <= N; }
};

}  // namespace postern
