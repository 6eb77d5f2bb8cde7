#include "sshd/net/link.h"

#include <poll.h>

#include <cerrno>

namespace postern::sshd::net {

void Link::send_bytes(std::uint16_t type, std::string bytes) {
  if (gone_) return;
  unsent_ += bytes.size();
  outbox_.push_back({type, std::move(bytes)});
  if (unsent_ > most_unsent) gone_ = true;
  flush();
}

void Link::flush() {
  while (!gone_ && !outbox_.empty()) {
    const auto& first = outbox_.front();
    auto sent = send_message(socket_.get(), version_, first.type, std::as_bytes(std::span{first.bytes}));
    if (!sent) {
      if (sent.error().code != EAGAIN) gone_ = true;
      return;
    }
    unsent_ -= first.bytes.size();
    outbox_.pop_front();
  }
}

std::optional<Message> Link::receive() {
  if (gone_) return std::nullopt;
  auto message = receive_message(socket_.get(), largest_);
  if (!message) {
    if (message.error().code != EAGAIN) gone_ = true;
    return std::nullopt;
  }
  if (!*message || (*message)->version != version_) {
    gone_ = true;
    return std::nullopt;
  }
  return std::move(**message);
}

std::optional<Message> Link::next() {
  if (!inbox_.empty()) {
    auto message = std::move(inbox_.front());
    inbox_.pop_front();
    return message;
  }
  return receive();
}

std::optional<Message> Link::wait_for(std::uint16_t type, std::chrono::milliseconds limit) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + limit;
  while (!gone_) {
    while (auto message = receive()) {
      if (message->type == type) return message;
      inbox_.push_back(std::move(*message));
    }
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    if (gone_ || left.count() <= 0) return std::nullopt;
    pollfd polled{socket_.get(), static_cast<short>(POLLIN | (outbox_.empty() ? 0 : POLLOUT)), 0};
    ::poll(&polled, 1, static_cast<int>(left.count()));
    flush();
  }
  return std::nullopt;
}

}  // namespace postern::sshd::net
