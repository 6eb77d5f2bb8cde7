#include "recorder/relay/settings.h"

#include "base/node.h"

#include <toml++/toml.h>

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <fstream>
#include <set>
#include <sstream>
#include <vector>

namespace postern::recorder::relay {
namespace {

/// What is wrong; caught in parse_settings (start-up may throw).
struct Wrong {
  Problem problem;
};

struct Unit {
  std::string_view name;
  std::uint64_t factor;
};
constexpr std::array<Unit, 5> durations{{{"ms", 1}, {"s", 1000}, {"m", 60'000}, {"h", 3'600'000}, {"d", 86'400'000}}};
constexpr std::array<Unit, 5> sizes{{{"B", 1}, {"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", std::uint64_t{1} << 40}}};

template <std::size_t N>
std::optional<std::uint64_t> parse_amount(std::string_view text, const std::array<Unit, N>& units) {
  std::uint64_t number = 0;
  const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (ec != std::errc{}) return std::nullopt;
  std::string_view name{end, static_cast<std::size_t>(text.data() + text.size() - end)};
  while (!name.empty() && name.front() == ' ') name.remove_prefix(1);
  for (const auto& unit : units)
    if (name == unit.name) {
      if (number > (std::uint64_t{1} << 53) / unit.factor) return std::nullopt;
      return number * unit.factor;
    }
  return std::nullopt;
}

class Reader {
 public:
  Reader(const toml::table& root, std::string file) : root_{root}, file_{std::move(file)} {}

  void table(const char* name, const std::function<void()>& members) {
    const toml::node* node = root_.get(name);
    tables_.insert(name);
    known_.clear();
    table_ = nullptr;
    table_name_ = name;
    if (node && !node->is_table()) wrong(*node, name, "must be a table", std::string{"write [" } + name + "]");
    if (node) table_ = node->as_table();
    members();
    if (table_)
      for (const auto& [key, value] : *table_)
        if (!known_.contains(std::string{key.str()})) wrong(value, field(std::string{key.str()}), "is not a setting", known());
  }
  void done() {
    for (const auto& [key, value] : root_)
      if (!tables_.contains(std::string{key.str()})) {
        std::string hint = "tables:";
        for (const auto& t : tables_) hint += " " + t;
        wrong(value, std::string{key.str()}, "is not a setting", hint);
      }
  }

  void text(const char* key, std::string& into, bool may_be_empty = false) {
    const auto* node = find(key);
    if (!node) return;
    const auto value = node->value_exact<std::string>();
    if (!value || (value->empty() && !may_be_empty)) wrong(*node, field(key), "must be a text that is not empty");
    into = *value;
  }
  template <class Duration>
  void duration(const char* key, Duration& into, std::chrono::milliseconds least = std::chrono::milliseconds{1}) {
    const auto* node = find(key);
    if (!node) return;
    const auto value = node->value_exact<std::string>();
    const auto ms = value ? parse_amount(*value, durations) : std::nullopt;
    if (!ms) wrong(*node, field(key), "must be a duration", "a whole number and ms, s, m, h or d: \"500ms\"");
    if (*ms < static_cast<std::uint64_t>(least.count())) wrong(*node, field(key), "is too short", "at least " + std::to_string(least.count()) + "ms");
    into = std::chrono::milliseconds{*ms};
  }
  void size(const char* key, std::uint64_t& into) {
    const auto* node = find(key);
    if (!node) return;
    const auto value = node->value_exact<std::string>();
    const auto bytes = value ? parse_amount(*value, sizes) : std::nullopt;
    if (!bytes) wrong(*node, field(key), "must be a size", "a whole number and B, KiB, MiB, GiB or TiB: \"4GiB\"");
    into = *bytes;
  }
  void number(const char* key, unsigned& into, unsigned least, unsigned most) {
    const auto* node = find(key);
    if (!node) return;
    const auto value = node->value_exact<std::int64_t>();
    if (!value || *value < least || *value > most)
      wrong(*node, field(key), "must be a whole number from " + std::to_string(least) + " to " + std::to_string(most));
    into = static_cast<unsigned>(*value);
  }
  void address(const char* key, std::optional<Address>& into) {
    const auto* node = find(key);
    if (!node) return;
    const auto value = node->value_exact<std::string>();
    if (value && value->empty()) return;
    const auto address = value ? Address::parse(*value) : std::nullopt;
    if (!address) wrong(*node, field(key), "must be a numeric IP address", "\"127.0.0.2\"");
    into = *address;
  }
  void one_of(const char* key, std::string& into, const std::vector<std::string>& values) {
    const auto* node = find(key);
    if (!node) return;
    const auto value = node->value_exact<std::string>();
    if (!value || std::find(values.begin(), values.end(), *value) == values.end()) {
      std::string hint = "one of";
      for (const auto& v : values) hint += " " + v;
      wrong(*node, field(key), "is not a level", hint);
    }
    into = *value;
  }

 private:
  const toml::node* find(const char* key) {
    known_.insert(key);
    return table_ ? table_->get(key) : nullptr;
  }
  std::string field(const std::string& key) const { return table_name_ + "." + key; }
  std::string known() const {
    std::string hint = "settings of [" + table_name_ + "]:";
    for (const auto& k : known_) hint += " " + k;
    return hint;
  }
  [[noreturn]] void wrong(const toml::node& node, const std::string& name, const std::string& message, const std::string& hint = "") const {
    const auto at = node.source().begin;
    throw Wrong{{{file_, static_cast<unsigned>(at.line), static_cast<unsigned>(at.column)}, name, message, hint}};
  }

  const toml::table& root_;
  std::string file_, table_name_;
  const toml::table* table_ = nullptr;
  std::set<std::string> known_, tables_;
};

}  // namespace

Expected<Settings> parse_settings(std::string_view text, const std::string& file) {
  Settings s;
  try {
    const toml::table root = toml::parse(text, file);
    Reader r{root, file};
    r.table("sessions", [&] {
      r.text("socket", s.session_socket);
      r.number("connections", s.sessions, 1, 1'000'000);
      r.duration("liveness_interval", s.liveness_interval);
    });
    r.table("control", [&] { r.text("socket", s.control_socket); });
    r.table("journal", [&] {
      std::string dir = s.journal.dir;
      r.text("dir", dir);
      s.journal.dir = dir;
      r.size("recording_quota", s.journal.recording_quota);
      r.size("total_quota", s.journal.total_quota);
      r.size("min_free", s.journal.min_free);
      r.duration("sync_interval", s.journal.sync_interval, Milliseconds{0});
      r.duration("gap_keep", s.gap_keep);
    });
    r.table("dial", [&] {
      r.address("source", s.source);
      r.text("name", s.name);
    });
    r.table("recorders", [&] {
      r.duration("connect_timeout", s.connect_timeout);
      r.duration("attempt_stagger", s.attempt_stagger);
      r.duration("lost_timeout", s.lost_timeout, Milliseconds{50});
      r.duration("commit_timeout", s.commit_timeout, Milliseconds{50});
      r.duration("backoff_shortest", s.backoff_shortest);
      r.duration("backoff_longest", s.backoff_longest);
      r.duration("penalty", s.penalty);
      r.duration("keep_warm", s.keep_warm);
      r.duration("moved_retry", s.moved_retry);
      r.number("replays", s.replays, 1, 4096);
    });
    r.table("log", [&] { r.one_of("level", s.log_level, {"trace", "debug", "info", "warning", "error"}); });
    r.done();
  } catch (const Wrong& wrong) {
    return Unexpected{Error{EINVAL, wrong.problem.text()}};
  } catch (const toml::parse_error& e) {
    const auto at = e.source().begin;
    const Problem problem{{file, static_cast<unsigned>(at.line), static_cast<unsigned>(at.column)}, "", std::string{e.description()}, ""};
    return Unexpected{Error{EINVAL, problem.text()}};
  }
  if (s.name.empty()) {
    std::array<char, 256> name{};
    if (::gethostname(name.data(), name.size() - 1) == 0) s.name = name.data();
  }
  return s;
}

Expected<Settings> load_settings(const std::string& file) {
  std::ifstream in{file, std::ios::binary};
  std::ostringstream text;
  if (!in || !(text << in.rdbuf())) {
    if (!in) return Unexpected{system_error(file)};
  }
  return parse_settings(text.str(), file);
}

}  // namespace postern::recorder::relay
