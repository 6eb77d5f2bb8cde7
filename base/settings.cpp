#include "base/settings.h"

#include <toml++/toml.h>

#include <algorithm>
#include <set>

namespace postern {

namespace {

/// Nothing for tables, dates and times.
std::optional<SettingsValue> settings_value(const toml::node& node) {
  SettingsValue v;
  v.line = node.source().begin.line;
  v.column = node.source().begin.column;
  switch (node.type()) {
    case toml::node_type::boolean:
      v.kind = SettingsValue::Kind::boolean;
      v.boolean = node.as_boolean()->get();
      return v;
    case toml::node_type::integer:
      v.kind = SettingsValue::Kind::number;
      v.text = std::to_string(node.as_integer()->get());
      return v;
    case toml::node_type::floating_point:
      v.kind = SettingsValue::Kind::number;
      v.text = std::to_string(node.as_floating_point()->get());
      return v;
    case toml::node_type::string: v.text = node.as_string()->get(); return v;
    case toml::node_type::array:
      v.kind = SettingsValue::Kind::list;
      for (const auto& item : *node.as_array()) {
        auto one = settings_value(item);
        if (!one) return std::nullopt;
        v.items.push_back(std::move(*one));
      }
      return v;
    default: return std::nullopt;
  }
}

}  // namespace

struct SettingsReader::Impl {
  std::string file;
  toml::table root;
  std::vector<Problem> problems;
  std::set<std::string> tables;
  std::string table_name;
  const toml::table* table = nullptr;
  std::set<std::string> known;
  bool parsed = false;

  void refuse(const toml::source_region& source, std::string field, std::string what, std::string hint) {
    problems.push_back({{file, source.begin.line, source.begin.column}, std::move(field), std::move(what), std::move(hint)});
  }
  const toml::node* peek(const char* key) const { return table == nullptr ? nullptr : table->get(key); }
  const toml::node* find(const char* key) {
    known.insert(key);
    return peek(key);
  }
  std::string field(const char* key) const { return table_name + "." + key; }
};

SettingsReader::SettingsReader(std::string_view text, std::string file) : impl_{std::make_unique<Impl>()} {
  impl_->file = std::move(file);
  try {
    impl_->root = toml::parse(text, impl_->file);
    impl_->parsed = true;
  } catch (const toml::parse_error& e) {
    impl_->refuse(e.source(), "", std::string{e.description()}, "");
  }
}

SettingsReader::~SettingsReader() = default;

void SettingsReader::table(const char* name, const std::function<void()>& members) {
  Impl& me = *impl_;
  if (!me.parsed) return;
  me.tables.insert(name);
  me.table_name = name;
  me.known.clear();
  const toml::node* node = me.root.get(name);
  me.table = node == nullptr ? nullptr : node->as_table();
  if (node != nullptr && me.table == nullptr) me.refuse(node->source(), name, "must be a table", std::string{"write ["} + name + "]");
  members();
  if (me.table == nullptr) return;
  std::string hint = std::string{"settings of ["} + name + "]:";
  for (const auto& k : me.known) hint += " " + k;
  for (auto&& [key, value] : *me.table) {
    const std::string k{key.str()};
    if (!me.known.contains(k)) me.refuse(value.source(), me.table_name + "." + k, "is not a setting", hint);
  }
}

void SettingsReader::refuse(const char* key, std::string what, std::string hint) {
  if (const toml::node* node = impl_->peek(key)) impl_->refuse(node->source(), impl_->field(key), std::move(what), std::move(hint));
}

void SettingsReader::refuse(Problem problem) { impl_->problems.push_back(std::move(problem)); }

std::optional<SettingsValue> SettingsReader::any(const char* key) {
  const toml::node* node = impl_->find(key);
  if (node == nullptr) return std::nullopt;
  auto value = settings_value(*node);
  if (!value) refuse(key, "must be a text, a number, true, false or a list");
  return value;
}

void SettingsReader::refuse_member(const char* key, std::size_t index, std::string what, std::string hint) {
  const toml::node* node = impl_->peek(key);
  const toml::array* list = node == nullptr ? nullptr : node->as_array();
  if (list == nullptr || index >= list->size()) return;
  impl_->refuse((*list)[index].source(), impl_->field(key) + "[" + std::to_string(index) + "]", std::move(what), std::move(hint));
}

void SettingsReader::text(const char* key, std::string& into, bool may_be_empty) {
  const toml::node* node = impl_->find(key);
  if (node == nullptr) return;
  const auto value = node->value_exact<std::string>();
  if (!value) return refuse(key, "must be a text", "\"...\"");
  if (value->empty() && !may_be_empty) return refuse(key, "must not be empty");
  if (value->find('\0') != std::string::npos) return refuse(key, "must not contain NUL");
  into = *value;
}

void SettingsReader::path(const char* key, std::string& into, bool may_be_empty, bool socket) {
  std::string value;
  const std::size_t before = impl_->problems.size();
  text(key, value, may_be_empty);
  if (impl_->peek(key) == nullptr || impl_->problems.size() != before) return;
  if (!value.empty() && value[0] != '/') return refuse(key, "must be an absolute path");
  if (socket && value.size() > 107) return refuse(key, "is too long for a unix socket (107 bytes at most, unix(7))");
  into = value;
}

void SettingsReader::one_of(const char* key, std::string& into, const std::vector<std::string>& values) {
  const toml::node* node = impl_->find(key);
  if (node == nullptr) return;
  const auto value = node->value_exact<std::string>();
  if (value && std::find(values.begin(), values.end(), *value) != values.end()) {
    into = *value;
    return;
  }
  std::string hint = "one of";
  for (const auto& v : values) hint += " \"" + v + "\"";
  refuse(key, value ? "is not a value that this setting has" : "must be a text", hint);
}

void SettingsReader::flag(const char* key, bool& into) {
  const toml::node* node = impl_->find(key);
  if (node == nullptr) return;
  if (const auto value = node->value_exact<bool>()) into = *value;
  else refuse(key, "must be true or false");
}

std::optional<std::int64_t> SettingsReader::whole_number(const char* key, std::int64_t least, std::int64_t most) {
  const toml::node* node = impl_->find(key);
  if (node == nullptr) return std::nullopt;
  const auto value = node->value_exact<std::int64_t>();
  if (value && *value >= least && *value <= most) return value;
  refuse(key, "must be a whole number from " + std::to_string(least) + " to " + std::to_string(most));
  return std::nullopt;
}

std::optional<std::chrono::milliseconds> SettingsReader::amount_of_time(const char* key, Milliseconds least, Milliseconds most) {
  const toml::node* node = impl_->find(key);
  if (node == nullptr) return std::nullopt;
  const auto value = node->value_exact<std::string>();
  const auto time = value ? parse_duration(*value) : std::nullopt;
  if (!time) {
    refuse(key, "must be a duration", "a whole number and ms, s, m, h or d: \"500ms\"");
    return std::nullopt;
  }
  if (*time >= least && *time <= most) return time;
  refuse(key, "must be from " + std::to_string(least.count()) + "ms to " + std::to_string(most.count()) + "ms");
  return std::nullopt;
}

std::optional<std::uint64_t> SettingsReader::amount_of_bytes(const char* key, std::uint64_t least, std::uint64_t most) {
  const toml::node* node = impl_->find(key);
  if (node == nullptr) return std::nullopt;
  const auto value = node->value_exact<std::string>();
  const auto bytes = value ? parse_size(*value) : std::nullopt;
  if (!bytes) {
    refuse(key, "must be a size", "a whole number and B, KiB, MiB, GiB or TiB: \"4GiB\"");
    return std::nullopt;
  }
  if (*bytes >= least && *bytes <= most) return bytes;
  refuse(key, "must be from " + std::to_string(least) + " to " + std::to_string(most) + " bytes");
  return std::nullopt;
}

void SettingsReader::address(const char* key, std::optional<Address>& into) {
  const toml::node* node = impl_->find(key);
  if (node == nullptr) return;
  const auto value = node->value_exact<std::string>();
  if (value && value->empty()) return into.reset();
  const auto parsed = value ? Address::parse(*value) : std::nullopt;
  if (parsed) into = parsed;
  else refuse(key, "must be a numeric IP address", "\"127.0.0.2\"");
}

std::optional<std::vector<std::string>> SettingsReader::text_list(const char* key, const std::string& hint, bool required) {
  const toml::node* node = impl_->find(key);
  if (node == nullptr) {
    // The place of what is missing: its table, or the file's beginning.
    if (required && impl_->parsed) {
      toml::source_region at;
      at.begin = {1, 1};
      impl_->refuse(impl_->table == nullptr ? at : impl_->table->source(), impl_->field(key), "is missing", "[" + hint + "]");
    }
    return std::nullopt;
  }
  const toml::array* list = node->as_array();
  if (list == nullptr || (required && list->empty())) {
    refuse(key, required ? "must be a list that is not empty" : "must be a list", "[" + hint + "]");
    return std::nullopt;
  }
  std::vector<std::string> texts;
  for (const auto& member : *list) texts.push_back(member.value_exact<std::string>().value_or(std::string(1, '\0')));  // NUL: no parse takes it
  return texts;
}

std::vector<Problem> SettingsReader::finish() {
  Impl& me = *impl_;
  if (me.parsed) {
    std::string hint = "tables:";
    for (const auto& t : me.tables) hint += " [" + t + "]";
    for (auto&& [key, value] : me.root) {
      const std::string k{key.str()};
      if (!me.tables.contains(k)) me.refuse(value.source(), k, "is not a setting", hint);
    }
  }
  std::stable_sort(me.problems.begin(), me.problems.end(), [](const Problem& a, const Problem& b) {
    return std::pair{a.place.line, a.place.column} < std::pair{b.place.line, b.place.column};
  });
  return std::exchange(me.problems, {});
}

std::string text_of(const std::vector<Problem>& problems) {
  std::string out;
  for (const auto& p : problems) out += (out.empty() ? "" : "\n") + p.text();
  return out;
}

}  // namespace postern
