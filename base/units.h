#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string_view>

namespace postern {

/// "250ms", "10s", "5m", "2h", "1d": a whole number and a unit, at most 2^53 ms. Nothing else.
std::optional<std::chrono::milliseconds> parse_duration(std::string_view text);
/// "512B", "64KiB", "4MiB", "1GiB", "2TiB", at most 2^53 bytes. Nothing else.
std::optional<std::uint64_t> parse_size(std::string_view text);

}  // namespace postern
