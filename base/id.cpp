#include "base/id.h"

#include <sys/random.h>

#include <cerrno>
#include <system_error>

namespace postern {
namespace {
constexpr std::string_view alphabet = "abcdefghijklmnopqrstuvwxyz234567";
}

Id Id::random() {
  Id id;
  std::size_t have = 0;
  while (have < id.bytes.size()) {
    const ssize_t n = ::getrandom(id.bytes.data() + have, id.bytes.size() - have, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw std::system_error{errno, std::generic_category(), "getrandom"};
    have += static_cast<std::size_t>(n);
  }
  return id;
}

std::string Id::text() const {
  std::string out;
  unsigned bits = 0, buffer = 0;
  for (const std::uint8_t b : bytes) {
    buffer = buffer << 8 | b;
    bits += 8;
    while (bits >= 5) {
      out += alphabet[buffer >> (bits - 5) & 31];
      bits -= 5;
    }
  }
  out += alphabet[buffer << (5 - bits) & 31];  // 128 = 25 * 5 + 3
  return out;
}

std::optional<Id> Id::parse(std::string_view text) {
  if (text.size() != 26) return std::nullopt;
  Id id;
  unsigned bits = 0, buffer = 0;
  std::size_t at = 0;
  for (const char c : text) {
    const auto value = alphabet.find(c);
    if (value == std::string_view::npos) return std::nullopt;
    buffer = buffer << 5 | static_cast<unsigned>(value);
    bits += 5;
    if (bits >= 8 && at < id.bytes.size()) {
      id.bytes[at++] = static_cast<std::uint8_t>(buffer >> (bits - 8));
      bits -= 8;
    }
  }
  if ((buffer & 3) != 0) return std::nullopt;  // the two spare bits are 0: one text for one id
  return id;
}

}  // namespace postern
