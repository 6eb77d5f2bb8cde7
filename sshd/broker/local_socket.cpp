#include "sshd/broker/local_socket.h"

#include <boost/asio/post.hpp>

#include <cerrno>
#include <utility>

namespace postern::sshd::broker {

struct LocalSocket::State : std::enable_shared_from_this<State> {
  State(boost::asio::any_io_executor executor, UniqueFd fd, std::uint16_t v, std::size_t l)
      : socket{executor, fd.release()}, version{v}, largest{l} {}

  struct Queued {
    std::uint16_t type;
    std::vector<std::byte> body;
    std::vector<UniqueFd> fds;
  };
  boost::asio::posix::stream_descriptor socket;
  std::uint16_t version;
  std::size_t largest;
  OnMessage on_message;
  OnClosed on_closed;
  std::deque<Queued> queue;
  bool waiting_to_write = false;
  bool started = false;
  bool over = false;

  void end(const std::string& why) {
    if (over) return;
    over = true;
    boost::system::error_code ignored;
    socket.close(ignored);
    queue.clear();
    const OnClosed handler = std::move(on_closed);
    on_message = nullptr;
    if (handler) handler(why);
  }
  void read() {
    socket.async_wait(boost::asio::posix::descriptor_base::wait_read, [self = shared_from_this()](boost::system::error_code error) {
      if (error || self->over) return;
      self->drain();
    });
  }
  void drain() {
    // A few a turn: one chatty child must not keep the broker from the others.
    for (int i = 0; i < 16; i++) {
      auto received = receive_message(socket.native_handle(), largest);
      if (!received) {
        if (received.error().code == EAGAIN || received.error().code == EWOULDBLOCK) break;
        return end(received.error().doing);
      }
      if (!received->has_value()) return end("it closed its end");
      Message message = std::move(**received);
      if (message.version != version) return end("it speaks another version of the protocol");
      const auto handler = on_message;  // may be replaced or this closed meanwhile
      if (handler) handler(std::move(message));
      if (over) return;
    }
    read();
  }
  bool send_now(const Queued& q) {
    std::vector<int> fds;
    for (const auto& fd : q.fds) fds.push_back(fd.get());
    const auto sent = send_message(socket.native_handle(), version, q.type, q.body, {}, fds);
    if (sent) return true;
    if (sent.error().code != EAGAIN && sent.error().code != EWOULDBLOCK) {
      // Not from inside the caller's send(): it may be in the middle of something.
      boost::asio::post(socket.get_executor(), [self = shared_from_this(), why = sent.error().doing] { self->end(why); });
      return true;
    }
    return false;
  }
  void flush() {
    while (!queue.empty()) {
      if (!send_now(queue.front())) return wait_to_write();
      queue.pop_front();
    }
  }
  void wait_to_write() {
    if (waiting_to_write) return;
    waiting_to_write = true;
    socket.async_wait(boost::asio::posix::descriptor_base::wait_write, [self = shared_from_this()](boost::system::error_code error) {
      self->waiting_to_write = false;
      if (error || self->over) return;
      self->flush();
    });
  }
};

LocalSocket::LocalSocket(boost::asio::any_io_executor executor, UniqueFd socket, std::uint16_t version, std::size_t largest)
    : state_{std::make_shared<State>(std::move(executor), std::move(socket), version, largest)} {}

LocalSocket::~LocalSocket() { close(); }

void LocalSocket::start(OnMessage on_message, OnClosed on_closed) {
  if (state_->over) {  // it ended before anybody listened: told once, and not from inside this call
    boost::asio::post(state_->socket.get_executor(), [s = state_, on_closed = std::move(on_closed)] { on_closed("it was closed"); });
    return;
  }
  state_->on_message = std::move(on_message);
  state_->on_closed = std::move(on_closed);
  if (!std::exchange(state_->started, true)) state_->read();
}

void LocalSocket::send_bytes(std::uint16_t type, std::span<const std::byte> body, std::vector<UniqueFd> fds) {
  if (state_->over) return;
  State::Queued q{type, {body.begin(), body.end()}, std::move(fds)};
  if (state_->queue.empty() && state_->send_now(q)) return;
  if (state_->queue.size() >= max_queued) {
    boost::asio::post(state_->socket.get_executor(), [s = state_] { s->end("it does not read its messages"); });
    return;
  }
  state_->queue.push_back(std::move(q));
  state_->wait_to_write();
}

void LocalSocket::close() {
  state_->on_closed = nullptr;
  state_->end({});
}

bool LocalSocket::open() const noexcept { return !state_->over; }

}  // namespace postern::sshd::broker
