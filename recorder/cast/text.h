#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

// The three things between a program's bytes and a line of JSON: what of them is UTF-8 text, how text stands in a JSON string,
// and base64 for what is not text. Pure.
namespace postern::recorder::cast {

/// Bytes of the well-formed UTF-8 character at the start of `bytes` (Unicode 15, table 3-7: no surrogates, no overlong forms); 0
/// when there is none.
std::size_t character(std::string_view bytes) noexcept;

/// Whether `bytes` (1 to 3 of them) begin a well-formed character that lacks its end.
bool is_cut_character(std::string_view bytes) noexcept;

/// Bytes at the end of `bytes` that are a cut character; 0 to 3.
std::size_t cut_at_end(std::string_view bytes) noexcept;

/// Appends `bytes` as the inside of a JSON string (RFC 8259 section 7: only `"`, `\` and U+0000 to U+001F are escaped) up to the
/// first byte that is not UTF-8. Returns how many bytes were taken.
std::size_t append_text(std::string_view bytes, std::string& out);

/// The same for all bytes: what is not UTF-8 shows as U+FFFD, one for each maximal subpart (Unicode 15 section 3.9, what browsers
/// do); with over 1/8 of such bytes, one for each run.
void append_lossy_text(std::string_view bytes, std::string& out);

/// RFC 4648 section 4, with padding.
void append_base64(std::string_view bytes, std::string& out);
/// Nothing when it is not exactly that form.
std::optional<std::string> parse_base64(std::string_view text);

}  // namespace postern::recorder::cast
