#pragma once

#include "recorder/cast/encoder.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

namespace postern::recorder::cast {

/// One event of a recording.
struct Event {
  double time = 0;    ///< seconds since the start
  std::string code;   ///< "o" "e" "i" "r" "x" "m"; others are foreign and are handed on as they are
  std::string text;   ///< as a player shows it, UTF-8
  std::string bytes;  ///< exactly what the program wrote: of the `b` before it if there is one, else the text
};

/// The header of a cast, ours or Tailscale's; nothing when the line is not a version 2 header. Members of another type than
/// expected read as absent.
std::optional<Header> parse_header(std::string_view line);

/// Reads asciicast v2, from any source and cut anywhere. Never fails as a whole: a line that is not understood is reported and
/// left out. A `b` event of ours is not handed out, it becomes `bytes` of the next event of its stream.
class Decoder {
 public:
  struct Handlers {
    std::function<void(const Header&)> header;
    std::function<void(const Event&)> event;
    /// Line numbers count from 1.
    std::function<void(std::uint64_t line, const std::string& what)> problem;
  };
  /// The encoder's longest line is under 400 KiB (64 KiB of control characters); foreign ones may be longer.
  static constexpr std::size_t longest_line = 4 * 1024 * 1024;

  explicit Decoder(Handlers handlers) : handlers_{std::move(handlers)} {}

  void feed(std::string_view bytes);
  /// No more bytes. False when the last line was cut or the header is missing (reported as problems).
  bool finish();

 private:
  void line(std::string_view text);
  void problem(const std::string& what) const;

  Handlers handlers_;
  std::string partial_;
  bool skipping_ = false;  // the rest of a line that is too long
  bool header_seen_ = false;
  std::uint64_t line_ = 1;
  std::map<char, std::string> exact_;  // stream -> bytes of its next event
};

}  // namespace postern::recorder::cast
