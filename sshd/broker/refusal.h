#pragma once

#include "base/unique_fd.h"

#include <boost/asio/any_io_executor.hpp>

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
/// sockets at a time are only shut down, and closed when the client has gone or after `longest`; what it sends is thrown away unseen. All
/// others are closed at once.
class TurnedAway {
 public:
  static constexpr std::size_t most = 64;
  explicit TurnedAway(boost::asio::any_io_executor executor) : executor_{std::move(executor)} {}
  void add(UniqueFd client, const std::string& bytes);

 private:
  struct One;
  boost::asio::any_io_executor executor_;
  std::shared_ptr<std::size_t> waiting_ = std::make_shared<std::size_t>(0);
};

}  // namespace postern::sshd::broker
