#include "recorder/relay/upload.h"

#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <utility>

namespace postern::recorder::relay {
namespace {

using Json = nlohmann::json;
using Ending = journal::Meta::Ending;

constexpr std::size_t longest_line = 16'384;

std::string dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::uint64_t number(const Json& json, const char* name) {
  const auto it = json.find(name);
  return it != json.end() && it->is_number_unsigned() ? it->get<std::uint64_t>() : 0;
}

std::string text(const Json& json, const char* name) {
  const auto it = json.find(name);
  return it != json.end() && it->is_string() ? it->get<std::string>() : std::string{};
}

}  // namespace

Upload::Upload(std::shared_ptr<journal::Entry> entry, std::uint64_t epoch, std::string relay_name, HeadSource heads, Handlers handlers)
    : entry_{std::move(entry)}, epoch_{epoch}, relay_name_{std::move(relay_name)}, heads_{std::move(heads)}, handlers_{std::move(handlers)} {}

void Upload::start(std::unique_ptr<Stream> stream, Clock::time_point now) {
  stream_ = std::move(stream);
  now_ = now;
  phase_ = Phase::opening;
  target_ = entry_->length();
  progress();
  const Json open{{"open", 1},        {"id", entry_->meta().recording.text()}, {"epoch", epoch_},   {"relay", relay_name_.substr(0, 255)},
                  {"chain", 1},       {"from", 0},                             {"length", target_}, {"signature", ""}};
  stream_->send(dump(open) + "\n");
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
  while (!bytes.empty() && phase_ != Phase::over) {
    const auto end = bytes.find('\n');
    partial_ += bytes.substr(0, end);
    if (partial_.size() > longest_line) return fail({"", status_, 0, "a line that is too long"});
    if (end == std::string_view::npos) return;
    bytes.remove_prefix(end + 1);
    line(std::exchange(partial_, {}));
  }
}

void Upload::on_over(const std::string& why, bool refused_unseen) {
  if (phase_ == Phase::over) return;
  if (!partial_.empty()) {
    const auto self = shared_from_this();
    line(std::exchange(partial_, {}));  // an error body whose line has no end
    if (phase_ == Phase::over) return;
  }
  fail({refused_unseen ? "not_accepting" : "", status_, 0, why});
}

void Upload::line(std::string_view textline) {
  const Json json = Json::parse(textline.begin(), textline.end(), nullptr, false);
  if (!json.is_object()) return fail({"", status_, 0, "a line that is no JSON object"});
  if (json.contains("error") || status_ != 200) return fail({text(json, "code"), status_, number(json, "epoch"), text(json, "error")});
  if (phase_ == Phase::opening) return answer(textline);
  if (json.contains("ack")) {
    const std::uint64_t n = number(json, "ack");
    if (n > next_) return fail({"", status_, 0, "it acked bytes that it was not sent"});
    if (n > acked_) {
      acked_ = n;
      waiting_.reset();
      progress();
      handlers_.acked(n);
      if (phase_ == Phase::over) return;
      if (!caught_up_ && acked_ >= target_) {
        caught_up_ = true;
        handlers_.caught_up();
      }
    }
    return;
  }
  const bool whole = json.contains("whole"), cut = json.contains("cut");
  if (!whole && !cut) return;  // a later version's line
  const auto& meta = entry_->meta();
  if (phase_ != Phase::ending || whole != (meta.ending == Ending::ended)) return fail({"", status_, 0, "an end that was not asked for"});
  if (whole && text(json, "whole") != meta.head) return fail({"conflict", status_, 0, "it has another head at the end"});
  if (cut && number(json, "length") < meta.length) return fail({"", status_, 0, "it marked less as cut than it was sent"});
  phase_ = Phase::over;
  waiting_.reset();
  handlers_.stored(cut);
}

void Upload::answer(std::string_view textline) {
  const Json json = Json::parse(textline.begin(), textline.end(), nullptr, false);
  const auto ranges = json.find("ranges");
  const auto is_range = [](const Json& r) { return r.is_array() && r.size() == 2 && r[0].is_number_unsigned() && r[1].is_number_unsigned(); };
  if (ranges == json.end() || !ranges->is_array() || ranges->size() != 1 || !is_range((*ranges)[0]) || (*ranges)[0][0] != 0)
    return fail({"", status_, 0, "an answer that makes no sense"});
  if (text(json, "ack") != "disk") return fail({"", status_, 0, "its acks mean something that this relay does not know"});
  const auto n = (*ranges)[0][1].get<std::uint64_t>();
  const std::string head = text(json, "head");
  const bool whole = text(json, "state") == "whole";
  std::optional<std::pair<std::uint64_t, std::string>> proven;
  if (const auto p = json.find("proven"); p != json.end() && p->is_object()) proven = {number(*p, "offset"), text(*p, "head")};

  phase_ = Phase::comparing;
  progress();
  // In the order of the protocol's page, "What the relay does with it".
  const auto second = [this, n, proven] {
    if (proven && proven->first < n && proven->first <= entry_->length())
      return compare(proven->first, proven->second, [this, n, m = proven->first](bool equal) { equal ? go_on(m) : conflict(n); });
    const auto& meta = entry_->meta();
    if (n > entry_->length() && meta.ending == Ending::cut) {
      // This host lost its tail (its power, for instance) and the session is dead: the recorder's longer copy is the better one.
      phase_ = Phase::streaming;
      next_ = entry_->length();
      acked_ = next_;
      handlers_.opened();
      if (phase_ == Phase::streaming) pump();
      return;
    }
    conflict(n);
  };
  if (n > entry_->length()) return second();
  compare(n, head, [this, n, whole, second](bool equal) {
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
  if (!caught_up_ && acked_ >= target_) {
    caught_up_ = true;
    handlers_.caught_up();
  }
  if (phase_ != Phase::streaming) return;
  pump();
  progress();
}

void Upload::conflict(std::uint64_t n) {
  heads_(std::min(n, entry_->length()), [weak = weak_from_this(), n](Expected<cast::Digest> ours) {
    const auto self = weak.lock();
    if (!self || self->phase_ != Phase::comparing) return;
    if (ours) {
      self->frame('F', n, dump(Json{{"offset", n}, {"head", cast::hex(*ours)}}));
      self->stream_->finish();
      // The recorder marks its copy and ends the stream; nothing of that matters here any more, but a reset could overtake the frame.
      self->phase_ = Phase::over;
      self->handlers_.refused({"conflict", self->status_, 0, "its part is not a beginning of this recording"});
      return;
    }
    self->fail({"conflict", self->status_, 0, "its part is not a beginning of this recording"});
  });
}

void Upload::frame(char type, std::uint64_t offset, std::string_view payload) {
  std::string out;
  out.reserve(12 + payload.size());
  out += type;
  for (int shift = 16; shift >= 0; shift -= 8) out += static_cast<char>(payload.size() >> shift);
  for (int shift = 56; shift >= 0; shift -= 8) out += static_cast<char>(offset >> shift);
  out += payload;
  stream_->send(std::move(out));
}

void Upload::pump() {
  while (next_ < entry_->length() && stream_->unsent() < ahead) {
    const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(piece, entry_->length() - next_));
    std::string out(12 + n, '\0');
    const auto have = entry_->read(next_, {out.data() + 12, n});
    if (!have || *have != n) return fail({"", status_, 0, have ? "the journal is shorter than it should be" : have.error().doing});
    out[0] = 'D';
    for (int i = 0; i < 3; i++) out[static_cast<std::size_t>(1 + i)] = static_cast<char>(n >> (16 - 8 * i));
    for (int i = 0; i < 8; i++) out[static_cast<std::size_t>(4 + i)] = static_cast<char>(next_ >> (56 - 8 * i));
    stream_->send(std::move(out));
    next_ += n;
  }
  const auto& meta = entry_->meta();
  if (meta.ending == Ending::none || next_ < entry_->length()) return;
  Json end{{"length", meta.length}, {"head", meta.head}, {"signature", meta.signature}};
  if (meta.ending == Ending::cut) end["reason"] = meta.reason;
  frame(meta.ending == Ending::ended ? 'E' : 'X', meta.length, dump(end));
  stream_->finish();
  phase_ = Phase::ending;
  progress();
}

}  // namespace postern::recorder::relay
