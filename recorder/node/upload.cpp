#include "recorder/node/upload.h"

#include "base/log.h"

#include <utility>

namespace postern::recorder::node {

using wire::Code;
using wire::ErrorLine;

namespace {
Unexpected<Error> bad(std::string what) { return Unexpected{Error{0, std::move(what)}}; }
}  // namespace

void answer_error(wire::Http2Stream& stream, const ErrorLine& error) {
  stream.respond(wire::http_status(error.code), {{"content-type", "application/jsonl"}});
  stream.write(wire::format(error));
  stream.finish();
}

Upload::Upload(boost::asio::io_context& io, Store& store, std::shared_ptr<wire::Http2Stream> stream, const Id& id, std::uint64_t epoch,
               const Address& source)
    : store_{store},
      stream_{std::move(stream)},
      id_{id},
      epoch_{epoch},
      source_{source},
      reader_{{
          .open = [this](const wire::OpenLine& open) -> Expected<Done> {
            if (open.id != id_ || open.epoch != epoch_) return bad("open line: not the id and epoch of the path");
            timer_.cancel();
            upload_ = store_.open(open, source_, shared_from_this());
            return Done{};
          },
          .data = [this](std::uint64_t offset, std::span<const std::byte> bytes) -> Expected<Done> {
            if (!answered_) return bad("a frame before the answer");
            data_ += bytes.size();
            store_.append(upload_, offset, std::string{reinterpret_cast<const char*>(bytes.data()), bytes.size()});
            return Done{};
          },
          .end = [this](const wire::EndFrame& end) -> Expected<Done> {
            if (!answered_) return bad("a frame before the answer");
            ended_ = true;
            store_.end(upload_, end);
            return Done{};
          },
          .cut = [this](const wire::EndFrame& cut) -> Expected<Done> {
            if (!answered_) return bad("a frame before the answer");
            ended_ = true;
            store_.cut(upload_, cut);
            return Done{};
          },
          .conflict = [this](const wire::ConflictFrame& conflict) -> Expected<Done> {
            if (!answered_) return bad("a frame before the answer");
            ended_ = true;
            store_.conflict(upload_, conflict);
            return Done{};
          },
      }},
      timer_{io} {}

std::shared_ptr<Upload> Upload::begin(boost::asio::io_context& io, Store& store, const std::shared_ptr<wire::Http2Stream>& stream,
                                      const Id& id, std::uint64_t epoch, const Address& source, std::chrono::milliseconds open_timeout) {
  const std::shared_ptr<Upload> self{new Upload{io, store, stream, id, epoch, source}};
  stream->set_handlers({
      .on_headers = {},
      .on_data = [self](std::span<const std::byte> bytes) { self->received(bytes); },
      .on_end =
          [self] {
            if (self->over_ || self->ended_) return;
            // No more will come, and no end: what is there stays.
            if (self->upload_ != 0) self->store_.close(self->upload_);
            if (!self->answered_) return self->failed({"the request ended too early", Code::bad_request, 0});
            self->over_ = true;
            self->stream_->finish();
          },
      .on_drain = {},
      .on_close =
          [self](std::uint32_t, bool) {
            self->timer_.cancel();
            if (!std::exchange(self->over_, true) && self->upload_ != 0) self->store_.close(self->upload_);
          },
  });
  self->timer_.expires_after(open_timeout);
  self->timer_.async_wait([self](const boost::system::error_code& ec) {
    if (!ec && !self->over_ && self->upload_ == 0) self->failed({"no open line", Code::timeout, 0});
  });
  return self;
}

void Upload::stalled(bool stalled) {
  if (upload_ != 0 && !over_) store_.stalled(upload_, stalled);
}

void Upload::received(std::span<const std::byte> bytes) {
  if (over_) {
    stream_->consume(bytes.size());
    return;
  }
  data_ = 0;
  const auto done = reader_.feed(bytes);
  // Payload gives its window back when the storage thread has written it; the rest at once.
  stream_->consume(bytes.size() - data_);
  if (done) return;
  if (upload_ != 0) store_.close(upload_);
  failed({done.error().doing, answered_ ? Code::bad_frame : Code::bad_request, 0});
}

void Upload::opened(const wire::AnswerLine& answer) {
  if (over_) return;
  answered_ = true;
  stream_->respond(200, {{"content-type", "application/jsonl"}});
  stream_->write(wire::format(answer));
}

void Upload::written(std::size_t bytes) { stream_->consume(bytes); }

void Upload::committed(std::uint64_t offset) {
  // A relay that does not read its acks: each line says all that the ones before said, so leaving some out loses nothing.
  if (!over_ && stream_->queued() < wire::Http2Stream::low_water) stream_->write(wire::format_ack(offset));
}

void Upload::last(const std::string& line) {
  if (std::exchange(over_, true)) return;
  timer_.cancel();
  stream_->write(line);
  stream_->finish();
}

void Upload::whole(const std::string& head) { last(wire::format_whole(head)); }
void Upload::cut(const std::string& head, std::uint64_t length) { last(wire::format_cut(head, length)); }

void Upload::failed(const ErrorLine& error) {
  if (over_) return;
  if (!answered_) stream_->respond(wire::http_status(error.code), {{"content-type", "application/jsonl"}});
  last(wire::format(error));
}

}  // namespace postern::recorder::node
