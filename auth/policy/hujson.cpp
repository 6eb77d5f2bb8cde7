#include "auth/policy/hujson.h"

#include "base/log.h"

#include <algorithm>
#include <cstdint>
#include <unordered_map>

namespace postern::auth::policy::hujson {

std::size_t sequence_length(std::string_view text) noexcept {
  const auto at = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = at(0);
  if (first < 0x80) return 1;
  std::size_t length = 0;
  unsigned char low = 0x80, high = 0xbf;  // of the second byte
  if (first >= 0xc2 && first <= 0xdf) {
    length = 2;
  } else if (first >= 0xe0 && first <= 0xef) {
    length = 3;
    if (first == 0xe0) low = 0xa0;
    if (first == 0xed) high = 0x9f;
  } else if (first >= 0xf0 && first <= 0xf4) {
    length = 4;
    if (first == 0xf0) low = 0x90;
    if (first == 0xf4) high = 0x8f;
  } else {
    return 0;
  }
  if (text.size() < length || at(1) < low || at(1) > high) return 0;
  for (std::size_t i = 2; i < length; i++)
    if (at(i) < 0x80 || at(i) > 0xbf) return 0;
  return length;
}

namespace {

void append_utf8(std::string& out, std::uint32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xc0 | c >> 6);
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xe0 | c >> 12);
    out += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | c >> 18);
    out += static_cast<char>(0x80 | (c >> 12 & 0x3f));
    out += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  }
}

/// Recursive descent; depth is bounded by max_nesting, so is the stack.
class Parser {
 public:
  Parser(std::string_view text, Problems& problems) : text_{text}, problems_{problems} {}

  std::optional<Value> document() {
    if (!skip()) return std::nullopt;
    if (end()) {
      fail("the file is empty", "write at least { }");
      return std::nullopt;
    }
    Value root;
    if (!value(root, 0) || !skip()) return std::nullopt;
    if (!end()) {
      fail("text after the end of the policy", "one value a file; is there a } too many above?");
      return std::nullopt;
    }
    return root;
  }

 private:
  bool end() const { return at_ >= text_.size(); }
  char peek() const { return end() ? '\0' : text_[at_]; }
  unsigned column() const { return static_cast<unsigned>(at_ - line_start_) + 1; }

  bool fail_at(unsigned line, unsigned column, std::string message, std::string hint = {}) {
    problems_.add(line, column, "", std::move(message), std::move(hint));
    return false;
  }
  bool fail(std::string message, std::string hint = {}) { return fail_at(line_, column(), std::move(message), std::move(hint)); }

  void new_line() {
    line_++;
    line_start_ = at_;
  }

  /// Takes the character at the cursor, which must not be a raw control character other than tab, CR and LF.
  bool take_in_comment() {
    const auto c = static_cast<unsigned char>(text_[at_]);
    if (c == '\n') {
      at_++;
      new_line();
      return true;
    }
    if ((c < 0x20 && c != '\t' && c != '\r') || c == 0x7f) return fail("control character in a comment", "delete it");
    at_++;
    return true;
  }

  /// Skips blanks and comments. False (with a problem) for a comment that does not end.
  bool skip() {
    for (;;) {
      if (end()) return true;
      const char c = text_[at_];
      if (c == '\n') {
        at_++;
        new_line();
      } else if (c == ' ' || c == '\t' || c == '\r') {
        at_++;
      } else if (c == '/') {
        const unsigned line = line_, start = column();
        const char next = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
        if (next == '/') {
          while (!end() && text_[at_] != '\n')
            if (!take_in_comment()) return false;
        } else if (next == '*') {
          at_ += 2;
          for (;;) {
            if (end()) return fail_at(line, start, "this comment does not end", "close it with */");
            if (text_.substr(at_, 2) == "*/") {
              at_ += 2;
              break;
            }
            if (!take_in_comment()) return false;
          }
        } else {
          return fail("\"/\" begins no comment here", "comments are // to the end of the line, or /* ... */");
        }
      } else {
        return true;
      }
    }
  }

  bool value(Value& out, unsigned depth) {
    out.line = line_;
    out.column = column();
    if (++values_ > max_values) return fail("too many values in this file", "the most is " + std::to_string(max_values));
    if (end()) return fail("the file ends where a value should be", "is the file whole?");
    const char c = peek();
    switch (c) {
      case '{': return object(out, depth + 1);
      case '[': return array(out, depth + 1);
      case '"': out.kind = Kind::string; return string(out.text);
      case 't':
        out.kind = Kind::boolean;
        out.boolean = true;
        return word("true");
      case 'f':
        out.kind = Kind::boolean;
        out.boolean = false;
        return word("false");
      case 'n': out.kind = Kind::null; return word("null");
      default: break;
    }
    if (c == '-' || (c >= '0' && c <= '9')) return number(out);
    if (c == '\'') return fail("a value cannot begin with '", "strings are written in double quotes");
    if (c == ',') return fail("a comma where a value should be", "one comma between two values, at most one after the last");
    if (c == ']' || c == '}') return fail(std::string{"\""} + c + "\" where a value should be");
    return fail("not a value: " + safe_quoted(text_.substr(at_, 1)), "a string in double quotes, a number, true, false, null, [ ] or { }");
  }

  bool word(std::string_view w) {
    std::size_t length = 0;
    while (at_ + length < text_.size() && ((text_[at_ + length] | 0x20) >= 'a' && (text_[at_ + length] | 0x20) <= 'z')) length++;
    if (text_.substr(at_, length) != w) return fail("not a value: " + safe_quoted(text_.substr(at_, length), 40), "strings are written in double quotes");
    at_ += length;
    return true;
  }

  bool number(Value& out) {
    out.kind = Kind::number;
    const std::size_t start = at_;
    const auto digits = [&] {
      const std::size_t from = at_;
      while (peek() >= '0' && peek() <= '9') at_++;
      return at_ - from;
    };
    if (peek() == '-') at_++;
    const bool zero = peek() == '0';
    const std::size_t whole = digits();
    if (whole == 0 || (zero && whole > 1)) return fail("not a number", "no leading zeros, no plus sign");
    if (peek() == '.') {
      at_++;
      if (digits() == 0) return fail("not a number", "digits must follow the point");
    }
    if (peek() == 'e' || peek() == 'E') {
      at_++;
      if (peek() == '+' || peek() == '-') at_++;
      if (digits() == 0) return fail("not a number", "digits must follow the exponent");
    }
    out.text = text_.substr(start, at_ - start);
    return true;
  }

  std::optional<std::uint32_t> hex4() {
    if (text_.size() - at_ < 4) return std::nullopt;
    std::uint32_t value = 0;
    for (int i = 0; i < 4; i++) {
      const char c = text_[at_ + static_cast<std::size_t>(i)];
      value <<= 4;
      if (c >= '0' && c <= '9') value |= static_cast<std::uint32_t>(c - '0');
      else if (c >= 'a' && c <= 'f') value |= static_cast<std::uint32_t>(c - 'a' + 10);
      else if (c >= 'A' && c <= 'F') value |= static_cast<std::uint32_t>(c - 'A' + 10);
      else return std::nullopt;
    }
    at_ += 4;
    return value;
  }

  bool string(std::string& out) {
    const unsigned line = line_, start = column();
    at_++;
    for (;;) {
      if (end()) return fail_at(line, start, "this string does not end", "close it with \"");
      const auto c = static_cast<unsigned char>(text_[at_]);
      if (c == '"') {
        at_++;
        return true;
      }
      if (c == '\n' || c == '\r') return fail_at(line, start, "this string does not end in its line", "close it with \"");
      if (c < 0x20 || c == 0x7f) return fail("control character in a string", "write it as \\u00XX if it is meant");
      if (c != '\\') {
        out += text_[at_++];
        continue;
      }
      if (!escape(out)) return false;
    }
  }

  bool escape(std::string& out) {
    const unsigned start = column();
    at_++;
    const char c = peek();
    at_++;
    switch (c) {
      case '"':
      case '\\':
      case '/': out += c; return true;
      case 'b': out += '\b'; return true;
      case 'f': out += '\f'; return true;
      case 'n': out += '\n'; return true;
      case 'r': out += '\r'; return true;
      case 't': out += '\t'; return true;
      case 'u': break;
      default: return fail_at(line_, start, "unknown escape in a string", "\\\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX");
    }
    auto code = hex4();
    if (!code) return fail_at(line_, start, "\\u must be followed by four hexadecimal digits");
    if (*code >= 0xdc00 && *code <= 0xdfff) return fail_at(line_, start, "half of a surrogate pair", "the high half comes first");
    if (*code >= 0xd800 && *code <= 0xdbff) {
      if (text_.substr(at_, 2) != "\\u") return fail_at(line_, start, "half of a surrogate pair", "\\uD83D\\uDEAA, both halves");
      at_ += 2;
      const auto low = hex4();
      if (!low || *low < 0xdc00 || *low > 0xdfff) return fail_at(line_, start, "half of a surrogate pair", "\\uD83D\\uDEAA, both halves");
      code = 0x10000 + ((*code - 0xd800) << 10) + (*low - 0xdc00);
    }
    if (*code == 0) return fail_at(line_, start, "NUL in a string", "no name or pattern can hold one");
    append_utf8(out, *code);
    return true;
  }

  bool deeper(unsigned depth) {
    if (depth <= max_nesting) return true;
    return fail("nested too deeply", "at most " + std::to_string(max_nesting) + " arrays and objects within each other");
  }

  /// After an element: true to go on with the next, false at the end or on a problem (then `ok` is false).
  bool next(char close, const Value& open, bool& ok) {
    ok = skip();
    if (!ok) return false;
    if (peek() == ',' && !end()) {
      at_++;
      ok = skip();
      if (!ok) return false;
      if (peek() == close) {  // a trailing comma
        at_++;
        return false;
      }
      return true;
    }
    if (peek() == close) {
      at_++;
      return false;
    }
    ok = false;
    if (end()) {
      fail_at(open.line, open.column, std::string{"this \""} + (close == '}' ? "{" : "[") + "\" is not closed", "is the file whole?");
    } else {
      fail(std::string{"expected a comma or \""} + close + "\" here", "is a comma missing before it?");
    }
    return false;
  }

  bool array(Value& out, unsigned depth) {
    out.kind = Kind::array;
    if (!deeper(depth)) return false;
    at_++;
    if (!skip()) return false;
    if (peek() == ']') {
      at_++;
      return true;
    }
    for (bool ok = true;;) {
      if (end()) return fail_at(out.line, out.column, "this \"[\" is not closed", "is the file whole?");
      if (!value(out.items.emplace_back(), depth)) return false;
      if (!next(']', out, ok)) return ok;
    }
  }

  bool object(Value& out, unsigned depth) {
    out.kind = Kind::object;
    if (!deeper(depth)) return false;
    at_++;
    if (!skip()) return false;
    if (peek() == '}') {
      at_++;
      return true;
    }
    std::unordered_map<std::string, unsigned> names;  // and their lines
    for (bool ok = true;;) {
      if (end()) return fail_at(out.line, out.column, "this \"{\" is not closed", "is the file whole?");
      Member member;
      member.line = line_;
      member.column = column();
      if (peek() != '"') return fail("expected a name in double quotes here", "{ \"name\": value, ... }");
      if (!string(member.name) || !skip()) return false;
      if (peek() != ':') return fail("expected \":\" after the name " + safe_quoted(member.name, 40));
      at_++;
      if (!skip() || !value(member.value, depth)) return false;
      if (const auto [first, is_new] = names.try_emplace(member.name, member.line); is_new) {
        out.members.push_back(std::move(member));
      } else {
        fail_at(member.line, member.column, "the name " + safe_quoted(member.name, 80) + " appears twice in this object",
                "first in line " + std::to_string(first->second) + "; merge the two");
      }
      if (!next('}', out, ok)) return ok;
    }
  }

  std::string_view text_;
  Problems& problems_;
  std::size_t at_ = 0;
  std::size_t line_start_ = 0;
  unsigned line_ = 1;
  std::size_t values_ = 0;
};

}  // namespace

const Member* Value::find(std::string_view name) const noexcept {
  for (const auto& m : members)
    if (m.name == name) return &m;
  return nullptr;
}

std::string_view describe(Kind kind) noexcept {
  switch (kind) {
    case Kind::null: return "null";
    case Kind::boolean: return "true or false";
    case Kind::number: return "a number";
    case Kind::string: return "a string";
    case Kind::array: return "an array";
    case Kind::object: return "an object";
  }
  return "a value";
}

void Problems::add(unsigned line, unsigned column, std::string field, std::string message, std::string hint) {
  if (all_.size() >= max_problems) {
    left_out_++;
    return;
  }
  all_.push_back({Place{file_, line, column}, std::move(field), std::move(message), std::move(hint)});
}

std::vector<Problem> Problems::take() {
  std::stable_sort(all_.begin(), all_.end(), [](const Problem& a, const Problem& b) {
    return a.place.line != b.place.line ? a.place.line < b.place.line : a.place.column < b.place.column;
  });
  if (left_out_ != 0) {
    const Place last = all_.back().place;
    all_.push_back({last, "", std::to_string(left_out_) + " more problems are not shown", "mend the first ones and try again"});
  }
  left_out_ = 0;
  return std::move(all_);
}

std::size_t find_invalid_utf8(std::string_view text) noexcept {
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t length = sequence_length(text.substr(at));
    if (length == 0) return at;
    at += length;
  }
  return std::string_view::npos;
}

std::optional<Value> parse(std::string_view text, Problems& problems) {
  const auto add_at = [&](std::size_t offset, std::string message, std::string hint) {
    const auto before = text.substr(0, offset);
    const auto line = 1 + static_cast<unsigned>(std::count(before.begin(), before.end(), '\n'));
    const auto start = before.rfind('\n');
    problems.add(line, static_cast<unsigned>(offset - (start == std::string_view::npos ? 0 : start + 1)) + 1, "", std::move(message), std::move(hint));
  };
  if (text.size() > max_file_bytes) {
    problems.add(1, 1, "", "the file is too large: " + std::to_string(text.size()) + " bytes", "at most " + std::to_string(max_file_bytes) + " bytes");
    return std::nullopt;
  }
  if (text.substr(0, 3) == "\xef\xbb\xbf") {
    problems.add(1, 1, "", "the file begins with a byte order mark", "save it as UTF-8 without one");
    return std::nullopt;
  }
  bool readable = true;
  if (const auto nul = text.find('\0'); nul != std::string_view::npos) {
    add_at(nul, "NUL byte in the file", "is the file whole, and saved as UTF-8?");
    readable = false;
  }
  if (const auto bad = find_invalid_utf8(text); bad != std::string_view::npos) {
    add_at(bad, "the file is not UTF-8 here", "save it as UTF-8");
    readable = false;
  }
  if (!readable) return std::nullopt;
  return Parser{text, problems}.document();
}

}  // namespace postern::auth::policy::hujson
