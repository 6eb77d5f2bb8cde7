#include "catch.h"

#include "recorder/wire/local.h"

#include <cstring>
#include <random>

using namespace postern;
using namespace postern::recorder::wire;

namespace {

std::string_view payload_of(const std::string& frame) { return std::string_view{frame}.substr(local::header_size); }

RecordingOpen some_open() { return {Id::random(), {"127.0.2.1:80", "[::1]:80"}, true, "f00-ba4", 4711, 123456789012345ULL}; }

void feed(local::FrameReader& reader, std::string_view bytes) {
  while (!bytes.empty()) {
    const auto space = reader.space();
    const auto n = std::min(space.size(), bytes.size());
    std::memcpy(space.data(), bytes.data(), n);
    reader.filled(n);
    bytes.remove_prefix(n);
  }
}

}  // namespace

TEST_CASE("each local message comes back as it was sent", "[wire][local]") {
  std::string out;
  const auto open = some_open();
  local::append(local::Open{local::version, open}, out);
  const auto o = local::parse_open(payload_of(out));
  REQUIRE(o);
  CHECK(o->recording.recording == open.recording);
  CHECK(o->recording.recorders == open.recorders);
  CHECK(o->recording.enforce);
  CHECK(o->recording.boot_id == open.boot_id);
  CHECK(o->recording.pid == open.pid);
  CHECK(o->recording.start_time == open.start_time);

  out.clear();
  local::append(local::Opened{1, true, {7, 6, 5}, {RecorderState::none, "r"}}, out);
  const auto opened = local::parse_opened(payload_of(out));
  REQUIRE(opened);
  CHECK(opened->ended);
  CHECK(opened->acks == local::Acks{7, 6, 5});
  CHECK(opened->state == local::State{RecorderState::none, "r"});

  out.clear();
  local::append(local::End{99, {1, 2, 3}, "s"}, out);
  const auto end = local::parse_end(payload_of(out));
  REQUIRE(end);
  CHECK(end->length == 99);
  CHECK(end->head[2] == 3);
  CHECK(end->signature == "s");
}

TEST_CASE("a local message that was cut or has more than it should is refused", "[wire][local]") {
  std::string open, opened, end, acks, state;
  local::append(local::Open{local::version, some_open()}, open);
  local::append(local::Opened{}, opened);
  local::append(local::End{}, end);
  local::append(local::Acks{}, acks);
  local::append(local::State{}, state);
  const auto refused = [](const std::string& frame, auto parse) {
    const auto payload = payload_of(frame);
    REQUIRE(parse(payload));
    for (std::size_t n = 0; n < payload.size(); n++) CHECK_FALSE(parse(payload.substr(0, n)));
    CHECK_FALSE(parse(std::string{payload} + "x"));
  };
  refused(open, local::parse_open);
  refused(opened, local::parse_opened);
  refused(end, local::parse_end);
  refused(acks, local::parse_acks);
  refused(state, local::parse_state);
  state[local::header_size] = 3;
  CHECK_FALSE(local::parse_state(payload_of(state)));
}

TEST_CASE("frames are found wherever the stream is cut", "[wire][local]") {
  std::string stream;
  const std::string bytes(local::largest_data, 'd');
  for (std::uint64_t offset = 0; offset < 5; offset++) {
    const auto prefix = local::data_prefix(offset, bytes.size());
    stream.append(prefix.data(), prefix.size());
    stream += bytes;
    local::append(local::Acks{offset, 0, 0}, stream);
  }
  for (const std::size_t step : {1UL, 13UL, 4096UL, 100'000UL, stream.size()}) {
    local::FrameReader reader;
    std::uint64_t data = 0, acks = 0;
    for (std::size_t at = 0; at < stream.size(); at += step) {
      feed(reader, std::string_view{stream}.substr(at, step));
      while (const auto frame = reader.next()) {
        if (frame->type == local::Type::data) {
          const auto d = local::parse_data(frame->payload);
          REQUIRE(d);
          CHECK(d->offset == data++);
          CHECK(d->bytes == bytes);
        } else {
          CHECK(local::parse_acks(frame->payload)->written == acks++);
        }
      }
    }
    CHECK(data == 5);
    CHECK(acks == 5);
    CHECK_FALSE(reader.broken());
  }
}

TEST_CASE("a frame that announces more than any frame has is the end", "[wire][local]") {
  local::FrameReader reader;
  feed(reader, std::string{"\xff\xff\xff\x7f\x02\0\0\0", 8});
  CHECK_FALSE(reader.next());
  CHECK(reader.broken());
}
