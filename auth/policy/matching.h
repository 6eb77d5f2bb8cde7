#pragma once

#include "auth/policy/compiled.h"
#include "base/node.h"

#include <span>
#include <string>
#include <string_view>

// One principal against one node, as people read a rule: for explain() and the file's own tests. decide() has lists instead; that both
// are of one opinion is tested over generated policies.
namespace postern::auth::policy {

inline bool is_member(const Node& node) noexcept { return !node.tagged() && !node.login.empty(); }

/// The user's own devices. Neither end may be tagged: who tags a device gives it away.
inline bool same_user(const Node& a, const Node& b) noexcept { return is_member(a) && is_member(b) && a.login == b.login; }

/// `addresses`: those of `node` that a rule's prefixes are held against. `own`: the other end is a device of the same user.
bool takes(const Compiled& policy, const Principal& principal, const Node& node, std::span<const Address> addresses, bool own);

/// The addresses of question.destination that a network rule's prefixes are held against. A packet filter sees the address that was dialled;
/// where we do not know it, it has at least the source's family.
std::vector<Address> dialled(const Question& question);

/// The first of `principals` that takes it, or nullptr.
const Principal* first_taking(const Compiled& policy, const std::vector<Principal>& principals, const Node& node, std::span<const Address> addresses, bool own);

/// As a rule writes it: "group:eng", "user:*@example.com".
std::string text_of(const Principal& principal);

/// What lets `ssh_user` in by a rule's `users` ("root", "autogroup:nonroot", "localpart:*@example.com"); empty: nothing does.
std::string user_by(const SshRule& rule, const Node& source, std::string_view ssh_user, std::optional<std::uint32_t> uid);

/// Whether `source` meets one of the postures, or none is asked for.
bool postures_hold(const Compiled& policy, const Postures& postures, const std::map<std::string, Attribute>& attributes);

}  // namespace postern::auth::policy
