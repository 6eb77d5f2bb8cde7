#include "base/go_duration.h"

#include <array>
#include <limits>
#include <utility>

namespace postern {
namespace {

using Unit = std::pair<std::string_view, std::int64_t>;
constexpr std::array<Unit, 8> units{{{"ns", 1},
                                     {"us", 1'000},
                                     {"\xc2\xb5s", 1'000},  // U+00B5 micro sign
                                     {"\xce\xbcs", 1'000},  // U+03BC Greek mu
                                     {"ms", 1'000'000},
                                     {"s", 1'000'000'000},
                                     {"m", 60'000'000'000},
                                     {"h", 3'600'000'000'000}}};

bool is_digit(char c) { return c >= '0' && c <= '9'; }

std::string quoted(std::string_view text) { return "\"" + std::string{text} + "\""; }

/// "1.5" of a unit of `scale` nanoseconds, without trailing zeros.
std::string with_fraction(std::uint64_t value, std::uint64_t scale) {
  std::string out = std::to_string(value / scale);
  std::uint64_t rest = value % scale;
  if (rest == 0) return out;
  out += '.';
  for (scale /= 10; rest != 0; scale /= 10) {
    out += static_cast<char>('0' + rest / scale);
    rest %= scale;
  }
  return out;
}

}  // namespace

GoDuration parse_go_duration(std::string_view text) {
  const auto invalid = [&] { return GoDuration{{}, "time: invalid duration " + quoted(text)}; };
  std::string_view rest = text;
  bool negative = false;
  if (!rest.empty() && (rest.front() == '-' || rest.front() == '+')) {
    negative = rest.front() == '-';
    rest.remove_prefix(1);
  }
  if (rest == "0") return {};
  if (rest.empty()) return invalid();
  constexpr auto most = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  std::uint64_t total = 0;
  while (!rest.empty()) {
    if (rest.front() != '.' && !is_digit(rest.front())) return invalid();
    std::uint64_t whole = 0;
    std::size_t digits = 0;
    for (; !rest.empty() && is_digit(rest.front()); rest.remove_prefix(1), digits++) {
      const auto digit = static_cast<std::uint64_t>(rest.front() - '0');
      if (whole > (most - digit) / 10) return invalid();
      whole = whole * 10 + digit;
    }
    double fraction = 0, scale = 1;
    if (!rest.empty() && rest.front() == '.') {
      rest.remove_prefix(1);
      std::size_t after = 0;
      for (; !rest.empty() && is_digit(rest.front()); rest.remove_prefix(1), after++)
        if (after < 18) fraction += (rest.front() - '0') * (scale /= 10);
      if (digits == 0 && after == 0) return invalid();
    }
    const auto length = rest.find_first_of(".0123456789");
    const auto name = rest.substr(0, length);
    if (name.empty()) return {{}, "time: missing unit in duration " + quoted(text)};
    const Unit* unit = nullptr;
    for (const auto& u : units)
      if (u.first == name) unit = &u;
    if (unit == nullptr) return {{}, "time: unknown unit " + quoted(name) + " in duration " + quoted(text)};
    rest.remove_prefix(name.size());
    const auto size = static_cast<std::uint64_t>(unit->second);
    if (whole > most / size) return invalid();
    const std::uint64_t part = whole * size + static_cast<std::uint64_t>(fraction * static_cast<double>(size));
    if (part > most || total > most - part) return invalid();
    total += part;
  }
  const auto value = static_cast<std::int64_t>(total);
  return {std::chrono::nanoseconds{negative ? -value : value}, {}};
}

std::string go_duration_text(std::chrono::nanoseconds duration) {
  const std::int64_t n = duration.count();
  if (n == 0) return "0s";
  const std::string sign = n < 0 ? "-" : "";
  const auto value = n < 0 ? ~static_cast<std::uint64_t>(n) + 1 : static_cast<std::uint64_t>(n);
  if (value < 1'000) return sign + std::to_string(value) + "ns";
  if (value < 1'000'000) return sign + with_fraction(value, 1'000) + "\xc2\xb5s";
  if (value < 1'000'000'000) return sign + with_fraction(value, 1'000'000) + "ms";
  constexpr std::uint64_t second = 1'000'000'000;
  const std::uint64_t minutes = value / (60 * second);
  std::string out = with_fraction(value % (60 * second), second) + "s";
  if (minutes != 0) out = std::to_string(minutes % 60) + "m" + out;
  if (minutes >= 60) out = std::to_string(minutes / 60) + "h" + out;
  return sign + out;
}

}  // namespace postern
