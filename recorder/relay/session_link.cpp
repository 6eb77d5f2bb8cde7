#include "recorder/relay/session_link.h"

#include <boost/asio/buffer.hpp>
#include <boost/asio/write.hpp>

#include <utility>

namespace postern::recorder::relay {

namespace asio = boost::asio;
namespace local = wire::local;

void SessionLink::start(Handlers handlers) {
  rebind(std::move(handlers));
  read();
}

void SessionLink::rebind(Handlers handlers) { handlers_ = std::make_shared<const Handlers>(std::move(handlers)); }

void SessionLink::read() {
  const auto space = reader_.space();
  socket_.async_read_some(asio::buffer(space.data(), space.size()), [self = shared_from_this()](boost::system::error_code ec, std::size_t n) {
    if (self->closed_) return;
    if (ec) return self->over(ec.message());
    self->reader_.filled(n);
    self->take();
    if (self->closed_ || self->closing_) return;
    if (const auto handlers = self->handlers_) handlers->batch();
    if (!self->closed_ && !self->closing_) self->read();
  });
}

void SessionLink::take() {
  while (const auto frame = reader_.next()) {
    const auto handlers = handlers_;
    switch (frame->type) {
      case local::Type::open: {
        const auto open = local::parse_open(frame->payload);
        if (open_ || !open) return over("an open that makes no sense");
        if (open->version < local::oldest_version || open->version > local::version) return refuse("this version is not spoken here");
        open_ = true;
        handlers->open(*open);
        break;
      }
      case local::Type::data: {
        const auto data = local::parse_data(frame->payload);
        if (!open_ || end_ || !data) return over("data out of place");
        handlers->data(data->offset, data->bytes);
        break;
      }
      case local::Type::end: {
        const auto end = local::parse_end(frame->payload);
        if (!open_ || end_ || !end) return over("an end out of place");
        end_ = true;
        handlers->end(*end);
        break;
      }
      default:
        return over("an unknown frame");
    }
    if (closed_ || closing_) return;
  }
  if (reader_.broken()) over("a broken frame");
}

void SessionLink::opened(const local::Opened& opened) {
  sent_acks_ = opened.acks;
  told_ended_ = opened.ended;
  local::append(opened, out_);
  write();
}

void SessionLink::acks(const local::Acks& acks) {
  if (acks == sent_acks_ && !acks_) return;
  acks_ = acks;
  write();
}

void SessionLink::state(const local::State& state) {
  state_ = state;
  write();
}

void SessionLink::journal_failed(const std::string& why) {
  if (acks_) {
    local::append(*std::exchange(acks_, std::nullopt), out_);  // what was taken before
  }
  local::append(local::Type::journal_failed, why, out_);
  write();
}

void SessionLink::ended() {
  if (ended_) return;
  ended_ = true;
  if (acks_) local::append(*std::exchange(acks_, std::nullopt), out_);
  local::append(local::Type::ended, "", out_);
  write();
}

void SessionLink::refuse(const std::string& why) {
  local::append(local::Type::refused, why, out_);
  closing_ = true;
  write();
}

void SessionLink::write() {
  if (closed_ || !writing_.empty()) return;
  if (acks_) {
    sent_acks_ = *acks_;
    local::append(*acks_, out_);
    acks_.reset();
  }
  if (state_) {
    local::append(*state_, out_);
    state_.reset();
  }
  if (out_.empty()) {
    if (closing_) over("refused");
    return;
  }
  writing_.swap(out_);
  asio::async_write(socket_, asio::buffer(writing_), [self = shared_from_this(), with_end = ended_](boost::system::error_code ec, std::size_t) {
    self->writing_.clear();
    if (self->closed_) return;
    if (ec) return self->over(ec.message());
    if (with_end) self->told_ended_ = true;
    self->write();
  });
}

void SessionLink::over(const std::string& why) {
  if (closed_) return;
  const auto handlers = handlers_;
  close();
  if (handlers) handlers->closed(why);
}

void SessionLink::close() {
  if (closed_) return;
  closed_ = true;
  boost::system::error_code ignored;
  socket_.close(ignored);
  handlers_.reset();
}

}  // namespace postern::recorder::relay
