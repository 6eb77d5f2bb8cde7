#pragma once

#include "auth/policy/hujson.h"
#include "base/expected.h"
#include "base/node.h"

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace postern::auth::policy {

/// Default name of the app grant that carries SessionRules (setting policy.session_capability).
inline constexpr std::string_view default_session_capability = "postern.internal/cap/ssh";

/// What a session may do, beyond Tailscale's language, which only says who may log in. docs/POLICY.md has the table: name, default,
/// who may widen it.
///
/// They come from app grants (of the policy file, or of whois's CapMap) and from posternd.toml. Every source only narrows: stricter()
/// of two takes from each what is tighter, so the order in which sources are read changes nothing.
struct SessionRules {
  enum class Sftp { full, read_only, none };

  /// Where a forwarding may go. One list for each source that gave one: a target must stand in every one of them. Words:
  /// "host:port", "*:5432", "10.0.0.0/8:*", "[fd7a::1]:8000-8999", "unix:/run/app/*.sock"; an empty list allows nothing.
  /// Both are sorted and unique, so that equal rules compare equal.
  using TargetLists = std::vector<std::vector<std::string>>;

  std::optional<std::string> command;  ///< runs instead of what the client asks for (sshd's ForceCommand); that is in SSH_ORIGINAL_COMMAND
  bool command_conflict = false;       ///< two sources force different commands: nobody can obey both, so nobody logs in (`command` is empty then)
  std::optional<std::chrono::seconds> max_duration;  ///< of the connection, from the login on
  std::optional<std::chrono::seconds> idle_timeout;  ///< no byte either way on any channel
  std::optional<std::uint32_t> max_sessions;         ///< open session channels of the connection
  bool record_input = false;  ///< recordings hold what is typed as well ("i" events)
  Sftp sftp = Sftp::full;
  bool pty = true;
  TargetLists local_forward, remote_forward;  ///< -L, -D, -W and -R; no list: every target
  bool agent_forwarding = true;
  bool x11_forwarding = true;
  /// Names of what an enforceRecorder rule does not shut off ("localForward", "agentForwarding" …): a source that names a forwarding
  /// allows it under such a rule, within its own limits. Sorted, unique.
  std::vector<std::string> named;

  bool operator==(const SessionRules&) const = default;
  /// One "name": value a member that differs from the default, as JSON text: {"sftp", "\"read-only\""}. In the table's order. Forwardings
  /// are arrays of lists (one a source), whoever gave them; "commandConflict" and "named" stand for what no source writes.
  std::vector<std::pair<std::string, std::string>> members() const;
};

// Bounds of values; what is outside is a problem.
inline constexpr std::size_t max_forced_command = 1024;  ///< bytes; a longer one belongs into a script
inline constexpr std::chrono::seconds max_session_limit = std::chrono::hours{24 * 365};
inline constexpr std::uint32_t max_session_count = 10'000;  ///< as limits.sessions_per_connection
inline constexpr std::size_t max_forward_targets = 256;     ///< of one list

/// The stricter of both in every member: commutative, associative, idempotent; SessionRules{} changes nothing. (`named` is what either
/// names: it is what a source may do in spite of enforceRecorder, DESIGN section 1, and the limits of all of them hold there.)
SessionRules stricter(SessionRules a, const SessionRules& b);

/// Reads a capability's value: an array of objects (several narrow each other). Unknown members, wrong kinds and values out of range
/// are problems with their place; `field` is where the value stands ("grants[2].app[\"postern.internal/cap/ssh\"]"). A refused value
/// reads as the default, which is wider: with any problem the result must not be used.
SessionRules read_session_rules(const hujson::Value& value, const std::string& field, hujson::Problems& problems);

/// The same for one object whose members have the names that they have in posternd.toml ("max_duration").
SessionRules read_session_rule_settings(const hujson::Value& object, const std::string& field, hujson::Problems& problems);
/// Those names, in the table's order.
std::vector<std::string> session_rule_settings();

/// The rules that a node's own capability (whois's CapMap) asks for; none where it has none. An error (`doing`: the problem with its place)
/// where it cannot be read: then nobody knows what it forbids.
Expected<SessionRules> capability_rules(const Node& node, const std::string& capability);

}  // namespace postern::auth::policy
