#include "sshd/net/channel_session.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

namespace postern::sshd::net {
namespace {

/// Outputs that are over mostly mean that the program is, too: its exit-status, which is to come first, is on its way.
constexpr std::chrono::milliseconds exit_wait{50};

/// Shared by all channels of this process, never zero-filled (a zeroed megabyte is a private megabyte, research/libssh.md section 5).
char* shared_buffer() {
  static char* const buffer = new char[SessionChannel::whole_read];
  return buffer;
}

}  // namespace

SessionChannel::~SessionChannel() {
  if (end_timer_ != 0) poller_.cancel(end_timer_);
  close_input(false);
  close_output(output_);
  close_output(error_);
  if (handle_ != nullptr) {
    ssh_remove_channel_callbacks(handle_, &callbacks_);
    ssh_channel_free(handle_);
  }
}

void SessionChannel::opened(ssh_session session, ssh_channel handle) {
  session_ = session;
  handle_ = handle;
  callbacks_.userdata = this;
  callbacks_.channel_data_function = on_data;
  callbacks_.channel_eof_function = on_eof;
  callbacks_.channel_close_function = on_close;
  ssh_callbacks_init(&callbacks_);
  ssh_set_channel_callbacks(handle_, &callbacks_);
}

void SessionChannel::answered(bool want_reply, bool yes) {
  if (!want_reply) return;
  expected_.push_back({want_reply, yes});
  send_replies();
}

void SessionChannel::session_answered(bool yes) {
  for (auto& e : expected_)
    if (!e.result) {
      e.result = yes;
      if (e.start && !yes) start_asked = false;  // another may follow, as with sshd (PuTTY's pscp: sftp, then exec)
      break;
    }
  send_replies();
}

void SessionChannel::send_replies() {
  while (!expected_.empty() && expected_.front().result) {
    if (expected_.front().want_reply && handle_ != nullptr && !client_closed_) ext::reply_request(handle_, *expected_.front().result);
    expected_.pop_front();
  }
}

// ---------------------------------------------------------------- client -> program

int SessionChannel::on_data(ssh_session, ssh_channel, void* data, std::uint32_t length, int is_error, void* self) {
  auto& channel = *static_cast<SessionChannel*>(self);
  channel.touched_ = channel.moved_ = true;
  if (is_error != 0) return static_cast<int>(length);  // a client has no stderr to send
  return static_cast<int>(channel.take(static_cast<const char*>(data), length));
}

void SessionChannel::on_eof(ssh_session, ssh_channel, void* self) {
  auto& channel = *static_cast<SessionChannel*>(self);
  channel.touched_ = channel.client_eof_ = true;
}

void SessionChannel::on_close(ssh_session, ssh_channel, void* self) {
  auto& channel = *static_cast<SessionChannel*>(self);
  channel.touched_ = channel.client_closed_ = true;
}

/// How much the program took. What it did not take stays in libssh: the client's window does not grow.
std::size_t SessionChannel::take(const char* bytes, std::size_t size) {
  if (!started_ && !finished_) {  // data may come before the answer to exec (sftp clients do that)
    backlog_ = true;
    return 0;
  }
  if (input_ < 0) return size;
  if (backlog_) return 0;
  std::size_t written = 0;
  while (written < size) {
    const ssize_t n = ::write(input_, bytes + written, size - written);
    if (n > 0) {
      written += static_cast<std::size_t>(n);
    } else if (n < 0 && errno == EINTR) {
      continue;
    } else if (n < 0 && errno == EAGAIN) {
      backlog_ = true;
      break;
    } else {
      close_input(true);
      return size;
    }
  }
  return written;
}

/// Empties the backlog: what we took out of libssh first, then what libssh still holds.
void SessionChannel::write_input() {
  if (!started_ || handle_ == nullptr) return;
  std::size_t budget = shared_read;
  while (backlog_) {
    while (!pending_input_.empty() && input_ >= 0) {
      const ssize_t n = ::write(input_, pending_input_.data(), pending_input_.size());
      if (n > 0) {
        pending_input_.erase(0, static_cast<std::size_t>(n));
      } else if (n < 0 && errno == EINTR) {
        continue;
      } else if (n < 0 && errno == EAGAIN) {
        return;
      } else {
        close_input(true);
      }
    }
    if (input_ < 0) pending_input_.clear();
    if (budget == 0 && input_ >= 0) return;  // the rest in the next turn: the input is writable
    // Not on the stack: 32 KiB there would stay with every process.
    char* const chunk = shared_buffer();
    const int n = ssh_channel_read_nonblocking(handle_, chunk, 64 * 1024, 0);
    if (n <= 0) {
      backlog_ = false;
      break;
    }
    pending_input_.assign(chunk, static_cast<std::size_t>(n));
    budget -= std::min<std::size_t>(budget, static_cast<std::size_t>(n));
  }
  if (pending_input_.empty() && pending_input_.capacity() > 4096) pending_input_.shrink_to_fit();
}

void SessionChannel::close_input(bool program_closed) {
  if (input_ < 0) return;
  if (!combined_) poller_.forget(input_);
  input_ = -1;
  input_own_.reset();
  pending_input_.clear();
  if (program_closed && !pty_ && handle_ != nullptr && !client_closed_ && !client_eof_) {
    // Only OpenSSH knows it, and asks for it in no other way than by its name (OpenSSH channels.c, SSH_NEW_OPENSSH).
    const char* client = ssh_get_clientbanner(session_);
    if (client != nullptr && std::strstr(client, "OpenSSH") != nullptr) ext::send_end_of_write(handle_);
  }
}

// ---------------------------------------------------------------- program -> client

bool SessionChannel::may_send() const {
  return handle_ != nullptr && !client_closed_ && !finished_ && !ext::exchanging_keys(session_) && (ssh_get_status(session_) & SSH_WRITE_PENDING) == 0 &&
         ssh_channel_window_size(handle_) > 0;
}

void SessionChannel::send_or_keep(const char* bytes, std::size_t size, bool error) {
  std::size_t sent = 0;
  while (sent < size) {
    // Short or 0: a key exchange has begun, or the window is used up. Keep the rest.
    const std::size_t part = std::min<std::size_t>(size - sent, ssh_channel_window_size(handle_));
    if (part == 0) break;
    const int n = error ? ssh_channel_write_stderr(handle_, bytes + sent, static_cast<std::uint32_t>(part))
                        : ssh_channel_write(handle_, bytes + sent, static_cast<std::uint32_t>(part));
    if (n < 0) return;  // the channel or the connection is closed: nobody is there to see the rest
    if (n == 0) break;
    sent += static_cast<std::size_t>(n);
    moved_ = true;
  }
  if (sent < size) rests_.push_back({error, std::string{bytes + sent, size - sent}});
}

/// True when nothing is left over from before.
bool SessionChannel::send_rests() {
  while (!rests_.empty() && may_send()) {
    Rest rest = std::move(rests_.front());
    rests_.pop_front();
    const std::size_t before = rests_.size();
    send_or_keep(rest.bytes.data(), rest.bytes.size(), rest.error);
    if (rests_.size() > before) {  // kept again, at the back: it belongs in front
      std::rotate(rests_.begin(), rests_.end() - 1, rests_.end());
      return false;
    }
  }
  return rests_.empty();
}

void SessionChannel::show(const std::string& text) {
  if (handle_ == nullptr || client_closed_ || end_sent_ || finished_) return;
  rests_.push_back({true, text + "\r\n"});
  send_rests();
}

void SessionChannel::read_output(Output& output, std::size_t most) {
  if (output.ended || !rests_.empty() || !may_send()) return;
  const std::size_t size = ext::room(handle_, most);
  char* const buffer = shared_buffer();
  ssize_t n = ::read(output.fd.get(), buffer, size);
  // A terminal may say so while the last bytes are still on their way between its two ends: asked again it has them (session/channel.cpp).
  if (n < 0 && errno == EIO) n = ::read(output.fd.get(), buffer, size);
  if (n > 0) {
    send_or_keep(buffer, static_cast<std::size_t>(n), output.error);
  } else if (n < 0 && errno == EINTR) {
    return;
  } else if (n < 0 && errno == EAGAIN) {
    if (exited_ && exited_->close_now != 0) close_output(output);
  } else {
    close_output(output);  // end of file; a pty says EIO (tty_ioctl(4): the last follower closed)
  }
}

void SessionChannel::close_output(Output& output) {
  output.ended = true;
  if (!output.fd) return;
  poller_.forget(output.fd.get());
  if (combined_ && &output == &output_) input_ = -1;
  output.fd.reset();
}

// ---------------------------------------------------------------- life

void SessionChannel::started(const channel::Started& how, std::vector<UniqueFd> fds) {
  started_ = true;
  pty_ = how.pty != 0;
  combined_ = how.combined != 0;
  std::size_t next = 0;
  const auto following = [&] { return next < fds.size() ? std::move(fds[next++]) : UniqueFd{}; };
  if (combined_) {
    output_.fd = following();
    input_ = output_.fd.get();
  } else {
    if (how.input != 0) input_own_ = following();
    input_ = input_own_.get();
    if (how.output != 0) output_.fd = following();
    if (how.error != 0) error_.fd = following();
  }
  error_.error = true;
  // A handler has nothing to do: every event ends in a turn, which tries all that can be tried.
  for (Output* output : {&output_, &error_}) {
    output->ended = !output->fd;
    if (output->fd) poller_.watch(output->fd.get(), 0, [](short) {});
  }
  if (!combined_ && input_ >= 0) {
    poller_.watch(input_, 0, [this](short events) {
      if ((events & POLLERR) != 0) {  // the program closed its stdin
        backlog_ = true;              // what libssh holds is thrown away in the next turn
        close_input(true);
      }
    });
  }
  backlog_ = true;  // whatever the client sent before
}

void SessionChannel::exited(const channel::Exited& how) {
  if (exited_) return;
  exited_ = how;
  // Also after the client's CLOSE where that answered our EOF, as sshd does: OpenSSH's client closes at once then, and waits for the status.
  if (handle_ == nullptr || (client_closed_ && !end_sent_) || finished_) return;
  if (how.by_signal != 0)
    ssh_channel_request_send_exit_signal(handle_, std::string{how.name.get()}.c_str(), how.core != 0 ? 1 : 0, "", "");
  else
    ssh_channel_request_send_exit_status(handle_, static_cast<int>(how.status));
}

void SessionChannel::turn(bool alone) {
  touched_ = false;
  if (handle_ == nullptr || finished_) return;
  if (client_closed_) {
    ext::keep_window(handle_);  // to a channel that it has closed the client wants no WINDOW_ADJUST
    if (!end_sent_) return drain();
  }
  write_input();
  if ((client_eof_ || client_closed_) && !backlog_ && pending_input_.empty() && !pty_ && started_) close_input(false);
  if (send_rests()) {
    const std::size_t most = alone ? whole_read : shared_read;
    read_output(output_, most);
    read_output(error_, most);
  }
  if (!started_ || !output_.ended || !error_.ended || !rests_.empty()) return;
  if (!exited_) return announce_end();
  // RFC 4254 section 6.10 leaves the order open; OpenSSH's: exit-status, output, EOF, CLOSE.
  ended_ = true;
  finish();
}

/// Nothing more will come from a program that lives on: who reads its output to the end is not to wait for it, as under sshd. CLOSE comes at its exit.
void SessionChannel::announce_end() {
  if (end_sent_) return;
  if (end_due_) {
    ssh_channel_send_eof(handle_);
    end_sent_ = true;
  } else if (end_timer_ == 0) {
    end_timer_ = poller_.after(exit_wait, [this] {
      end_timer_ = 0;
      touched_ = end_due_ = true;
    });
  }
}

/// The client closed the channel first. As under sshd (CHAN_OUTPUT_WAIT_DRAIN) its program still gets all that was sent, and then its end of file; only
/// then CLOSE is answered. Who waits for that knows that everything has arrived. A program that ends does not want the rest.
void SessionChannel::drain() {
  if (start_asked && !started_) return;  // it is on its way, and so is what belongs into it
  if (!exited_) write_input();
  if (pty_) close_input(false);  // a terminal hangs up: what does not fit now is nobody's
  close_output(output_);
  close_output(error_);
  rests_.clear();
  if (!exited_ && input_ >= 0 && (backlog_ || !pending_input_.empty())) return;
  finish();
}

void SessionChannel::finish() {
  close_input(false);
  close_output(output_);
  close_output(error_);
  rests_.clear();
  // Both in two calls: with output pending ssh_channel_close() sends the EOF alone (research/libssh.md 7.6).
  ext::keep_window(handle_);  // what the client still sends is thrown away
  ssh_channel_send_eof(handle_);
  ssh_channel_close(handle_);
  finished_ = true;
}

void SessionChannel::client_reads_no_more() {
  // Inside libssh's packet handling: closes our descriptor and forgets its watch, neither reads nor frees a channel.
  touched_ = true;
  if (finished_ || combined_ || pty_ || !started_) return;
  close_output(output_);
  std::erase_if(rests_, [](const Rest& r) { return !r.error; });
}

void SessionChannel::update_watches() {
  if (handle_ == nullptr || finished_) return;
  const bool may_read = rests_.empty() && may_send();
  const bool wants_write = input_ >= 0 && backlog_ && started_;
  if (!output_.ended) {
    const short events = static_cast<short>((may_read ? POLLIN : 0) | (combined_ && wants_write ? POLLOUT : 0));
    // Nothing to hear: not even the hang-up, which would wake us for ever.
    if (events != 0)
      poller_.set_events(output_.fd.get(), events);
    else
      poller_.disable(output_.fd.get());
  }
  if (!error_.ended) {
    if (may_read)
      poller_.set_events(error_.fd.get(), POLLIN);
    else
      poller_.disable(error_.fd.get());
  }
  if (!combined_ && input_ >= 0) poller_.set_events(input_, wants_write ? POLLOUT : 0);
}

}  // namespace postern::sshd::net
