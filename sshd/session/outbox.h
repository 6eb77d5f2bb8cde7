#pragma once

#include "base/poller.h"
#include "base/seqpacket.h"
#include "base/unique_fd.h"

#include <deque>
#include <functional>
#include <span>
#include <vector>

namespace postern::sshd::session {

/// Our end of one local message socket: what cannot be sent at once waits here, in order, with its descriptors. While something
/// waits the peer's requests are not read, so that one that asks and never listens cannot make us grow - unless `always_read`: the
/// broker's word (revoke) is heard whatever it has left unread itself.
class Outbox {
 public:
  /// `readable` runs when there is something to receive or the peer is gone.
  ///
  /// `let_go` gets every descriptor that we are through with (sent, or never to be sent) and the socket itself, in whose queue there may be
  /// more, where closing them is not harmless (close_elsewhere.h). Without it they are closed.
  using LetGo = std::function<void(UniqueFd fd, bool delivered)>;
  Outbox(Poller& poller, bool always_read, std::function<void()> readable, LetGo let_go = {})
      : poller_{poller}, always_read_{always_read}, readable_{std::move(readable)}, let_go_{std::move(let_go)} {}
  ~Outbox() { close(); }
  Outbox(const Outbox&) = delete;
  Outbox& operator=(const Outbox&) = delete;

  void open(UniqueFd socket);
  void close();
  /// As close(), but the socket is the caller's to close; it is not in `let_go`.
  UniqueFd take();
  bool is_open() const noexcept { return static_cast<bool>(socket_); }
  int fd() const noexcept { return socket_.get(); }
  bool blocked() const noexcept { return !waiting_.empty(); }
  std::size_t waiting() const noexcept { return waiting_.size(); }

  template <class Body>
  void send(std::uint16_t protocol, std::uint16_t type, const Body& body, std::vector<UniqueFd> fds = {}) {
    post(protocol, type, std::as_bytes(std::span{&body, 1}), std::move(fds));
  }
  void post(std::uint16_t protocol, std::uint16_t type, std::span<const std::byte> body, std::vector<UniqueFd> fds);
  /// Sends what waits, as far as it goes.
  void flush();

 private:
  struct Waiting {
    std::uint16_t version;
    std::uint16_t type;
    std::vector<std::byte> body;
    std::vector<UniqueFd> fds;
  };
  bool try_send(Waiting& w);
  void let_go(Waiting& w, bool delivered);
  void drop_waiting();
  void arm();

  Poller& poller_;
  const bool always_read_;
  std::function<void()> readable_;
  LetGo let_go_;
  UniqueFd socket_;
  std::deque<Waiting> waiting_;
};

}  // namespace postern::sshd::session
