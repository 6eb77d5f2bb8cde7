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

void Network::index() {
  by_address_.clear();
  by_tag_.clear();
  for (std::size_t i = 0; i < nodes.size(); i++) {
    for (const auto& address : nodes[i].addresses) by_address_.emplace(address, i);
    for (const auto& tag : nodes[i].tags) by_tag_[tag].push_back(i);
  }
  indexed_ = nodes.size();
}

const Node* Network::find(const Address& address) const noexcept {
  const auto has = [&](const Node& n) { return std::find(n.addresses.begin(), n.addresses.end(), address) != n.addresses.end(); };
  if (indexed_ == nodes.size()) {
    const auto it = by_address_.find(address);
    return it == by_address_.end() || !has(nodes[it->second]) ? nullptr : &nodes[it->second];
  }
  const auto it = std::find_if(nodes.begin(), nodes.end(), has);
  return it == nodes.end() ? nullptr : &*it;
}

std::vector<const Node*> Network::with_tag(std::string_view tag) const {
  std::vector<const Node*> out;
  const auto take = [&](const Node& n) {
    if (std::find(n.tags.begin(), n.tags.end(), tag) != n.tags.end()) out.push_back(&n);
  };
  if (indexed_ != nodes.size()) {
    for (const Node& n : nodes) take(n);
  } else if (const auto it = by_tag_.find(tag); it != by_tag_.end()) {
    for (const std::size_t i : it->second) take(nodes[i]);
  }
  return out;
}

}  // namespace postern
