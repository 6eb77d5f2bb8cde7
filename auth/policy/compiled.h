#pragma once

#include "auth/policy/policy.h"
#include "auth/policy/posture.h"
#include "auth/policy/ranges.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

// What a policy file becomes. Rules are numbers; for each kind of principal there is the list of the rules that name it. A
// decision is then a handful of look-ups, a few "or"s and one "and" of bit sets, whatever the number of rules: with 10,000
// rules the sets have 157 words.
namespace postern::auth::policy {

struct StringHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const noexcept { return std::hash<std::string_view>{}(text); }
};
template <class T>
using StringMap = std::unordered_map<std::string, T, StringHash, std::equal_to<>>;

/// A user name outside ASCII that a directory may hold (LDAP, AD): letters, digits and signs of any script, but nothing that is
/// blank, invisible, or changes the direction of what follows. Such a name passes only where a rule writes it out.
bool is_foreign_user_name(std::string_view name) noexcept;

/// A set of rule numbers below a fixed count.
class RuleSet {
 public:
  explicit RuleSet(std::size_t rules) : words_((rules + 63) / 64) {}
  void add(std::uint32_t rule) { words_[rule / 64] |= std::uint64_t{1} << (rule % 64); }
  RuleSet& operator|=(const RuleSet& other) noexcept;
  RuleSet& operator&=(const RuleSet& other) noexcept;
  /// The lowest number in both that is not below `from`, or -1.
  static long first_common(const RuleSet& a, const RuleSet& b, std::size_t from = 0) noexcept;
  bool empty() const noexcept;

 private:
  friend class RuleList;
  std::vector<std::uint64_t> words_;
};

/// The rules that name one principal. Kept as numbers when few, as words when many.
class RuleList {
 public:
  void add(std::uint32_t rule);
  void finish(std::size_t rules);
  void add_to(RuleSet& set) const;
  /// Adds those of `later`, whose numbers are not lower than ours. Before finish().
  void append(const RuleList& later);

 private:
  std::vector<std::uint32_t> numbers_;
  std::vector<std::uint64_t> words_;
};

struct PortRange {
  std::uint16_t first = 0;
  std::uint16_t last = 65535;
  auto operator<=>(const PortRange&) const = default;
};
using Ports = std::vector<PortRange>;
using PortsId = std::uint32_t;
inline constexpr PortsId every_port = 0;  ///< of ssh rules, of sources, and of "*"

/// The rules that name one principal, by the ports they open there.
class PortedRules {
 public:
  /// `rule` is not lower than that of the call before.
  void add(std::uint32_t rule, PortsId ports);
  void finish(std::size_t rules);
  template <class IsOpen>
  void add_to(RuleSet& set, const IsOpen& is_open) const {
    for (const auto& [ports, list] : lists_)
      if (is_open(ports)) list.add_to(set);
  }

 private:
  std::vector<std::pair<PortsId, RuleList>> lists_;
};

/// Rules by address prefix: one table for each length that occurs.
class PrefixRules {
 public:
  PortedRules& at(const Prefix& prefix);
  void finish(std::size_t rules);
  template <class IsOpen>
  void add_to(RuleSet& set, const Address& address, const IsOpen& is_open) const {
    for (const auto& table : tables_) {
      if (table.v4 != address.v4()) continue;
      if (const auto it = table.rules.find(key(address, table.length)); it != table.rules.end()) it->second.add_to(set, is_open);
    }
  }
  template <class IsOpen>
  void add_all_to(RuleSet& set, const IsOpen& is_open) const {
    for (const auto& table : tables_)
      for (const auto& [prefix, rules] : table.rules) rules.add_to(set, is_open);
  }

 private:
  using Key = std::array<std::uint8_t, 16>;
  struct KeyHash {
    std::size_t operator()(const Key& k) const noexcept { return std::hash<std::string_view>{}({reinterpret_cast<const char*>(k.data()), k.size()}); }
  };
  struct Table {
    bool v4;
    unsigned length;
    std::unordered_map<Key, PortedRules, KeyHash> rules;
  };
  static Key key(const Address& address, unsigned length) noexcept;
  std::vector<Table> tables_;
};

/// What a rule can name on one side. `name`: what was written; `prefix` of addresses and hosts; `set`: the number of an ipset or range; `nobody`: well-formed words of
/// which this side can know no node (autogroup:internet, users' roles, shared-in users, synced groups).
enum class What { everyone, member, tagged, self, user, domain, group, tag, prefix, set, nobody };
struct Principal {
  What what = What::everyone;
  std::string name = {};
  Prefix prefix = {};
  std::uint32_t set = 0;
};

/// One side (src or dst) of the ssh rules, or of the network rules.
struct Side {
  PortedRules everyone, member, tagged, self;
  StringMap<PortedRules> users, domains, tags;
  std::vector<PortedRules> groups;  ///< by group number
  PrefixRules prefixes;
  std::map<std::uint32_t, PortedRules> sets;  ///< by the number of an ipset or range

  void finish(std::size_t rules);
};

/// Postures of which one must hold, by their numbers; empty: none is asked for.
using Postures = std::vector<std::uint32_t>;

struct SshRule {
  unsigned line = 0;
  unsigned column = 0;
  std::string field;  ///< "ssh[3]"
  Outcome verdict = Outcome::accept;
  std::optional<std::chrono::seconds> check_period;
  std::vector<std::string> accept_env;
  std::string recorder_tag;
  bool enforce_recorder = false;
  Postures postures;
  // As written: for explain() and the file's own tests.
  std::vector<Principal> src, dst;
  std::vector<std::string> users;
  bool nonroot = false;
  std::vector<std::string> localparts;  ///< domains
};

/// A rule with localpart:*@domain and a destination other than autogroup:self lets each of its sources in on the source's own node as well,
/// although that is no destination. Not documented; so does the real service, whose captures ssh-d2 to d12, e5, e6, f3 to f5 show it.
inline bool reaches_own_node(const SshRule& rule) {
  return !rule.localparts.empty() && std::any_of(rule.dst.begin(), rule.dst.end(), [](const Principal& p) { return p.what != What::self; });
}

/// A protocol (IANA number, 0 = all of them) and its ports.
struct Open {
  std::uint16_t protocol = 0;
  PortRange ports;
};

struct NetworkRule {
  unsigned line = 0;
  unsigned column = 0;
  std::string field;  ///< "acls[0]", "grants[2]"
  std::vector<Principal> src;
  struct Destination {
    Principal who;
    std::vector<Open> opens;
  };
  std::vector<Destination> dst;
  Postures postures;
  std::optional<SessionRules> session_rules;  ///< of its app grant
  bool via = false;  ///< only through a router: opens nothing at the node itself
};

/// An entry of `tests`.
struct NetworkTest {
  unsigned line = 0;
  unsigned column = 0;
  std::string field;
  std::string src;
  std::uint16_t protocol = 0;  ///< 0: TCP or UDP
  std::optional<std::map<std::string, Attribute>> attributes;  ///< srcPostureAttrs
  struct Target {
    unsigned line = 0;
    unsigned column = 0;
    std::string field;
    std::string text, host;
    std::uint16_t port = 0;
    bool accept = true;
  };
  std::vector<Target> targets;
};

/// An entry of `sshTests`.
struct SshTest {
  unsigned line = 0;
  unsigned column = 0;
  std::string field;
  std::string src;
  std::vector<std::string> dst;
  std::optional<std::map<std::string, Attribute>> attributes;
  struct Expectation {
    unsigned line = 0;
    unsigned column = 0;
    std::string field;
    std::string user;
    enum class Kind { accept, check, deny } kind = Kind::accept;
  };
  std::vector<Expectation> expectations;
};

struct Compiled {
  std::string file;

  StringMap<std::uint32_t> groups;                        ///< "group:eng" -> its number
  std::vector<std::vector<std::string>> group_members;    ///< by that number
  StringMap<std::vector<std::uint32_t>> groups_of;        ///< login -> the groups it is in
  StringMap<Prefix> hosts;
  StringMap<bool> tags;                                   ///< of tagOwners
  std::vector<Posture> postures;
  std::vector<AddressRanges> sets;  ///< ipsets, and the ranges of rules

  std::vector<SshRule> ssh;  ///< in the order of evaluation: check before accept, then as in the file
  Side ssh_src, ssh_dst;
  StringMap<RuleList> ssh_users;       ///< names as a rule writes them; "root" only from here
  StringMap<RuleList> ssh_localparts;  ///< by domain
  RuleList ssh_nonroot;                ///< rules with autogroup:nonroot
  RuleList ssh_own_node;               ///< rules that let a source in on itself, too: reaches_own_node()

  bool network_is_open = true;  ///< neither acls nor grants in the file: all is open, as in the real service
  std::vector<NetworkRule> network;
  Side network_src, network_dst;  ///< of what opens TCP ports of a node itself
  std::vector<Ports> ports;       ///< by PortsId, of TCP; [every_port] is unused
  Side any_src, any_dst;          ///< of all network rules, whatever they open: for the file's own tests
  std::vector<std::uint32_t> grants_with_rules;  ///< network rules that carry session rules; the sides count them 0, 1, ...
  Side rules_src, rules_dst;

  std::vector<NetworkTest> tests;
  std::vector<SshTest> ssh_tests;
  std::vector<Problem> warnings;

  bool opens(PortsId id, std::uint16_t port) const noexcept {
    if (id == every_port) return true;
    for (const auto& range : ports[id])
      if (range.first <= port && port <= range.last) return true;
    return false;
  }
};

}  // namespace postern::auth::policy
