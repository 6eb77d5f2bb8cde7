#include "sshd/broker/refusal.h"

#include "sshd/protocol/ssh_wire.h"

#include <boost/asio/buffer.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>

#include <sys/socket.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <utility>

namespace postern::sshd::broker {
std::string refusal(const std::string& version, std::string_view reason) {
  std::string payload;
  payload += static_cast<char>(1);  // SSH_MSG_DISCONNECT
  put_u32(payload, 1);              // SSH_DISCONNECT_HOST_NOT_ALLOWED_TO_CONNECT
  put_string(payload, reason);
  put_string(payload, {});
  std::size_t padding = 8 - (5 + payload.size()) % 8;
  if (padding < 4) padding += 8;
  std::string out = "SSH-2.0-" + version + "\r\n";
  put_u32(out, 1 + payload.size() + padding);
  out += static_cast<char>(padding);
  out += payload;
  out.append(padding, '\0');
  return out;
}

struct TurnedAway::One : std::enable_shared_from_this<One> {
  static constexpr std::size_t most_bytes = 64 * 1024;

  One(const boost::asio::any_io_executor& executor, UniqueFd client, std::chrono::milliseconds time, std::shared_ptr<std::size_t> count)
      : socket{executor, client.release()}, timer{executor, time}, waiting{std::move(count)} {
    ++*waiting;
  }
  ~One() { --*waiting; }

  void start() {
    timer.async_wait([self = shared_from_this()](boost::system::error_code ec) { if (!ec) self->end(); });
    read();
  }
  void read() {
    socket.async_read_some(boost::asio::buffer(buffer), [self = shared_from_this()](boost::system::error_code ec, std::size_t n) {
      if (ec || (self->got += n) > most_bytes) return self->end();
      self->read();
    });
  }
  void end() {
    boost::system::error_code ignored;
    socket.close(ignored);
    timer.cancel();
  }

  boost::asio::posix::stream_descriptor socket;
  boost::asio::steady_timer timer;
  std::shared_ptr<std::size_t> waiting;
  std::array<char, 1024> buffer{};
  std::size_t got = 0;
};

void TurnedAway::add(UniqueFd client, const std::string& bytes) {
  // A fresh socket's buffer takes these few hundred bytes at once.
  (void)::send(client.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  ::shutdown(client.get(), SHUT_WR);
  if (*waiting_ < most) std::make_shared<One>(executor_, std::move(client), time_, waiting_)->start();
}

}  // namespace postern::sshd::broker
