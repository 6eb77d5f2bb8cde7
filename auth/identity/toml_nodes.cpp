// Nodes as people write them in TOML: the static provider's file, and the names of WireGuard's public keys.
#include "auth/identity/toml_nodes.h"

#include "base/log.h"

#include <nlohmann/json.hpp>
#include <sodium.h>
#include <toml++/toml.h>

#include <algorithm>
#include <cmath>
#include <map>

namespace postern::auth::identity {
namespace {

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
  std::map<std::string, unsigned> names, ids, keys;
  std::map<Address, std::pair<unsigned, std::string>> addresses;
};

class Reader {
 public:
  Reader(std::string_view text, std::string file, NodesForm form) : lines_{text}, file_{std::move(file)}, form_{form} {}

  void problem(const toml::source_position& at, std::string field, std::string message, std::string hint = {}) {
    problems_.push_back({lines_.place(file_, at), std::move(field), std::move(message), std::move(hint)});
  }
  void problem(const toml::node& at, std::string field, std::string message, std::string hint = {}) {
    problem(at.source().begin, std::move(field), std::move(message), std::move(hint));
  }

  void read(const toml::table& root) {
    const std::string_view list = form_ == NodesForm::fixed ? "node" : "peer";
    for (const auto& [key, value] : root) {
      const std::string name{key.str()};
      if (form_ == NodesForm::keys && name == "self") {
        if (const toml::table* table = value.as_table()) nodes_.self = node(*table, name, false);
        else problem(key.source().begin, name, "must be a table, not " + kind_of(value), "[self]");
        continue;
      }
      if (name != list) {
        problem(key.source().begin, name, "unknown key " + safe_quoted(name, 60), form_ == NodesForm::fixed ? "the file has [[node]] tables only" : "the file has [self] and [[peer]] tables");
        continue;
      }
      const toml::array* all = value.as_array();
      if (all == nullptr) {
        problem(key.source().begin, name, "must be an array of tables, not " + kind_of(value), "write [[" + name + "]], in double brackets");
        continue;
      }
      for (std::size_t i = 0; i < all->size(); i++) {
        const std::string field = name + "[" + std::to_string(i) + "]";
        if (const toml::table* table = (*all)[i].as_table()) nodes_.nodes.push_back(node(*table, field, true));
        else problem((*all)[i], field, "must be a table, not " + kind_of((*all)[i]));
      }
    }
    if (form_ == NodesForm::keys && !root.contains("self")) problem(toml::source_position{1, 1}, "self", "is missing: what this machine is called and which tags it has", "[self] name = \"server\", tags = [\"tag:server\"]");
  }

  std::vector<Problem> problems() {
    std::stable_sort(problems_.begin(), problems_.end(), [](const Problem& a, const Problem& b) {
      return a.place.line != b.place.line ? a.place.line < b.place.line : a.place.column < b.place.column;
    });
    return std::move(problems_);
  }
  TomlNodes nodes() { return std::move(nodes_); }
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

  /// `peer`: with addresses, or a public key and networks.
  TomlNode node(const toml::table& table, const std::string& field, bool peer) {
    const bool fixed = peer && form_ == NodesForm::fixed, keyed = peer && form_ == NodesForm::keys;
    for (const auto& [key, value] : table) {
      const auto k = key.str();
      if (k == "name" || k == "id" || k == "user" || k == "tags" || k == "capabilities" || k == "attributes") continue;
      if ((fixed && k == "addresses") || (keyed && (k == "public_key" || k == "networks"))) continue;
      problem(key.source().begin, field + "." + std::string{k}, "unknown key " + safe_quoted(k, 60),
              std::string{fixed ? "a node has name, id, addresses" : keyed ? "a peer has public_key, name, id, networks" : "[self] has name, id"} + ", user or tags, capabilities, attributes");
    }
    TomlNode read;
    Node& n = read.node;
    if (keyed) public_key(table, field, read);
    bool name_taken = false;
    if (const auto* name = text(table, "name", field)) {
      n.name = *name;
      name_taken = taken(seen_.names, *name, *table.get("name"), field + ".name", "name");
    } else if (!table.contains("name")) {
      problem(table, field, "name is missing", "name = \"alice-laptop\"");
    }
    n.id = keyed ? key_text(read.public_key) : n.name;  // another key under the same name is another node
    const toml::node* id_at = keyed ? nullptr : table.get("name");
    if (const auto* id = text(table, "id", field)) {
      n.id = *id;
      id_at = table.get("id");
    }
    if (id_at != nullptr && !n.id.empty() && !(name_taken && n.id == n.name)) taken(seen_.ids, n.id, *id_at, field + ".id", "id");

    if (fixed) addresses(table, field, n);
    if (keyed) networks(table, field, read);
    const bool user = table.contains("user"), tags = table.contains("tags");
    if (user && tags) problem(table, field, "a node has a user or tags, not both", "a tagged node is nobody's own device");
    else if (!user && !tags) problem(table, field, "user or tags is missing", "user = \"alice@example.com\", or tags = [\"tag:server\"]");
    if (const auto* login = text(table, "user", field)) {
      if (const auto wrong = problem_of_login(*login); !wrong.empty()) problem(*table.get("user"), field + ".user", std::string{wrong}, "alice@example.com");
      n.login = *login;
    }
    if (const toml::array* array = tags ? table.get("tags")->as_array() : nullptr; array != nullptr && array->empty())
      problem(*array, field + ".tags", "must hold at least one tag");
    std::size_t index = 0;
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
    return read;
  }

  void addresses(const toml::table& table, const std::string& field, Node& n) {
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
  }

  void public_key(const toml::table& table, const std::string& field, TomlNode& read) {
    constexpr auto hint = "44 characters, as `wg show` prints it";
    if (!table.contains("public_key")) return problem(table, field, "public_key is missing", hint);
    const auto* key = text(table, "public_key", field);
    if (key == nullptr) return;
    std::size_t size = 0;
    if (key->size() != 44 || sodium_base642bin(read.public_key.data(), read.public_key.size(), key->data(), key->size(), nullptr, &size, nullptr, sodium_base64_VARIANT_ORIGINAL) != 0 ||
        size != read.public_key.size())
      return problem(*table.get("public_key"), field + ".public_key", "is no public key of WireGuard", hint);
    taken(seen_.keys, *key, *table.get("public_key"), field + ".public_key", "public key");
  }

  void networks(const toml::table& table, const std::string& field, TomlNode& read) {
    std::size_t index = 0;
    for (const auto& [value, at] : texts(table, "networks", field)) {
      const std::string where = field + ".networks[" + std::to_string(index++) + "]";
      const auto prefix = value.find('/') == std::string::npos ? std::nullopt : Prefix::parse(value);
      if (!prefix) problem(*at, where, "not a network: " + safe_quoted(value, 60), "\"10.1.0.0/24\"");
      else if (std::find(read.networks.begin(), read.networks.end(), *prefix) != read.networks.end()) problem(*at, where, "the network " + prefix->text() + " is named twice");
      else read.networks.push_back(*prefix);
    }
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
  const NodesForm form_;
  Seen seen_;
  TomlNodes nodes_;
};

}  // namespace

std::string key_text(const PublicKey& key) {
  char text[sodium_base64_ENCODED_LEN(sizeof(PublicKey), sodium_base64_VARIANT_ORIGINAL)];
  return sodium_bin2base64(text, sizeof text, key.data(), key.size(), sodium_base64_VARIANT_ORIGINAL);
}

Expected<TomlNodes, std::vector<Problem>> read_toml_nodes(std::string_view text, std::string file_name, NodesForm form) {
  Reader reader{text, std::move(file_name), form};
  try {
    reader.read(toml::parse(text));
  } catch (const toml::parse_error& error) {
    reader.problem(error.source().begin, "", std::string{error.description()});
  }
  if (reader.failed()) return Unexpected{reader.problems()};
  return reader.nodes();
}

}  // namespace postern::auth::identity
