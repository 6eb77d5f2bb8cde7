#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace postern {

/// 128 random bits that name a connection or a recording. Text form: 26 characters of lower-case base32 (RFC 4648 section 6
/// alphabet a-z2-7, no padding), so it is safe in a path, a URL and a log line.
struct Id {
  std::array<std::uint8_t, 16> bytes{};

  /// From the kernel's random source (getrandom(2)).
  static Id random();
  static std::optional<Id> parse(std::string_view text);
  std::string text() const;
  auto operator<=>(const Id&) const = default;
};

}  // namespace postern
