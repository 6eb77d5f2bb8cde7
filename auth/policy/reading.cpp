#include "auth/policy/reading.h"

#include "base/log.h"

#include <algorithm>
#include <charconv>

namespace postern::auth::policy {

using hujson::Kind;
using hujson::Member;
using hujson::Value;

namespace {

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 0x20) : c; }

bool same_name(std::string_view a, std::string_view b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](char x, char y) { return lower(x) == lower(y); });
}

/// Edit distance of at most 2, without regard to case: for "did you mean".
bool alike(std::string_view a, std::string_view b) {
  if (a.size() > 40 || b.size() > 40 || a.size() > b.size() + 2 || b.size() > a.size() + 2) return false;
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); j++) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); i++) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); j++) {
      const std::size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (lower(a[i - 1]) == lower(b[j - 1]) ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()] <= 2;
}

std::optional<std::uint16_t> number(std::string_view text, unsigned least, unsigned most) {
  unsigned value = 0;
  if (text.size() > 1 && text.front() == '0') return std::nullopt;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc{} || end != text.data() + text.size() || value < least || value > most) return std::nullopt;
  return static_cast<std::uint16_t>(value);
}

/// Users' roles. The network does not tell who has one, so they name nobody here.
constexpr std::array<std::string_view, 6> roles{"owner", "admin", "it-admin", "network-admin", "billing-admin", "auditor"};

}  // namespace

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view blanks = " \t\n\v\f\r";
  const auto first = text.find_first_not_of(blanks);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

std::string json_quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text.substr(0, 200)) {
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (u < 0x20 || u == 0x7f) {
      out += safe_quoted(std::string_view{&c, 1}).substr(1, 4);
    } else {
      out += c;
    }
  }
  return out + (text.size() > 200 ? "...\"" : "\"");
}

bool is_empty(const Value& v) {
  return v.kind == Kind::null || (v.kind == Kind::boolean && !v.boolean) || (v.kind == Kind::array && v.items.empty()) ||
         (v.kind == Kind::object && v.members.empty()) || (v.kind == Kind::string && v.text.empty());
}

void Reading::wrong_kind(const Value& at, std::string field, std::string_view wanted) {
  problem(at, std::move(field), "must be " + std::string{wanted} + ", not " + std::string{describe(at.kind)});
}

const Member* Reading::find(const Value& object, std::string_view name) noexcept {
  for (const auto& m : object.members)
    if (same_name(m.name, name)) return &m;
  return nullptr;
}

void Reading::check_members(const Value& object, const std::string& field, std::span<const std::string_view> known, std::string_view what) {
  std::unordered_map<std::string, const Member*> seen;
  for (const auto& m : object.members) {
    const std::string where = field.empty() ? m.name : field + "." + m.name;
    std::string folded = m.name;
    std::transform(folded.begin(), folded.end(), folded.begin(), lower);
    if (const auto [first, is_new] = seen.emplace(std::move(folded), &m); !is_new) {  // hujson told of the equal ones
      problem(m, where, "the name " + json_quoted(m.name) + " appears twice in this object",
              "first in line " + std::to_string(first->second->line) + " as " + json_quoted(first->second->name) + "; merge the two");
      continue;
    }
    if (std::any_of(known.begin(), known.end(), [&](auto k) { return same_name(m.name, k); })) continue;
    if (m.name.substr(0, 1) == "#" && what == "an acl") continue;  // Headscale's: another tool's remarks ("#ha-meta")
    std::string hint;
    if (const auto near = std::find_if(known.begin(), known.end(), [&](auto k) { return alike(m.name, k); }); near != known.end()) {
      hint = "did you mean \"" + std::string{*near} + "\"?";
    } else {
      hint = std::string{what} + " has: ";
      for (const auto k : known) hint += (k == known.front() ? "" : ", ") + std::string{k};
    }
    problem(m, where, "unknown member " + json_quoted(m.name), std::move(hint));
  }
}

std::vector<Reading::Text> Reading::strings(const Value& value, const std::string& field) {
  std::vector<Text> out_texts;
  if (value.kind == Kind::null) return out_texts;
  if (value.kind != Kind::array) {
    wrong_kind(value, field, "an array of strings");
    return out_texts;
  }
  for (std::size_t i = 0; i < value.items.size(); i++) {
    const Value& item = value.items[i];
    if (item.kind == Kind::string) out_texts.push_back({item.text, &item});
    else wrong_kind(item, field + "[" + std::to_string(i) + "]", "a string");
  }
  return out_texts;
}

std::vector<Reading::Text> Reading::strings(const Value& object, std::string_view name, const std::string& field) {
  const Member* m = find(object, name);
  return m == nullptr ? std::vector<Text>{} : strings(m->value, field + "." + std::string{name});
}

const Value* Reading::section(std::string_view name, Kind kind) {
  const Member* m = find(root, name);
  if (m == nullptr || m->value.kind == Kind::null) return nullptr;
  if (m->value.kind != kind) {
    wrong_kind(m->value, std::string{name}, describe(kind));
    return nullptr;
  }
  return &m->value;
}

Postures Reading::postures(const Value& rule, const std::string& field) {
  // [] and null are none of its own, as when it is not there: then the default holds. Anything else that is no list is a problem.
  const auto texts = strings(rule, "srcPosture", field);
  if (texts.empty()) return default_postures;
  Postures found;
  std::size_t index = 0;
  for (const auto& [raw, at] : texts) {
    const std::string place = field + ".srcPosture[" + std::to_string(index++) + "]";
    if (const auto it = posture_numbers.find(trimmed(raw)); it != posture_numbers.end()) found.push_back(it->second);
    else problem(*at, place, "posture not found: " + json_quoted(trimmed(raw)), "define it in postures");
  }
  return found;
}

std::optional<std::map<std::string, Attribute>> Reading::posture_attributes(const Value& object, const std::string& field) {
  const Member* m = find(object, "srcPostureAttrs");
  if (m == nullptr || m->value.kind == Kind::null) return std::nullopt;
  const std::string where = field + ".srcPostureAttrs";
  std::map<std::string, Attribute> found;
  if (m->value.kind != Kind::object) {
    wrong_kind(m->value, where, "an object");
    return found;
  }
  for (const auto& a : m->value.members) {
    double value = 0;
    if (a.value.kind == Kind::string) found.emplace(a.name, a.value.text);
    else if (a.value.kind == Kind::boolean) found.emplace(a.name, a.value.boolean);
    else if (a.value.kind == Kind::number && std::from_chars(a.value.text.data(), a.value.text.data() + a.value.text.size(), value).ec == std::errc{})
      found.emplace(a.name, value);
    else wrong_kind(a.value, where + "[" + json_quoted(a.name) + "]", "a string, a number, true or false");
  }
  return found;
}

std::optional<std::uint16_t> Reading::protocol(std::string_view name) {
  // tailscale.com/kb/1337/policy-syntax#proto
  static constexpr std::array<std::pair<std::string_view, std::uint16_t>, 15> names{{{"*", 0},
                                                                                   {"icmp", 1},
                                                                                   {"igmp", 2},
                                                                                   {"ipv4", 4},
                                                                                   {"ip-in-ip", 4},
                                                                                   {"tcp", 6},
                                                                                   {"egp", 8},
                                                                                   {"igp", 9},
                                                                                   {"udp", 17},
                                                                                   {"gre", 47},
                                                                                   {"esp", 50},
                                                                                   {"ah", 51},
                                                                                   {"ipv6-icmp", 58},
                                                                                   {"sctp", 132},
                                                                                   {"fc", 133}}};
  for (const auto& [word, value] : names)
    if (same_name(word, name)) return value;
  return number(name, 1, 255);
}

std::optional<std::vector<PortRange>> Reading::port_list(std::string_view text) {
  if (text == "*") return std::vector<PortRange>{PortRange{}};
  std::vector<PortRange> ranges;
  for (;;) {
    const auto comma = text.find(',');
    const auto part = trimmed(text.substr(0, comma));
    const auto dash = part.find('-');
    const auto first = number(part.substr(0, dash), 1, 65535);
    const auto last = dash == std::string_view::npos ? first : number(part.substr(dash + 1), 1, 65535);
    if (!first || !last || *first > *last) return std::nullopt;
    ranges.push_back({*first, *last});
    if (comma == std::string_view::npos) return ranges;
    text.remove_prefix(comma + 1);
  }
}

bool Reading::domain_is_ours(std::string_view domain, const Value& at, std::string field, bool in_ssh_src) {
  const bool any = options.domains.empty();
  const bool sound = !domain.empty() && domain.find_first_of("*@ \t:/\"") == std::string_view::npos;
  if (sound && (any || std::find(options.domains.begin(), options.domains.end(), domain) != options.domains.end())) return true;
  std::string hint = "the network's domains:";
  for (const auto& d : options.domains) hint += " " + d;
  problem(at, std::move(field),
          std::string{in_ssh_src ? "[ssh] " : ""} + std::string{domain} + " is not associated with this Tailnet and cannot be used in user:*@<domain> expressions",
          any ? "one domain, such as example.com" : hint);
  return false;
}

std::optional<Principal> Reading::principal(std::string_view raw, const Value& at, Spot spot, const std::string& field, std::size_t index) {
  const auto text = trimmed(raw);
  const bool is_src = spot == Spot::ssh_src || spot == Spot::network_src;
  const bool is_ssh = spot == Spot::ssh_src || spot == Spot::ssh_dst;
  const auto where = [&] { return field + "[" + std::to_string(index) + "]"; };
  // The service's own forms: src=…, dst="…": … in acls and grants; [ssh] … for sources of ssh rules.
  const auto refuse = [&](std::string message, std::string hint) -> std::optional<Principal> {
    const std::string side = spot == Spot::network_src ? "src=" : spot == Spot::network_dst ? "dst=" + json_quoted(text) + ": " : "";
    problem(at, where(), side + message, std::move(hint));
    return std::nullopt;
  };
  const auto invalid = [&](std::string hint) {
    if (spot == Spot::ssh_src) {
      problem(at, where(), "[ssh] " + json_quoted(text) + " is not allowed in src", std::move(hint));
      return std::optional<Principal>{};
    }
    problem(at, where(), std::string{"invalid "} + (is_src ? "src " : "dst ") + json_quoted(text), std::move(hint));
    return std::optional<Principal>{};
  };
  const auto begins = [&](std::string_view with) { return text.substr(0, with.size()) == with; };
  const auto nobody = [&](std::string why, std::string hint) {
    warnings.add(at.line, at.column, where(), json_quoted(text) + ": " + std::move(why), std::move(hint));
    return Principal{What::nobody, std::string{text}};
  };

  if (text.empty()) return invalid("it is empty");
  if (text == "*") {
    if (!is_ssh) return Principal{What::everyone, "*"};
    return invalid(is_src ? "autogroup:member is every user's devices, autogroup:tagged every tagged node"
                          : "name a tag, autogroup:self, autogroup:member or autogroup:tagged");
  }
  if (begins("autogroup:")) {
    const auto name = text.substr(10);
    if (name == "member" || name == "members") return Principal{What::member, std::string{text}};
    if (name == "tagged") return Principal{What::tagged, std::string{text}};
    if (name == "self" && !is_src) return Principal{What::self, std::string{text}};
    if (name == "internet" && spot == Spot::network_dst) return Principal{What::nobody, std::string{text}};  // never a node of the network
    if (name == "danger-all" && spot == Spot::network_src) return Principal{What::everyone, std::string{text}};
    if (name == "danger-all" && spot == Spot::network_dst) {
      problem(at, where(), "cannot use autogroup:danger-all as a dst", "\"*\" is every node of the network");
      return std::nullopt;
    }
    if (name == "self" && spot == Spot::network_src) {
      problem(at, where(), "\"autogroup:self\" not valid on the src side of a rule", "write autogroup:member here, and autogroup:self in dst");
      return std::nullopt;
    }
    if (name == "shared" && is_src) return nobody("users that others share in are not known here", "it lets in nobody");
    if (std::find(roles.begin(), roles.end(), name) != roles.end() && spot != Spot::ssh_dst)
      return nobody("who has which role is not known here", "it lets in nobody; name a group of those users");
    return invalid(is_src ? "here: autogroup:member, autogroup:tagged" : "here: autogroup:self, autogroup:member, autogroup:tagged");
  }
  if (begins("group:")) {
    if (spot == Spot::ssh_dst) return invalid("a tag, a user, autogroup:self, autogroup:member or autogroup:tagged");
    if (has_group(text)) return Principal{What::group, std::string{text}};
    // The service fills group:name@domain from the identity provider (SCIM); nobody tells us who is in it.
    if (text.find('@') != std::string_view::npos) return nobody("a group of the identity provider is not known here", "it lets in nobody; name its users in groups");
    return refuse("group not found: " + json_quoted(text), "define it in groups");
  }
  if (begins("tag:")) {
    if (has_tag(text)) return Principal{What::tag, std::string{text}};
    return refuse("tag not found: " + json_quoted(text), text.find(':', 4) != std::string_view::npos ? "no port here" : "define it in tagOwners");
  }
  if (begins("user:*@")) {
    if (spot == Spot::ssh_dst) return invalid("a tag, a user, autogroup:self, autogroup:member or autogroup:tagged");
    const auto domain = text.substr(7);
    if (!domain_is_ours(domain, at, where(), spot == Spot::ssh_src)) return std::nullopt;
    return Principal{What::domain, std::string{domain}};
  }
  if (begins("ipset:")) {
    if (is_ssh) return invalid("not in ssh rules");
    if (const auto set = ipsets.find(text); set != ipsets.end()) return Principal{What::set, std::string{text}, {}, set->second};
    return refuse("ipset not found: " + json_quoted(text), "define it in ipsets");
  }
  if (begins("svc:")) {
    if (spot == Spot::network_dst) return Principal{What::nobody, std::string{text}};  // a service has addresses of its own
    return invalid("not here");
  }
  if (is_login(text)) return Principal{What::user, std::string{text}};
  if (is_ssh)
    return invalid(is_src ? "a user, group, tag, autogroup:member or autogroup:tagged"
                          : "a tag, a user, autogroup:self, autogroup:member or autogroup:tagged; never a host, address or port");
  const auto host_name = begins("host:") ? text.substr(5) : text;
  if (const auto host = out.hosts.find(host_name); host != out.hosts.end()) return Principal{What::prefix, std::string{text}, host->second};
  auto bare = text;
  if (bare.size() > 2 && bare.front() == '[' && bare.back() == ']') bare = bare.substr(1, bare.size() - 2);
  if (const auto prefix = Prefix::parse(bare)) return Principal{What::prefix, std::string{text}, *prefix};
  if (auto range = parse_address_range(bare)) {
    out.sets.push_back(std::move(*range));
    return Principal{What::set, std::string{text}, {}, static_cast<std::uint32_t>(out.sets.size() - 1)};
  }
  return invalid("a user, group, tag, autogroup, address, prefix, or a name of hosts");
}

}  // namespace postern::auth::policy
