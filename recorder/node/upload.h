#pragma once

#include "recorder/node/store.h"
#include "recorder/wire/http2.h"
#include "recorder/wire/messages.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>

#include <chrono>
#include <memory>

namespace postern::recorder::node {

/// One upload: a POST stream of a relay, between its HTTP/2 stream and the store. Owns itself while either of the two calls it.
class Upload : public UploadSink, public std::enable_shared_from_this<Upload> {
 public:
  /// Takes the stream over; its request is POST …/recordings/{id}?epoch={epoch}.
  static std::shared_ptr<Upload> begin(boost::asio::io_context& io, Store& store, const std::shared_ptr<wire::Http2Stream>& stream,
                                       const Id& id, std::uint64_t epoch, const Address& source, std::chrono::milliseconds open_timeout);
  /// The relay's connection answers no more, or again.
  void stalled(bool stalled);

  void opened(const wire::AnswerLine& answer) override;
  void written(std::size_t bytes) override;
  void committed(std::uint64_t offset) override;
  void whole(const std::string& head) override;
  void cut(const std::string& head, std::uint64_t length) override;
  void failed(const wire::ErrorLine& error) override;

 private:
  Upload(boost::asio::io_context& io, Store& store, std::shared_ptr<wire::Http2Stream> stream, const Id& id, std::uint64_t epoch,
         const Address& source);
  void received(std::span<const std::byte> bytes);
  void last(const std::string& line);

  Store& store_;
  std::shared_ptr<wire::Http2Stream> stream_;
  Id id_;
  std::uint64_t epoch_;
  Address source_;
  wire::UploadReader reader_;
  boost::asio::steady_timer timer_;
  Store::UploadId upload_ = 0;
  bool answered_ = false;  // the store has opened it: 200 is out
  bool ended_ = false;     // E, X or F came
  bool over_ = false;      // the last line is out, or the stream is gone
  std::size_t data_ = 0;   // payload bytes of the piece that is being read
};

/// The answer to a request that failed before its 200: status and one line.
void answer_error(wire::Http2Stream& stream, const wire::ErrorLine& error);

}  // namespace postern::recorder::node
