#pragma once

#include "auth/policy/policy.h"

#include <array>
#include <cstdint>
#include <functional>
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
  /// The lowest number in both, or -1.
  static long first_common(const RuleSet& a, const RuleSet& b) noexcept;
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
  bool empty() const noexcept { return numbers_.empty() && words_.empty(); }

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

/// What a rule can name on one side. `name` of a user, group or tag; `prefix` of an address.
enum class What { everyone, member, tagged, self, user, group, tag, prefix };
struct Principal {
  What what = What::everyone;
  std::string name = {};
  Prefix prefix = {};
};

/// One side (src or dst) of the ssh rules, or of the network rules.
struct Side {
  PortedRules everyone, member, tagged, self;
  StringMap<PortedRules> users, tags;
  std::vector<PortedRules> groups;  ///< by group number
  PrefixRules prefixes;

  void finish(std::size_t rules);
};

struct SshRule {
  unsigned line = 0;
  unsigned column = 0;
  Outcome verdict = Outcome::accept;
  std::vector<std::string> accept_env;
  std::string recorder_tag;
  bool enforce_recorder = false;
};

struct Compiled {
  std::string file;

  StringMap<std::uint32_t> groups;                  ///< "group:eng" -> its number
  StringMap<std::vector<std::uint32_t>> groups_of;  ///< login -> the groups it is in

  std::vector<SshRule> ssh;  ///< in the order of evaluation: check before accept, then as in the file
  Side ssh_src, ssh_dst;
  StringMap<RuleList> ssh_users;  ///< names as a rule writes them; "root" only from here
  RuleList ssh_nonroot;           ///< rules with autogroup:nonroot

  std::size_t network_rules = 0;  ///< acls and grants that say something of tcp
  Side network_src, network_dst;
  std::vector<Ports> ports;  ///< by PortsId; [every_port] is unused

  std::vector<Problem> warnings;

  bool opens(PortsId id, std::uint16_t port) const noexcept {
    if (id == every_port) return true;
    for (const auto& range : ports[id])
      if (range.first <= port && port <= range.last) return true;
    return false;
  }
};

}  // namespace postern::auth::policy
