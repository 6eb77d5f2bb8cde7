#include "recorder/node/settings.h"

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

namespace postern::recorder::node {
namespace {

using Milliseconds = std::chrono::milliseconds;

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
  void size(const char* key, std::uint64_t& into, std::uint64_t least = 0, std::uint64_t most = std::uint64_t{1} << 53) {
    const auto* node = find(key);
    if (!node) return;
    const auto value = node->value_exact<std::string>();
    const auto bytes = value ? parse_amount(*value, sizes) : std::nullopt;
    if (!bytes) wrong(*node, field(key), "must be a size", "a whole number and B, KiB, MiB, GiB or TiB: \"4GiB\"");
    if (*bytes < least || *bytes > most) wrong(*node, field(key), "must be from " + std::to_string(least) + " to " + std::to_string(most) + " bytes");
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
  /// A list of texts, each turned into a value by `parse`.
  template <class T, class Parse>
  void list(const char* key, std::vector<T>& into, const Parse& parse, const std::string& what, const std::string& hint) {
    const auto* node = find(key);
    if (!node) return;
    const auto* array = node->as_array();
    if (!array) wrong(*node, field(key), "must be a list", "[" + hint + "]");
    into.clear();
    std::size_t i = 0;
    for (const auto& member : *array) {
      const auto text = member.value_exact<std::string>();
      const auto value = text ? parse(*text) : std::nullopt;
      if (!value) wrong(member, field(key) + "[" + std::to_string(i) + "]", "must be " + what, hint);
      into.push_back(*value);
      i++;
    }
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
  s.listen = {*Endpoint::parse("0.0.0.0", 80), *Endpoint::parse("[::]", 80)};
  try {
    const toml::table root = toml::parse(text, file);
    Reader r{root, file};
    const auto endpoint = [](const std::string& t) { return Endpoint::parse(t, 80); };
    const auto prefix = [](const std::string& t) { return Prefix::parse(t); };
    const auto host = [](const std::string& t) { return t.empty() || t.size() > 255 ? std::nullopt : std::optional{t}; };
    r.table("listen", [&] {
      r.list("addresses", s.listen, endpoint, "a numeric address with or without a port", "\"127.0.2.1:80\", \"[::1]:80\"");
      r.text("name", s.store.name);
    });
    r.table("ingest", [&] { r.list("allow", s.ingest, prefix, "an address or a prefix", "\"127.0.0.2\", \"100.64.0.0/10\""); });
    r.table("read", [&] {
      r.list("allow", s.read, prefix, "an address or a prefix", "\"127.0.0.1\", \"100.64.0.0/10\"");
      r.list("names", s.names, host, "a host name", "\"recorder-a\"");
    });
    r.table("store", [&] {
      std::string dir = s.store.dir;
      r.text("dir", dir);
      s.store.dir = dir;
      r.size("min_free", s.store.min_free);
      r.size("turn_bytes", s.store.turn_bytes, 128 << 10, 64 << 20);
      r.duration("commit_interval", s.store.commit_interval, Milliseconds{0});
      r.duration("health_interval", s.store.health_interval, Milliseconds{10});
    });
    r.table("limits", [&] {
      r.number("streams", s.store.streams, 1, 1'000'000);
      r.number("connections", s.connections, 1, 1'000'000);
      r.number("connections_per_source", s.connections_per_source, 1, 1'000'000);
      r.size("max_recording", s.store.max_recording, 1 << 20);
      r.duration("open_timeout", s.open_timeout);
      r.duration("ping_interval", s.http2.ping_interval);
      r.duration("stall_timeout", s.http2.stall_timeout);
      r.duration("peer_timeout", s.http2.peer_timeout);
      r.duration("shutdown_timeout", s.shutdown_timeout);
      r.duration("stop_timeout", s.stop_timeout);
      std::uint64_t stream = s.http2.stream_window, connection = s.http2.connection_window, headers = s.http2.max_header_list;
      r.size("stream_window", stream, 64 << 10, 1 << 30);
      r.size("connection_window", connection, 64 << 10, 1 << 30);
      r.size("header_list", headers, 1 << 10, 1 << 20);
      s.http2.stream_window = static_cast<std::uint32_t>(stream);
      s.http2.connection_window = static_cast<std::uint32_t>(connection);
      s.http2.max_header_list = static_cast<std::uint32_t>(headers);
      unsigned burst = static_cast<unsigned>(s.http2.reset_burst), rate = static_cast<unsigned>(s.http2.reset_rate);
      r.number("reset_burst", burst, 1, 1'000'000);
      r.number("reset_rate", rate, 1, 1'000'000);
      s.http2.reset_burst = burst;
      s.http2.reset_rate = rate;
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
  // Lists, reads and health streams come on top of the uploads.
  s.http2.max_concurrent_streams = std::max(4096U, s.store.streams + 256);
  if (s.store.name.empty()) {
    std::array<char, 256> name{};
    if (::gethostname(name.data(), name.size() - 1) == 0) s.store.name = name.data();
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

}  // namespace postern::recorder::node
