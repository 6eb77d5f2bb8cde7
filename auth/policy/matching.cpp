#include "auth/policy/matching.h"

#include "auth/policy/reading.h"

#include <algorithm>

namespace postern::auth::policy {

bool takes(const Compiled& policy, const Principal& principal, const Node& node, std::span<const Address> addresses, bool own) {
  switch (principal.what) {
    case What::everyone: return true;
    case What::member: return is_member(node);
    case What::tagged: return node.tagged();
    case What::self: return is_member(node) && own;
    case What::user: return is_member(node) && node.login == principal.name;
    case What::domain: return is_member(node) && domain_of(node.login) == principal.name;
    case What::group: {
      if (!is_member(node)) return false;
      const auto in = policy.groups_of.find(node.login);  // its numbers in rising order
      return in != policy.groups_of.end() && std::binary_search(in->second.begin(), in->second.end(), policy.groups.find(principal.name)->second);
    }
    case What::tag: return std::find(node.tags.begin(), node.tags.end(), principal.name) != node.tags.end();
    case What::prefix: return std::any_of(addresses.begin(), addresses.end(), [&](const Address& a) { return principal.prefix.contains(a); });
    case What::set: return std::any_of(addresses.begin(), addresses.end(), [&](const Address& a) { return policy.sets[principal.set].contains(a); });
    case What::nobody: return false;
  }
  return false;
}

std::vector<Address> dialled(const Question& question) {
  if (question.destination_address) return {*question.destination_address};
  std::vector<Address> out;
  std::copy_if(question.destination.addresses.begin(), question.destination.addresses.end(), std::back_inserter(out),
               [&](const Address& a) { return a.v4() == question.source_address.v4(); });
  return out;
}

const Principal* first_taking(const Compiled& policy, const std::vector<Principal>& principals, const Node& node, std::span<const Address> addresses, bool own) {
  const auto it = std::find_if(principals.begin(), principals.end(), [&](const Principal& p) { return takes(policy, p, node, addresses, own); });
  return it == principals.end() ? nullptr : &*it;
}

std::string text_of(const Principal& principal) {
  switch (principal.what) {
    case What::domain: return "user:*@" + principal.name;
    default: return principal.name;
  }
}

std::string user_by(const SshRule& rule, const Node& source, std::string_view ssh_user, std::optional<std::uint32_t> uid) {
  if (std::find(rule.users.begin(), rule.users.end(), ssh_user) != rule.users.end()) return std::string{ssh_user};
  // uid 0 has many names (toor, "0"): only what a rule writes out reaches it, also where a user's login begins with "root@".
  if (ssh_user == "root" || uid.value_or(1) == 0 || !is_mappable_user_name(ssh_user)) return {};
  if (rule.nonroot) return "autogroup:nonroot";
  if (is_member(source) && localpart_of(source.login) == ssh_user)
    for (const auto& domain : rule.localparts)
      if (domain_of(source.login) == domain) return "localpart:*@" + domain;
  return {};
}

bool postures_hold(const Compiled& policy, const Postures& postures, const std::map<std::string, Attribute>& attributes) {
  return postures.empty() || std::any_of(postures.begin(), postures.end(), [&](std::uint32_t n) { return policy.postures[n].holds(attributes); });
}

}  // namespace postern::auth::policy
