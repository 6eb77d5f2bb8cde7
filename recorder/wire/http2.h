#pragma once

#include "base/address.h"
#include "base/expected.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// HTTP/2 (RFC 9113) in the clear on an Asio socket, by libnghttp2: one connection, either side. For relay and recorder.
//
// One thread: everything runs on the io_context of the socket, handlers included. Handlers may call anything, also reset(),
// close() and drop their last pointer. What a peer sends is bounded: header lists, windows, settings, pings, resets.
namespace postern::recorder::wire {

struct Http2Options {
  std::uint32_t stream_window = 1 << 20;       ///< bytes a peer may send on a stream before consume()
  std::uint32_t connection_window = 16 << 20;  ///< the same for all streams together
  std::uint32_t max_concurrent_streams = 4096; ///< that the peer may open (server)
  std::uint32_t max_frame_size = 64 * 1024;
  std::uint32_t max_header_list = 16 * 1024;
  std::uint64_t reset_burst = 8192;            ///< streams a peer may open and reset at once (CVE-2023-44487) …
  std::uint64_t reset_rate = 256;              ///< … and this many a second after that
  std::chrono::milliseconds ping_interval{5000};   ///< 0 = no PING of ours
  std::chrono::milliseconds stall_timeout{10000};  ///< a PING unanswered for so long: on_stalled(true)
  std::chrono::milliseconds peer_timeout{60000};   ///< … and for so long: the connection is closed
};

using HeaderList = std::vector<std::pair<std::string, std::string>>;

class Http2Connection;

/// One stream: a request and its answer. Kept alive by its connection until on_close, then by whoever holds a pointer (calls on
/// a closed stream do nothing). Its handlers are dropped after on_close.
class Http2Stream : public std::enable_shared_from_this<Http2Stream> {
 public:
  struct Handlers {
    /// Client: the answer's headers came.
    std::function<void(int status, const HeaderList& headers)> on_headers;
    /// Body bytes. The sender gets window back only by consume(), at once or when a disk has taken them.
    std::function<void(std::span<const std::byte> bytes)> on_data;
    /// The peer has sent END_STREAM.
    std::function<void()> on_end;
    /// What was queued is below `low_water` again (called only after write() found it above).
    std::function<void()> on_drain;
    /// Last call, always. `error` is an HTTP/2 error code (RFC 9113 section 7; 0 = both sides ended well), `refused` = the peer
    /// did not look at it (REFUSED_STREAM, GOAWAY below it).
    std::function<void(std::uint32_t error, bool refused)> on_close;
  };
  static constexpr std::size_t low_water = 128 * 1024;

  void set_handlers(Handlers handlers) { handlers_ = std::move(handlers); }

  // Of the request.
  const std::string& method() const noexcept { return method_; }
  const std::string& path() const noexcept { return path_; }  ///< with the query
  const HeaderList& headers() const noexcept { return headers_; }
  std::int32_t id() const noexcept { return id_; }
  /// Null after on_close.
  Http2Connection* connection() const noexcept { return connection_; }

  /// Server: status and headers of the answer, once. `end` = no body.
  void respond(int status, const HeaderList& headers, bool end = false);
  /// Queues body bytes. Never refuses: a sender of bulk looks at queued() and goes on at on_drain.
  void write(std::string bytes);
  /// Bytes queued here that flow control has not let out yet.
  std::size_t queued() const noexcept { return queued_; }
  /// END_STREAM after what is queued. A server whose client is still sending then also stops it with RST_STREAM(NO_ERROR).
  void finish();
  /// RST_STREAM at once; queued bytes are dropped. on_close follows. 8 = CANCEL, 7 = REFUSED_STREAM.
  void reset(std::uint32_t error = 8);
  /// Gives `bytes` of window back.
  void consume(std::size_t bytes);
  bool closed() const noexcept { return connection_ == nullptr; }

 private:
  friend class Http2Connection;
  Http2Connection* connection_ = nullptr;
  Handlers handlers_;
  std::int32_t id_ = 0;
  std::string method_, path_;
  HeaderList headers_;
  std::size_t header_bytes_ = 0;
  int status_ = 0;
  bool headers_done_ = false, responded_ = false, peer_ended_ = false, finish_ = false, waiting_drain_ = false;
  std::deque<std::string> out_;
  std::size_t out_at_ = 0;  // of out_.front()
  std::size_t queued_ = 0;
  std::size_t unconsumed_ = 0;
};

class Http2Connection : public std::enable_shared_from_this<Http2Connection> {
 public:
  using Socket = boost::asio::ip::tcp::socket;
  struct Handlers {
    /// Server: a request's headers are complete. Set the stream's handlers here and respond() now or later.
    std::function<void(const std::shared_ptr<Http2Stream>&)> on_request;
    /// true: a PING went unanswered for stall_timeout; false: answered again.
    std::function<void(bool stalled)> on_stalled;
    /// Last call, once. Every stream has had its on_close before.
    std::function<void(const std::string& why)> on_close;
  };

  /// `received` = bytes already read from the socket (by who looked for the preface).
  static std::shared_ptr<Http2Connection> server(Socket socket, const Http2Options& options, Handlers handlers,
                                                 std::string_view received = {});
  static std::shared_ptr<Http2Connection> client(Socket socket, const Http2Options& options, Handlers handlers);
  ~Http2Connection();

  /// Client: opens a stream. `end` = the request has no body. Null when the connection is closing or has no stream ids left.
  std::shared_ptr<Http2Stream> request(const std::string& method, const std::string& path, const HeaderList& headers, bool end,
                                       Http2Stream::Handlers handlers);
  /// GOAWAY; streams that are open go on, new ones are refused; closes when the last one has ended.
  void shut_down();
  /// Closes at once. on_close follows from the event loop, not from here.
  void close(const std::string& why);
  bool closed() const noexcept { return closed_; }
  bool stalled() const noexcept { return stalled_; }
  std::size_t streams() const noexcept;
  const Endpoint& peer() const noexcept { return peer_; }

 private:
  friend class Http2Stream;
  struct Impl;
  Http2Connection(Socket socket, const Http2Options& options, Handlers handlers, bool is_server);
  void start(std::string_view received);
  void receive(std::span<const std::uint8_t> bytes);
  void flush();  // soon: writes what nghttp2 wants to send
  void write_some();
  void read_some();
  void tick();
  void settle();  // on_close of everything, from the event loop

  std::unique_ptr<Impl> impl_;
  Handlers handlers_;
  Endpoint peer_;
  bool closed_ = false, stalled_ = false;
};

/// Connects (non-blocking) from `source` (unset: the kernel chooses) to `to`, within `timeout`; TCP_NODELAY set. Calls back once,
/// from the event loop. The returned function cancels: no call-back then.
std::function<void()> connect_tcp(boost::asio::io_context& io, const Endpoint& to, const std::optional<Address>& source,
                                  std::chrono::milliseconds timeout,
                                  std::function<void(Expected<boost::asio::ip::tcp::socket>)> done);

boost::asio::ip::tcp::endpoint to_asio(const Endpoint& endpoint);
/// IPv4-mapped addresses become IPv4 (base/address.h).
Endpoint from_asio(const boost::asio::ip::tcp::endpoint& endpoint);

}  // namespace postern::recorder::wire
