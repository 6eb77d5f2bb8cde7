#include "recorder/wire/messages.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>

namespace postern::recorder::wire {
namespace {

using nlohmann::json;

struct CodeName {
  Code code;
  std::string_view name;
  int status;
};
constexpr std::array codes{
    CodeName{Code::bad_request, "bad_request", 400},     CodeName{Code::not_allowed, "not_allowed", 403},
    CodeName{Code::not_yours, "not_yours", 403},         CodeName{Code::not_found, "not_found", 404},
    CodeName{Code::stale_epoch, "stale_epoch", 409},     CodeName{Code::conflict, "conflict", 409},
    CodeName{Code::too_large, "too_large", 413},         CodeName{Code::io_error, "io_error", 500},
    CodeName{Code::not_accepting, "not_accepting", 503}, CodeName{Code::disk_full, "disk_full", 507},
    CodeName{Code::bad_frame, "bad_frame", 400},         CodeName{Code::superseded, "superseded", 409},
    CodeName{Code::timeout, "timeout", 408}};

Unexpected<Error> bad(std::string what) { return Unexpected{Error{0, std::move(what)}}; }

std::string dump(const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace); }
std::string line_of(const json& value) { return dump(value) + "\n"; }

/// A parsed object and what was wrong with it so far: getters note the first fault and go on.
class Object {
 public:
  explicit Object(std::string_view text) {
    if (text.size() > max_line) {
      fault_ = "too long";
      return;
    }
    // The SAX depth of a stranger's "[[[[…" is bounded by max_line; nlohmann's parser does not recurse.
    value_ = json::parse(text, nullptr, false);
    if (!value_.is_object()) fault_ = "not a JSON object";
  }
  bool has(const char* key) const { return value_.is_object() && value_.contains(key); }
  std::uint64_t number(const char* key) {
    const json* v = find(key);
    if (!v) return 0;
    if (!v->is_number_unsigned() || v->get<std::uint64_t>() > max_number) {
      wrong(key);
      return 0;
    }
    return v->get<std::uint64_t>();
  }
  std::string text(const char* key, std::size_t most = 255) {
    const json* v = find(key);
    if (!v) return {};
    if (!v->is_string() || v->get_ref<const std::string&>().size() > most) {
      wrong(key);
      return {};
    }
    return v->get<std::string>();
  }
  bool boolean(const char* key) {
    const json* v = find(key);
    if (!v) return false;
    if (!v->is_boolean()) {
      wrong(key);
      return false;
    }
    return v->get<bool>();
  }
  std::string head(const char* key) {
    std::string text = this->text(key, 64);
    if (text.size() != 64 || text.find_first_not_of("0123456789abcdef") != std::string::npos) wrong(key);
    return text;
  }
  void wrong(const char* key) {
    if (fault_.empty()) fault_ = std::string{"bad member "} + key;
  }
  const json& value() const { return value_; }
  const std::string& fault() const { return fault_; }

 private:
  const json* find(const char* key) {
    if (!fault_.empty()) return nullptr;
    const auto it = value_.find(key);
    if (it == value_.end()) {
      fault_ = std::string{"no member "} + key;
      return nullptr;
    }
    return &*it;
  }
  json value_;
  std::string fault_;
};

void put_number(std::string& out, std::uint64_t value, unsigned bytes) {
  while (bytes-- > 0) out += static_cast<char>(value >> (8 * bytes) & 0xff);
}

std::string frame_header(char type, std::uint64_t offset, std::size_t length) {
  std::string out{type};
  put_number(out, length, 3);
  put_number(out, offset, 8);
  return out;
}

std::string control_frame(char type, std::uint64_t offset, const json& payload) {
  const std::string text = dump(payload);
  return frame_header(type, offset, text.size()) + text;
}

}  // namespace

std::string_view name(Code code) {
  for (const auto& c : codes)
    if (c.code == code) return c.name;
  return "bad_request";
}

std::optional<Code> parse_code(std::string_view text) {
  for (const auto& c : codes)
    if (c.name == text) return c.code;
  return std::nullopt;
}

int http_status(Code code) {
  for (const auto& c : codes)
    if (c.code == code) return c.status;
  return 400;
}

std::string format(const OpenLine& l) {
  return line_of({{"open", 1}, {"id", l.id.text()}, {"epoch", l.epoch}, {"relay", l.relay}, {"chain", 1}, {"from", l.from},
                  {"length", l.length}, {"signature", l.signature}});
}

std::string format(const AnswerLine& l) {
  json value{{"ranges", json::array({json::array({0, l.have})})}, {"head", l.head}, {"ack", l.ack}, {"state", l.state}};
  if (l.proven) value["proven"] = {{"offset", l.proven->offset}, {"head", l.proven->head}};
  return line_of(value);
}

std::string format(const HealthLine& l) {
  json value{{"health", 1}, {"free", l.free}, {"min_free", l.min_free}, {"accepting", l.accepting}, {"reason", l.reason},
             {"last_commit_age_ms", nullptr}, {"live", l.live}, {"time_ms", l.time_ms}, {"name", l.name}, {"challenge", l.challenge}};
  if (l.last_commit_age_ms) value["last_commit_age_ms"] = *l.last_commit_age_ms;
  return line_of(value);
}

std::string format(const MovedNotice& l) { return line_of({{"to", l.to}, {"epoch", l.epoch}, {"signature", l.signature}}); }
std::string format(const MovedAnswer& l) { return line_of({{"state", l.state}, {"length", l.length}, {"head", l.head}}); }

std::string format(const ErrorLine& l) {
  json value{{"error", l.error.substr(0, 1024)}, {"code", name(l.code)}};
  if (l.code == Code::stale_epoch) value["epoch"] = l.epoch;
  return line_of(value);
}

std::string format_ack(std::uint64_t committed) { return "{\"ack\":" + std::to_string(committed) + "}\n"; }
std::string format_whole(const std::string& head) { return line_of({{"whole", head}}); }
std::string format_cut(const std::string& head, std::uint64_t length) { return line_of({{"cut", head}, {"length", length}}); }

Expected<OpenLine> parse_open(std::string_view line) {
  Object o{line};
  OpenLine out;
  if (o.number("open") != 1) o.wrong("open");
  if (o.number("chain") != 1) o.wrong("chain");
  if (const auto id = Id::parse(o.text("id"))) out.id = *id;
  else o.wrong("id");
  out.epoch = o.number("epoch");
  if (out.epoch == 0) o.wrong("epoch");
  out.relay = o.text("relay");
  out.from = o.number("from");
  out.length = o.number("length");
  out.signature = o.text("signature", 4096);
  if (!o.fault().empty()) return bad("open line: " + o.fault());
  return out;
}

Expected<AnswerLine> parse_answer(std::string_view line) {
  Object o{line};
  AnswerLine out;
  out.head = o.head("head");
  out.ack = o.text("ack");
  out.state = o.text("state");
  if (o.fault().empty()) {
    const auto ranges = o.value().find("ranges");
    const bool good = ranges != o.value().end() && ranges->is_array() && ranges->size() == 1 && (*ranges)[0].is_array() &&
                      (*ranges)[0].size() == 2 && (*ranges)[0][0] == 0 && (*ranges)[0][1].is_number_unsigned() &&
                      (*ranges)[0][1].get<std::uint64_t>() <= max_number;
    if (good) out.have = (*ranges)[0][1].get<std::uint64_t>();
    else o.wrong("ranges");
  }
  if (o.fault().empty() && o.has("proven")) {
    Object p{dump(o.value()["proven"])};
    Proven proven;
    proven.offset = p.number("offset");
    proven.head = p.head("head");
    if (!p.fault().empty() || proven.offset >= out.have) o.wrong("proven");
    out.proven = proven;
  }
  if (!o.fault().empty()) return bad("answer line: " + o.fault());
  return out;
}

Expected<HealthLine> parse_health(std::string_view line) {
  Object o{line};
  HealthLine out;
  if (o.number("health") != 1) o.wrong("health");
  // A disk may hold more than 2^53 bytes by what statvfs(3) says of some file systems; only these two are clipped by format().
  out.free = o.number("free");
  out.min_free = o.number("min_free");
  out.accepting = o.boolean("accepting");
  out.reason = o.text("reason");
  if (o.fault().empty() && o.has("last_commit_age_ms") && !o.value()["last_commit_age_ms"].is_null())
    out.last_commit_age_ms = o.number("last_commit_age_ms");
  out.live = o.number("live");
  out.time_ms = o.number("time_ms");
  out.name = o.text("name");
  out.challenge = o.text("challenge");
  if (!o.fault().empty()) return bad("health line: " + o.fault());
  return out;
}

Expected<MovedNotice> parse_moved_notice(std::string_view line) {
  Object o{line};
  MovedNotice out;
  out.to = o.text("to");
  out.epoch = o.number("epoch");
  if (out.epoch == 0) o.wrong("epoch");
  out.signature = o.text("signature", 4096);
  if (!o.fault().empty()) return bad("moved notice: " + o.fault());
  return out;
}

Expected<MovedAnswer> parse_moved_answer(std::string_view line) {
  Object o{line};
  MovedAnswer out;
  out.state = o.text("state");
  out.length = o.number("length");
  out.head = o.text("head", 64);
  if (!o.fault().empty()) return bad("moved answer: " + o.fault());
  return out;
}

namespace {
ErrorLine read_error(Object& o) {
  ErrorLine out;
  out.error = o.text("error", max_line);
  const auto code = parse_code(o.text("code"));
  if (!code) o.wrong("code");
  else out.code = *code;
  if (o.fault().empty() && o.has("epoch")) out.epoch = o.number("epoch");
  return out;
}
}  // namespace

Expected<UploadReply> parse_upload_reply(std::string_view line) {
  Object o{line};
  UploadReply out;
  if (o.has("ack")) {
    out.offset = o.number("ack");
  } else if (o.has("whole")) {
    out.kind = UploadReply::Kind::whole;
    out.head = o.head("whole");
  } else if (o.has("cut")) {
    out.kind = UploadReply::Kind::cut;
    out.head = o.head("cut");
    out.offset = o.number("length");
  } else {
    out.kind = UploadReply::Kind::error;
    out.error = read_error(o);
  }
  if (!o.fault().empty()) return bad("reply line: " + o.fault());
  return out;
}

ErrorLine parse_error_body(std::string_view body, int status) {
  if (const auto end = body.find('\n'); end != std::string_view::npos) body = body.substr(0, end);
  Object o{body};
  ErrorLine out = read_error(o);
  if (!o.fault().empty()) return ErrorLine{"status " + std::to_string(status), Code::bad_request, 0};
  return out;
}

std::string data_frame_header(std::uint64_t offset, std::size_t length) { return frame_header('D', offset, length); }

std::string end_frame(const EndFrame& e) {
  return control_frame('E', e.length, {{"length", e.length}, {"head", e.head}, {"signature", e.signature}});
}
std::string cut_frame(const EndFrame& e) {
  return control_frame('X', e.length, {{"length", e.length}, {"head", e.head}, {"reason", e.reason}, {"signature", e.signature}});
}
std::string conflict_frame(const ConflictFrame& c) { return control_frame('F', c.offset, {{"offset", c.offset}, {"head", c.head}}); }

Expected<Done> LineReader::feed(std::string_view bytes, const std::function<bool(std::string_view)>& handler) {
  while (!bytes.empty()) {
    const auto end = bytes.find('\n');
    const auto piece = bytes.substr(0, end);
    if (line_.size() + piece.size() + 1 > max_line) return bad("a line is longer than 16 KiB");
    line_.append(piece);
    if (end == std::string_view::npos) break;
    bytes.remove_prefix(end + 1);
    const std::string line = std::exchange(line_, {});  // the handler may end us
    if (!handler(line)) break;
  }
  return Done{};
}

Expected<Done> UploadReader::feed(std::span<const std::byte> bytes) {
  std::string_view in{reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  if (!opened_ && !in.empty()) {
    const auto end = in.find('\n');
    const auto piece = in.substr(0, end);
    if (line_.size() + piece.size() + 1 > max_line) return bad("open line: too long");
    line_.append(piece);
    if (end == std::string_view::npos) return Done{};
    in.remove_prefix(end + 1);
    opened_ = true;
    auto open = parse_open(line_);
    line_ = {};
    if (!open) return Unexpected{open.error()};
    if (auto done = handlers_.open(*open); !done) return done;
  }
  while (!in.empty()) {
    if (finished_) return bad("bytes after the last frame");
    if (left_ == 0) {
      const std::size_t n = std::min(frame_header_size - head_.size(), in.size());
      head_.append(in.substr(0, n));
      in.remove_prefix(n);
      if (head_.size() < frame_header_size) break;
      if (auto done = header(); !done) return done;
      continue;
    }
    const std::size_t n = std::min(left_, in.size());
    const auto piece = in.substr(0, n);
    in.remove_prefix(n);
    left_ -= n;
    if (type_ == 'D') {
      const std::uint64_t at = offset_;
      offset_ += n;
      next_ = offset_;
      if (auto done = handlers_.data(at, std::as_bytes(std::span{piece.data(), piece.size()})); !done) return done;
    } else if (type_ < 0x80) {
      payload_.append(piece);
      if (left_ == 0)
        if (auto done = control(); !done) return done;
    }
  }
  return Done{};
}

Expected<Done> UploadReader::header() {
  std::uint64_t length = 0, offset = 0;
  for (unsigned i = 1; i < 4; i++) length = length << 8 | static_cast<std::uint8_t>(head_[i]);
  for (unsigned i = 4; i < 12; i++) offset = offset << 8 | static_cast<std::uint8_t>(head_[i]);
  type_ = static_cast<std::uint8_t>(head_[0]);
  head_.clear();
  payload_.clear();
  if (offset > max_number) return bad("frame: offset beyond 2^53");
  const bool is_control = type_ == 'E' || type_ == 'X' || type_ == 'F';
  if (type_ == 'D') {
    if (length == 0 || length > max_data_frame) return bad("data frame: length");
    if (next_ && offset != *next_) return bad("data frame: offset is not where the one before ended");
  } else if (is_control) {
    if (length == 0 || length > max_line) return bad("frame: length");
  } else if (type_ < 0x80) {
    return bad("frame of an unknown type");
  }
  offset_ = offset;
  left_ = static_cast<std::size_t>(length);
  return Done{};
}

Expected<Done> UploadReader::control() {
  finished_ = true;
  Object o{payload_};
  if (type_ == 'F') {
    const ConflictFrame conflict{o.number("offset"), o.head("head")};
    if (!o.fault().empty() || conflict.offset != offset_) return bad("conflict frame: " + o.fault());
    return handlers_.conflict(conflict);
  }
  EndFrame end;
  end.length = o.number("length");
  end.head = o.head("head");
  end.signature = o.text("signature", 4096);
  if (type_ == 'X') end.reason = o.text("reason");
  if (!o.fault().empty() || end.length != offset_) return bad("end frame: " + o.fault());
  if (type_ == 'E' && next_ && *next_ != end.length) return bad("end frame: length is not what was sent");
  return type_ == 'E' ? handlers_.end(end) : handlers_.cut(end);
}

}  // namespace postern::recorder::wire
