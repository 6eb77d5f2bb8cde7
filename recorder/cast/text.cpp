#include "recorder/cast/text.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace postern::recorder::cast {
namespace {

constexpr char base64_alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
constexpr char hex_digits[] = "0123456789abcdef";
constexpr std::string_view replacement = "\xef\xbf\xbd";

/// Length that the lead byte announces, and the range of the second byte (table 3-7). 0 = not a lead byte.
struct Lead {
  unsigned length = 0;
  unsigned char low = 0x80, high = 0xbf;
};

constexpr Lead lead(unsigned char c) {
  if (c < 0x80) return {1};
  if (c < 0xc2) return {};
  if (c < 0xe0) return {2};
  if (c == 0xe0) return {3, 0xa0, 0xbf};
  if (c == 0xed) return {3, 0x80, 0x9f};
  if (c < 0xf0) return {3};
  if (c == 0xf0) return {4, 0x90, 0xbf};
  if (c < 0xf4) return {4};
  if (c == 0xf4) return {4, 0x80, 0x8f};
  return {};
}

constexpr auto leads = [] {
  std::array<Lead, 256> table;
  for (unsigned c = 0; c < 256; c++) table[c] = lead(static_cast<unsigned char>(c));
  return table;
}();

/// Bytes of the longest prefix of a well-formed character, and whether it is the whole character. 0 = not even a lead byte.
struct Prefix {
  std::size_t length = 0;
  bool whole = false;
};

Prefix prefix(std::string_view bytes) {
  if (bytes.empty()) return {};
  const auto at = [&](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
  if (at(0) < 0x80) return {1, true};
  const Lead l = leads[at(0)];
  if (l.length == 0) return {};
  std::size_t n = 1;
  for (; n < l.length && n < bytes.size(); n++) {
    const unsigned char low = n == 1 ? l.low : 0x80, high = n == 1 ? l.high : 0xbf;
    if (at(n) < low || at(n) > high) break;
  }
  return {n, n == l.length};
}

void append_escape(unsigned char c, char*& to) {
  char short_form = 0;
  switch (c) {
    case '"': short_form = '"'; break;
    case '\\': short_form = '\\'; break;
    case '\n': short_form = 'n'; break;
    case '\r': short_form = 'r'; break;
    case '\t': short_form = 't'; break;
    case '\b': short_form = 'b'; break;
    case '\f': short_form = 'f'; break;
    default: break;
  }
  *to++ = '\\';
  if (short_form != 0) {
    *to++ = short_form;
    return;
  }
  *to++ = 'u';
  *to++ = '0';
  *to++ = '0';
  *to++ = hex_digits[c >> 4];
  *to++ = hex_digits[c & 15];
}

constexpr bool plain(unsigned char c) { return c >= 0x20 && c < 0x80 && c != '"' && c != '\\'; }

}  // namespace

std::size_t character(std::string_view bytes) noexcept {
  const Prefix p = prefix(bytes);
  return p.whole ? p.length : 0;
}

bool is_cut_character(std::string_view bytes) noexcept {
  const Prefix p = prefix(bytes);
  return !p.whole && p.length > 0 && p.length == bytes.size();
}

std::size_t cut_at_end(std::string_view bytes) noexcept {
  for (std::size_t n = 1; n <= 3 && n <= bytes.size(); n++)
    if (is_cut_character(bytes.substr(bytes.size() - n))) return n;
  return 0;
}

std::size_t append_text(std::string_view bytes, std::string& out) {
  // Through a small buffer on the stack: std::string::resize would clear what is overwritten at once, and reserving six times the
  // input for the worst case makes a process keep it.
  constexpr std::size_t size = 4096, slack = 32;
  __attribute__((uninitialized)) char buffer[size];
  char* to = buffer;
  const char* const start = bytes.data();
  const char* from = start;
  const char* const end = from + bytes.size();
  while (from < end) {
    if (to > buffer + size - slack) {
      out.append(buffer, static_cast<std::size_t>(to - buffer));
      to = buffer;
    }
#ifdef __SSE2__
    if (end - from >= 16) {
      const __m128i chunk = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      // Signed: below 0x20 are the control characters and everything from 0x80 on.
      const __m128i low = _mm_cmplt_epi8(chunk, _mm_set1_epi8(0x20));
      const __m128i quote = _mm_cmpeq_epi8(chunk, _mm_set1_epi8('"'));
      const __m128i slash = _mm_cmpeq_epi8(chunk, _mm_set1_epi8('\\'));
      const int special = _mm_movemask_epi8(_mm_or_si128(low, _mm_or_si128(quote, slash)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), chunk);
      if (special == 0) {
        from += 16;
        to += 16;
        continue;
      }
      const int run = __builtin_ctz(static_cast<unsigned>(special));
      from += run;
      to += run;
      if (to > buffer + size - slack) continue;
    } else
#endif
        if (plain(static_cast<unsigned char>(*from))) {
      *to++ = *from++;
      continue;
    }
    const auto c = static_cast<unsigned char>(*from);
    if (c < 0x80) {
      append_escape(c, to);
      from++;
      continue;
    }
    // A run of characters outside ASCII, without going back to the wide scan.
    while (to <= buffer + size - slack && from < end && static_cast<unsigned char>(*from) >= 0x80) {
      const Prefix p = prefix({from, static_cast<std::size_t>(end - from)});
      if (!p.whole) {
        out.append(buffer, static_cast<std::size_t>(to - buffer));
        return static_cast<std::size_t>(from - start);
      }
      for (std::size_t i = 0; i < p.length; i++) *to++ = *from++;
    }
  }
  out.append(buffer, static_cast<std::size_t>(to - buffer));
  return bytes.size();
}

void append_lossy_text(std::string_view bytes, std::string& out) {
  std::size_t invalid = 0;
  for (std::string_view rest = bytes; !rest.empty();) {
    const Prefix p = prefix(rest);
    const std::size_t n = std::max<std::size_t>(p.length, 1);
    if (!p.whole) invalid += n;
    rest.remove_prefix(n);
  }
  const bool runs = invalid * 8 > bytes.size();

  constexpr std::size_t size = 4096, slack = 32;
  __attribute__((uninitialized)) char buffer[size];
  char* to = buffer;
  bool in_run = false;
  for (std::string_view rest = bytes; !rest.empty();) {
    if (to > buffer + size - slack) {
      out.append(buffer, static_cast<std::size_t>(to - buffer));
      to = buffer;
    }
    const Prefix p = prefix(rest);
    const std::size_t n = std::max<std::size_t>(p.length, 1);
    if (!p.whole) {
      if (!runs || !in_run)
        for (const char c : replacement) *to++ = c;
      in_run = true;
    } else {
      in_run = false;
      const auto c = static_cast<unsigned char>(rest[0]);
      if (n == 1 && !plain(c))
        append_escape(c, to);
      else
        for (std::size_t i = 0; i < n; i++) *to++ = rest[i];
    }
    rest.remove_prefix(n);
  }
  out.append(buffer, static_cast<std::size_t>(to - buffer));
}

void append_base64(std::string_view bytes, std::string& out) {
  // Two characters at a time for 12 bits.
  static const auto pairs = [] {
    std::array<std::array<char, 2>, 4096> table{};
    for (unsigned i = 0; i < table.size(); i++) table[i] = {base64_alphabet[i >> 6], base64_alphabet[i & 63]};
    return table;
  }();
  const std::size_t old = out.size();
  out.resize(old + (bytes.size() + 2) / 3 * 4);
  char* to = out.data() + old;
  const auto* from = reinterpret_cast<const unsigned char*>(bytes.data());
  std::size_t n = bytes.size();
  for (; n >= 3; n -= 3, from += 3, to += 4) {
    const unsigned v = static_cast<unsigned>(from[0]) << 16 | static_cast<unsigned>(from[1]) << 8 | from[2];
    std::memcpy(to, pairs[v >> 12].data(), 2);
    std::memcpy(to + 2, pairs[v & 4095].data(), 2);
  }
  if (n == 0) return;
  const unsigned v = static_cast<unsigned>(from[0]) << 16 | (n == 2 ? static_cast<unsigned>(from[1]) << 8 : 0);
  to[0] = base64_alphabet[v >> 18];
  to[1] = base64_alphabet[v >> 12 & 63];
  to[2] = n == 2 ? base64_alphabet[v >> 6 & 63] : '=';
  to[3] = '=';
}

std::optional<std::string> parse_base64(std::string_view text) {
  static const auto values = [] {
    std::array<std::int8_t, 256> table;
    table.fill(-1);
    for (int i = 0; i < 64; i++) table[static_cast<unsigned char>(base64_alphabet[i])] = static_cast<std::int8_t>(i);
    return table;
  }();
  if (text.size() % 4 != 0) return std::nullopt;
  std::size_t padding = 0;
  while (padding < 2 && padding < text.size() && text[text.size() - 1 - padding] == '=') padding++;
  std::string out;
  out.reserve(text.size() / 4 * 3);
  for (std::size_t i = 0; i < text.size(); i += 4) {
    const bool last = i + 4 == text.size();
    unsigned v = 0;
    for (std::size_t k = 0; k < 4; k++) {
      int value = values[static_cast<unsigned char>(text[i + k])];
      if (last && k >= 4 - padding) value = 0;
      if (value < 0) return std::nullopt;
      v = v << 6 | static_cast<unsigned>(value);
    }
    const std::size_t bytes = last ? 3 - padding : 3;
    if (bytes < 3 && (v & ((1U << (8 * (3 - bytes))) - 1)) != 0) return std::nullopt;  // one text for one value
    for (std::size_t k = 0; k < bytes; k++) out += static_cast<char>(v >> (16 - 8 * k));
  }
  return out;
}

}  // namespace postern::recorder::cast
