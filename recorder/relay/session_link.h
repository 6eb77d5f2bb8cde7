#pragma once

#include "recorder/wire/local.h"

#include <boost/asio/local/stream_protocol.hpp>

#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace postern::recorder::relay {

/// The relay's end of one session's connection (recorder/wire/local.h). Reads frames, checks their order, and hands them out; what
/// it tells the session is coalesced, so a session that does not read costs a fixed amount of memory.
class SessionLink : public std::enable_shared_from_this<SessionLink> {
 public:
  using Socket = boost::asio::local::stream_protocol::socket;
  struct Handlers {
    std::function<void(const wire::local::Open&)> open;
    std::function<void(std::uint64_t offset, std::string_view bytes)> data;
    std::function<void(const wire::local::End&)> end;
    /// All frames of one read were handed out: the moment to tell acks.
    std::function<void()> batch;
    /// The connection is over, for whatever reason; once, last.
    std::function<void(const std::string& why)> closed;
  };

  explicit SessionLink(Socket socket) : socket_{std::move(socket)} {}
  /// Calls no handler before it returns.
  void start(Handlers handlers);
  /// Other handlers from the next call on; may be called from a handler.
  void rebind(Handlers handlers);

  void opened(const wire::local::Opened& opened);
  void acks(const wire::local::Acks& acks);
  void state(const wire::local::State& state);
  void journal_failed(const std::string& why);
  void ended();
  bool told_ended() const noexcept { return told_ended_; }  ///< and the socket has taken it
  /// Tells why and closes.
  void refuse(const std::string& why);
  /// No handler is called any more, `closed` neither.
  void close();

 private:
  void read();
  void take();
  void write();
  void over(const std::string& why);

  Socket socket_;
  std::shared_ptr<const Handlers> handlers_;  // shared: a handler that is running must outlive rebind() and close()
  wire::local::FrameReader reader_;
  bool open_ = false, end_ = false, closed_ = false, closing_ = false;
  std::string out_, writing_;
  std::optional<wire::local::Acks> acks_;
  wire::local::Acks sent_acks_;
  std::optional<wire::local::State> state_;
  bool ended_ = false, told_ended_ = false;
};

}  // namespace postern::recorder::relay
