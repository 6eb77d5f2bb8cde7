#include "sshd/net/channel_forward.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace postern::sshd::net {
namespace {

constexpr std::size_t largest_read = 256 * 1024;

/// Shared by all forwardings of this process; never zero-filled (research/libssh.md section 5).
char* shared_buffer() {
  static char* const buffer = new char[largest_read];
  return buffer;
}

}  // namespace

ForwardChannel::~ForwardChannel() {
  if (socket_) poller_.forget(socket_.get());
  if (handle_ != nullptr) {
    ssh_remove_channel_callbacks(handle_, &callbacks_);
    ssh_channel_free(handle_);
  }
}

void ForwardChannel::opened(ssh_session, ssh_channel handle, UniqueFd socket, bool confirmed) {
  handle_ = handle;
  socket_ = std::move(socket);
  confirmed_ = touched_ = confirmed;
  callbacks_.userdata = this;
  callbacks_.channel_data_function = on_data;
  callbacks_.channel_eof_function = on_eof;
  callbacks_.channel_close_function = on_close;
  ssh_callbacks_init(&callbacks_);
  ssh_set_channel_callbacks(handle_, &callbacks_);
  poller_.watch(socket_.get(), 0, [this](short events) {
    if ((events & (POLLIN | POLLHUP | POLLERR)) != 0) readable_ = true;
    if ((events & (POLLOUT | POLLHUP | POLLERR)) != 0) writable_ = true;
  });
  poller_.disable(socket_.get());
}

void ForwardChannel::answered(bool success) {
  touched_ = true;
  confirmed_ = success;
  refused_ = !success;
}

// ---------------------------------------------------------------- client -> socket

int ForwardChannel::on_data(ssh_session, ssh_channel, void* data, std::uint32_t length, int is_error, void* self) {
  auto& channel = *static_cast<ForwardChannel*>(self);
  channel.touched_ = channel.moved_ = true;
  if (is_error != 0) return static_cast<int>(length);  // there is no second stream
  return static_cast<int>(channel.take(static_cast<const char*>(data), length));
}

void ForwardChannel::on_eof(ssh_session, ssh_channel, void* self) {
  auto& channel = *static_cast<ForwardChannel*>(self);
  channel.touched_ = channel.client_eof_ = true;
}

void ForwardChannel::on_close(ssh_session, ssh_channel, void* self) {
  auto& channel = *static_cast<ForwardChannel*>(self);
  channel.touched_ = channel.client_eof_ = channel.client_closed_ = true;
}

/// False when the socket is full.
bool ForwardChannel::write_some(const char*& bytes, std::size_t& size) {
  while (size > 0) {
    // The user may have a duplicate, and set or clear O_NONBLOCK of both (fcntl(2)).
    const ssize_t n = ::send(socket_.get(), bytes, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0) {
      from_client_ += static_cast<std::uint64_t>(n);
      bytes += n;
      size -= static_cast<std::size_t>(n);
    } else if (errno == EAGAIN) {
      return false;
    } else if (errno != EINTR) {
      input_over_ = true;  // the other end takes no more; what it still says goes on (a web server that answers early and closes its input)
      size = 0;
    }
  }
  return true;
}

std::size_t ForwardChannel::take(const char* bytes, std::size_t size) {
  if (input_over_ || finished_) return size;  // thrown away: the client's window must not stall its EOF
  if (backlog_) return 0;
  std::size_t left = size;
  if (!write_some(bytes, left)) backlog_ = true;
  return size - left;
}

/// What we took out of libssh first, then what libssh still holds.
void ForwardChannel::write_backlog() {
  std::size_t budget = largest_read;
  while (backlog_) {
    if (input_over_) unwritten_.clear();
    const char* bytes = unwritten_.data();
    std::size_t left = unwritten_.size();
    const bool whole = write_some(bytes, left);
    unwritten_.erase(0, unwritten_.size() - left);
    if (!whole) break;
    if (budget == 0) {
      writable_ = true;  // the rest in the next turn
      break;
    }
    char* const chunk = shared_buffer();
    const int n = ssh_channel_read_nonblocking(handle_, chunk, 64 * 1024, 0);
    if (n <= 0) {
      backlog_ = false;
      break;
    }
    unwritten_.assign(chunk, static_cast<std::size_t>(n));
    budget -= std::min<std::size_t>(budget, static_cast<std::size_t>(n));
  }
  if (unwritten_.empty() && unwritten_.capacity() > 4096) unwritten_.shrink_to_fit();
}

void ForwardChannel::end_input() {
  if (input_over_) return;
  input_over_ = true;
  ::shutdown(socket_.get(), SHUT_WR);  // half-close: the answer may still come
}

// ---------------------------------------------------------------- socket -> client

bool ForwardChannel::send_or_keep(const char* bytes, std::size_t size) {
  std::size_t sent = 0;
  while (sent < size) {
    const std::size_t part = std::min<std::size_t>(size - sent, ssh_channel_window_size(handle_));
    if (part == 0) break;
    const int n = ssh_channel_write(handle_, bytes + sent, static_cast<std::uint32_t>(part));
    if (n < 0) return false;  // closed: nobody is there to see the rest
    if (n == 0) break;
    sent += static_cast<std::size_t>(n);
  }
  to_client_ += sent;
  moved_ = moved_ || sent > 0;
  unsent_.assign(bytes + sent, size - sent);
  return sent > 0;
}

bool ForwardChannel::read_socket(std::size_t most) {
  const std::size_t size = ext::room(handle_, std::min(most, largest_read));
  if (size == 0) return false;
  readable_ = false;
  char* const buffer = shared_buffer();
  const ssize_t n = ::recv(socket_.get(), buffer, size, MSG_DONTWAIT);
  if (n > 0) return send_or_keep(buffer, static_cast<std::size_t>(n));
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  output_over_ = true;
  if (n < 0) input_over_ = true;  // reset: nothing goes either way
  return false;
}

bool ForwardChannel::needs_turn(bool may_send) const {
  if (handle_ == nullptr || finished_) return false;
  if (touched_ || (backlog_ && (writable_ || input_over_))) return true;
  if (!may_send || !confirmed_ || ssh_channel_window_size(handle_) == 0) return false;
  return !unsent_.empty() || (readable_ && !output_over_);
}

bool ForwardChannel::turn(std::size_t most) {
  touched_ = false;
  if (handle_ == nullptr || finished_) return false;
  if (refused_) {
    finish();
    return false;
  }
  if (!confirmed_) return false;
  if (backlog_) {
    writable_ = false;
    write_backlog();
  }
  if (client_eof_ && !backlog_) end_input();
  if (client_closed_) {  // what it sent before has gone out, as far as the socket takes it
    if (!backlog_) finish();
    return false;
  }
  bool sent = false;
  if (!unsent_.empty() && most > 0) {
    const std::string rest = std::move(unsent_);
    unsent_.clear();
    sent = send_or_keep(rest.data(), rest.size());
  }
  if (unsent_.empty() && readable_ && !output_over_) sent = read_socket(most) || sent;
  if (output_over_ && unsent_.empty() && !eof_sent_) {
    eof_sent_ = true;
    ssh_channel_send_eof(handle_);
  }
  if (eof_sent_ && input_over_) finish();
  return sent;
}

void ForwardChannel::update_watch(bool may_send) {
  if (!socket_ || finished_) return;
  const bool read = confirmed_ && may_send && !output_over_ && !client_closed_ && unsent_.empty() && ssh_channel_window_size(handle_) > 0;
  const bool write = confirmed_ && backlog_ && !input_over_;
  const short events = static_cast<short>((read ? POLLIN : 0) | (write ? POLLOUT : 0));
  if (events == watched_) return;
  watched_ = events;
  if (events != 0)
    poller_.set_events(socket_.get(), events);
  else
    poller_.disable(socket_.get());  // not even the hang-up, which would wake us for ever
}

// ---------------------------------------------------------------- the end

void ForwardChannel::finish() {
  if (finished_) return;
  finished_ = true;
  if (socket_) poller_.forget(socket_.get());
  socket_.reset();
  unsent_.clear();
  unwritten_.clear();
  if (refused_) return;
  ext::keep_window(handle_);  // what the client still sends is thrown away
  ssh_channel_send_eof(handle_);
  ssh_channel_close(handle_);
}

std::size_t ForwardChannel::kept() const { return finished_ || !backlog_ ? 0 : unwritten_.size() + ext::unread(handle_); }

void ForwardChannel::abort() {
  if (finished_ || handle_ == nullptr) return;
  if (confirmed_ || refused_) {
    // What libssh holds goes now: when the channel is freed is the client's to say. What comes meanwhile is thrown away (take()).
    input_over_ = true;
    ext::keep_window(handle_);
    while (backlog_ && !refused_ && ssh_channel_read_nonblocking(handle_, shared_buffer(), largest_read, 0) > 0) {
    }
    backlog_ = false;
    return finish();
  }
  // The client has not answered yet, and freeing or closing would come before its answer: it is closed with that.
  if (socket_) poller_.forget(socket_.get());
  socket_.reset();
  output_over_ = input_over_ = true;
}

}  // namespace postern::sshd::net
