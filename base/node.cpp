#include "base/node.h"

#include <algorithm>

namespace postern {

std::string_view problem_of_tag(std::string_view tag) noexcept {
  const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  if (tag.substr(0, 4) != "tag:") return "tags must start with 'tag:'";
  const auto name = tag.substr(4);
  if (name.empty()) return "tag names must not be empty";
  if (!letter(name.front())) return "tag names must start with a letter, after 'tag:'";
  if (!std::all_of(name.begin(), name.end(), [&](char c) { return letter(c) || (c >= '0' && c <= '9') || c == '-'; }))
    return "tag names can only contain numbers, letters, or dashes";
  return {};
}

std::string_view problem_of_login(std::string_view login) noexcept {
  if (login.empty()) return "a user must not be empty";
  if (login.size() > 320) return "a user has at most 320 bytes";
  const auto at = login.find('@');
  if (at == std::string_view::npos || at == 0) return "a user must be written name@domain";
  if (login.find('@', at + 1) != std::string_view::npos) return "a user must have one \"@\"";
  const auto bad = [](char c) { return static_cast<unsigned char>(c) <= 0x20 || c == 0x7f || c == '*' || c == ':' || c == '/' || c == '"' || c == ','; };
  if (std::any_of(login.begin(), login.end(), bad)) return "a user must not hold blanks or any of * : / \" ,";
  return {};
}

}  // namespace postern
