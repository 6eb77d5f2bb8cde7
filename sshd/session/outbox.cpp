#include "sshd/session/outbox.h"

#include <cerrno>

namespace postern::sshd::session {

void Outbox::open(UniqueFd socket) {
  close();
  socket_ = std::move(socket);
  poller_.watch(socket_.get(), POLLIN, [this](short events) {
    if ((events & POLLOUT) != 0) flush();
    if (!is_open()) return;
    const bool gone = (events & (POLLHUP | POLLERR)) != 0;
    if (gone) drop_waiting();  // nobody will read it
    if (gone || ((events & POLLIN) != 0 && (always_read_ || !blocked()))) readable_();
  });
}

UniqueFd Outbox::take() {
  if (!socket_) return {};
  poller_.forget(socket_.get());
  drop_waiting();
  return std::move(socket_);
}

void Outbox::close() {
  UniqueFd socket = take();
  if (socket && let_go_) let_go_(std::move(socket), false);
}

void Outbox::let_go(Waiting& w, bool delivered) {
  if (let_go_)
    for (auto& fd : w.fds) let_go_(std::move(fd), delivered);
  w.fds.clear();
}

void Outbox::drop_waiting() {
  for (auto& w : waiting_) let_go(w, false);
  waiting_.clear();
}

void Outbox::arm() {
  if (!socket_) return;
  if (blocked())
    poller_.set_events(socket_.get(), static_cast<short>(POLLOUT | (always_read_ ? POLLIN : 0)));
  else
    poller_.set_events(socket_.get(), POLLIN);
}

bool Outbox::try_send(Waiting& w) {
  std::vector<int> fds;
  for (const auto& fd : w.fds) fds.push_back(fd.get());
  const auto sent = send_message(socket_.get(), w.version, w.type, w.body, {}, fds);
  // Other errors (the peer is gone) show up as its end of file; nothing is gained by keeping the message.
  if (!sent && (sent.error().code == EAGAIN || sent.error().code == ENOBUFS || sent.error().code == ETOOMANYREFS)) return false;
  let_go(w, sent.has_value());
  return true;
}

void Outbox::post(std::uint16_t protocol, std::uint16_t type, std::span<const std::byte> body, std::vector<UniqueFd> fds) {
  Waiting w{protocol, type, {body.begin(), body.end()}, std::move(fds)};
  if (!socket_) return let_go(w, false);
  if (waiting_.empty() && try_send(w)) return;
  waiting_.push_back(std::move(w));
  arm();
}

void Outbox::flush() {
  while (!waiting_.empty() && try_send(waiting_.front())) waiting_.pop_front();
  arm();
}

}  // namespace postern::sshd::session
