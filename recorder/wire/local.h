#pragma once

#include "recorder/wire/relay_link.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

// The protocol between postern-session and postern-relay on the relay's unix stream socket; docs/PROTOCOL.relay.md describes it.
// One connection per recording. Frames: 8 bytes of header (u32 size of the payload, u8 type, three zero bytes), then the payload.
// All numbers little-endian. Parsing is bounded and never trusts: the session is root and the relay is not.
namespace postern::recorder::wire::local {

inline constexpr std::uint16_t version = 1;
inline constexpr std::uint16_t oldest_version = 1;
inline constexpr std::size_t header_size = 8;
inline constexpr std::size_t data_prefix_size = 8;  ///< the offset, before the bytes of `data`
inline constexpr std::size_t largest_data = 64 * 1024;
/// Largest payload: a data frame, or an open with its recorders.
inline constexpr std::size_t largest_payload = data_prefix_size + largest_data;
inline constexpr std::size_t most_recorders = 64;
inline constexpr std::size_t longest_text = 1024;

enum class Type : std::uint8_t {
  // session -> relay
  open = 1,  ///< first; the rest after `opened`
  data = 2,  ///< u64 offset, bytes
  end = 3,
  // relay -> session
  opened = 0x81,
  acks = 0x82,
  state = 0x83,
  journal_failed = 0x84,  ///< text: why
  ended = 0x85,           ///< empty
  refused = 0x86,         ///< text: why; the relay closes after it
};

struct Open {
  std::uint16_t version = local::version;
  RecordingOpen recording;
};

struct End {
  std::uint64_t length = 0;
  std::array<std::uint8_t, 32> head{};
  std::string signature;
};

struct Acks {
  std::uint64_t written = 0, journaled = 0, committed = 0;
  bool operator==(const Acks&) const = default;
};

struct State {
  RecorderState state = RecorderState::searching;
  std::string recorder;
  bool operator==(const State&) const = default;
};

struct Opened {
  std::uint16_t version = local::version;
  bool ended = false;  ///< the end was taken already: nothing is to be sent
  Acks acks;           ///< `written` = length that the journal has: send from there
  State state;
};

void append(const Open& open, std::string& out);
void append(const End& end, std::string& out);
void append(const Opened& opened, std::string& out);
void append(const Acks& acks, std::string& out);
void append(const State& state, std::string& out);
/// journal_failed, refused (with text), ended (without).
void append(Type type, std::string_view text, std::string& out);
/// Header and offset of a data frame with `size` bytes, which follow.
std::array<char, header_size + data_prefix_size> data_prefix(std::uint64_t offset, std::size_t size);

std::optional<Open> parse_open(std::string_view payload);
std::optional<End> parse_end(std::string_view payload);
std::optional<Opened> parse_opened(std::string_view payload);
std::optional<Acks> parse_acks(std::string_view payload);
std::optional<State> parse_state(std::string_view payload);
struct Data {
  std::uint64_t offset;
  std::string_view bytes;
};
std::optional<Data> parse_data(std::string_view payload);

/// Cuts a byte stream into frames. Read into space(), tell filled(), take next() until there is none.
class FrameReader {
 public:
  struct Frame {
    Type type;
    std::string_view payload;  ///< valid until the next space()
  };
  std::span<char> space();
  void filled(std::size_t bytes) noexcept { end_ += bytes; }
  /// Nothing: more bytes are needed, or broken().
  std::optional<Frame> next();
  /// A header that no frame has: the connection must be closed.
  bool broken() const noexcept { return broken_; }

 private:
  std::string buffer_;
  std::size_t begin_ = 0, end_ = 0;
  bool broken_ = false;
};

}  // namespace postern::recorder::wire::local
