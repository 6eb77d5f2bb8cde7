// Policy::load: from HuJSON to what decide() looks up.
//
// Every member is read by name, and what is left over is a problem: a member that nobody read could be one that restricts access.
// Sentences in quotes that other tools know are those of the real service (research/tailscale-ssh.md section 3.5).
#include "auth/policy/reading.h"
#include "base/go_duration.h"

#include <algorithm>
#include <map>
#include <utility>

namespace postern::auth::policy {
namespace {

using hujson::Kind;
using hujson::Member;
using hujson::Problems;
using hujson::Value;
using Text = Reading::Text;

constexpr std::chrono::hours standard_check_period{12};
constexpr std::chrono::hours longest_check_period{168};
/// ipsets within each other. Nobody needs 5; a chain of thousands would use up the stack.
constexpr unsigned deepest_ipset = 32;
/// Ranges of addresses in all ipsets together: sets that name each other multiply.
constexpr std::size_t most_ranges = 200'000;

std::string indexed(std::string_view name, std::size_t i) { return std::string{name} + "[" + std::to_string(i) + "]"; }

class Loader {
 public:
  Loader(const Value& root, Problems& problems, Problems& warnings, const LoadOptions& options)
      : out_{std::make_shared<Compiled>()}, r_{root, problems, warnings, options, *out_} {
    out_->file = problems.file();
    out_->ports.emplace_back();  // every_port
  }

  std::shared_ptr<Compiled> run() {
    if (r_.root.kind != Kind::object) {
      r_.wrong_kind(r_.root, "", "an object");
      return nullptr;
    }
    sections();
    groups();
    hosts();
    tag_owners();
    postures();
    ipsets();
    for (auto* side : {&out_->ssh_src, &out_->ssh_dst, &out_->network_src, &out_->network_dst, &out_->any_src, &out_->any_dst, &out_->rules_src, &out_->rules_dst})
      side->groups.resize(out_->groups.size());
    network();
    ssh();
    check_other_sections(r_);
    read_tests(r_);
    for (auto* lists : {&out_->ssh_users, &out_->ssh_localparts})
      for (auto& [name, list] : *lists) list.finish(out_->ssh.size());
    out_->ssh_nonroot.finish(out_->ssh.size());
    out_->ssh_own_node.finish(out_->ssh.size());
    for (auto* side : {&out_->ssh_src, &out_->ssh_dst}) side->finish(out_->ssh.size());
    for (auto* side : {&out_->network_src, &out_->network_dst, &out_->any_src, &out_->any_dst}) side->finish(out_->network.size());
    for (auto* side : {&out_->rules_src, &out_->rules_dst}) side->finish(out_->grants_with_rules.size());
    if (r_.problems.empty()) warn_of_unreachable();
    return out_;
  }

 private:
  void sections() {
    // From nodeAttrs on they say nothing of who may log in: other_sections.cpp looks at their form.
    static constexpr std::array<std::string_view, 18> known{"groups",   "hosts",     "tagOwners",     "acls",    "grants",              "ssh",         "tests",         "sshTests",
                                                            "postures", "defaultSrcPosture", "ipsets", "nodeAttrs", "autoApprovers", "derpMap", "randomizeClientPort", "disableIPv4",
                                                            "OneCGNATRoute", "extraDNSRecords"};
    r_.check_members(r_.root, "", known, "a policy");
  }

  // -- names ---------------------------------------------------------------------------------------------------------------

  void groups() {
    const Value* all = r_.section("groups", Kind::object);
    if (all == nullptr) return;
    for (const auto& m : all->members) {
      const std::string field = "groups[" + json_quoted(m.name) + "]";
      if (m.name.substr(0, 6) != "group:" || m.name.size() == 6)
        r_.problem(m, field, "group names must start with 'group:'", "\"group:eng\": [\"alice@example.com\"]");
      const auto number = static_cast<std::uint32_t>(out_->groups.size());
      out_->groups.emplace(m.name, number);
      auto& members = out_->group_members.emplace_back();
      for (const auto& [raw, at] : r_.strings(m.value, field)) {
        const auto text = trimmed(raw);
        if (text.substr(0, 6) == "group:") {
          r_.problem(*at, field, json_quoted(text) + ": group members cannot be recursive", "name its users here");
        } else if (!is_login(text)) {
          r_.problem(*at, field, json_quoted(text) + ": group members must be users", "alice@example.com");
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
    const Value* all = r_.section("hosts", Kind::object);
    if (all == nullptr) return;
    for (const auto& m : all->members) {
      const std::string field = "hosts[" + json_quoted(m.name) + "]";
      const bool has_sign = m.name.find_first_of(":@*/ \t") != std::string::npos;
      if (m.name.empty() || has_sign || Address::parse(m.name)) {
        r_.problem(m, field, json_quoted(m.name) + " is not a valid host name", "a short name without \":\", \"@\", \"*\", \"/\" or blanks");
        continue;
      }
      if (m.value.kind != Kind::string) {
        r_.wrong_kind(m.value, field, "a string");
        continue;
      }
      if (const auto prefix = Prefix::parse(trimmed(m.value.text))) out_->hosts.emplace(m.name, *prefix);
      else r_.problem(m.value, field, json_quoted(m.value.text) + " is not an IP address or prefix", "100.64.0.16 or 10.0.0.0/24");
    }
  }

  void tag_owners() {
    const Value* all = r_.section("tagOwners", Kind::object);
    if (all == nullptr) return;
    for (const auto& m : all->members) out_->tags.emplace(m.name, true);
    for (const auto& m : all->members) {
      const std::string field = "tagOwners[" + json_quoted(m.name) + "]";
      if (const auto wrong = problem_of_tag(m.name); !wrong.empty()) r_.problem(m, field, std::string{wrong}, "\"tag:server\"");
      for (const auto& [raw, at] : r_.strings(m.value, field)) {
        const auto text = trimmed(raw);
        if (text.substr(0, 4) == "tag:") {
          if (!r_.has_tag(text)) r_.problem(*at, field, "tag not found: " + json_quoted(text), "define it in tagOwners");
        } else if (text.substr(0, 6) == "group:") {
          if (!r_.has_group(text) && text.find('@') == std::string_view::npos)
            r_.problem(*at, field, "group not found: " + json_quoted(text), "define it in groups");
        } else if (text.substr(0, 10) != "autogroup:" && text.substr(0, 7) != "user:*@" && !is_login(text)) {
          r_.problem(*at, field, json_quoted(text) + " cannot own a tag", "a user, group, tag or autogroup");
        }
      }
    }
  }

  void postures() {
    if (const Value* all = r_.section("postures", Kind::object); all != nullptr) {
      for (const auto& m : all->members) {
        const std::string field = "postures[" + json_quoted(m.name) + "]";
        if (m.name.substr(0, 8) != "posture:" || m.name.size() == 8)
          r_.problem(m, field, "posture names must start with 'posture:'", "\"posture:latestMac\": [\"node:os == 'macos'\"]");
        r_.posture_numbers.emplace(m.name, static_cast<std::uint32_t>(out_->postures.size()));
        Posture& posture = out_->postures.emplace_back();
        posture.name = m.name;
        std::size_t index = 0;
        for (const auto& [text, at] : r_.strings(m.value, field)) {
          const std::string where = field + "[" + std::to_string(index++) + "]";
          auto parsed = parse_posture_condition(text);
          if (parsed.condition) posture.conditions.push_back(std::move(*parsed.condition));
          else r_.problem(*at, where, "invalid posture condition " + json_quoted(text) + ": " + parsed.error, "\"node:tsVersion >= '1.40'\"");
        }
        // An empty one would hold for everybody; nobody means that by naming it in a rule.
        if (index == 0 && m.value.kind == Kind::array) r_.problem(m.value, field, "a posture must have a condition", "\"node:os == 'macos'\"");
      }
    }
    const Member* standard = Reading::find(r_.root, "defaultSrcPosture");
    if (standard == nullptr) return;
    std::size_t index = 0;
    for (const auto& [raw, at] : r_.strings(standard->value, "defaultSrcPosture")) {
      const std::string where = indexed("defaultSrcPosture", index++);
      if (const auto it = r_.posture_numbers.find(trimmed(raw)); it != r_.posture_numbers.end()) r_.default_postures.push_back(it->second);
      else r_.problem(*at, where, "posture not found: " + json_quoted(trimmed(raw)), "define it in postures");
    }
  }

  // -- ipsets: tailscale.com/kb/1387/ipsets --------------------------------------------------------------------------------

  void ipsets() {
    const Value* all = r_.section("ipsets", Kind::object);
    if (all == nullptr) return;
    StringMap<const Member*> defined;
    for (const auto& m : all->members) {
      if (m.name.substr(0, 6) != "ipset:" || m.name.size() == 6)
        r_.problem(m, "ipsets[" + json_quoted(m.name) + "]", "ipset names must start with 'ipset:'", "\"ipset:office\": [\"10.1.0.0/16\"]");
      defined.emplace(m.name, &m);
    }
    StringMap<bool> open;
    for (const auto& m : all->members) ipset(m, defined, open, 1);
  }

  /// Sets name each other in any order. False when this one is already being read: a cycle.
  bool ipset(const Member& m, const StringMap<const Member*>& defined, StringMap<bool>& open, unsigned depth) {
    if (r_.ipsets.find(m.name) != r_.ipsets.end()) return true;
    if (!open.emplace(m.name, true).second) return false;
    const std::string field = "ipsets[" + json_quoted(m.name) + "]";
    AddressRanges set;
    std::size_t index = 0;
    for (const auto& [raw, at] : r_.strings(m.value, field)) {
      const std::string where = field + "[" + std::to_string(index++) + "]";
      auto text = trimmed(raw);
      bool remove = false;
      for (const std::string_view verb : {"add ", "remove "}) {
        if (text.substr(0, verb.size()) != verb) continue;
        remove = verb == "remove ";
        text = trimmed(text.substr(verb.size()));
        break;
      }
      AddressRanges named;
      const auto host = out_->hosts.find(text.substr(0, 5) == "host:" ? text.substr(5) : text);
      if (text == "autogroup:internet") continue;  // no address of a node is in it
      if (text.substr(0, 6) == "ipset:") {
        const auto other = defined.find(text);
        if (other == defined.end()) {
          r_.problem(*at, where, "ipset not found: " + json_quoted(text), "define it in ipsets");
        } else if (depth == deepest_ipset) {
          r_.problem(*at, where, "ipsets within each other, more than " + std::to_string(deepest_ipset) + " deep", "name the addresses here");
        } else if (!ipset(*other->second, defined, open, depth + 1)) {
          r_.problem(*at, where, "ipsets cannot be circular: " + json_quoted(text), "one of them must not name the other");
        } else if (ranges_ += out_->sets[r_.ipsets.find(text)->second].size(); ranges_ <= most_ranges) {
          named = out_->sets[r_.ipsets.find(text)->second];
        }
      } else if (const auto prefix = Prefix::parse(text)) {
        named.add(*prefix);
      } else if (const auto range = parse_address_range(text)) {
        named = *range;
      } else if (host != out_->hosts.end()) {
        named.add(host->second);
      } else {
        r_.problem(*at, where, json_quoted(raw) + " cannot be in an ipset", "\"10.0.0.0/8\", \"add ipset:other\", \"remove host:name\"; no users, groups or tags");
      }
      if (remove) set.remove(named);
      else set.add(named);
      if (++ranges_ <= most_ranges) continue;
      if (!std::exchange(ranges_told_, true)) r_.problem(*at, where, "the ipsets hold too many addresses", "at most " + std::to_string(most_ranges) + " ranges in all of them");
      break;
    }
    r_.ipsets.emplace(m.name, static_cast<std::uint32_t>(out_->sets.size()));
    out_->sets.push_back(std::move(set));
    return true;
  }

  // -- lists for decide() --------------------------------------------------------------------------------------------------

  void add(Side& side, const Principal& principal, std::uint32_t rule, PortsId ports = every_port) {
    switch (principal.what) {
      case What::everyone: return side.everyone.add(rule, ports);
      case What::member: return side.member.add(rule, ports);
      case What::tagged: return side.tagged.add(rule, ports);
      case What::self: return side.self.add(rule, ports);
      case What::user: return side.users[principal.name].add(rule, ports);
      case What::domain: return side.domains[principal.name].add(rule, ports);
      case What::group: return side.groups[out_->groups.find(principal.name)->second].add(rule, ports);
      case What::tag: return side.tags[principal.name].add(rule, ports);
      case What::prefix: return side.prefixes.at(principal.prefix).add(rule, ports);
      case What::set: return side.sets[principal.set].add(rule, ports);
      case What::nobody: return;
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

  std::vector<Principal> principals(const Value& rule, std::string_view name, Spot spot, const std::string& field) {
    const std::string where = field + "." + std::string{name};
    std::vector<Principal> found;
    std::size_t index = 0;
    for (const auto& [text, at] : r_.strings(rule, name, field))
      if (auto named = r_.principal(text, *at, spot, where, index++)) found.push_back(std::move(*named));
    return found;
  }

  /// `action` of a rule. False (with a problem) when it is none that we could take.
  bool action(const Value& rule, const std::string& field, std::string_view& verb) {
    const Member* m = Reading::find(rule, "action");
    if (m != nullptr && m->value.kind != Kind::null && m->value.kind != Kind::string) {
      r_.wrong_kind(m->value, field + ".action", "a string");
      return false;
    }
    verb = m == nullptr ? std::string_view{} : trimmed(m->value.text);
    if (verb.empty()) r_.problem(m == nullptr ? rule : m->value, field + ".action", "action must be specified", "\"action\": \"accept\"");
    return !verb.empty();
  }

  // -- network rules -------------------------------------------------------------------------------------------------------

  void network() {
    // Neither is there: the service lets everybody reach everything. An empty one opens nothing.
    for (const std::string_view name : {"acls", "grants"}) {
      const Member* m = Reading::find(r_.root, name);
      if (m != nullptr && m->value.kind != Kind::null) out_->network_is_open = false;
    }
    if (const Value* all = r_.section("acls", Kind::array))
      for (std::size_t i = 0; i < all->items.size(); i++) acl(all->items[i], indexed("acls", i));
    if (const Value* all = r_.section("grants", Kind::array))
      for (std::size_t i = 0; i < all->items.size(); i++) grant(all->items[i], indexed("grants", i));
    const bool tested = !is_absent("tests");
    for (std::size_t number = 0; number < out_->network.size(); number++) {
      const NetworkRule& rule = out_->network[number];
      const auto n = static_cast<std::uint32_t>(number);
      if (rule.session_rules) {
        const auto grant_number = static_cast<std::uint32_t>(out_->grants_with_rules.size());
        out_->grants_with_rules.push_back(n);
        for (const auto& p : rule.src) add(out_->rules_src, p, grant_number);
        for (const auto& d : rule.dst) add(out_->rules_dst, d.who, grant_number);
      }
      if (tested) {
        for (const auto& p : rule.src) add(out_->any_src, p, n);
        for (const auto& d : rule.dst) add(out_->any_dst, d.who, n);
      }
      if (rule.via) continue;
      for (const auto& p : rule.src) add(out_->network_src, p, n);
      for (const auto& d : rule.dst) {
        Ports tcp;
        for (const Open& open : d.opens)
          if (open.protocol == 0 || open.protocol == 6) tcp.push_back(open.ports);
        if (!tcp.empty()) add(out_->network_dst, d.who, n, intern(std::move(tcp)));
      }
    }
  }

  bool is_absent(std::string_view section) const {
    const Member* m = Reading::find(r_.root, section);
    return m == nullptr || is_empty(m->value);
  }

  NetworkRule begin_rule(const Value& value, std::string field) {
    NetworkRule rule;
    rule.line = value.line;
    rule.column = value.column;
    rule.postures = r_.postures(value, field);
    rule.field = std::move(field);
    return rule;
  }

  void acl(const Value& value, const std::string& field) {
    if (value.kind != Kind::object) return r_.wrong_kind(value, field, "an object");
    static constexpr std::array<std::string_view, 7> known{"action", "src", "dst", "proto", "srcPosture", "users", "ports"};
    r_.check_members(value, field, known, "an acl");
    std::string_view verb;
    if (action(value, field, verb) && verb != "accept")
      r_.problem(Reading::find(value, "action")->value, field + ".action", "action=" + json_quoted(verb) + " is not supported", "the only action is \"accept\"");

    NetworkRule rule = begin_rule(value, field);
    std::optional<std::uint16_t> protocol = 0;
    if (const Member* m = Reading::find(value, "proto"); m != nullptr && m->value.kind != Kind::null) {
      if (m->value.kind != Kind::string) {
        r_.wrong_kind(m->value, field + ".proto", "a string");
      } else if (const auto name = trimmed(m->value.text); !name.empty()) {
        protocol = name == "*" ? std::nullopt : Reading::protocol(name);  // left out, it is TCP and UDP; "*" is a grant's word
        if (!protocol) r_.problem(m->value, field + ".proto", json_quoted(name) + " is not a protocol", "tcp, udp, icmp, ... or a number up to 255");
      }
    }
    // "users" and "ports" are the old names of "src" and "dst" (the service still takes them).
    const auto name_of = [&](std::string_view now, std::string_view then) {
      const Member *a = Reading::find(value, now), *b = Reading::find(value, then);
      if (a != nullptr && b != nullptr)
        r_.problem(*b, field + "." + std::string{then}, json_quoted(then) + " is the old name of " + json_quoted(now) + ", and both are here", "merge the two");
      return a == nullptr && b != nullptr ? then : now;
    };
    rule.src = principals(value, name_of("src", "users"), Spot::network_src, field);
    const auto dst = name_of("dst", "ports");
    const std::string where = field + "." + std::string{dst};
    std::size_t index = 0;
    for (const auto& [raw, at] : r_.strings(value, dst, field)) {
      const std::size_t i = index++;
      const auto text = trimmed(raw);
      const auto colon = text.rfind(':');
      const auto after = colon == std::string_view::npos ? text : trimmed(text.substr(colon + 1));
      const auto ports = colon == std::string_view::npos ? std::nullopt : Reading::port_list(after);
      if (!ports) {
        const bool begins_well = !after.empty() && after.front() >= '0' && after.front() <= '9';
        r_.problem(*at, indexed(where, i), "dst=" + json_quoted(text) + ": port range " + json_quoted(after) + (begins_well ? ": invalid ports" : ": invalid first integer"),
                   "a dst of an acl ends with its ports: \"tag:server:22\", \"*:*\", \"host:1-1024,2222\"");
        continue;
      }
      if (!may_have_ports(protocol) && after != "*") {
        r_.problem(*at, indexed(where, i), "this protocol has no ports, only \"*\" can stand there", "tcp, udp and sctp have ports");
        continue;
      }
      auto who = r_.principal(text.substr(0, colon), *at, Spot::network_dst, where, i);
      if (!who || !protocol) continue;
      auto& to = rule.dst.emplace_back(NetworkRule::Destination{std::move(*who), {}});
      for (const PortRange& range : *ports) to.opens.push_back({*protocol, range});
    }
    own_devices(value, dst, field, rule, false);
    out_->network.push_back(std::move(rule));
  }

  static bool may_have_ports(const std::optional<std::uint16_t>& protocol) {
    return !protocol || *protocol == 0 || *protocol == 6 || *protocol == 17 || *protocol == 132;
  }

  /// autogroup:self needs a user at the other end. (The service takes "*" in an acl, not in a grant.)
  void own_devices(const Value& value, std::string_view dst, const std::string& field, const NetworkRule& rule, bool is_grant) {
    const bool self = std::any_of(rule.dst.begin(), rule.dst.end(), [](const auto& d) { return d.who.what == What::self; });
    const bool others = std::any_of(rule.src.begin(), rule.src.end(), [&](const Principal& p) {
      return p.what == What::tag || p.what == What::tagged || p.what == What::prefix || p.what == What::set || (is_grant && p.what == What::everyone);
    });
    if (self && others)
      r_.problem(Reading::find(value, dst)->value, field + "." + std::string{dst}, "autogroup:self can only be used with users, groups, or supported autogroups", "split the rule");
  }

  void grant(const Value& value, const std::string& field) {
    if (value.kind != Kind::object) return r_.wrong_kind(value, field, "an object");
    static constexpr std::array<std::string_view, 6> known{"src", "dst", "ip", "app", "via", "srcPosture"};
    r_.check_members(value, field, known, "a grant");
    const Member* ip = Reading::find(value, "ip");
    const Member* app = Reading::find(value, "app");
    if ((ip == nullptr || is_empty(ip->value)) && (app == nullptr || is_empty(app->value)))
      r_.problem(value, field, "ip and app can not both be empty", "\"ip\": [\"tcp:22\"]");

    NetworkRule rule = begin_rule(value, field);
    std::vector<Open> opens;
    std::size_t index = 0;
    for (const auto& [raw, at] : r_.strings(value, "ip", field)) {
      const std::string where = field + ".ip[" + std::to_string(index++) + "]";
      const auto text = trimmed(raw);
      const auto colon = text.find(':');
      const auto protocol = colon == std::string_view::npos ? std::optional<std::uint16_t>{0} : Reading::protocol(text.substr(0, colon));
      const auto ports = Reading::port_list(trimmed(colon == std::string_view::npos ? text : text.substr(colon + 1)));
      const bool one_port_too_many = colon != std::string_view::npos && !may_have_ports(protocol) && trimmed(text.substr(colon + 1)) != "*";
      if (!protocol || !ports || text.find(',') != std::string_view::npos || one_port_too_many) {
        r_.problem(*at, where, "invalid ip " + json_quoted(text), "\"*\", \"22\", \"1-1024\", \"tcp:22\", \"udp:*\"");
        continue;
      }
      for (const PortRange& range : *ports) opens.push_back({*protocol, range});
    }
    if (app != nullptr && app->value.kind != Kind::null) capabilities(app->value, field + ".app", rule);
    index = 0;
    for (const auto& [raw, at] : r_.strings(value, "via", field)) {
      const std::string where = field + ".via[" + std::to_string(index++) + "]";
      const auto text = trimmed(raw);
      rule.via = true;
      if (text.substr(0, 4) != "tag:") r_.problem(*at, where, "via can only be a tag", "the tag of the routers");
      else if (!r_.has_tag(text)) r_.problem(*at, where, "tag " + json_quoted(text) + " not found", "define it in tagOwners");
    }
    rule.src = principals(value, "src", Spot::network_src, field);
    for (auto& who : principals(value, "dst", Spot::network_dst, field)) {
      const bool everything = who.what == What::prefix && who.prefix.length == 0;
      if (everything) r_.problem(Reading::find(value, "dst")->value, field + ".dst", "dst " + json_quoted(who.name) + ": to allow all IP addresses, use \"*\" or \"autogroup:internet\"");
      if (who.name == "autogroup:internet" && app != nullptr && !is_empty(app->value))
        r_.problem(Reading::find(value, "dst")->value, field + ".dst", "cannot use app grants with autogroup:internet", "split the grant");
      rule.dst.push_back({std::move(who), opens});
    }
    own_devices(value, "dst", field, rule, true);
    certain_ends(value, field, rule);
    out_->network.push_back(std::move(rule));
  }

  /// Session rules narrow what somebody may do: one that holds for people whom we cannot tell would hold for nobody, and so open.
  void certain_ends(const Value& value, const std::string& field, const NetworkRule& rule) {
    if (!rule.session_rules) return;
    const auto unknown = [&](const Principal& p, std::string_view side) {
      if (p.what == What::nobody)
        r_.problem(Reading::find(value, side)->value, field + "." + std::string{side}, "session rules for " + json_quoted(p.name) + " would hold for nobody: who that is is not known here",
                   "name users, groups or tags; or put them into [session_rules] of posternd.toml");
    };
    for (const auto& p : rule.src) unknown(p, "src");
    for (const auto& d : rule.dst) unknown(d.who, "dst");
  }

  void capabilities(const Value& value, const std::string& field, NetworkRule& rule) {
    if (value.kind != Kind::object) return r_.wrong_kind(value, field, "an object");
    for (const auto& m : value.members) {
      const std::string where = field + "[" + json_quoted(m.name) + "]";
      const auto slash = m.name.find('/');
      if (slash == std::string::npos || slash == 0 || slash + 1 == m.name.size() || m.name.find("://") != std::string::npos)
        r_.problem(m, where, "capability name must have the form {domain}/{path}", "\"" + r_.options.session_capability + "\"");
      if (m.value.kind != Kind::array) {
        r_.wrong_kind(m.value, where, "an array of objects");
        continue;
      }
      if (m.name == r_.options.session_capability) rule.session_rules = read_session_rules(m.value, where, r_.problems);
    }
  }

  // -- ssh rules -----------------------------------------------------------------------------------------------------------

  void ssh() {
    const Value* all = r_.section("ssh", Kind::array);
    if (all == nullptr) return;
    for (std::size_t i = 0; i < all->items.size(); i++) {
      const Value& item = all->items[i];
      if (item.kind != Kind::object) r_.wrong_kind(item, indexed("ssh", i), "an object");
      else out_->ssh.push_back(ssh_rule(item, indexed("ssh", i)));
    }
    // "Most restrictive first": every check rule before every accept rule, whatever the file's order.
    std::stable_partition(out_->ssh.begin(), out_->ssh.end(), [](const SshRule& r) { return r.verdict == Outcome::check; });
    for (std::size_t i = 0; i < out_->ssh.size(); i++) {
      const SshRule& rule = out_->ssh[i];
      const auto number = static_cast<std::uint32_t>(i);
      for (const auto& p : rule.src) add(out_->ssh_src, p, number);
      for (const auto& p : rule.dst) add(out_->ssh_dst, p, number);
      for (const auto& name : rule.users) out_->ssh_users[name].add(number);
      for (const auto& domain : rule.localparts) out_->ssh_localparts[domain].add(number);
      if (rule.nonroot) out_->ssh_nonroot.add(number);
      if (reaches_own_node(rule)) out_->ssh_own_node.add(number);
    }
  }

  SshRule ssh_rule(const Value& value, std::string rule_field) {
    SshRule rule;
    rule.line = value.line;
    rule.column = value.column;
    rule.field = std::move(rule_field);
    const std::string& field = rule.field;
    static constexpr std::array<std::string_view, 9> known{"action",    "src",        "dst",      "users",          "checkPeriod",
                                                           "acceptEnv", "srcPosture", "recorder", "enforceRecorder"};
    r_.check_members(value, field, known, "an ssh rule");
    std::string_view verb;
    if (action(value, field, verb)) {
      if (verb == "check") rule.verdict = Outcome::check;
      else if (verb != "accept")
        r_.problem(Reading::find(value, "action")->value, field + ".action", json_quoted(verb) + " is not a valid action", "\"accept\" or \"check\"");
    }
    check_period(value, rule);
    rule.postures = r_.postures(value, field);
    rule.src = principals(value, "src", Spot::ssh_src, field);
    rule.dst = principals(value, "dst", Spot::ssh_dst, field);
    combinations(value, rule);
    user_names(value, rule);
    std::size_t index = 0;
    for (const auto& [text, at] : r_.strings(value, "acceptEnv", field)) {
      const std::string where = indexed(field + ".acceptEnv", index++);
      if (text.empty()) r_.problem(*at, where, "acceptEnv values cannot be empty", "\"LANG\", \"GIT_*\", \"CUSTOM_VAR_?\"");
      else if (text.size() > longest_accept_env) r_.problem(*at, where, "an acceptEnv value is too long", "at most " + std::to_string(longest_accept_env) + " bytes");
      else if (index == most_accept_env + 1) r_.problem(*at, where, "too many acceptEnv values", "at most " + std::to_string(most_accept_env) + " in a rule; a glob takes many names");
      else rule.accept_env.emplace_back(text);
    }
    recorder(value, rule);
    return rule;
  }

  void check_period(const Value& value, SshRule& rule) {
    const std::string where = rule.field + ".checkPeriod";
    if (rule.verdict == Outcome::check) rule.check_period = standard_check_period;
    const Member* m = Reading::find(value, "checkPeriod");
    if (m == nullptr || m->value.kind == Kind::null) return;
    if (m->value.kind != Kind::string) return r_.wrong_kind(m->value, where, "a duration (\"12h\") or \"always\"");
    const auto text = trimmed(m->value.text);
    if (text.empty()) return;
    std::optional<std::chrono::seconds> period;
    if (text != "always") {
      const auto duration = parse_go_duration(text);
      if (!duration.error.empty()) return r_.problem(m->value, where, duration.error, "\"20m\", \"12h\", or \"always\"");
      if (duration.value.count() < 0)
        return r_.problem(m->value, where, "checkPeriod " + go_duration_text(duration.value) + " must be a positive duration", "from 1m to 168h");
      if (duration.value > longest_check_period)
        return r_.problem(m->value, where, "checkPeriod " + go_duration_text(duration.value) + " is above the max (168h)", "from 1m to 168h");
      // Part of a second is none, and none is "always": what is shorter than meant lets in nobody too many.
      if (const auto seconds = std::chrono::floor<std::chrono::seconds>(duration.value); seconds.count() > 0) period = seconds;
    }
    if (rule.verdict == Outcome::check) rule.check_period = period;
    else r_.warnings.add(m->line, m->column, where, "checkPeriod without \"action\": \"check\" does nothing", "");
  }

  /// Sources and destinations that may not stand in one rule (headscale hscontrol/policy/v2/types.go, after the service's answers).
  void combinations(const Value& value, const SshRule& rule) {
    if (rule.src.empty()) return;  // matches nobody
    const auto has = [&](What what) { return std::any_of(rule.src.begin(), rule.src.end(), [&](const Principal& p) { return p.what == what; }); };
    const bool tags = has(What::tag) || has(What::tagged);
    if (tags && rule.verdict == Outcome::check)
      r_.problem(Reading::find(value, "src")->value, rule.field + ".src", "[ssh] \"check\" action does not support tags in src",
                 "a tagged node has nobody who could prove who they are");
    const Member* dst = Reading::find(value, "dst");
    for (const auto& p : rule.dst) {
      const auto refuse = [&](std::string message, std::string hint) { r_.problem(dst->value, rule.field + ".dst", std::move(message), std::move(hint)); };
      if (p.what == What::user) {
        const bool same = std::all_of(rule.src.begin(), rule.src.end(), [&](const Principal& s) { return s.what == What::user && s.name == p.name; });
        if (!same) refuse("users in dst are only allowed from the same user", tags ? "tags may reach tags" : "write autogroup:self for everybody's own devices");
      } else if (p.what == What::self && tags) {
        refuse("autogroup:self destination requires source to contain only users or groups, not tags or autogroup:tagged", "split the rule");
      } else if (p.what == What::member && tags) {
        refuse("tags in SSH source cannot access autogroup:member (user-owned devices)", "split the rule");
      }
    }
  }

  void user_names(const Value& value, SshRule& rule) {
    const std::string field = rule.field + ".users";
    const Member* m = Reading::find(value, "users");
    if (m == nullptr || m->value.kind == Kind::null || (m->value.kind == Kind::array && m->value.items.empty()))
      return r_.problem(m == nullptr ? value : m->value, field, "users must be specified", "\"users\": [\"autogroup:nonroot\"]");
    std::size_t index = 0;
    for (const auto& [raw, at] : r_.strings(m->value, field)) {
      const std::string where = indexed(field, index++);
      const auto text = trimmed(raw);
      constexpr std::string_view localpart = "localpart:*@";
      if (text.empty() || text == "*") {
        r_.problem(*at, where, "user " + json_quoted(text) + " is not valid",
                   text.empty() ? "" : "autogroup:nonroot is everybody but root; name root beside it if it is meant");
      } else if (text.substr(0, localpart.size()) == localpart && text.size() > localpart.size()) {
        const auto domain = text.substr(localpart.size());
        if (r_.domain_is_ours(domain, *at, where, false)) rule.localparts.emplace_back(domain);
      } else if (text == "autogroup:nonroot") {
        rule.nonroot = true;
      } else {
        // The service takes any other word as a name, group:x too. No such account can exist: it denies, and we say so.
        if (!is_mappable_user_name(text) && !is_foreign_user_name(text))
          r_.warnings.add(at->line, at->column, where, json_quoted(text) + " can never be the name of a local account", "nobody is let in as it");
        rule.users.emplace_back(text);
      }
    }
  }

  void recorder(const Value& value, SshRule& rule) {
    const std::string field = rule.field + ".recorder";
    const auto tags = r_.strings(value, "recorder", rule.field);
    std::size_t index = 0;
    for (const auto& [raw, at] : tags) {
      const std::string where = indexed(field, index++);
      const auto text = trimmed(raw);
      if (text.substr(0, 4) != "tag:") r_.problem(*at, where, "invalid recorder " + json_quoted(text), "\"recorder\": [\"tag:recorder\"]");
      else if (!r_.has_tag(text)) r_.problem(*at, where, "tag not found: " + json_quoted(text), "define it in tagOwners");
      else if (index > 1) r_.problem(*at, where, "a rule takes one recorder tag", "give all recorder nodes the same tag");
      else rule.recorder_tag = text;
    }
    const Member* enforce = Reading::find(value, "enforceRecorder");
    if (enforce == nullptr || enforce->value.kind == Kind::null) return;
    if (enforce->value.kind != Kind::boolean) return r_.wrong_kind(enforce->value, rule.field + ".enforceRecorder", "true or false");
    rule.enforce_recorder = enforce->value.boolean;
    // The service takes it and records nothing. Whoever wrote it means that nothing goes unrecorded, so it is better said now.
    if (enforce->value.boolean && tags.empty())
      r_.problem(enforce->value, rule.field + ".enforceRecorder", "enforceRecorder without a recorder", "add \"recorder\": [\"tag:recorder\"]");
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
        : policy{c}, side{s}, check_port{with_port}, always{c.network.size()}, any_user{c.network.size()}, any_tag{c.network.size()} {
      const auto open = is_open();
      s.everyone.add_to(always, open);
      s.prefixes.add_all_to(always, open);
      for (const auto& [number, list] : s.sets) list.add_to(always, open);
      any_user |= always;
      any_tag |= always;
      for (const auto* list : {&s.member, &s.self}) list->add_to(any_user, open);
      for (const auto& [name, list] : s.users) list.add_to(any_user, open);
      for (const auto& [name, list] : s.domains) list.add_to(any_user, open);
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
      if (const auto it = side.domains.find(domain_of(login)); it != side.domains.end()) it->second.add_to(set, open);
    }
    const RuleSet& of(const Principal& p) {
      if (p.what == What::tag || p.what == What::tagged) return any_tag;
      if (p.what != What::user && p.what != What::group) return any_user;
      if (const auto it = known.find(p.name); it != known.end()) return it->second;
      RuleSet set = always;
      for (const auto* list : {&side.member, &side.self}) list->add_to(set, is_open());
      if (p.what == What::user) add_user(set, p.name);
      else
        for (const auto& login : policy.group_members[policy.groups.find(p.name)->second]) add_user(set, login);
      return known.emplace(p.name, std::move(set)).first->second;
    }
  };

  void warn_of_unreachable() {
    const Member* ssh = Reading::find(r_.root, "ssh");
    if (ssh == nullptr || out_->ssh.empty()) return;
    if (out_->network_is_open) {
      r_.warnings.add(ssh->line, ssh->column, "ssh", "the file has neither acls nor grants, so everybody may reach port 22, and the ssh rules alone decide",
                      "\"grants\": [{\"src\": [\"autogroup:member\"], \"dst\": [\"tag:server\"], \"ip\": [\"tcp:22\"]}]");
      return;
    }
    Overlap src{*out_, out_->network_src, false};
    Overlap dst{*out_, out_->network_dst, true};
    for (const auto& rule : out_->ssh) {
      if (rule.src.empty() || rule.dst.empty()) continue;
      RuleSet from{out_->network.size()}, to{out_->network.size()};
      for (const auto& p : rule.src) from |= src.of(p);
      for (const auto& p : rule.dst) to |= dst.of(p);
      if (RuleSet::first_common(from, to) < 0)
        r_.warnings.add(rule.line, rule.column, rule.field, "no acl or grant opens port 22 for this rule", "nobody can reach it");
    }
  }

  std::shared_ptr<Compiled> out_;
  Reading r_;
  std::map<Ports, PortsId> port_ids_;
  std::size_t ranges_ = 0;
  bool ranges_told_ = false;
};

}  // namespace

Expected<Policy, std::vector<Problem>> Policy::load(std::string_view text, std::string file_name, const LoadOptions& options) {
  Problems problems{file_name};
  Problems warnings{std::move(file_name)};
  const auto root = hujson::parse(text, problems);
  if (!root) return Unexpected{problems.take()};
  auto compiled = Loader{*root, problems, warnings, options}.run();
  if (!problems.empty() || compiled == nullptr) return Unexpected{problems.take()};
  compiled->warnings = warnings.take();
  return Policy{std::move(compiled)};
}

}  // namespace postern::auth::policy
