#pragma once

#include "base/expected.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace postern::auth::identity {

/// Connections kept to tailscaled for questions; each costs it a goroutine. The bus is one more.
inline constexpr std::size_t max_localapi_connections = 4;
/// Questions that wait for a connection. Beyond, one fails at once.
inline constexpr std::size_t max_localapi_waiting = 16 * 1024;
/// A question that waits fails after so many time-outs, however quickly others are answered.
inline constexpr int max_localapi_waits = 4;

/// HTTP/1.1 to tailscaled by its unix socket: questions with one answer each, over a few connections that are kept.
///
/// Never blocks, never throws, and calls back exactly once for each question, within bounded time whatever the other end does: `timeout` from sending
/// to the last byte; while a question waits for a connection, `timeout` without any answer to anybody, or max_localapi_waits of them in all.
/// What it says of the other end's faults is Error{EAGAIN}, of an answer longer than `limit` Error{E2BIG}. Once destroyed it calls nothing.
class LocalApi {
 public:
  struct Answer {
    unsigned status = 0;
    std::string body;
  };
  struct Question {
    std::string target;         ///< "/localapi/v0/status"
    std::size_t limit = 0;      ///< of the answer's body
    bool first = false;         ///< before those that wait already
    std::function<void(Expected<Answer>)> answer;
  };

  LocalApi(boost::asio::io_context& io, std::string socket, std::chrono::milliseconds timeout);
  ~LocalApi();
  LocalApi(const LocalApi&) = delete;
  LocalApi& operator=(const LocalApi&) = delete;

  /// May call back only after it returned.
  void ask(Question question);
  /// The user of the process that listens there (SO_PEERCRED, unix(7)), as of the last connection.
  std::optional<uid_t> peer_user() const { return peer_user_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Waiting {
    Question question;
    Clock::time_point asked;
  };
  class Connection;

  void pump();
  void sweep();
  void arm_sweep();
  Clock::time_point gives_up(const Waiting& waiting) const;
  void fail_later(Question question, std::string doing);

  boost::asio::io_context& io_;
  const std::string socket_;
  const std::chrono::milliseconds timeout_;
  std::deque<Waiting> waiting_;
  std::vector<std::shared_ptr<Connection>> connections_;
  Clock::time_point last_answer_{};
  std::optional<uid_t> peer_user_;
  boost::asio::steady_timer sweep_timer_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

/// An answer without an end, line by line (watch-ipn-bus). A connection of its own.
///
/// `timeout` holds until the header is there and for each line from its first byte to its last; between lines it may be silent for ever.
class LineStream {
 public:
  struct Handlers {
    std::function<void()> open;                  ///< the header says 200
    std::function<void(std::string_view)> line;  ///< without its end; never empty
    std::function<void(Error)> end;              ///< at most once, and then nothing more
  };
  LineStream(boost::asio::io_context& io, const std::string& socket, const std::string& target, std::size_t max_line, std::chrono::milliseconds timeout,
             Handlers handlers);
  /// Calls nothing any more. Also from within a handler.
  ~LineStream();
  LineStream(const LineStream&) = delete;
  LineStream& operator=(const LineStream&) = delete;

 private:
  class State;
  std::shared_ptr<State> state_;
};

}  // namespace postern::auth::identity
