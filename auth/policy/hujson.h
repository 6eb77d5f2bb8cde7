#pragma once

#include "base/node.h"

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

// HuJSON: JSON (RFC 8259) with // and /* */ comments and trailing commas (tailscale.com/kb/1337/policy-syntax).
//
// Ours, because every value and member must keep the place where a person wrote it, and because the common readers take the
// last of two equal names in silence: in a policy that would lose a rule.
namespace postern::auth::policy::hujson {

/// Largest file. The largest real policies are a few hundred KiB; issue 4's load test is 5 MB.
inline constexpr std::size_t max_file_bytes = 16 * 1024 * 1024;
/// Arrays and objects within each other. A policy needs 6.
inline constexpr unsigned max_nesting = 100;
/// Values in one file; bounds the memory that 16 MiB of "0,0,0" would take.
inline constexpr std::size_t max_values = 2'000'000;
/// Problems kept for one file; the rest is counted in one sentence.
inline constexpr std::size_t max_problems = 200;

enum class Kind { null, boolean, number, string, array, object };

struct Member;

struct Value {
  Kind kind = Kind::null;
  unsigned line = 0;
  unsigned column = 0;
  bool boolean = false;
  std::string text;             ///< a string's value (UTF-8, escapes resolved), or a number as written
  std::vector<Value> items;     ///< of an array
  std::vector<Member> members;  ///< of an object, in file order, names unique

  const Member* find(std::string_view name) const noexcept;
};

struct Member {
  std::string name;
  unsigned line = 0;
  unsigned column = 0;
  Value value;
};

/// "an array", "a string" … for messages.
std::string_view describe(Kind kind) noexcept;

/// Collects what is wrong with one file.
class Problems {
 public:
  explicit Problems(std::string file) : file_{std::move(file)} {}
  void add(unsigned line, unsigned column, std::string field, std::string message, std::string hint = {});
  bool empty() const noexcept { return all_.empty(); }
  const std::string& file() const noexcept { return file_; }
  /// In file order. The object is empty afterwards.
  std::vector<Problem> take();

 private:
  std::string file_;
  std::vector<Problem> all_;
  std::size_t left_out_ = 0;
};

/// The one value that `text` is. Nothing, with problems, when it is not HuJSON: what follows a syntax error cannot be told,
/// so that is one problem. Equal names in an object are problems too, but reading goes on after them (the first one stays).
std::optional<Value> parse(std::string_view text, Problems& problems);

/// Length of the UTF-8 sequence at the front of `text` (which is not empty), 0 when it is none (RFC 3629 section 4).
std::size_t sequence_length(std::string_view text) noexcept;

/// Where `text` stops to be UTF-8 (RFC 3629: no overlong forms, surrogates, or values over U+10FFFF); npos when it is all UTF-8.
std::size_t find_invalid_utf8(std::string_view text) noexcept;

}  // namespace postern::auth::policy::hujson
