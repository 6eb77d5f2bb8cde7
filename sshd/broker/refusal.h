#pragma once

#include "base/unique_fd.h"

#include <boost/asio/any_io_executor.hpp>

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace postern::sshd::broker {

/// What is sent to a client that is not served: identification line and SSH_MSG_DISCONNECT (RFC 4253 sections 4.2, 6, 11.1), unencrypted, made
/// without reading a byte. `version` is what follows "SSH-2.0-".
std::string refusal(const std::string& version, std::string_view reason);

/// Turns clients away with a refusal, at a bounded cost.
///
/// Closing a socket with bytes unread resets the connection, and then OpenSSH's client says "Connection reset" in place of the reason. So a few
/// sockets at a time are only shut down, and closed when the client has gone or after `time`; what it sends is thrown away unseen. All
/// others are closed at once.
class TurnedAway {
 public:
  static constexpr std::size_t most = 256;
  TurnedAway(boost::asio::any_io_executor executor, std::chrono::milliseconds time) : executor_{std::move(executor)}, time_{time} {}
  void add(UniqueFd client, const std::string& bytes);

 private:
  struct One;
  boost::asio::any_io_executor executor_;
  std::chrono::milliseconds time_;
  std::shared_ptr<std::size_t> waiting_ = std::make_shared<std::size_t>(0);
};

}  // namespace postern::sshd::broker
