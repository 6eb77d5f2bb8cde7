#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace postern {

/// A Go duration ("20m", "1h30m", "1.5h", "-1m", "0"), as Tailscale's file writes them (pkg.go.dev/time#ParseDuration).
struct GoDuration {
  std::chrono::nanoseconds value{0};
  std::string error;  ///< what Go's parser would say: `time: invalid duration "abc"`; empty when it is one
};
GoDuration parse_go_duration(std::string_view text);

/// As Go prints it (pkg.go.dev/time#Duration.String): "168h0m1s", "-1m0s", "1.5s", "300ms", "0s".
std::string go_duration_text(std::chrono::nanoseconds value);

}  // namespace postern
