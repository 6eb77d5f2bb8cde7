#include "sshd/protocol/forward_targets.h"

#include <fnmatch.h>

#include <algorithm>
#include <charconv>

namespace postern::sshd {
namespace {

std::string lower(std::string_view text) {
  std::string out{text};
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  if (out.size() > 1 && out.back() == '.') out.pop_back();  // "db.example.com." is the same name (RFC 1034 section 3.1)
  return out;
}

std::optional<std::uint16_t> port_number(std::string_view text) {
  std::uint16_t n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc{} || end != text.data() + text.size() || n == 0) return std::nullopt;
  return n;
}

}  // namespace

std::string ForwardTargets::encode(const std::vector<std::vector<std::string>>& lists) {
  std::string out;
  for (const auto& list : lists) {
    for (const auto& word : list) out += word + "\n";
    out += "\f";
  }
  return out;
}

std::optional<ForwardTargets::Word> ForwardTargets::read(std::string_view text) {
  constexpr std::string_view unix_prefix = "unix:";
  Word word;
  if (text.starts_with(unix_prefix)) {
    word.socket = true;
    word.text = text.substr(unix_prefix.size());
    return word.text.starts_with('/') ? std::optional{word} : std::nullopt;
  }
  const auto colon = text.rfind(':');
  if (colon == std::string_view::npos) return std::nullopt;
  std::string_view host = text.substr(0, colon);
  const std::string_view ports = text.substr(colon + 1);
  if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
  if (host.empty()) return std::nullopt;
  word.any_host = host == "*";
  if (!word.any_host) word.prefix = Prefix::parse(host);
  if (!word.any_host && !word.prefix) word.text = lower(host);
  if (ports == "*") {
    word.first = 1;
    word.last = 65535;
    return word;
  }
  const auto dash = ports.find('-');
  const auto first = port_number(ports.substr(0, dash));
  const auto last = dash == std::string_view::npos ? first : port_number(ports.substr(dash + 1));
  if (!first || !last || *first > *last) return std::nullopt;
  word.first = *first;
  word.last = *last;
  return word;
}

std::optional<ForwardTargets> ForwardTargets::decode(std::string_view text) {
  ForwardTargets targets;
  std::vector<Word> list;
  while (!text.empty()) {
    if (text.front() == '\f') {
      targets.lists_.push_back(std::move(list));
      list.clear();
      text.remove_prefix(1);
      continue;
    }
    const auto end = text.find('\n');
    if (end == std::string_view::npos) return std::nullopt;
    auto word = read(text.substr(0, end));
    if (!word) return std::nullopt;
    list.push_back(std::move(*word));
    text.remove_prefix(end + 1);
  }
  if (!list.empty()) return std::nullopt;  // a list without its end
  return targets;
}

template <class Matches>
bool ForwardTargets::every_list(const Matches& matches) const {
  return std::all_of(lists_.begin(), lists_.end(), [&](const auto& list) { return std::any_of(list.begin(), list.end(), matches); });
}

bool ForwardTargets::may_allow(std::string_view host, std::uint16_t port) const {
  const std::string name = lower(host);
  const auto address = Address::parse(host);
  return every_list([&](const Word& w) {
    return w.has_port(port) && (w.any_host || (w.prefix ? !address || w.prefix->contains(*address) : w.text == name));
  });
}

bool ForwardTargets::allows(std::string_view host, const Address& address, std::uint16_t port) const {
  const std::string name = lower(host);
  return every_list([&](const Word& w) { return w.has_port(port) && (w.any_host || (w.prefix ? w.prefix->contains(address) : w.text == name)); });
}

bool ForwardTargets::allows_socket(const std::string& path) const {
  // FNM_PATHNAME: "*" stays within one folder.
  return every_list([&](const Word& w) { return w.socket && ::fnmatch(w.text.c_str(), path.c_str(), FNM_PATHNAME) == 0; });
}

bool ForwardTargets::may_allow_sockets() const {
  return every_list([](const Word& w) { return w.socket; });
}

}  // namespace postern::sshd
