#include "recorder/relay/upload.h"

#include "recorder/wire/messages.h"

#include <algorithm>
#include <utility>

namespace postern::recorder::relay {
namespace {

using Ending = journal::Meta::Ending;

}  // namespace

Upload::Upload(std::shared_ptr<journal::Entry> entry, std::uint64_t epoch, std::string relay_name, HeadSource heads, Handlers handlers)
    : entry_{std::move(entry)}, epoch_{epoch}, relay_name_{std::move(relay_name)}, heads_{std::move(heads)}, handlers_{std::move(handlers)} {}

void Upload::start(std::unique_ptr<Stream> stream, Clock::time_point now) {
  stream_ = std::move(stream);
  now_ = now;
  phase_ = Phase::opening;
  target_ = entry_->length();
  progress();
  stream_->send(wire::format(wire::OpenLine{entry_->meta().recording, epoch_, relay_name_.substr(0, 255), 0, target_, ""}));
}

/// Starts the clock of waiting_since() when something waits and it does not run, stops it when nothing does.
void Upload::progress() {
  bool waits = false;
  switch (phase_) {
    case Phase::opening:
    case Phase::ending: waits = true; break;
    case Phase::streaming: waits = entry_->length() > acked_; break;
    default: break;
  }
  if (!waits)
    waiting_.reset();
  else if (!waiting_)
    waiting_ = now_;
}

std::optional<Upload::Clock::time_point> Upload::waiting_since() const { return waiting_; }

void Upload::poke(Clock::time_point now) {
  const auto self = shared_from_this();  // a handler may drop it
  now_ = now;
  if (phase_ != Phase::streaming) return;
  pump();
  progress();
}

void Upload::writable() {
  if (phase_ == Phase::streaming) pump();
}

void Upload::cancel() {
  if (phase_ == Phase::over) return;
  phase_ = Phase::over;
  waiting_.reset();
  if (stream_) stream_->cancel();
}

void Upload::fail(Refused refused) {
  if (phase_ == Phase::over) return;
  const auto self = shared_from_this();  // the handler may drop this upload
  cancel();
  handlers_.refused(refused);
}

void Upload::on_status(int status) { status_ = status; }

void Upload::on_data(std::string_view bytes, Clock::time_point now) {
  const auto self = shared_from_this();
  now_ = now;
  if (phase_ == Phase::over) return;
  if (status_ != 200) {
    if (error_body_.size() < wire::max_line) error_body_ += bytes;
    return;
  }
  const auto fed = lines_.feed(bytes, [&](std::string_view text) {
    if (phase_ == Phase::opening)
      answer(text);
    else
      reply(text);
    return phase_ != Phase::over;
  });
  if (!fed && phase_ != Phase::over) fail({"", status_, 0, fed.error().doing});
}

void Upload::on_over(const std::string& why, bool refused_unseen) {
  if (phase_ == Phase::over) return;
  if (status_ != 0 && status_ != 200) {
    const auto error = wire::parse_error_body(error_body_, status_);
    return fail({std::string{wire::name(error.code)}, status_, error.epoch, error.error});
  }
  fail({refused_unseen ? "not_accepting" : "", status_, 0, why});
}

void Upload::reply(std::string_view text) {
  const auto parsed = wire::parse_upload_reply(text);
  if (!parsed) return fail({"", status_, 0, parsed.error().doing});
  using Kind = wire::UploadReply::Kind;
  if (parsed->kind == Kind::error) return fail({std::string{wire::name(parsed->error.code)}, status_, parsed->error.epoch, parsed->error.error});
  if (parsed->kind == Kind::ack) {
    const std::uint64_t n = parsed->offset;
    if (n > next_) return fail({"", status_, 0, "it acked bytes that it was not sent"});
    if (n <= acked_) return;
    acked_ = n;
    waiting_.reset();
    progress();
    handlers_.acked(n);
    if (phase_ != Phase::over) check_caught_up();
    return;
  }
  const auto& meta = entry_->meta();
  const bool cut = parsed->kind == Kind::cut;
  if (phase_ != Phase::ending || cut != (meta.ending == Ending::cut)) return fail({"", status_, 0, "an end that was not asked for"});
  if (!cut && parsed->head != meta.head) return fail({"conflict", status_, 0, "it has another head at the end"});
  if (cut && parsed->offset < meta.length) return fail({"", status_, 0, "it marked less as cut than it was sent"});
  phase_ = Phase::over;
  waiting_.reset();
  handlers_.stored(cut);
}

void Upload::check_caught_up() {
  if (caught_up_ || acked_ < target_) return;
  caught_up_ = true;
  handlers_.caught_up();
}

void Upload::answer(std::string_view text) {
  const auto parsed = wire::parse_answer(text);
  if (!parsed) {
    const auto reply = wire::parse_upload_reply(text);
    if (reply && reply->kind == wire::UploadReply::Kind::error)
      return fail({std::string{wire::name(reply->error.code)}, status_, reply->error.epoch, reply->error.error});
    return fail({"", status_, 0, parsed.error().doing});
  }
  if (parsed->ack != "disk") return fail({"", status_, 0, "its acks mean something that this relay does not know"});
  const std::uint64_t n = parsed->have;
  const bool whole = parsed->state == "whole";

  phase_ = Phase::comparing;
  progress();
  // In the order of the protocol's page, "What the relay does with it".
  const auto second = [this, n, proven = parsed->proven] {
    if (proven && proven->offset < n && proven->offset <= entry_->length())
      return compare(proven->offset, proven->head, [this, n, m = proven->offset](bool equal) { equal ? go_on(m) : conflict(n); });
    if (n > entry_->length() && entry_->meta().ending == Ending::cut) {
      // This host lost its tail (its power, for instance) and the session is dead: the recorder's longer copy is the better one.
      return go_on(entry_->length());
    }
    conflict(n);
  };
  if (n > entry_->length()) return second();
  compare(n, parsed->head, [this, n, whole, second](bool equal) {
    if (!equal) return second();
    if (!whole) return go_on(n);
    const auto& meta = entry_->meta();
    if (meta.ending == Ending::none || meta.length != n) return conflict(n);
    acked_ = next_ = n;
    handlers_.opened();
    if (phase_ == Phase::over) return;
    cancel();
    handlers_.acked(n);
    handlers_.stored(false);
  });
}

void Upload::compare(std::uint64_t n, const std::string& head, std::function<void(bool)> then) {
  heads_(n, [weak = weak_from_this(), head, then = std::move(then)](Expected<cast::Digest> ours) {
    const auto self = weak.lock();
    if (!self || self->phase_ != Phase::comparing) return;
    if (!ours) return self->fail({"", self->status_, 0, ours.error().doing});
    then(cast::hex(*ours) == head);
  });
}

void Upload::go_on(std::uint64_t n) {
  phase_ = Phase::streaming;
  next_ = acked_ = n;
  handlers_.opened();
  if (phase_ == Phase::over) return;
  if (n > 0) handlers_.acked(n);
  if (phase_ == Phase::over) return;
  check_caught_up();
  if (phase_ != Phase::streaming) return;
  pump();
  progress();
}

void Upload::conflict(std::uint64_t n) {
  heads_(std::min(n, entry_->length()), [weak = weak_from_this(), n](Expected<cast::Digest> ours) {
    const auto self = weak.lock();
    if (!self || self->phase_ != Phase::comparing) return;
    if (ours) {
      self->stream_->send(wire::conflict_frame({n, cast::hex(*ours)}));
      self->stream_->finish();
      // The recorder marks its copy and ends the stream; nothing of that matters here any more, but a reset could overtake the frame.
      self->phase_ = Phase::over;
      self->handlers_.refused({"conflict", self->status_, 0, "its part is not a beginning of this recording"});
      return;
    }
    self->fail({"conflict", self->status_, 0, "its part is not a beginning of this recording"});
  });
}

void Upload::pump() {
  while (next_ < entry_->length() && stream_->unsent() < ahead) {
    const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(piece, entry_->length() - next_));
    std::string out = wire::data_frame_header(next_, n);
    out.resize(wire::frame_header_size + n);
    const auto have = entry_->read(next_, {out.data() + wire::frame_header_size, n});
    if (!have || *have != n) return fail({"", status_, 0, have ? "the journal is shorter than it should be" : have.error().doing});
    stream_->send(std::move(out));
    next_ += n;
  }
  const auto& meta = entry_->meta();
  if (meta.ending == Ending::none || next_ < entry_->length()) return;
  const wire::EndFrame end{meta.length, meta.head, meta.reason, meta.signature};
  stream_->send(meta.ending == Ending::ended ? wire::end_frame(end) : wire::cut_frame(end));
  stream_->finish();
  phase_ = Phase::ending;
  progress();
}

}  // namespace postern::recorder::relay
