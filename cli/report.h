#pragma once

#include "base/node.h"

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

// What a file that a person wrote is told about itself, as a compiler does it:
//
//     policy.hujson:12:13: error: ssh[2].action: "deny" is not a valid action
//         "action": "deny",
//                   ^
//       hint: "accept" or "check"
namespace postern::cli {

/// Somebody else's text for a terminal: what a terminal prints in columns of its own stays, all else (control characters, what is no
/// UTF-8, what is invisible or changes the direction of writing) becomes \xNN or \u{NNNN}.
std::string printable(std::string_view text);

/// Columns that printable text takes.
std::size_t columns_of(std::string_view printable_text);

/// A file's text by lines; holds no copy of it.
class Lines {
 public:
  explicit Lines(std::string_view text);
  /// Line `number`, from 1, without its end; empty when there is none.
  std::string_view at(unsigned number) const noexcept;

 private:
  std::string_view text_;
  std::vector<std::size_t> starts_;
};

/// `line` and a caret under the byte at `column` (from 1): two lines with their ends. A long line is cut around the caret.
std::string with_caret(std::string_view line, unsigned column);

enum class Severity { error, warning, note };

/// The whole report of one problem, with line ends. Without a place (line 0) or a line to show there is no caret.
std::string report(const Problem& problem, Severity severity, const Lines& lines);

}  // namespace postern::cli
