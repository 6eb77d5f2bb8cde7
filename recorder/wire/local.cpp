#include "recorder/wire/local.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace postern::recorder::wire::local {
namespace {

template <class Number>
void put(Number number, std::string& out) {
  static_assert(std::is_unsigned_v<Number>);
  for (std::size_t i = 0; i < sizeof number; i++) out += static_cast<char>(number >> (8 * i));
}

void put_text(std::string_view text, std::string& out) {
  text = text.substr(0, longest_text);
  put(static_cast<std::uint16_t>(text.size()), out);
  out += text;
}

/// Takes numbers and texts from the front; once something is missing, ok() stays false.
class Taker {
 public:
  explicit Taker(std::string_view bytes) : rest_{bytes} {}
  template <class Number>
  Number number() {
    static_assert(std::is_unsigned_v<Number>);
    const auto bytes = take(sizeof(Number));
    Number n = 0;
    for (std::size_t i = 0; i < bytes.size(); i++) n = static_cast<Number>(n | static_cast<Number>(static_cast<unsigned char>(bytes[i])) << (8 * i));
    return n;
  }
  std::string_view take(std::size_t n) {
    if (n > rest_.size()) {
      ok_ = false;
      rest_ = {};
      return {};
    }
    const auto taken = rest_.substr(0, n);
    rest_.remove_prefix(n);
    return taken;
  }
  std::string text() {
    const auto size = number<std::uint16_t>();
    if (size > longest_text) ok_ = false;
    return std::string{take(size)};
  }
  bool ok() const { return ok_; }
  bool done() const { return ok_ && rest_.empty(); }

 private:
  std::string_view rest_;
  bool ok_ = true;
};

/// Writes a header, then the payload that `body` appends, then the payload's size into the header.
template <class Body>
void frame(Type type, std::string& out, Body body) {
  const std::size_t at = out.size();
  put(std::uint32_t{0}, out);
  out += static_cast<char>(type);
  out.append(3, '\0');
  body();
  const auto size = static_cast<std::uint32_t>(out.size() - at - header_size);
  for (std::size_t i = 0; i < 4; i++) out[at + i] = static_cast<char>(size >> (8 * i));
}

void put_acks(const Acks& acks, std::string& out) {
  put(acks.written, out);
  put(acks.journaled, out);
  put(acks.committed, out);
}

void put_state(const State& state, std::string& out) {
  out += static_cast<char>(state.state);
  put_text(state.recorder, out);
}

Acks take_acks(Taker& t) {
  Acks a;
  a.written = t.number<std::uint64_t>();
  a.journaled = t.number<std::uint64_t>();
  a.committed = t.number<std::uint64_t>();
  return a;
}

std::optional<State> take_state(Taker& t) {
  State s;
  const auto code = t.number<std::uint8_t>();
  if (code > static_cast<std::uint8_t>(RecorderState::none)) return std::nullopt;
  s.state = static_cast<RecorderState>(code);
  s.recorder = t.text();
  return s;
}

}  // namespace

void append(const Open& open, std::string& out) {
  const RecordingOpen& r = open.recording;
  frame(Type::open, out, [&] {
    put(open.version, out);
    out.append(reinterpret_cast<const char*>(r.recording.bytes.data()), r.recording.bytes.size());
    put(static_cast<std::uint16_t>(r.enforce ? 1 : 0), out);
    put(static_cast<std::uint32_t>(r.pid), out);
    put(r.start_time, out);
    put_text(r.boot_id, out);
    const auto n = std::min(r.recorders.size(), most_recorders);
    put(static_cast<std::uint16_t>(n), out);
    for (std::size_t i = 0; i < n; i++) put_text(r.recorders[i], out);
  });
}

std::optional<Open> parse_open(std::string_view payload) {
  Taker t{payload};
  Open o;
  RecordingOpen& r = o.recording;
  o.version = t.number<std::uint16_t>();
  const auto id = t.take(r.recording.bytes.size());
  if (id.size() == r.recording.bytes.size()) std::memcpy(r.recording.bytes.data(), id.data(), id.size());
  r.enforce = (t.number<std::uint16_t>() & 1) != 0;
  r.pid = static_cast<std::int32_t>(t.number<std::uint32_t>());
  r.start_time = t.number<std::uint64_t>();
  r.boot_id = t.text();
  const auto n = t.number<std::uint16_t>();
  if (n > most_recorders) return std::nullopt;
  for (unsigned i = 0; i < n && t.ok(); i++) r.recorders.push_back(t.text());
  // A later version may append members; one of this version has none.
  if (!(o.version > version ? t.ok() : t.done())) return std::nullopt;
  return o;
}

void append(const End& end, std::string& out) {
  frame(Type::end, out, [&] {
    put(end.length, out);
    out.append(reinterpret_cast<const char*>(end.head.data()), end.head.size());
    put_text(end.signature, out);
  });
}

std::optional<End> parse_end(std::string_view payload) {
  Taker t{payload};
  End e;
  e.length = t.number<std::uint64_t>();
  const auto head = t.take(e.head.size());
  if (head.size() == e.head.size()) std::memcpy(e.head.data(), head.data(), head.size());
  e.signature = t.text();
  return t.done() ? std::optional{e} : std::nullopt;
}

void append(const Opened& opened, std::string& out) {
  frame(Type::opened, out, [&] {
    put(opened.version, out);
    out += static_cast<char>(opened.ended ? 1 : 0);
    put_acks(opened.acks, out);
    put_state(opened.state, out);
  });
}

std::optional<Opened> parse_opened(std::string_view payload) {
  Taker t{payload};
  Opened o;
  o.version = t.number<std::uint16_t>();
  o.ended = t.number<std::uint8_t>() != 0;
  o.acks = take_acks(t);
  const auto state = take_state(t);
  if (!state || !t.done()) return std::nullopt;
  o.state = *state;
  return o;
}

void append(const Acks& acks, std::string& out) {
  frame(Type::acks, out, [&] { put_acks(acks, out); });
}

std::optional<Acks> parse_acks(std::string_view payload) {
  Taker t{payload};
  const Acks a = take_acks(t);
  return t.done() ? std::optional{a} : std::nullopt;
}

void append(const State& state, std::string& out) {
  frame(Type::state, out, [&] { put_state(state, out); });
}

std::optional<State> parse_state(std::string_view payload) {
  Taker t{payload};
  auto s = take_state(t);
  return t.done() ? s : std::nullopt;
}

void append(Type type, std::string_view text, std::string& out) {
  frame(type, out, [&] { out += text.substr(0, longest_text); });
}

std::array<char, header_size + data_prefix_size> data_prefix(std::uint64_t offset, std::size_t size) {
  std::array<char, header_size + data_prefix_size> out{};
  const auto payload = static_cast<std::uint32_t>(data_prefix_size + size);
  for (std::size_t i = 0; i < 4; i++) out[i] = static_cast<char>(payload >> (8 * i));
  out[4] = static_cast<char>(Type::data);
  for (std::size_t i = 0; i < 8; i++) out[header_size + i] = static_cast<char>(offset >> (8 * i));
  return out;
}

std::optional<Data> parse_data(std::string_view payload) {
  Taker t{payload};
  const auto offset = t.number<std::uint64_t>();
  if (!t.ok()) return std::nullopt;
  return Data{offset, payload.substr(data_prefix_size)};
}

std::span<char> FrameReader::space() {
  constexpr std::size_t least = 4096;
  if (begin_ == end_) begin_ = end_ = 0;
  if (buffer_.size() - end_ < least && begin_ > 0) {
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  // Small to begin with (acks at the session), large for who gets large frames (data at the relay).
  if (buffer_.size() - end_ < least) buffer_.resize(buffer_.empty() ? least : std::max(buffer_.size() * 2, end_ + least));
  return {buffer_.data() + end_, buffer_.size() - end_};
}

std::optional<FrameReader::Frame> FrameReader::next() {
  if (broken_ || end_ - begin_ < header_size) return std::nullopt;
  const auto* at = reinterpret_cast<const unsigned char*>(buffer_.data()) + begin_;
  const std::size_t size = at[0] | at[1] << 8 | at[2] << 16 | static_cast<std::size_t>(at[3]) << 24;
  if (size > largest_payload || at[5] != 0 || at[6] != 0 || at[7] != 0) {
    broken_ = true;
    return std::nullopt;
  }
  if (end_ - begin_ - header_size < size) return std::nullopt;
  const Frame frame{static_cast<Type>(at[4]), {buffer_.data() + begin_ + header_size, size}};
  begin_ += header_size + size;
  return frame;
}

}  // namespace postern::recorder::wire::local
