#pragma once

#include "base/address.h"
#include "base/expected.h"
#include "base/node.h"

#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

/// What tailscaled's answers mean. Pure: text in, a value or the reason why not out; no sockets, no clock.
///
/// The fields are those of Tailscale's tailcfg.Node, apitype.WhoIsResponse, ipnstate.Status and ipn.Notify. Of them whois and status are called stable
/// (client/local, 2026-07); the rest is read as narrowly as possible. What is no such answer is Error{EAGAIN}: nothing is known then. A whole
/// answer about a node that cannot be read denies that node, and no word of a node's own (its name, its operating system) makes an answer unreadable.
namespace postern::auth::identity {

/// Bounds on what tailscaled says, in bytes.
inline constexpr std::size_t max_whois_bytes = 1024 * 1024;
inline constexpr std::size_t max_status_bytes = 64 * 1024 * 1024;  ///< about 1 KiB a peer
inline constexpr std::size_t max_bus_line_bytes = 16 * 1024 * 1024;
inline constexpr std::size_t max_netmap_bytes = 64 * 1024 * 1024;  ///< the bus's first line where the network's ssh rules are wanted
inline constexpr std::size_t max_prefs_bytes = 1024 * 1024;
/// Of one capability's JSON, as in the static file. It is read again at each decision.
inline constexpr std::size_t max_whois_capability_bytes = 64 * 1024;
/// Brackets within brackets. Writing JSON out again is recursive in the library.
inline constexpr std::size_t max_tailscaled_nesting = 128;

using WallTime = std::chrono::system_clock::time_point;

/// "2026-12-01T10:00:00.5+01:00" (RFC 3339, as Go writes it). Nothing for Go's zero time and for what is no time.
std::optional<WallTime> read_go_time(std::string_view text);

struct WhoisContext {
  std::string own_id;         ///< this machine's StableID
  bool shared_users = false;  ///< as in TailscaledSettings
  WallTime now;
};
struct WhoisAnswer {
  Node node;
};
/// The body of whois's 200. Error{EACCES, ..., user_message}: it is a node that must not log in. Error{E2BIG}: a capability is too long.
/// `asked`: the address that must be one of the node's own; nothing: it was asked for by the port of tailscaled's proxy.
Expected<WhoisAnswer> read_whois(std::string_view json, const std::optional<Address>& asked, const WhoisContext& context);

struct TailscaledStatus {
  std::string state;  ///< "Running"; see ipn.State
  bool tun = true;    ///< false: userspace networking, where peers appear as 127.0.0.1, and so does this machine
  std::string own_id;
  std::vector<Address> own_addresses;  ///< empty while not Running
  Network network;                     ///< this machine and the peers that it may see; empty while not Running
  std::vector<WallTime> key_expiries;  ///< of peers, also past ones
  std::map<std::string, std::string> dns_names;  ///< by StableID: "server.example.ts.net", where the network has one

  bool running() const { return state == "Running"; }
};
Expected<TailscaledStatus> read_status(std::string_view json, bool shared_users);

/// Of prefs: whether Tailscale SSH is on.
Expected<bool> read_run_ssh(std::string_view json);

/// Of a line of the bus: the same, where it has the preferences.
Expected<std::optional<bool>> read_bus_line(std::string_view json);

/// The network's ssh rules, as compact JSON, of a netmap (`on_bus`: of the bus line that holds one). "{\"rules\":[]}" where the network has none.
/// Nothing: no netmap in it, or one without a word on ssh.
Expected<std::optional<std::string>> read_ssh_policy(std::string_view json, bool on_bus);

}  // namespace postern::auth::identity
