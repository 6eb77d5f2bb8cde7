#pragma once

#include "base/expected.h"
#include "base/seqpacket.h"
#include "base/unique_fd.h"

#include <chrono>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>

namespace postern::sshd::net {

/// One of a worker's local sockets (to the broker, later to its session): sends without blocking, keeps what does not fit, and can wait
/// for one answer in the middle of a key exchange while other messages queue up.
class Link {
 public:
  Link(UniqueFd socket, std::uint16_t protocol_version, std::size_t largest)
      : socket_{std::move(socket)}, version_{protocol_version}, largest_{largest} {}

  int fd() const { return socket_.get(); }

  template <class Body>
  void send(std::uint16_t type, const Body& body, std::string_view tail = {}) {
    std::string bytes(reinterpret_cast<const char*>(&body), sizeof body);
    bytes += tail;
    send_bytes(type, std::move(bytes));
  }
  /// The next message: one that queued up, or one from the socket. Nothing when there is none now or the other end is gone (gone() tells).
  std::optional<Message> next();
  /// Waits at most `limit` for a message of this type; others queue up for next(). Nothing: time-out, or gone.
  std::optional<Message> wait_for(std::uint16_t type, std::chrono::milliseconds limit);

  void flush();  ///< call when the socket is writable
  bool has_queued_messages() const { return !inbox_.empty(); }
  bool wants_to_write() const { return !outbox_.empty(); }
  /// The other end closed, broke the protocol, or lets more than `most_unsent` bytes lie.
  bool gone() const { return gone_; }

 private:
  struct Unsent {
    std::uint16_t type;
    std::string bytes;
  };
  static constexpr std::size_t most_unsent = 4 * 1024 * 1024;
  void send_bytes(std::uint16_t type, std::string bytes);
  std::optional<Message> receive();

  UniqueFd socket_;
  std::uint16_t version_;
  std::size_t largest_;
  std::deque<Message> inbox_;
  std::deque<Unsent> outbox_;
  std::size_t unsent_ = 0;
  bool gone_ = false;
};

}  // namespace postern::sshd::net
