// A network on paper: reading it (from a person's file, or from posternd), and writing it (posternd).
#include "auth/policy/network_file.h"

#include "auth/policy/hujson.h"
#include "auth/policy/matching.h"
#include "base/log.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <map>
#include <set>

namespace postern::auth::policy {
namespace {

using hujson::Kind;
using hujson::Member;
using hujson::Problems;
using hujson::Value;

/// A JSON string. What is no UTF-8 becomes U+FFFD: the answer of a provider must stay readable as a whole.
std::string json_string(std::string_view text) {
  std::string out = "\"";
  const auto append = [&](std::string_view good) {
    for (const char c : good) {
      const auto u = static_cast<unsigned char>(c);
      if (c == '"' || c == '\\') out += '\\';
      if (u >= 0x20 && u != 0x7f) {
        out += c;
      } else {
        constexpr char hex[] = "0123456789abcdef";
        out += "\\u00";
        out += hex[u >> 4];
        out += hex[u & 15];
      }
    }
  };
  for (;;) {
    const auto bad = hujson::find_invalid_utf8(text);
    append(text.substr(0, bad));
    if (bad == std::string_view::npos) return out + "\"";
    out += "\xef\xbf\xbd";
    text.remove_prefix(bad + 1);
  }
}

/// `value` as JSON without blanks. Its depth is bounded by hujson::max_nesting.
std::string json_text(const Value& value) {
  std::string out;
  switch (value.kind) {
    case Kind::null: return "null";
    case Kind::boolean: return value.boolean ? "true" : "false";
    case Kind::number: return value.text;
    case Kind::string: return json_string(value.text);
    case Kind::array:
      for (const auto& item : value.items) out += (out.empty() ? "" : ",") + json_text(item);
      return "[" + out + "]";
    case Kind::object:
      for (const auto& m : value.members) out += (out.empty() ? "" : ",") + json_string(m.name) + ":" + json_text(m.value);
      return "{" + out + "}";
  }
  return out;
}

class Reader {
 public:
  explicit Reader(Problems& problems) : problems_{problems} {}

  NetworkFile read(const Value& root) {
    if (root.kind != Kind::object) {
      wrong_kind(root, "", "an object");
      return {};
    }
    const std::string tailnet = text_of(root, "tailnet", "");
    if (const Value* all = member(root, "domains", "", Kind::array))
      for (std::size_t i = 0; i < all->items.size(); i++) {
        if (const Value& item = all->items[i]; item.kind == Kind::string) out_.domains.push_back(item.text);
        else wrong_kind(item, "domains[" + std::to_string(i) + "]", "a string");
      }
    users(root);
    nodes(root);
    const std::string domain{tailnet.empty() ? std::string_view{creators_domain_} : domain_of(tailnet)};
    if (const std::string name = text_of(root, "session_capability", ""); !name.empty()) out_.session_capability = name;
    if (const Value* flag = member(root, "require_network_rule", "", Kind::boolean)) out_.require_network_rule = flag->boolean;
    if (out_.domains.empty() && !domain.empty()) out_.domains.push_back(domain);
    return std::move(out_);
  }

 private:
  template <class At>
  void problem(const At& at, std::string field, std::string message, std::string hint = {}) {
    problems_.add(at.line, at.column, std::move(field), std::move(message), std::move(hint));
  }
  void wrong_kind(const Value& at, std::string field, std::string_view wanted) {
    problem(at, std::move(field), "must be " + std::string{wanted} + ", not " + std::string{describe(at.kind)});
  }
  static std::string joined(const std::string& field, std::string_view name) { return field.empty() ? std::string{name} : field + "." + std::string{name}; }

  /// The member `name` when there is one of that kind. Null is as good as absent.
  const Value* member(const Value& object, std::string_view name, const std::string& field, Kind kind) {
    const Member* m = object.find(name);
    if (m == nullptr || m->value.kind == Kind::null) return nullptr;
    if (m->value.kind == kind) return &m->value;
    wrong_kind(m->value, joined(field, name), describe(kind));
    return nullptr;
  }
  std::string text_of(const Value& object, std::string_view name, const std::string& field) {
    const Value* value = member(object, name, field, Kind::string);
    return value == nullptr ? "" : value->text;
  }

  void users(const Value& root) {
    const Value* all = member(root, "users", "", Kind::array);
    if (all == nullptr) return;
    for (std::size_t i = 0; i < all->items.size(); i++) {
      const std::string field = "users[" + std::to_string(i) + "]";
      if (const Value& user = all->items[i]; user.kind == Kind::object) one_user(user, field);
      else wrong_kind(user, field, "an object");
    }
  }

  void one_user(const Value& user, const std::string& field) {
    std::optional<std::uint64_t> id;
    if (const Member* m = user.find("id"); m != nullptr && m->value.kind != Kind::null) {
      const std::string& digits = m->value.text;
      std::uint64_t value = 0;
      const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
      if (m->value.kind != Kind::number || error != std::errc{} || end != digits.data() + digits.size()) problem(m->value, field + ".id", "must be a whole number");
      else if (!user_ids_.insert(value).second) problem(m->value, field + ".id", "another user has the id " + digits);
      else id = value;
    }
    const std::string name = text_of(user, "name", field);
    if (name.empty()) return problem(user, field, "a user must have a name");
    // Headscale's users of the command line have a name alone, and "name@" stands for them in a policy.
    std::string login = text_of(user, "email", field);
    const Value& at = login.empty() ? user : user.find("email")->value;
    if (login.empty()) login = name.find('@') == std::string::npos ? name + "@" : name;
    if (const auto wrong = problem_of_login(login); !wrong.empty()) problem(at, field + ".email", safe_quoted(login, 80) + ": " + std::string{wrong});
    if (!login_of_user_.emplace(name, login).second) return problem(user.find("name")->value, field + ".name", "another user has the name " + safe_quoted(name, 80));
    if (!logins_.insert(login).second) return problem(at, field + ".email", "another user is " + safe_quoted(login, 80));
    if (id && (!creator_ || *id < *creator_)) {
      creator_ = id;
      creators_domain_ = domain_of(login);
    }
    out_.network.users.push_back(std::move(login));
  }

  void nodes(const Value& root) {
    const Value* all = member(root, "nodes", "", Kind::object);
    if (all == nullptr && root.find("nodes") == nullptr) problem(root, "nodes", "nodes are missing", R"("nodes": {"server": {"ipv4": "100.64.0.1", "tags": ["tag:server"]}})");
    if (all == nullptr) return;
    for (const auto& m : all->members) {
      const std::string field = "nodes[" + safe_quoted(m.name, 80) + "]";
      if (m.name.empty()) problem(m, field, "a node must have a name");
      if (m.value.kind == Kind::object) one_node(m, field);
      else wrong_kind(m.value, field, "an object");
    }
  }

  void one_node(const Member& m, const std::string& field) {
    const Value& value = m.value;
    Node node;
    node.name = m.name;
    (void)text_of(value, "hostname", field);
    id(m, field, node);
    addresses(value, field, node);
    tags(value, field, node);
    user(value, field, node);
    if (const Value* all = member(value, "attributes", field, Kind::object))
      for (const auto& a : all->members) attribute(a, field, node);
    if (const Value* all = member(value, "capabilities", field, Kind::object))
      for (const auto& c : all->members) {
        if (c.value.kind == Kind::array) node.capabilities.emplace(c.name, json_text(c.value));
        else wrong_kind(c.value, field + ".capabilities[" + safe_quoted(c.name, 80) + "]", "an array");
      }
    out_.network.nodes.push_back(std::move(node));
  }

  void id(const Member& m, const std::string& field, Node& node) {
    const Member* given = m.value.find("id");
    node.id = m.name;
    if (given != nullptr && given->value.kind != Kind::null) {
      if (given->value.kind != Kind::string && given->value.kind != Kind::number) return wrong_kind(given->value, field + ".id", "a string");
      node.id = given->value.text;
    }
    if (!node_ids_.insert(node.id).second) problem(given == nullptr ? m.value : given->value, field + ".id", "another node has the id " + safe_quoted(node.id, 80));
  }

  void addresses(const Value& value, const std::string& field, Node& node) {
    const auto add = [&](const Value& at, const std::string& where, std::string_view what, std::optional<bool> v4) {
      if (at.kind != Kind::string) return wrong_kind(at, where, "a string");
      const auto address = Address::parse(at.text);
      if (!address || (v4 && address->v4() != *v4)) return problem(at, where, safe_quoted(at.text, 60) + " is not an " + std::string{what} + " address");
      if (const auto [first, is_new] = address_of_.emplace(*address, node.name); !is_new)
        return problem(at, where, "another node has the address " + address->text(), "it is " + safe_quoted(first->second, 80) + "'s");
      node.addresses.push_back(*address);
    };
    const Member *ipv4 = value.find("ipv4"), *ipv6 = value.find("ipv6"), *list = value.find("addresses");
    if (ipv4 != nullptr && ipv4->value.kind != Kind::null) add(ipv4->value, field + ".ipv4", "IPv4", true);
    if (ipv6 != nullptr && ipv6->value.kind != Kind::null) add(ipv6->value, field + ".ipv6", "IPv6", false);
    if (const Value* all = member(value, "addresses", field, Kind::array))
      for (std::size_t i = 0; i < all->items.size(); i++) add(all->items[i], field + ".addresses[" + std::to_string(i) + "]", "IP", std::nullopt);
    // "addresses": [] says that there is none; to say nothing is more likely a slip of the pen. The same with tags below.
    if (ipv4 == nullptr && ipv6 == nullptr && list == nullptr) problem(value, field, "a node must have an address", R"("ipv4", "ipv6", "addresses")");
  }

  void tags(const Value& value, const std::string& field, Node& node) {
    const Value* all = member(value, "tags", field, Kind::array);
    if (all == nullptr) return;
    for (std::size_t i = 0; i < all->items.size(); i++) {
      const Value& item = all->items[i];
      const std::string where = field + ".tags[" + std::to_string(i) + "]";
      if (item.kind != Kind::string) wrong_kind(item, where, "a string");
      else if (const auto wrong = problem_of_tag(item.text); !wrong.empty()) problem(item, where, safe_quoted(item.text, 80) + ": " + std::string{wrong}, "\"tag:server\"");
      else node.tags.push_back(item.text);
    }
    std::sort(node.tags.begin(), node.tags.end());
    node.tags.erase(std::unique(node.tags.begin(), node.tags.end()), node.tags.end());
  }

  void user(const Value& value, const std::string& field, Node& node) {
    if (value.find("user") == nullptr && value.find("tags") == nullptr)
      return problem(value, field, "a node must have a user or tags", R"("user": "alice@example.com", or "tags": ["tag:server"])");
    const Value* name = member(value, "user", field, Kind::string);
    if (name == nullptr || name->text.empty()) return;
    std::string login = name->text;
    if (const auto it = login_of_user_.find(login); it != login_of_user_.end()) {
      login = it->second;
    } else if (login.find('@') == std::string::npos) {
      return problem(*name, field + ".user", "user not found: " + safe_quoted(login, 80), "a name of \"users\", or a login such as alice@example.com");
    } else if (const auto wrong = problem_of_login(login); !wrong.empty()) {
      return problem(*name, field + ".user", safe_quoted(login, 80) + ": " + std::string{wrong});
    } else if (logins_.insert(login).second) {
      out_.network.users.push_back(login);
    }
    if (!node.tagged()) node.login = std::move(login);  // who tags a device gives it away
  }

  void attribute(const Member& a, const std::string& field, Node& node) {
    const Value& value = a.value;
    switch (value.kind) {
      case Kind::string: node.attributes.emplace(a.name, value.text); return;
      case Kind::boolean: node.attributes.emplace(a.name, value.boolean); return;
      case Kind::number: {
        double number = 0;
        const auto [end, error] = std::from_chars(value.text.data(), value.text.data() + value.text.size(), number);
        if (error != std::errc{}) return problem(value, field + ".attributes[" + safe_quoted(a.name, 80) + "]", "is too large a number");
        node.attributes.emplace(a.name, number);
        return;
      }
      default: wrong_kind(value, field + ".attributes[" + safe_quoted(a.name, 80) + "]", "a string, a number, true or false");
    }
  }

  Problems& problems_;
  NetworkFile out_;
  std::map<std::string, std::string> login_of_user_;  // by name
  std::set<std::string> logins_, node_ids_;
  std::set<std::uint64_t> user_ids_;
  std::map<Address, std::string> address_of_;  // and the node that has it
  std::optional<std::uint64_t> creator_;       // the lowest id
  std::string creators_domain_;
};

template <class Items, class Write>
std::string list_of(const Items& items, const Write& write) {
  std::string out;
  for (const auto& item : items) out += (out.empty() ? "" : ",") + write(item);
  return out;
}

std::string attribute_text(const Attribute& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return json_string(*text);
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  char digits[64];
  const auto [end, error] = std::to_chars(digits, digits + sizeof digits, std::get<double>(value));
  return std::string{digits, end};
}

std::map<std::string, std::string> readable(std::map<std::string, std::string> capabilities) {
  std::erase_if(capabilities, [](const auto& c) {
    Problems problems{""};
    return !hujson::parse(c.second, problems) || !problems.empty();
  });
  return capabilities;
}

std::string node_text(const Node& node) {
  std::string out = json_string(node.name) + ":{\"id\":" + json_string(node.id);
  out += ",\"addresses\":[" + list_of(node.addresses, [](const Address& a) { return json_string(a.text()); });
  out += "],\"tags\":[" + list_of(node.tags, json_string) + "]";
  if (!node.login.empty()) out += ",\"user\":" + json_string(node.login);
  if (!node.attributes.empty())
    out += ",\"attributes\":{" + list_of(node.attributes, [](const auto& a) { return json_string(a.first) + ":" + attribute_text(a.second); }) + "}";
  if (!node.capabilities.empty())
    out += ",\"capabilities\":{" + list_of(readable(node.capabilities), [](const auto& c) {
             std::string value = c.second;  // JSON as a provider had it; a line's end can only stand between its words
             std::replace_if(value.begin(), value.end(), [](char x) { return x == '\n' || x == '\r'; }, ' ');
             return json_string(c.first) + ":" + value;
           }) + "}";
  return out + "}";
}

}  // namespace

Expected<NetworkFile, std::vector<Problem>> read_network(std::string_view text, std::string file_name) {
  Problems problems{std::move(file_name)};
  const auto root = hujson::parse(text, problems);
  if (!root) return Unexpected{problems.take()};
  NetworkFile file = Reader{problems}.read(*root);
  if (!problems.empty()) return Unexpected{problems.take()};
  file.network.index();
  return file;
}

std::string network_text(const NetworkFile& file) {
  const auto user = [](const std::string& login) { return "{\"name\":" + json_string(login) + ",\"email\":" + json_string(login) + "}"; };
  std::string out = "{\"domains\":[" + list_of(file.domains, json_string) + "]";
  if (file.session_capability) out += ",\"session_capability\":" + json_string(*file.session_capability);
  if (file.require_network_rule) out += std::string{",\"require_network_rule\":"} + (*file.require_network_rule ? "true" : "false");
  return out + ",\"users\":[" + list_of(file.network.users, user) + "],\"nodes\":{" + list_of(file.network.nodes, node_text) + "}}";
}

}  // namespace postern::auth::policy
