#include "cli/report.h"

#include "auth/policy/hujson.h"

#include <algorithm>
#include <clocale>
#include <cwchar>
#include <optional>

namespace postern::cli {
namespace {

/// Columns of a report that a source line may take.
constexpr std::size_t widest = 100;
/// Of these so many are right of the caret, if there are.
constexpr std::size_t context = 30;
constexpr std::string_view cut_mark = "...";
/// A tab is shown as blanks, and not by the terminal: its stops differ from an editor's, and the caret has to stand still.
constexpr std::string_view tab = "    ";

/// wcwidth(3) in a locale that knows all scripts, whatever the caller's is. Without one only ASCII is printed as it is.
class Widths {
 public:
  Widths() : utf8_{::newlocale(LC_CTYPE_MASK, "C.UTF-8", nullptr)} {}
  ~Widths() {
    if (utf8_ != nullptr) ::freelocale(utf8_);
  }
  Widths(const Widths&) = delete;
  Widths& operator=(const Widths&) = delete;

  /// Columns of a sign that may be shown; nothing for one that must not: control characters have none, and what takes no column of
  /// its own is invisible, turns the text around it (U+202E), or hides on the sign before it.
  std::optional<std::size_t> of(char32_t sign) const {
    if (sign < 0x80) return sign >= 0x20 && sign < 0x7f ? std::optional<std::size_t>{1} : std::nullopt;
    if (utf8_ == nullptr) return std::nullopt;
    const locale_t before = ::uselocale(utf8_);
    const int width = ::wcwidth(static_cast<wchar_t>(sign));
    ::uselocale(before);
    return width > 0 ? std::optional<std::size_t>{static_cast<std::size_t>(width)} : std::nullopt;
  }

 private:
  locale_t utf8_;
};

std::optional<std::size_t> width_of(char32_t sign) {
  static const Widths widths;
  return widths.of(sign);
}

/// One sign as it is shown.
struct Cell {
  std::string text;
  std::size_t columns = 0;
  std::size_t bytes = 0;  ///< of the source
};

Cell cell_at(std::string_view text) {
  constexpr char hex[] = "0123456789abcdef";
  const auto first = static_cast<unsigned char>(text.front());
  const std::size_t length = auth::policy::hujson::sequence_length(text);
  if (length == 0) return {std::string{"\\x"} + hex[first >> 4] + hex[first & 15], 4, 1};
  char32_t sign = length == 1 ? first : first & (0xffU >> (length + 1));
  for (std::size_t i = 1; i < length; i++) sign = sign << 6 | (static_cast<unsigned char>(text[i]) & 0x3fU);
  if (const auto columns = width_of(sign)) return {std::string{text.substr(0, length)}, *columns, length};
  if (sign < 0x80) return {std::string{"\\x"} + hex[first >> 4] + hex[first & 15], 4, 1};
  std::string code;
  for (; sign != 0; sign >>= 4) code.insert(code.begin(), hex[sign & 15]);
  code = "\\u{" + code + "}";
  return {code, code.size(), length};
}

Cell source_cell_at(std::string_view text) {
  if (text.front() == '\t') return {std::string{tab}, tab.size(), 1};
  return cell_at(text);
}

bool is_continuation(char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; }

// Lines may have 16 MiB: these two walk no further than they say.

/// Where `columns` of `line` end that begin at `begin`.
std::size_t end_of_columns(std::string_view line, std::size_t begin, std::size_t columns) {
  std::size_t at = begin;
  for (std::size_t used = 0; at < line.size();) {
    const Cell cell = source_cell_at(line.substr(at));
    used += cell.columns;
    if (used > columns) break;
    at += cell.bytes;
  }
  return at;
}

/// Where `columns` of `line` begin that end at `end`.
std::size_t begin_of_columns(std::string_view line, std::size_t end, std::size_t columns) {
  std::size_t at = end;
  for (std::size_t used = 0; at > 0;) {
    std::size_t previous = at - 1;
    while (previous > 0 && at - previous < 4 && is_continuation(line[previous])) previous--;
    if (source_cell_at(line.substr(previous)).bytes != at - previous) previous = at - 1;  // no UTF-8
    used += source_cell_at(line.substr(previous)).columns;
    if (used > columns) break;
    at = previous;
  }
  return at;
}

}  // namespace

std::string printable(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const Cell cell = cell_at(text);
    out += cell.text;
    text.remove_prefix(cell.bytes);
  }
  return out;
}

std::size_t columns_of(std::string_view text) {
  std::size_t columns = 0;
  while (!text.empty()) {
    const Cell cell = cell_at(text);
    columns += cell.columns;
    text.remove_prefix(cell.bytes);
  }
  return columns;
}

Lines::Lines(std::string_view text) : text_{text}, starts_{0} {
  for (std::size_t end = text.find('\n'); end != std::string_view::npos; end = text.find('\n', end + 1)) starts_.push_back(end + 1);
}

std::string_view Lines::at(unsigned number) const noexcept {
  if (number == 0 || number > starts_.size()) return {};
  std::string_view line = text_.substr(starts_[number - 1]);
  line = line.substr(0, line.find('\n'));
  if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  return line;
}

std::string with_caret(std::string_view line, unsigned column) {
  const std::size_t caret = std::min<std::size_t>(column == 0 ? 0 : column - 1, line.size());
  const auto text = line.find_first_not_of(" \t");  // indentation says nothing
  std::size_t begin = std::min(caret, text == std::string_view::npos ? 0 : text);
  if (end_of_columns(line, begin, widest) < line.size()) begin = std::max(begin, begin_of_columns(line, end_of_columns(line, caret, context), widest));
  const std::size_t end = end_of_columns(line, begin, widest);
  const std::string_view cut_before = begin > text ? cut_mark : "", cut_after = end < line.size() ? cut_mark : "";
  std::string shown{cut_before}, under(cut_before.size(), ' ');
  for (std::size_t at = begin; at < end;) {
    const Cell cell = source_cell_at(line.substr(at));
    if (at < caret) under.append(cell.columns, ' ');
    shown += cell.text;
    at += cell.bytes;
  }
  return "    " + shown + std::string{cut_after} + "\n    " + under + "^\n";
}

std::string report(const Problem& problem, Severity severity, const Lines& lines) {
  const bool placed = problem.place.line != 0;
  std::string out = printable(placed ? problem.place.text() : problem.place.file);
  out += severity == Severity::error ? ": error: " : severity == Severity::warning ? ": warning: " : ": note: ";
  if (!problem.field.empty()) out += printable(problem.field) + ": ";
  out += printable(problem.message) + "\n";
  if (const auto line = lines.at(problem.place.line); !line.empty()) out += with_caret(line, problem.place.column);
  if (!problem.hint.empty()) out += "  hint: " + printable(problem.hint) + "\n";
  return out;
}

}  // namespace postern::cli
