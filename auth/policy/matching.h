#pragma once

#include "auth/policy/compiled.h"
#include "base/node.h"

#include <span>
#include <string>
#include <string_view>

// One principal against one node, as people read a rule: for explain() and the file's own tests. decide() has lists instead; that both
// are of one opinion is tested over generated policies.
namespace postern::auth::policy {

/// Has a user, of this network or of another.
inline bool has_user(const Node& node) noexcept { return !node.tagged() && !node.login.empty(); }
/// autogroup:member: "users who are direct members of the tailnet" (tailscale.com/kb/1396).
inline bool is_member(const Node& node) noexcept { return has_user(node) && !node.shared; }

/// A login's parts: "alice@example.com" -> "example.com", "alice".
inline std::string_view domain_of(std::string_view login) { return login.substr(std::min(login.size(), login.find('@') + 1)); }
inline std::string_view localpart_of(std::string_view login) { return login.substr(0, login.find('@')); }

/// The user's own devices. Neither end may be tagged: who tags a device gives it away.
inline bool same_user(const Node& a, const Node& b) noexcept { return has_user(a) && has_user(b) && a.login == b.login; }

/// `addresses`: those of `node` that a rule's prefixes are held against. `own`: the other end is a device of the same user.
bool takes(const Compiled& policy, const Principal& principal, const Node& node, std::span<const Address> addresses, bool own);

/// The rules whose `side` takes `node`. `addresses`: those of the node that the rules' prefixes are held against; `own`: the
/// other side is a device of the same user.
template <class Addresses, class IsOpen>
RuleSet rules_for(const Compiled& policy, const Side& side, std::size_t rules, const Node& node, const Addresses& addresses, bool own, const IsOpen& is_open) {
  RuleSet set{rules};
  side.everyone.add_to(set, is_open);
  if (node.tagged()) {  // a tagged node has no user, whatever else is known of it
    side.tagged.add_to(set, is_open);
    for (const auto& tag : node.tags)
      if (const auto it = side.tags.find(tag); it != side.tags.end()) it->second.add_to(set, is_open);
  } else if (has_user(node)) {
    if (!node.shared) side.member.add_to(set, is_open);
    if (own) side.self.add_to(set, is_open);
    if (const auto it = side.users.find(node.login); it != side.users.end()) it->second.add_to(set, is_open);
    if (const auto it = side.domains.find(domain_of(node.login)); it != side.domains.end()) it->second.add_to(set, is_open);
    if (const auto it = policy.groups_of.find(node.login); it != policy.groups_of.end())
      for (const auto group : it->second) side.groups[group].add_to(set, is_open);
  }
  for (const Address& address : addresses) side.prefixes.add_to(set, address, is_open);
  for (const auto& [number, list] : side.sets) {
    const AddressRanges& ranges = policy.sets[number];
    if (std::any_of(addresses.begin(), addresses.end(), [&](const Address& a) { return ranges.contains(a); })) list.add_to(set, is_open);
  }
  return set;
}

/// The addresses of question.destination that a network rule's prefixes are held against. A packet filter sees the address that was dialled;
/// where we do not know it, it has at least the source's family.
std::vector<Address> dialled(const Question& question);

/// The first of `principals` that takes it, or nullptr.
const Principal* first_taking(const Compiled& policy, const std::vector<Principal>& principals, const Node& node, std::span<const Address> addresses, bool own);

/// As a rule writes it: "group:eng", "user:*@example.com".
std::string text_of(const Principal& principal);

/// What lets `ssh_user` in by a rule's `users` ("root", "autogroup:nonroot", "localpart:*@example.com"); empty: nothing does.
std::string user_by(const SshRule& rule, const Node& source, std::string_view ssh_user, std::optional<std::uint32_t> uid);

/// Of a device of which nothing is known nobody can say whether it meets a posture. Where a rule that asks for one would decide, such a device is
/// denied: skipping the rule, as for a device that does not meet it, could lead to one that asks for less.
inline bool postures_unknown(const Postures& postures, const Node& source) { return !postures.empty() && source.attributes.empty(); }

/// Whether `source` meets one of the postures, or none is asked for.
bool postures_hold(const Compiled& policy, const Postures& postures, const std::map<std::string, Attribute>& attributes);

}  // namespace postern::auth::policy
