#pragma once

#include "base/seqpacket.h"

#include <boost/asio/posix/stream_descriptor.hpp>

#include <deque>
#include <functional>
#include <memory>
#include <vector>

namespace postern::sshd::broker {

/// The broker's end of a SEQPACKET connection to one of our own processes, on Asio.
///
/// Reads one message after the other and hands each out; a message that is malformed, or the peer's end, ends it: `closed` runs
/// once, with the reason. Never blocks: what the peer does not read is queued up to max_queued messages, then the peer counts as
/// broken. The owner may destroy it from any handler.
class LocalSocket {
 public:
  using OnMessage = std::function<void(Message)>;
  using OnClosed = std::function<void(const std::string& why)>;

  static constexpr std::size_t max_queued = 64;

  LocalSocket(boost::asio::any_io_executor executor, UniqueFd socket, std::uint16_t version, std::size_t largest);
  ~LocalSocket();
  LocalSocket(const LocalSocket&) = delete;
  LocalSocket& operator=(const LocalSocket&) = delete;

  /// Again: the next owner's handlers take over (a registration that became a connection).
  void start(OnMessage on_message, OnClosed on_closed);

  template <class Body>
  void send(std::uint16_t type, const Body& body, std::vector<UniqueFd> fds = {}) {
    static_assert(std::is_trivially_copyable_v<Body>);
    send_bytes(type, std::as_bytes(std::span{&body, 1}), std::move(fds));
  }
  void send_bytes(std::uint16_t type, std::span<const std::byte> body, std::vector<UniqueFd> fds = {});
  void send_empty(std::uint16_t type) { send_bytes(type, {}, {}); }

  /// Closes without calling `closed`.
  void close();
  bool open() const noexcept;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace postern::sshd::broker
