#include "auth/policy/posture.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <compare>

namespace postern::auth::policy {
namespace {

using Operation = PostureCondition::Operation;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// Versions and the like: runs of digits compare as numbers, anything else byte by byte. "1.9" < "1.40", "13.0" == "13.00".
std::strong_ordering compare_versions(std::string_view a, std::string_view b) {
  const auto take_number = [](std::string_view& text) {
    while (!text.empty() && text.front() == '0') text.remove_prefix(1);
    std::size_t length = 0;
    while (length < text.size() && is_digit(text[length])) length++;
    const auto digits = text.substr(0, length);
    text.remove_prefix(length);
    return digits;
  };
  while (!a.empty() && !b.empty()) {
    if (is_digit(a.front()) && is_digit(b.front())) {
      const auto x = take_number(a), y = take_number(b);
      if (x.size() != y.size()) return x.size() <=> y.size();
      if (x != y) return x < y ? std::strong_ordering::less : std::strong_ordering::greater;
    } else {
      if (a.front() != b.front()) return static_cast<unsigned char>(a.front()) <=> static_cast<unsigned char>(b.front());
      a.remove_prefix(1);
      b.remove_prefix(1);
    }
  }
  return a.size() <=> b.size();
}

/// Absent: the two cannot be compared.
std::optional<std::partial_ordering> compare(const Attribute& a, const Attribute& b) {
  if (a.index() != b.index()) return std::nullopt;
  if (const auto* text = std::get_if<std::string>(&a)) return compare_versions(*text, std::get<std::string>(b));
  if (const auto* number = std::get_if<double>(&a)) return *number <=> std::get<double>(b);
  return std::nullopt;
}

bool compares(Operation operation, std::partial_ordering order) {
  switch (operation) {
    case Operation::less: return order < 0;
    case Operation::less_equal: return order <= 0;
    case Operation::greater: return order > 0;
    case Operation::greater_equal: return order >= 0;
    default: return false;
  }
}

class Parser {
 public:
  explicit Parser(std::string_view text) : rest_{text} {}

  ParsedCondition parse() {
    PostureCondition c;
    blanks();
    const auto end = std::min(rest_.size(), rest_.find_first_of(" \t=!<>'\"[],"));
    c.attribute = rest_.substr(0, end);
    rest_.remove_prefix(end);
    const auto colon = c.attribute.find(':');
    if (colon == std::string::npos || colon == 0 || colon + 1 == c.attribute.size())
      return {std::nullopt, "expected an attribute such as node:os first"};
    blanks();
    if (rest_.empty()) {
      c.values.emplace_back(true);
      return {std::move(c), {}};
    }
    if (!operation(c.operation)) return {std::nullopt, "expected ==, !=, <, <=, >, >=, IN, NOT IN, IS SET or NOT SET after " + c.attribute};
    blanks();
    if (c.operation == Operation::in || c.operation == Operation::not_in) {
      if (!list(c.values)) return {std::nullopt, "expected a list in brackets after IN: ['macos', 'linux']"};
    } else if (c.operation != Operation::is_set && c.operation != Operation::not_set) {
      if (!value(c.values.emplace_back())) return {std::nullopt, "expected a value: 'text', a number, true or false"};
      const bool orders = c.operation != Operation::equal && c.operation != Operation::not_equal;
      if (orders && std::holds_alternative<bool>(c.values.back())) return {std::nullopt, "true and false have no order"};
    }
    blanks();
    if (!rest_.empty()) return {std::nullopt, "text after the end of the condition"};
    return {std::move(c), {}};
  }

 private:
  void blanks() {
    while (!rest_.empty() && (rest_.front() == ' ' || rest_.front() == '\t')) rest_.remove_prefix(1);
  }
  bool take(std::string_view word) {
    if (rest_.substr(0, word.size()) != word) return false;
    rest_.remove_prefix(word.size());
    return true;
  }
  bool take_words(std::string_view first, std::string_view second) {
    const auto before = rest_;
    if (take(first)) {
      const auto after = rest_;
      blanks();
      if (rest_ != after && take(second)) return true;
    }
    rest_ = before;
    return false;
  }
  bool operation(Operation& out) {
    constexpr std::array<std::pair<std::string_view, Operation>, 6> signs{{{"==", Operation::equal},
                                                                          {"!=", Operation::not_equal},
                                                                          {"<=", Operation::less_equal},
                                                                          {">=", Operation::greater_equal},
                                                                          {"<", Operation::less},
                                                                          {">", Operation::greater}}};
    for (const auto& [sign, meaning] : signs) {
      if (!take(sign)) continue;
      out = meaning;
      return true;
    }
    if (take_words("NOT", "IN")) out = Operation::not_in;
    else if (take_words("NOT", "SET")) out = Operation::not_set;
    else if (take_words("IS", "SET")) out = Operation::is_set;
    else if (take("IN")) out = Operation::in;
    else return false;
    return true;
  }
  bool value(Attribute& out) {
    if (!rest_.empty() && (rest_.front() == '\'' || rest_.front() == '"')) {
      const auto end = rest_.find(rest_.front(), 1);
      if (end == std::string_view::npos) return false;
      out = std::string{rest_.substr(1, end - 1)};
      rest_.remove_prefix(end + 1);
      return true;
    }
    if (take("true")) return out = true, true;
    if (take("false")) return out = false, true;
    double number = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), number, std::chars_format::fixed);
    if (error != std::errc{}) return false;
    rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
    out = number;
    return true;
  }
  bool list(std::vector<Attribute>& out) {
    if (!take("[")) return false;
    for (;;) {
      blanks();
      if (!value(out.emplace_back())) return false;
      blanks();
      if (take("]")) return true;
      if (!take(",")) return false;
    }
  }

  std::string_view rest_;
};

}  // namespace

bool PostureCondition::holds(const std::map<std::string, Attribute>& attributes) const {
  const auto it = attributes.find(attribute);
  if (operation == Operation::not_set) return it == attributes.end();
  if (it == attributes.end()) return false;
  const Attribute& is = it->second;
  switch (operation) {
    case Operation::is_set: return true;
    case Operation::equal:
    case Operation::in: return std::find(values.begin(), values.end(), is) != values.end();
    case Operation::not_equal:
    case Operation::not_in: return std::find(values.begin(), values.end(), is) == values.end();
    default: break;
  }
  const auto order = compare(is, values.front());
  return order && compares(operation, *order);
}

ParsedCondition parse_posture_condition(std::string_view text) { return Parser{text}.parse(); }

bool Posture::holds(const std::map<std::string, Attribute>& attributes) const {
  return std::all_of(conditions.begin(), conditions.end(), [&](const PostureCondition& c) { return c.holds(attributes); });
}

}  // namespace postern::auth::policy
