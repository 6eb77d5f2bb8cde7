// Policy::load: from HuJSON to what decide() looks up.
//
// Every member is read by name, and what is left over is a problem: a member that nobody read could be one that restricts access.
// Sentences in quotes that other tools know are those of the real service (research/tailscale-ssh.md section 3.5).
#include "auth/policy/compiled.h"
#include "auth/policy/hujson.h"
#include "auth/policy/policy.h"

#include "base/log.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <span>

namespace postern::auth::policy {
namespace {

using hujson::Kind;
using hujson::Member;
using hujson::Problems;
using hujson::Value;

constexpr std::string_view not_yet = "not supported yet";

/// Sections of Tailscale's file that this version does not know. Empty ones say nothing and pass.
constexpr std::array<std::string_view, 16> later_sections{
    "autoApprovers",       "nodeAttrs",   "postures",      "defaultSrcPosture", "ipsets",   "tests",        "sshTests", "derpMap",
    "randomizeClientPort", "disableIPv4", "OneCGNATRoute", "extraDNSRecords",   "services", "networkAttrs", "regions",  "machinePerms"};

/// strings.TrimSpace for ASCII: the real service takes " root" and "\troot" for "root".
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

/// Edit distance of at most 2, without regard to case: for "did you mean".
bool alike(std::string_view a, std::string_view b) {
  if (a.size() > 40 || b.size() > 40 || a.size() > b.size() + 2 || b.size() > a.size() + 2) return false;
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 0x20) : c; };
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

enum class Spot { ssh_src, ssh_dst, network_src, network_dst };

class Loader {
 public:
  Loader(const Value& root, Problems& problems, Problems& warnings)
      : root_{root}, problems_{problems}, warnings_{warnings}, out_{std::make_shared<Compiled>()} {
    out_->file = problems.file();
    out_->ports.emplace_back();  // every_port
  }

  std::shared_ptr<Compiled> run() {
    if (root_.kind != Kind::object) {
      wrong_kind(root_, "", "an object");
      return nullptr;
    }
    sections();
    groups();
    hosts();
    tag_owners();
    for (auto* side : {&out_->ssh_src, &out_->ssh_dst, &out_->network_src, &out_->network_dst}) side->groups.resize(out_->groups.size());
    network();
    ssh();
    for (auto& [name, list] : out_->ssh_users) list.finish(out_->ssh.size());
    out_->ssh_nonroot.finish(out_->ssh.size());
    for (auto* side : {&out_->ssh_src, &out_->ssh_dst}) side->finish(out_->ssh.size());
    for (auto* side : {&out_->network_src, &out_->network_dst}) side->finish(out_->network_rules);
    if (problems_.empty()) warn_of_unreachable();
    return out_;
  }

 private:
  // -- problems ------------------------------------------------------------------------------------------------------------

  void problem(const Value& at, std::string field, std::string message, std::string hint = {}) {
    problems_.add(at.line, at.column, std::move(field), std::move(message), std::move(hint));
  }
  void problem(const Member& at, std::string field, std::string message, std::string hint = {}) {
    problems_.add(at.line, at.column, std::move(field), std::move(message), std::move(hint));
  }
  void wrong_kind(const Value& at, std::string field, std::string_view wanted) {
    problem(at, std::move(field), "must be " + std::string{wanted} + ", not " + std::string{describe(at.kind)});
  }

  /// A problem for each member of `object` whose name is not in `known`.
  void refuse_unknown(const Value& object, const std::string& field, std::span<const std::string_view> known, std::string_view what) {
    for (const auto& m : object.members) {
      if (std::find(known.begin(), known.end(), m.name) != known.end()) continue;
      std::string hint;
      if (m.name == "users" || m.name == "ports") {
        hint = m.name == "users" ? "the old name of \"src\"" : "the old name of \"dst\"";
      } else if (const auto near = std::find_if(known.begin(), known.end(), [&](auto k) { return alike(m.name, k); }); near != known.end()) {
        hint = "did you mean \"" + std::string{*near} + "\"?";
      } else {
        hint = std::string{what} + " has: ";
        for (const auto k : known) hint += (k == known.front() ? "" : ", ") + std::string{k};
      }
      problem(m, field.empty() ? m.name : field + "." + m.name, "unknown member " + json_quoted(m.name), std::move(hint));
    }
  }

  void refuse_later(const Value& object, const std::string& field, std::initializer_list<std::string_view> names) {
    for (const auto name : names)
      if (const Member* m = object.find(name); m != nullptr && !is_empty(m->value))
        problem(*m, field + "." + std::string{name}, json_quoted(name) + " is " + std::string{not_yet},
                "remove it; a rule that it restricts must not load without it");
  }

  // -- plain members -------------------------------------------------------------------------------------------------------

  struct Text {
    std::string_view text;
    const Value* at;
  };

  /// The strings of an array member; null and absent are empty.
  std::vector<Text> strings(const Value& value, const std::string& field) {
    std::vector<Text> out;
    if (value.kind == Kind::null) return out;
    if (value.kind != Kind::array) {
      wrong_kind(value, field, "an array of strings");
      return out;
    }
    for (std::size_t i = 0; i < value.items.size(); i++) {
      const Value& item = value.items[i];
      if (item.kind == Kind::string) out.push_back({item.text, &item});
      else wrong_kind(item, field + "[" + std::to_string(i) + "]", "a string");
    }
    return out;
  }
  std::vector<Text> strings(const Value& object, std::string_view name, const std::string& field) {
    const Member* m = object.find(name);
    return m == nullptr ? std::vector<Text>{} : strings(m->value, field + "." + std::string{name});
  }

  /// `action` of a rule. False (with a problem) when it is none that we could take.
  bool action(const Value& rule, const std::string& field, std::string_view& out) {
    const Member* m = rule.find("action");
    if (m == nullptr || m->value.kind == Kind::null) {
      problem(m == nullptr ? rule : m->value, field + ".action", "action must be specified", "\"action\": \"accept\"");
      return false;
    }
    if (m->value.kind != Kind::string) {
      wrong_kind(m->value, field + ".action", "a string");
      return false;
    }
    out = trimmed(m->value.text);
    if (out.empty()) {
      problem(m->value, field + ".action", "action must be specified", "\"action\": \"accept\"");
      return false;
    }
    return true;
  }

  const Value* section(std::string_view name, Kind kind) {
    const Member* m = root_.find(name);
    if (m == nullptr || m->value.kind == Kind::null) return nullptr;
    if (m->value.kind != kind) {
      wrong_kind(m->value, std::string{name}, describe(kind));
      return nullptr;
    }
    return &m->value;
  }

  void sections() {
    static constexpr std::array<std::string_view, 6> known{"groups", "hosts", "tagOwners", "acls", "grants", "ssh"};
    std::vector<std::string_view> all{known.begin(), known.end()};
    for (const auto& m : root_.members) {
      if (std::find(later_sections.begin(), later_sections.end(), m.name) == later_sections.end()) continue;
      all.push_back(m.name);
      if (!is_empty(m.value)) problem(m, m.name, json_quoted(m.name) + " is " + std::string{not_yet}, "remove the section, or make it empty");
    }
    refuse_unknown(root_, "", all, "a policy");
  }

  // -- names ---------------------------------------------------------------------------------------------------------------

  /// A login such as alice@example.com.
  static bool is_login(std::string_view text) { return problem_of_login(text).empty(); }

  void groups() {
    const Value* all = section("groups", Kind::object);
    if (all == nullptr) return;
    for (const auto& m : all->members) {
      const std::string field = "groups[" + json_quoted(m.name) + "]";
      if (m.name.substr(0, 6) != "group:" || m.name.size() == 6)
        problem(m, field, "group names must start with 'group:'", "\"group:eng\": [\"alice@example.com\"]");
      const auto number = static_cast<std::uint32_t>(out_->groups.size());
      out_->groups.emplace(m.name, number);
      auto& members = group_members_.emplace_back();
      for (const auto& [raw, at] : strings(m.value, field)) {
        const auto text = trimmed(raw);
        if (text.substr(0, 6) == "group:") {
          problem(*at, field, json_quoted(text) + ": group members cannot be recursive", "name its users here");
        } else if (text.substr(0, 6) == "user:*" || text.substr(0, 2) == "*@") {
          problem(*at, field, json_quoted(text) + " is " + std::string{not_yet}, "name the users");
        } else if (!is_login(text)) {
          problem(*at, field, json_quoted(text) + ": group members must be users", "alice@example.com");
        } else {
          auto& in = out_->groups_of[std::string{text}];
          if (in.empty() || in.back() != number) {
            in.push_back(number);
            members.emplace_back(text);
          }
        }
      }
    }
  }

  void hosts() {
    const Value* all = section("hosts", Kind::object);
    if (all == nullptr) return;
    for (const auto& m : all->members) {
      const std::string field = "hosts[" + json_quoted(m.name) + "]";
      const bool has_sign = m.name.find_first_of(":@*/ \t") != std::string::npos;
      if (m.name.empty() || has_sign || Address::parse(m.name)) {
        problem(m, field, json_quoted(m.name) + " is not a valid host name", "a short name without \":\", \"@\", \"*\", \"/\" or blanks");
        continue;
      }
      if (m.value.kind != Kind::string) {
        wrong_kind(m.value, field, "a string");
        continue;
      }
      if (const auto prefix = Prefix::parse(trimmed(m.value.text))) hosts_.emplace(m.name, *prefix);
      else problem(m.value, field, json_quoted(m.value.text) + " is not an IP address or prefix", "100.64.0.16 or 10.0.0.0/24");
    }
  }

  void tag_owners() {
    const Value* all = section("tagOwners", Kind::object);
    if (all == nullptr) return;
    for (const auto& m : all->members) tags_.emplace(m.name, true);
    for (const auto& m : all->members) {
      const std::string field = "tagOwners[" + json_quoted(m.name) + "]";
      if (const auto wrong = problem_of_tag(m.name); !wrong.empty()) problem(m, field, std::string{wrong}, "\"tag:server\"");
      for (const auto& [raw, at] : strings(m.value, field)) {
        const auto text = trimmed(raw);
        if (text.substr(0, 4) == "tag:") {
          if (tags_.find(text) == tags_.end()) problem(*at, field, "tag not found: " + json_quoted(text), "define it in tagOwners");
        } else if (text.substr(0, 6) == "group:") {
          if (out_->groups.find(text) == out_->groups.end()) problem(*at, field, "group not found: " + json_quoted(text), "define it in groups");
        } else if (text.substr(0, 10) != "autogroup:" && !is_login(text)) {
          problem(*at, field, json_quoted(text) + " cannot own a tag", "a user, group, tag or autogroup");
        }
      }
    }
  }

  // -- principals ----------------------------------------------------------------------------------------------------------

  /// What `raw` names at this place. `nothing`: it is well-formed and can match no node. Absent, with a problem, otherwise.
  struct Named {
    std::optional<Principal> principal;
    bool nothing = false;
  };
  Named principal(std::string_view raw, const Value& at, Spot place, const std::string& field, std::size_t index) {
    const auto text = trimmed(raw);
    const bool is_src = place == Spot::ssh_src || place == Spot::network_src;
    const bool is_ssh = place == Spot::ssh_src || place == Spot::ssh_dst;
    const auto where = [&] { return field + "[" + std::to_string(index) + "]"; };
    const auto invalid = [&](std::string hint) {
      problem(at, where(), std::string{"invalid "} + (is_src ? "src " : "dst ") + json_quoted(text), std::move(hint));
      return Named{};
    };
    const auto later = [&](std::string hint = {}) {
      problem(at, where(), json_quoted(text) + " is " + std::string{not_yet}, std::move(hint));
      return Named{};
    };
    const auto begins = [&](std::string_view with) { return text.substr(0, with.size()) == with; };

    if (text.empty()) return invalid("it is empty");
    if (text == "*") {
      if (!is_ssh) return {Principal{What::everyone}};
      return invalid(is_src ? "autogroup:member is every user's devices, autogroup:tagged every tagged node"
                            : "name a tag, autogroup:self, autogroup:member or autogroup:tagged");
    }
    if (begins("autogroup:")) {
      const auto name = text.substr(10);
      if (name == "member") return {Principal{What::member}};
      if (name == "tagged") return {Principal{What::tagged}};
      if (name == "self" && !is_src) return {Principal{What::self}};
      if (name == "internet" && place == Spot::network_dst) return {std::nullopt, true};  // never a node of the network
      for (const auto known : {"owner", "admin", "it-admin", "network-admin", "billing-admin", "auditor", "shared", "danger-all", "members"})
        if (name == known) return later(name == "members" ? "write autogroup:member" : "name a group of those users");
      return invalid(is_src ? "here: autogroup:member, autogroup:tagged" : "here: autogroup:self, autogroup:member, autogroup:tagged");
    }
    if (begins("group:")) {
      if (place == Spot::ssh_dst) return invalid("a tag, a user, autogroup:self, autogroup:member or autogroup:tagged");
      if (out_->groups.find(text) != out_->groups.end()) return {Principal{What::group, std::string{text}}};
      problem(at, where(), "group not found: " + json_quoted(text), "define it in groups");
      return {};
    }
    if (begins("tag:")) {
      if (tags_.find(text) != tags_.end()) return {Principal{What::tag, std::string{text}}};
      problem(at, where(), "tag not found: " + json_quoted(text), text.find(':', 4) != std::string_view::npos ? "no port here" : "define it in tagOwners");
      return {};
    }
    if (begins("user:*@") || begins("*@")) return later("name a group of those users");
    if (begins("ipset:") || begins("svc:")) return is_ssh ? invalid("not in ssh rules") : later();
    if (is_login(text)) return {Principal{What::user, std::string{text}}};
    if (is_ssh)
      return invalid(is_src ? "a user, group, tag, autogroup:member or autogroup:tagged"
                            : "a tag, a user, autogroup:self, autogroup:member or autogroup:tagged; never a host, address or port");
    if (const auto host = hosts_.find(text); host != hosts_.end()) return {Principal{What::prefix, std::string{text}, host->second}};
    auto bare = text;
    if (bare.size() > 2 && bare.front() == '[' && bare.back() == ']') bare = bare.substr(1, bare.size() - 2);
    if (const auto prefix = Prefix::parse(bare)) return {Principal{What::prefix, std::string{text}, *prefix}};
    if (const auto dash = bare.find('-'); dash != std::string_view::npos && Address::parse(bare.substr(0, dash)) && Address::parse(bare.substr(dash + 1)))
      return later("write it as prefixes, 10.0.0.0/24");
    return invalid("a user, group, tag, autogroup, address, prefix, or a name of hosts");
  }

  void add(Side& side, const Principal& principal, std::uint32_t rule, PortsId ports = every_port) {
    switch (principal.what) {
      case What::everyone: return side.everyone.add(rule, ports);
      case What::member: return side.member.add(rule, ports);
      case What::tagged: return side.tagged.add(rule, ports);
      case What::self: return side.self.add(rule, ports);
      case What::user: return side.users[principal.name].add(rule, ports);
      case What::group: return side.groups[out_->groups.find(principal.name)->second].add(rule, ports);
      case What::tag: return side.tags[principal.name].add(rule, ports);
      case What::prefix: return side.prefixes.at(principal.prefix).add(rule, ports);
    }
  }

  // -- network rules -------------------------------------------------------------------------------------------------------

  static std::optional<std::uint16_t> port_number(std::string_view text) {
    unsigned value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || error != std::errc{} || end != text.data() + text.size() || value == 0 || value > 65535) return std::nullopt;
    return static_cast<std::uint16_t>(value);
  }

  /// "22", "1-1024", "1-1024,22", "*".
  static std::optional<Ports> port_list(std::string_view text) {
    if (text == "*") return Ports{PortRange{}};
    Ports out;
    for (;;) {
      const auto comma = text.find(',');
      const auto part = trimmed(text.substr(0, comma));
      const auto dash = part.find('-');
      const auto first = port_number(part.substr(0, dash));
      const auto last = dash == std::string_view::npos ? first : port_number(part.substr(dash + 1));
      if (!first || !last || *first > *last) return std::nullopt;
      out.push_back({*first, *last});
      if (comma == std::string_view::npos) return out;
      text.remove_prefix(comma + 1);
    }
  }

  PortsId intern(Ports ports) {
    std::sort(ports.begin(), ports.end());
    for (const auto& range : ports)
      if (range.first <= 1 && range.last == 65535) return every_port;
    const auto [it, is_new] = port_ids_.try_emplace(ports, static_cast<PortsId>(out_->ports.size()));
    if (is_new) out_->ports.push_back(std::move(ports));
    return it->second;
  }

  /// Whether a protocol's rule is one for TCP. Absent, when there is no such protocol.
  static std::optional<bool> takes_tcp(std::string_view name) {
    if (name == "*" || name == "tcp" || name == "6") return true;
    for (const auto other : {"udp", "icmp", "ipv6-icmp", "igmp", "ipv4", "ip-in-ip", "egp", "igp", "gre", "esp", "ah", "sctp", "fc"})
      if (name == other) return false;
    unsigned value = 0;
    const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), value);
    if (name.empty() || error != std::errc{} || end != name.data() + name.size() || value == 0 || value > 255) return std::nullopt;
    return false;
  }

  void network() {
    if (const Value* all = section("acls", Kind::array))
      for (std::size_t i = 0; i < all->items.size(); i++) acl(all->items[i], "acls[" + std::to_string(i) + "]");
    if (const Value* all = section("grants", Kind::array))
      for (std::size_t i = 0; i < all->items.size(); i++) grant(all->items[i], "grants[" + std::to_string(i) + "]");
  }

  void network_sources(const Value& rule, const std::string& field, std::uint32_t number) {
    const std::string where = field + ".src";
    std::size_t index = 0;
    for (const auto& [text, at] : strings(rule, "src", field))
      if (const auto named = principal(text, *at, Spot::network_src, where, index++); named.principal) add(out_->network_src, *named.principal, number);
  }

  void acl(const Value& rule, const std::string& field) {
    if (rule.kind != Kind::object) return wrong_kind(rule, field, "an object");
    static constexpr std::array<std::string_view, 5> known{"action", "src", "dst", "proto", "srcPosture"};
    refuse_unknown(rule, field, known, "an acl");
    refuse_later(rule, field, {"srcPosture"});
    std::string_view verb;
    if (action(rule, field, verb) && verb != "accept")
      problem(rule.find("action")->value, field + ".action", json_quoted(verb) + " is not a valid action", "the only action is \"accept\"");

    bool tcp = true;
    if (const Member* m = rule.find("proto"); m != nullptr && m->value.kind != Kind::null) {
      if (m->value.kind != Kind::string) {
        wrong_kind(m->value, field + ".proto", "a string");
      } else if (const auto name = trimmed(m->value.text); !name.empty()) {
        const auto takes = takes_tcp(name);
        if (!takes) problem(m->value, field + ".proto", json_quoted(name) + " is not a protocol", "tcp, udp, icmp, ... or a number up to 255");
        tcp = takes.value_or(false);
      }
    }

    const auto number = static_cast<std::uint32_t>(out_->network_rules++);
    network_sources(rule, field, number);
    const std::string where = field + ".dst";
    std::size_t index = 0;
    for (const auto& [raw, at] : strings(rule, "dst", field)) {
      const std::size_t i = index++;
      const auto text = trimmed(raw);
      const auto colon = text.rfind(':');
      const auto ports = colon == std::string_view::npos ? std::nullopt : port_list(trimmed(text.substr(colon + 1)));
      if (!ports) {
        problem(*at, where + "[" + std::to_string(i) + "]", "invalid dst " + json_quoted(text) + ": no ports after the last \":\"",
                "\"tag:server:22\", \"*:*\", \"host:1-1024,2222\"");
        continue;
      }
      const auto named = principal(text.substr(0, colon), *at, Spot::network_dst, where, i);
      if (named.principal && tcp) add(out_->network_dst, *named.principal, number, intern(*ports));
    }
  }

  void grant(const Value& rule, const std::string& field) {
    if (rule.kind != Kind::object) return wrong_kind(rule, field, "an object");
    static constexpr std::array<std::string_view, 6> known{"src", "dst", "ip", "app", "via", "srcPosture"};
    refuse_unknown(rule, field, known, "a grant");
    refuse_later(rule, field, {"app", "via", "srcPosture"});
    const Member* ip = rule.find("ip");
    const Member* app = rule.find("app");
    if ((ip == nullptr || is_empty(ip->value)) && (app == nullptr || is_empty(app->value)))
      problem(rule, field, "a grant must have \"ip\" or \"app\"", "\"ip\": [\"tcp:22\"]");

    Ports open;
    std::size_t index = 0;
    for (const auto& [raw, at] : strings(rule, "ip", field)) {
      const std::string where = field + ".ip[" + std::to_string(index++) + "]";
      const auto text = trimmed(raw);
      const auto colon = text.find(':');
      const auto takes = colon == std::string_view::npos ? std::optional{true} : takes_tcp(text.substr(0, colon));
      const auto ports = port_list(trimmed(colon == std::string_view::npos ? text : text.substr(colon + 1)));
      if (!takes || !ports || text.find(',') != std::string_view::npos)
        problem(*at, where, "invalid ip " + json_quoted(text), "\"*\", \"22\", \"1-1024\", \"tcp:22\", \"udp:*\"");
      else if (*takes) open.insert(open.end(), ports->begin(), ports->end());
    }

    const auto number = static_cast<std::uint32_t>(out_->network_rules++);
    network_sources(rule, field, number);
    const std::string where = field + ".dst";
    const PortsId ports = open.empty() ? every_port : intern(open);
    index = 0;
    for (const auto& [text, at] : strings(rule, "dst", field)) {
      const auto named = principal(text, *at, Spot::network_dst, where, index++);
      if (named.principal && !open.empty()) add(out_->network_dst, *named.principal, number, ports);
    }
  }

  // -- ssh rules -----------------------------------------------------------------------------------------------------------

  struct ReadRule {
    SshRule rule;
    const Value* at = nullptr;
    std::string field;
    std::vector<Principal> src, dst;
    std::vector<std::string> users;
    bool nonroot = false;
  };

  void ssh() {
    const Value* all = section("ssh", Kind::array);
    if (all == nullptr) return;
    for (std::size_t i = 0; i < all->items.size(); i++) {
      const Value& item = all->items[i];
      std::string field = "ssh[" + std::to_string(i) + "]";
      if (item.kind != Kind::object) wrong_kind(item, field, "an object");
      else ssh_rule(item, std::move(field));
    }
    // "Most restrictive first": every check rule before every accept rule, whatever the file's order.
    std::stable_partition(rules_.begin(), rules_.end(), [](const ReadRule& r) { return r.rule.verdict == Outcome::check; });
    for (auto& read : rules_) {
      const auto number = static_cast<std::uint32_t>(out_->ssh.size());
      for (const auto& p : read.src) add(out_->ssh_src, p, number);
      for (const auto& p : read.dst) add(out_->ssh_dst, p, number);
      for (const auto& name : read.users) out_->ssh_users[name].add(number);
      if (read.nonroot) out_->ssh_nonroot.add(number);
      out_->ssh.push_back(std::move(read.rule));
    }
  }

  void ssh_rule(const Value& value, std::string rule_field) {
    ReadRule read;
    read.at = &value;
    read.field = std::move(rule_field);
    const std::string& field = read.field;
    read.rule.line = value.line;
    read.rule.column = value.column;
    static constexpr std::array<std::string_view, 9> known{"action",    "src",        "dst",      "users",          "checkPeriod",
                                                           "acceptEnv", "srcPosture", "recorder", "enforceRecorder"};
    refuse_unknown(value, field, known, "an ssh rule");
    refuse_later(value, field, {"checkPeriod", "srcPosture"});

    std::string_view verb;
    if (action(value, field, verb)) {
      const Value& at = value.find("action")->value;
      if (verb == "check") problem(at, field + ".action", "action \"check\" is " + std::string{not_yet}, "only \"accept\" is");
      else if (verb != "accept") problem(at, field + ".action", json_quoted(verb) + " is not a valid action", "\"accept\"");
    }

    principals(value, "src", Spot::ssh_src, field, read.src);
    principals(value, "dst", Spot::ssh_dst, field, read.dst);
    combinations(value, read);
    user_names(value, read);

    std::size_t index = 0;
    for (const auto& [text, at] : strings(value, "acceptEnv", field)) {
      const std::string where = field + ".acceptEnv[" + std::to_string(index++) + "]";
      if (text.empty()) problem(*at, where, "acceptEnv values cannot be empty", "\"LANG\", \"GIT_*\", \"CUSTOM_VAR_?\"");
      else read.rule.accept_env.emplace_back(text);
    }
    recorder(value, read);
    rules_.push_back(std::move(read));
  }

  void principals(const Value& value, std::string_view name, Spot place, const std::string& field, std::vector<Principal>& out) {
    const std::string where = field + "." + std::string{name};
    std::size_t index = 0;
    for (const auto& [text, at] : strings(value, name, field))
      if (auto named = principal(text, *at, place, where, index++); named.principal) out.push_back(std::move(*named.principal));
  }

  /// Sources and destinations that may not stand in one rule (headscale hscontrol/policy/v2/types.go, after the service's answers).
  void combinations(const Value& value, const ReadRule& read) {
    if (read.src.empty()) return;  // matches nobody
    const auto has = [&](What what) { return std::any_of(read.src.begin(), read.src.end(), [&](const Principal& p) { return p.what == what; }); };
    const bool tags = has(What::tag) || has(What::tagged);
    const Member* dst = value.find("dst");
    for (const auto& p : read.dst) {
      const auto refuse = [&](std::string message, std::string hint) { problem(dst->value, read.field + ".dst", std::move(message), std::move(hint)); };
      if (p.what == What::user) {
        const bool same = std::all_of(read.src.begin(), read.src.end(), [&](const Principal& s) { return s.what == What::user && s.name == p.name; });
        if (tags) refuse("tags in SSH source cannot access user-owned devices", "tags may reach tags");
        else if (!same) refuse("users in dst are only allowed from the same user", "write autogroup:self for everybody's own devices");
      } else if (p.what == What::self && tags) {
        refuse("autogroup:self destination requires source to contain only users or groups, not tags or autogroup:tagged", "split the rule");
      } else if (p.what == What::member && tags) {
        refuse("tags in SSH source cannot access autogroup:member (user-owned devices)", "split the rule");
      }
    }
  }

  void user_names(const Value& value, ReadRule& read) {
    const std::string field = read.field + ".users";
    const Member* m = value.find("users");
    if (m == nullptr || m->value.kind == Kind::null || (m->value.kind == Kind::array && m->value.items.empty())) {
      problem(m == nullptr ? value : m->value, field, "users must be specified", "\"users\": [\"autogroup:nonroot\"]");
      return;
    }
    std::size_t index = 0;
    for (const auto& [raw, at] : strings(m->value, field)) {
      const std::string where = field + "[" + std::to_string(index++) + "]";
      const auto text = trimmed(raw);
      constexpr std::string_view localpart = "localpart:*@";
      if (text.empty() || text == "*") {
        problem(*at, where, "user " + json_quoted(text) + " is not valid",
                text.empty() ? "" : "autogroup:nonroot is everybody but root; name root beside it if it is meant");
      } else if (text.substr(0, localpart.size()) == localpart && text.size() > localpart.size()) {
        problem(*at, where, json_quoted(text) + " is " + std::string{not_yet}, "name the users");
      } else if (text == "autogroup:nonroot") {
        read.nonroot = true;
      } else {
        // The service takes any other word as a name, group:x too. No such account can exist: it denies, and we say so.
        if (!is_mappable_user_name(text) && !is_foreign_user_name(text))
          warnings_.add(at->line, at->column, where, json_quoted(text) + " can never be the name of a local account", "nobody is let in as it");
        read.users.emplace_back(text);
      }
    }
  }

  void recorder(const Value& value, ReadRule& read) {
    const std::string field = read.field + ".recorder";
    const auto tags = strings(value, "recorder", read.field);
    std::size_t index = 0;
    for (const auto& [raw, at] : tags) {
      const std::string where = field + "[" + std::to_string(index++) + "]";
      const auto text = trimmed(raw);
      if (text.substr(0, 4) != "tag:") problem(*at, where, "invalid recorder " + json_quoted(text), "\"recorder\": [\"tag:recorder\"]");
      else if (tags_.find(text) == tags_.end()) problem(*at, where, "tag not found: " + json_quoted(text), "define it in tagOwners");
      else if (index > 1) problem(*at, where, "a rule takes one recorder tag", "give all recorder nodes the same tag");
      else read.rule.recorder_tag = text;
    }
    const Member* enforce = value.find("enforceRecorder");
    if (enforce == nullptr || enforce->value.kind == Kind::null) return;
    if (enforce->value.kind != Kind::boolean) return wrong_kind(enforce->value, read.field + ".enforceRecorder", "true or false");
    read.rule.enforce_recorder = enforce->value.boolean;
    // The service takes it and records nothing. Whoever wrote it means that nothing goes unrecorded, so it is better said now.
    if (enforce->value.boolean && tags.empty())
      problem(enforce->value, read.field + ".enforceRecorder", "enforceRecorder without a recorder", "add \"recorder\": [\"tag:recorder\"]");
  }

  // -- warnings ------------------------------------------------------------------------------------------------------------

  /// The network rules that could take some node which `p` names. Says no only where no network can make it yes.
  struct Overlap {
    const Compiled& policy;
    const Side& side;
    bool check_port;
    RuleSet always, any_user, any_tag;
    StringMap<RuleSet> known = {};

    Overlap(const Compiled& c, const Side& s, bool with_port)
        : policy{c}, side{s}, check_port{with_port}, always{c.network_rules}, any_user{c.network_rules}, any_tag{c.network_rules} {
      const auto open = is_open();
      s.everyone.add_to(always, open);
      s.prefixes.add_all_to(always, open);
      any_user |= always;
      any_tag |= always;
      for (const auto* list : {&s.member, &s.self}) list->add_to(any_user, open);
      for (const auto& [name, list] : s.users) list.add_to(any_user, open);
      for (const auto& list : s.groups) list.add_to(any_user, open);
      s.tagged.add_to(any_tag, open);
      for (const auto& [name, list] : s.tags) list.add_to(any_tag, open);
    }
    std::function<bool(PortsId)> is_open() const {
      if (!check_port) return [](PortsId) { return true; };
      return [this](PortsId id) { return policy.opens(id, 22); };
    }
    void add_user(RuleSet& set, const std::string& login) const {
      const auto open = is_open();
      if (const auto it = side.users.find(login); it != side.users.end()) it->second.add_to(set, open);
      if (const auto it = policy.groups_of.find(login); it != policy.groups_of.end())
        for (const auto group : it->second) side.groups[group].add_to(set, open);
    }
    const RuleSet& of(const Principal& p, const std::vector<std::vector<std::string>>& group_members) {
      if (p.what == What::tag || p.what == What::tagged) return any_tag;
      if (p.what != What::user && p.what != What::group) return any_user;
      if (const auto it = known.find(p.name); it != known.end()) return it->second;
      RuleSet set = always;
      for (const auto* list : {&side.member, &side.self}) list->add_to(set, is_open());
      if (p.what == What::user) add_user(set, p.name);
      else
        for (const auto& login : group_members[policy.groups.find(p.name)->second]) add_user(set, login);
      return known.emplace(p.name, std::move(set)).first->second;
    }
  };

  void warn_of_unreachable() {
    const Member* ssh = root_.find("ssh");
    if (ssh == nullptr || rules_.empty()) return;
    if (out_->network_rules == 0) {
      warnings_.add(ssh->line, ssh->column, "ssh", "the file has no acl and no grant, so nothing opens port 22",
                    "\"grants\": [{\"src\": [\"autogroup:member\"], \"dst\": [\"tag:server\"], \"ip\": [\"tcp:22\"]}]");
      return;
    }
    Overlap src{*out_, out_->network_src, false};
    Overlap dst{*out_, out_->network_dst, true};
    for (const auto& read : rules_) {
      if (read.src.empty() || read.dst.empty()) continue;
      RuleSet from{out_->network_rules}, to{out_->network_rules};
      for (const auto& p : read.src) from |= src.of(p, group_members_);
      for (const auto& p : read.dst) to |= dst.of(p, group_members_);
      if (RuleSet::first_common(from, to) < 0)
        warnings_.add(read.at->line, read.at->column, read.field, "no acl or grant opens port 22 for this rule", "nobody can reach it");
    }
  }

  const Value& root_;
  Problems& problems_;
  Problems& warnings_;
  std::shared_ptr<Compiled> out_;
  std::vector<std::vector<std::string>> group_members_;  // by group number
  StringMap<Prefix> hosts_;
  StringMap<bool> tags_;
  std::map<Ports, PortsId> port_ids_;
  std::vector<ReadRule> rules_;
};

}  // namespace

Expected<Policy, std::vector<Problem>> Policy::load(std::string_view text, std::string file_name, const LoadOptions&) {
  Problems problems{file_name};
  Problems warnings{std::move(file_name)};
  const auto root = hujson::parse(text, problems);
  if (!root) return Unexpected{problems.take()};
  auto compiled = Loader{*root, problems, warnings}.run();
  if (!problems.empty() || compiled == nullptr) return Unexpected{problems.take()};
  compiled->warnings = warnings.take();
  return Policy{std::move(compiled)};
}

}  // namespace postern::auth::policy
