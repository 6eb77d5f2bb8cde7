#include "auth/policy/session_rules.h"

#include "base/address.h"
#include "base/log.h"
#include "base/units.h"

#include <algorithm>
#include <cerrno>
#include <array>
#include <cctype>
#include <charconv>

namespace postern::auth::policy {
namespace {

using hujson::Kind;
using hujson::Value;

enum class Rule { command, max_duration, idle_timeout, max_sessions, record_input, sftp, pty, local_forward, remote_forward, agent_forwarding, x11_forwarding };

/// The table of docs/POLICY.md: JSON in a capability, TOML in posternd.toml.
struct Names {
  Rule rule;
  std::string_view in_capability, in_settings;
};
constexpr std::array<Names, 11> table{{
    {Rule::command, "command", "command"},
    {Rule::max_duration, "maxDuration", "max_duration"},
    {Rule::idle_timeout, "idleTimeout", "idle_timeout"},
    {Rule::max_sessions, "maxSessions", "max_sessions"},
    {Rule::record_input, "recordInput", "record_input"},
    {Rule::sftp, "sftp", "sftp"},
    {Rule::pty, "pty", "pty"},
    {Rule::local_forward, "localForward", "local_forward"},
    {Rule::remote_forward, "remoteForward", "remote_forward"},
    {Rule::agent_forwarding, "agentForwarding", "agent_forwarding"},
    {Rule::x11_forwarding, "x11Forwarding", "x11_forwarding"},
}};

constexpr std::array<std::pair<SessionRules::Sftp, std::string_view>, 3> sftp_words{
    {{SessionRules::Sftp::full, "full"}, {SessionRules::Sftp::read_only, "read-only"}, {SessionRules::Sftp::none, "none"}}};

template <class T>
void sort_unique(std::vector<T>& all) {
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
}

bool has_control_character(std::string_view text) {
  return std::any_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; });
}

/// "maxDuration", "max_duration" and "MaxDuration" are meant to be the same.
std::string squeezed(std::string_view name) {
  std::string out;
  for (const char c : name)
    if (c != '_' && c != '-') out += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

std::optional<unsigned> port_number(std::string_view text) {
  unsigned n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc{} || end != text.data() + text.size() || n < 1 || n > 65535) return std::nullopt;
  return n;
}

bool is_host_name(std::string_view name) {
  if (name.empty() || name.size() > 253) return false;
  std::string_view label;
  for (std::string_view rest = name;;) {
    const auto dot = rest.find('.');
    label = rest.substr(0, dot);
    if (label.empty() || label.size() > 63) return false;
    for (const unsigned char c : label)
      if (c >= 0x80 || (!std::isalnum(c) && c != '-' && c != '_')) return false;
    if (dot == std::string_view::npos) break;
    rest.remove_prefix(dot + 1);
  }
  // What ends in a number would be read as an address by some and as a name by others (RFC 3696 section 2: no top level is a number).
  return !std::all_of(label.begin(), label.end(), [](unsigned char c) { return std::isdigit(c) != 0; });
}

/// What is wrong with a forwarding target; empty: nothing.
std::string_view problem_of_target(std::string_view word) {
  constexpr std::string_view unix_prefix = "unix:";
  if (word.starts_with(unix_prefix)) {
    const std::string_view path = word.substr(unix_prefix.size());
    if (path.empty() || path[0] != '/') return "the path of a socket is absolute";
    if (path.size() > 107) return "the path of a socket has at most 107 bytes (unix(7))";
    if (has_control_character(path)) return "it holds a control character";
    // It would name another folder than the one that is written.
    if (path.find("/../") != std::string_view::npos || path.ends_with("/..")) return "\"..\" cannot stand in a path";
    return {};
  }
  const auto colon = word.rfind(':');
  if (colon == std::string_view::npos) return "the port is missing";
  const std::string_view host = word.substr(0, colon), ports = word.substr(colon + 1);
  if (host.starts_with('[')) {
    if (!host.ends_with(']')) return "the port is missing";
    const auto prefix = Prefix::parse(host.substr(1, host.size() - 2));
    if (!prefix || prefix->address.v4()) return "in brackets stands an IPv6 address or prefix";
  } else if (host.find(':') != std::string_view::npos) {
    return "an IPv6 address stands in brackets";
  } else if (host != "*" && !Prefix::parse(host) && !is_host_name(host)) {
    return "the host is no name, address, prefix or \"*\"";
  }
  if (ports == "*") return {};
  const auto dash = ports.find('-');
  const auto first = port_number(ports.substr(0, dash));
  const auto last = dash == std::string_view::npos ? first : port_number(ports.substr(dash + 1));
  if (!first || !last || *first > *last) return "the port is no number, range or \"*\"";
  return {};
}

std::string json_text(std::string_view text) {
  constexpr char digits[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') out += '\\';
    if (byte < 0x20 || byte == 0x7f)
      out += {'\\', 'u', '0', '0', digits[byte >> 4], digits[byte & 15]};
    else
      out += c;
  }
  return out + "\"";
}

std::string json_list(const std::vector<std::string>& texts) {
  std::string out = "[";
  for (const auto& t : texts) out += (out.size() > 1 ? "," : "") + json_text(t);
  return out + "]";
}

std::string json_lists(const SessionRules::TargetLists& lists) {
  std::string out = "[";
  for (const auto& l : lists) out += (out.size() > 1 ? "," : "") + json_list(l);
  return out + "]";
}

/// As parse_duration() reads it, in the largest unit that it is whole in.
std::string duration_text(std::chrono::seconds time) {
  const auto s = time.count();
  if (s % 86'400 == 0) return std::to_string(s / 86'400) + "d";
  if (s % 3600 == 0) return std::to_string(s / 3600) + "h";
  if (s % 60 == 0) return std::to_string(s / 60) + "m";
  return std::to_string(s) + "s";
}

/// Reads the members of one object.
class Reader {
 public:
  Reader(std::string_view Names::*name, const std::string& field, hujson::Problems& problems) : name_{name}, field_{field}, problems_{problems} {}

  SessionRules read(const Value& object) {
    for (const auto& member : object.members) {
      const auto it = std::find_if(table.begin(), table.end(), [&](const Names& n) { return n.*name_ == member.name; });
      if (it == table.end())
        unknown(member);
      else
        rule(it->rule, member);
    }
    sort_unique(rules_.named);
    return std::move(rules_);
  }

 private:
  void problem(const Value& at, const std::string& name, std::string what, std::string hint = {}) {
    problems_.add(at.line, at.column, field_ + "." + name, std::move(what), std::move(hint));
  }

  void unknown(const hujson::Member& member) {
    std::string hint, all;
    for (const auto& n : table) {
      const std::string name{n.*name_};
      if (squeezed(member.name) == squeezed(name)) hint = "write \"" + name + "\"";
      all += (all.empty() ? "session rules: " : ", ") + name;
    }
    problems_.add(member.line, member.column, field_ + "." + member.name, "unknown session rule " + safe_quoted(member.name, 60), hint.empty() ? all : hint);
  }

  bool is(Kind kind, const Value& v, const std::string& name, const char* what) {
    if (v.kind == kind) return true;
    problem(v, name, std::string{"must be "} + what + ", not " + std::string{hujson::describe(v.kind)});
    return false;
  }

  void rule(Rule rule, const hujson::Member& member) {
    const Value& v = member.value;
    const std::string& name = member.name;
    switch (rule) {
      case Rule::command: return command(v, name);
      case Rule::max_duration: return duration(v, name, rules_.max_duration);
      case Rule::idle_timeout: return duration(v, name, rules_.idle_timeout);
      case Rule::max_sessions: return count(v, name);
      case Rule::record_input: return flag(v, name, rules_.record_input);
      case Rule::sftp: return sftp(v, name);
      case Rule::pty: return flag(v, name, rules_.pty);
      case Rule::local_forward: return targets(v, name, rules_.local_forward, rule);
      case Rule::remote_forward: return targets(v, name, rules_.remote_forward, rule);
      case Rule::agent_forwarding: named(rule); return flag(v, name, rules_.agent_forwarding);
      case Rule::x11_forwarding: named(rule); return flag(v, name, rules_.x11_forwarding);
    }
  }

  void named(Rule rule) {
    for (const auto& n : table)
      if (n.rule == rule) rules_.named.emplace_back(n.in_capability);
  }

  void command(const Value& v, const std::string& name) {
    if (!is(Kind::string, v, name, "a string")) return;
    if (v.text.find_first_not_of(' ') == std::string::npos) return problem(v, name, "must not be empty", "leave it out where nothing is forced");
    if (has_control_character(v.text)) return problem(v, name, "holds a control character", "one line; what needs more belongs into a script");
    if (v.text.size() > max_forced_command)
      return problem(v, name, "is too long", "at most " + std::to_string(max_forced_command) + " bytes; what needs more belongs into a script");
    rules_.command = v.text;
  }

  void duration(const Value& v, const std::string& name, std::optional<std::chrono::seconds>& into) {
    constexpr auto hint = "a whole number and s, m, h or d: \"90m\"";
    if (!is(Kind::string, v, name, "a string")) return;
    const auto time = parse_duration(v.text);
    if (!time) return problem(v, name, safe_quoted(v.text, 60) + " is not a duration", hint);
    if (*time < std::chrono::seconds{1} || *time > max_session_limit) return problem(v, name, "must be from 1s to " + duration_text(max_session_limit));
    if (time->count() % 1000 != 0) return problem(v, name, "must be whole seconds", hint);
    into = std::chrono::duration_cast<std::chrono::seconds>(*time);
  }

  void count(const Value& v, const std::string& name) {
    if (!is(Kind::number, v, name, "a number")) return;
    std::uint32_t n = 0;
    const auto [end, error] = std::from_chars(v.text.data(), v.text.data() + v.text.size(), n);
    if (error != std::errc{} || end != v.text.data() + v.text.size() || n > max_session_count)
      return problem(v, name, "must be a whole number from 0 to " + std::to_string(max_session_count));
    rules_.max_sessions = n;
  }

  void flag(const Value& v, const std::string& name, bool& into) {
    if (is(Kind::boolean, v, name, "true or false")) into = v.boolean;
  }

  void sftp(const Value& v, const std::string& name) {
    if (!is(Kind::string, v, name, "a string")) return;
    for (const auto& [value, word] : sftp_words)
      if (v.text == word) {
        rules_.sftp = value;
        return;
      }
    problem(v, name, safe_quoted(v.text, 60) + " is not a value that sftp has", "\"full\", \"read-only\" or \"none\"");
  }

  void targets(const Value& v, const std::string& name, SessionRules::TargetLists& into, Rule rule) {
    named(rule);
    if (!is(Kind::array, v, name, "an array of strings")) return;
    if (v.items.size() > max_forward_targets) return problem(v, name, "has too many targets", "at most " + std::to_string(max_forward_targets));
    std::vector<std::string> list;
    for (std::size_t i = 0; i < v.items.size(); i++) {
      const Value& item = v.items[i];
      const std::string at = name + "[" + std::to_string(i) + "]";
      if (!is(Kind::string, item, at, "a string")) continue;
      if (const auto why = problem_of_target(item.text); !why.empty())
        problem(item, at, safe_quoted(item.text, 120) + " is not a target: " + std::string{why},
                "\"host:22\", \"*:5432\", \"10.0.0.0/8:*\", \"[fd7a::1]:22\", \"unix:/run/app.sock\"");
      else
        list.push_back(item.text);
    }
    sort_unique(list);
    into = {std::move(list)};
  }

  std::string_view Names::*name_;
  const std::string& field_;
  hujson::Problems& problems_;
  SessionRules rules_;
};

template <class T>
std::optional<T> least(const std::optional<T>& a, const std::optional<T>& b) {
  if (!a || !b) return a ? a : b;
  return std::min(*a, *b);
}

template <class T>
void unite(std::vector<T>& all, const std::vector<T>& more) {
  all.insert(all.end(), more.begin(), more.end());
  sort_unique(all);
}

}  // namespace

SessionRules stricter(SessionRules a, const SessionRules& b) {
  a.command_conflict = a.command_conflict || b.command_conflict || (a.command && b.command && *a.command != *b.command);
  if (a.command_conflict) a.command.reset();
  else if (!a.command) a.command = b.command;
  a.max_duration = least(a.max_duration, b.max_duration);
  a.idle_timeout = least(a.idle_timeout, b.idle_timeout);
  a.max_sessions = least(a.max_sessions, b.max_sessions);
  a.record_input = a.record_input || b.record_input;
  a.sftp = std::max(a.sftp, b.sftp);
  a.pty = a.pty && b.pty;
  unite(a.local_forward, b.local_forward);
  unite(a.remote_forward, b.remote_forward);
  a.agent_forwarding = a.agent_forwarding && b.agent_forwarding;
  a.x11_forwarding = a.x11_forwarding && b.x11_forwarding;
  unite(a.named, b.named);
  return a;
}

std::vector<std::pair<std::string, std::string>> SessionRules::members() const {
  std::vector<std::pair<std::string, std::string>> all;
  const auto add = [&](const char* name, std::string value) { all.emplace_back(name, std::move(value)); };
  if (command) add("command", json_text(*command));
  if (command_conflict) add("commandConflict", "true");
  if (max_duration) add("maxDuration", json_text(duration_text(*max_duration)));
  if (idle_timeout) add("idleTimeout", json_text(duration_text(*idle_timeout)));
  if (max_sessions) add("maxSessions", std::to_string(*max_sessions));
  if (record_input) add("recordInput", "true");
  for (const auto& [value, word] : sftp_words)
    if (value == sftp && value != Sftp::full) add("sftp", json_text(word));
  if (!pty) add("pty", "false");
  if (!local_forward.empty()) add("localForward", json_lists(local_forward));
  if (!remote_forward.empty()) add("remoteForward", json_lists(remote_forward));
  if (!agent_forwarding) add("agentForwarding", "false");
  if (!x11_forwarding) add("x11Forwarding", "false");
  if (!named.empty()) add("named", json_list(named));
  return all;
}

SessionRules read_session_rules(const Value& value, const std::string& field, hujson::Problems& problems) {
  SessionRules rules;
  if (value.kind != Kind::array) {
    problems.add(value.line, value.column, field, "must be an array of objects, not " + std::string{hujson::describe(value.kind)}, "[{\"sftp\": \"read-only\"}]");
    return rules;
  }
  for (std::size_t i = 0; i < value.items.size(); i++) {
    const Value& item = value.items[i];
    const std::string at = field + "[" + std::to_string(i) + "]";
    if (item.kind != Kind::object)
      problems.add(item.line, item.column, at, "must be an object, not " + std::string{hujson::describe(item.kind)}, "{\"sftp\": \"read-only\"}");
    else
      rules = stricter(std::move(rules), Reader{&Names::in_capability, at, problems}.read(item));
  }
  return rules;
}

SessionRules read_session_rule_settings(const Value& object, const std::string& field, hujson::Problems& problems) {
  return Reader{&Names::in_settings, field, problems}.read(object);
}

std::vector<std::string> session_rule_settings() {
  std::vector<std::string> names;
  for (const auto& n : table) names.emplace_back(n.in_settings);
  return names;
}

Expected<SessionRules> capability_rules(const Node& node, const std::string& capability) {
  const auto it = node.capabilities.find(capability);
  if (it == node.capabilities.end()) return SessionRules{};
  hujson::Problems problems{"capability"};
  SessionRules rules;
  if (const auto value = hujson::parse(it->second, problems)) rules = read_session_rules(*value, it->first, problems);
  if (!problems.empty()) return Unexpected{Error{EBADMSG, problems.take().front().text()}};
  return rules;
}

}  // namespace postern::auth::policy
