// The static provider: the network is what a TOML file says. For the demo, tests, and networks whose addresses never change.
//
// Never asks anything outside; the file is read at the start and on reload() only.
#include "auth/identity/identity.h"

#include "base/file.h"
#include "base/log.h"

#include <nlohmann/json.hpp>
#include <toml++/toml.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <map>

namespace postern::auth::identity {
namespace {

/// Largest file of nodes: 100,000 nodes need about 15 MiB.
constexpr std::size_t max_nodes_file_bytes = 64 * 1024 * 1024;
/// Of one capability's JSON. It is read again at each decision.
constexpr std::size_t max_capability_bytes = 64 * 1024;
/// Up to here a whole number is the same as a double, which an Attribute holds.
constexpr std::int64_t largest_whole = std::int64_t{1} << 53;

/// toml++ counts columns in code points, a Place in bytes.
class Lines {
 public:
  explicit Lines(std::string_view text) : text_{text} {
    starts_.push_back(0);
    for (std::size_t i = 0; i < text.size(); i++)
      if (text[i] == '\n') starts_.push_back(i + 1);
  }
  Place place(const std::string& file, const toml::source_position& at) const {
    Place p{file, std::max(1u, static_cast<unsigned>(at.line)), 1};
    if (p.line > starts_.size()) return p;
    std::size_t i = starts_[p.line - 1];
    for (unsigned points = 1; points < at.column && i < text_.size() && text_[i] != '\n'; points++) {
      i++;
      while (i < text_.size() && (static_cast<unsigned char>(text_[i]) & 0xc0) == 0x80) i++;
    }
    p.column = static_cast<unsigned>(i - starts_[p.line - 1]) + 1;
    return p;
  }

 private:
  std::string_view text_;
  std::vector<std::size_t> starts_;
};

std::string kind_of(const toml::node& node) {
  switch (node.type()) {
    case toml::node_type::table: return "a table";
    case toml::node_type::array: return "an array";
    case toml::node_type::string: return "a string";
    case toml::node_type::integer: return "an integer";
    case toml::node_type::floating_point: return "a number";
    case toml::node_type::boolean: return "true or false";
    default: return "a date or time";
  }
}

/// Where each name, id and address was seen first.
struct Seen {
  std::map<std::string, unsigned> names, ids;
  std::map<Address, std::pair<unsigned, std::string>> addresses;
};

class Reader {
 public:
  Reader(std::string_view text, std::string file) : lines_{text}, file_{std::move(file)} {}

  void problem(const toml::source_position& at, std::string field, std::string message, std::string hint = {}) {
    problems_.push_back({lines_.place(file_, at), std::move(field), std::move(message), std::move(hint)});
  }
  void problem(const toml::node& at, std::string field, std::string message, std::string hint = {}) {
    problem(at.source().begin, std::move(field), std::move(message), std::move(hint));
  }

  void read(const toml::table& root) {
    for (const auto& [key, value] : root) {
      if (key.str() != "node") {
        problem(key.source().begin, std::string{key.str()}, "unknown key " + safe_quoted(key.str(), 60), "the file has [[node]] tables only");
        continue;
      }
      const toml::array* nodes = value.as_array();
      if (nodes == nullptr) {
        problem(key.source().begin, "node", "must be an array of tables, not " + kind_of(value), "write [[node]], in double brackets");
        continue;
      }
      for (std::size_t i = 0; i < nodes->size(); i++) {
        const std::string field = "node[" + std::to_string(i) + "]";
        if (const toml::table* table = (*nodes)[i].as_table()) node(*table, field);
        else problem((*nodes)[i], field, "must be a table, not " + kind_of((*nodes)[i]));
      }
    }
  }

  std::vector<Problem> problems() {
    std::stable_sort(problems_.begin(), problems_.end(), [](const Problem& a, const Problem& b) {
      return a.place.line != b.place.line ? a.place.line < b.place.line : a.place.column < b.place.column;
    });
    return std::move(problems_);
  }
  Network network() {
    network_.index();
    return std::move(network_);
  }
  bool failed() const { return !problems_.empty(); }

 private:
  /// A non-empty string of printable characters; nothing when there is none (with a problem, when it is something else).
  const std::string* text(const toml::table& table, std::string_view key, const std::string& field) {
    const toml::node* value = table.get(key);
    if (value == nullptr) return nullptr;
    const auto* s = value->as_string();
    if (s == nullptr) {
      problem(*value, field + "." + std::string{key}, "must be a string, not " + kind_of(*value));
      return nullptr;
    }
    return plain(s->get(), *value, field + "." + std::string{key}) ? &s->get() : nullptr;
  }

  bool plain(const std::string& s, const toml::node& at, const std::string& field) {
    if (s.empty()) {
      problem(at, field, "must not be empty");
      return false;
    }
    if (s.size() > 320) {
      problem(at, field, "is too long", "at most 320 bytes");
      return false;
    }
    if (std::any_of(s.begin(), s.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; })) {
      problem(at, field, "holds a control character");
      return false;
    }
    return true;
  }

  std::vector<std::pair<std::string, const toml::node*>> texts(const toml::table& table, std::string_view key, const std::string& field) {
    std::vector<std::pair<std::string, const toml::node*>> out;
    const toml::node* value = table.get(key);
    if (value == nullptr) return out;
    const std::string where = field + "." + std::string{key};
    const auto* array = value->as_array();
    if (array == nullptr) {
      problem(*value, where, "must be an array of strings, not " + kind_of(*value), std::string{key} + " = [\"...\"]");
      return out;
    }
    for (std::size_t i = 0; i < array->size(); i++) {
      const toml::node& item = (*array)[i];
      const std::string at = where + "[" + std::to_string(i) + "]";
      if (const auto* s = item.as_string(); s == nullptr) problem(item, at, "must be a string, not " + kind_of(item));
      else if (plain(s->get(), item, at)) out.emplace_back(s->get(), &item);
    }
    return out;
  }

  /// True, with a problem, when another node has it.
  bool taken(std::map<std::string, unsigned>& seen, const std::string& what, const toml::node& at, const std::string& field, const char* noun) {
    const unsigned line = lines_.place(file_, at.source().begin).line;
    const auto [first, is_new] = seen.try_emplace(what, line);
    if (!is_new) problem(at, field, std::string{"another node has the "} + noun + " " + safe_quoted(what, 80), "in line " + std::to_string(first->second));
    return !is_new;
  }

  void node(const toml::table& table, const std::string& field) {
    for (const auto& [key, value] : table) {
      const auto k = key.str();
      if (k == "name" || k == "id" || k == "addresses" || k == "user" || k == "tags" || k == "capabilities" || k == "attributes") continue;
      problem(key.source().begin, field + "." + std::string{k}, "unknown key " + safe_quoted(k, 60), "a node has name, id, addresses, user or tags, capabilities, attributes");
    }
    Node n;
    bool name_taken = false;
    if (const auto* name = text(table, "name", field)) {
      n.name = *name;
      name_taken = taken(seen_.names, *name, *table.get("name"), field + ".name", "name");
    } else if (!table.contains("name")) {
      problem(table, field, "name is missing", "name = \"alice-laptop\"");
    }
    n.id = n.name;
    const toml::node* id_at = table.get("name");
    if (const auto* id = text(table, "id", field)) {
      n.id = *id;
      id_at = table.get("id");
    }
    if (id_at != nullptr && !n.id.empty() && !(name_taken && n.id == n.name)) taken(seen_.ids, n.id, *id_at, field + ".id", "id");

    if (!table.contains("addresses")) problem(table, field, "addresses is missing", "addresses = [\"100.64.0.1\"]");
    else if (const auto* array = table.get("addresses")->as_array(); array != nullptr && array->empty())
      problem(*array, field + ".addresses", "must hold at least one address");
    std::size_t index = 0;
    for (const auto& [value, at] : texts(table, "addresses", field)) {
      const std::string where = field + ".addresses[" + std::to_string(index++) + "]";
      const auto address = Address::parse(value);
      if (!address) {
        problem(*at, where, "not an IP address: " + safe_quoted(value, 60),
                value.find('/') != std::string::npos ? "one address, no prefix" : "numbers only, no name, no port");
        continue;
      }
      const unsigned line = lines_.place(file_, at->source().begin).line;
      if (const auto [first, is_new] = seen_.addresses.try_emplace(*address, line, n.name); is_new) n.addresses.push_back(*address);
      else problem(*at, where, "the address " + address->text() + " is named twice", "first in line " + std::to_string(first->second.first));
    }

    const bool user = table.contains("user"), tags = table.contains("tags");
    if (user && tags) problem(table, field, "a node has a user or tags, not both", "a tagged node is nobody's own device");
    else if (!user && !tags) problem(table, field, "user or tags is missing", "user = \"alice@example.com\", or tags = [\"tag:server\"]");
    if (const auto* login = text(table, "user", field)) {
      if (const auto wrong = problem_of_login(*login); !wrong.empty()) problem(*table.get("user"), field + ".user", std::string{wrong}, "alice@example.com");
      n.login = *login;
    }
    if (const toml::array* array = tags ? table.get("tags")->as_array() : nullptr; array != nullptr && array->empty())
      problem(*array, field + ".tags", "must hold at least one tag");
    index = 0;
    for (const auto& [tag, at] : texts(table, "tags", field)) {
      const std::string where = field + ".tags[" + std::to_string(index++) + "]";
      if (const auto wrong = problem_of_tag(tag); !wrong.empty()) problem(*at, where, safe_quoted(tag, 80) + ": " + std::string{wrong}, "\"tag:server\"");
      else if (std::find(n.tags.begin(), n.tags.end(), tag) != n.tags.end()) problem(*at, where, "the tag " + tag + " is named twice");
      else n.tags.push_back(tag);
    }
    std::sort(n.tags.begin(), n.tags.end());
    members(table, "capabilities", field, "\"example.com/cap/x\" = '[{}]'", [&](const std::string& name, const toml::node& value, const std::string& at) {
      capability(n, name, value, at);
    });
    members(table, "attributes", field, "\"node:os\" = \"linux\"", [&](const std::string& name, const toml::node& value, const std::string& at) {
      attribute(n, name, value, at);
    });
    network_.nodes.push_back(std::move(n));
  }

  /// Those of the table `key`; a name is plain text.
  template <class Read>
  void members(const toml::table& table, std::string_view key, const std::string& field, const std::string& hint, const Read& read) {
    const toml::node* value = table.get(key);
    if (value == nullptr) return;
    const std::string where = field + "." + std::string{key};
    const toml::table* all = value->as_table();
    if (all == nullptr) return problem(*value, where, "must be a table, not " + kind_of(*value), hint);
    for (const auto& [name, member] : *all) {
      const std::string at = where + "[" + safe_quoted(name.str(), 80) + "]";
      // Without quotes the dots of a name make tables (TOML 1.0, "Dotted keys").
      if (member.is_table()) problem(name.source().begin, at, "is a table", "a name with dots or colons stands in quotes: " + hint);
      else if (plain(std::string{name.str()}, member, at)) read(std::string{name.str()}, member, at);
    }
  }

  /// What whois would say: JSON, and of it an array.
  void capability(Node& n, const std::string& name, const toml::node& value, const std::string& at) {
    constexpr auto hint = "the text of a JSON array in single quotes: '[{\"sftp\": \"read-only\"}]'";
    const auto* text = value.as_string();
    if (text == nullptr) return problem(value, at, "must be a string, not " + kind_of(value), hint);
    if (text->get().size() > max_capability_bytes) return problem(value, at, "is too long", "at most " + std::to_string(max_capability_bytes) + " bytes");
    try {
      if (const auto json = nlohmann::json::parse(text->get()); !json.is_array()) return problem(value, at, std::string{"must be a JSON array, not "} + json.type_name(), hint);
    } catch (const nlohmann::json::parse_error& error) {
      return problem(value, at, "is no JSON: wrong at byte " + std::to_string(error.byte), hint);
    }
    n.capabilities.emplace(name, text->get());
  }

  void attribute(Node& n, const std::string& name, const toml::node& value, const std::string& at) {
    if (const auto* text = value.as_string()) {
      if (plain(text->get(), value, at)) n.attributes.emplace(name, text->get());
    } else if (const auto* flag = value.as_boolean()) {
      n.attributes.emplace(name, flag->get());
    } else if (const auto* whole = value.as_integer()) {
      if (whole->get() > largest_whole || whole->get() < -largest_whole) problem(value, at, "is too large a number", "at most 2^53");
      else n.attributes.emplace(name, static_cast<double>(whole->get()));
    } else if (const auto* number = value.as_floating_point()) {
      if (!std::isfinite(number->get())) problem(value, at, "is not a number that can be compared");
      else n.attributes.emplace(name, number->get());
    } else {
      problem(value, at, "must be a string, a number, true or false, not " + kind_of(value));
    }
  }

  Lines lines_;
  std::string file_;
  std::vector<Problem> problems_;
  Seen seen_;
  Network network_;
};

class StaticProvider final : public Provider {
 public:
  explicit StaticProvider(std::string file) : file_{std::move(file)} {}

  void who_is(const Address& peer, Answer answer) override {
    const Node* node = network_.find(peer);
    answer(node == nullptr ? std::nullopt : std::optional{*node});
  }

  const Network& network() const override { return network_; }

  Expected<Done, std::vector<Problem>> reload() override {
    auto text = read_whole_file(file_, max_nodes_file_bytes);
    if (!text) return Unexpected{std::vector{Problem{Place{file_, 1, 1}, "", text.error().doing, ""}}};
    auto read = parse_static_nodes(*text, file_);
    if (!read) return Unexpected{std::move(read.error())};
    network_ = std::move(*read);
    return Done{};
  }

 private:
  std::string file_;
  Network network_;
};

}  // namespace

Expected<Network, std::vector<Problem>> parse_static_nodes(std::string_view text, std::string file_name) {
  Reader reader{text, std::move(file_name)};
  try {
    reader.read(toml::parse(text));
  } catch (const toml::parse_error& error) {
    reader.problem(error.source().begin, "", std::string{error.description()});
  }
  if (reader.failed()) return Unexpected{reader.problems()};
  return reader.network();
}

Expected<std::unique_ptr<Provider>, std::vector<Problem>> make_static_provider(std::string file) {
  auto provider = std::make_unique<StaticProvider>(std::move(file));
  if (auto loaded = provider->reload(); !loaded) return Unexpected{std::move(loaded.error())};
  return std::unique_ptr<Provider>{std::move(provider)};
}

}  // namespace postern::auth::identity
