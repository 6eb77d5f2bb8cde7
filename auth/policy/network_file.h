#pragma once

#include "base/expected.h"
#include "base/node.h"

#include <optional>
#include <string>
#include <string_view>
#include <vector>

// A network on paper: what a policy is tried on (`postern policy … --network FILE`), and what posternd answers for `--network live`.
//
//     {
//       "tailnet": "alice@example.com",                       // optional; or "example.com", or "domains": ["example.com", "example.org"]
//       "users": [{"id": 1, "name": "alice", "email": "alice@example.com"}],
//       "nodes": {
//         "alice-laptop": {"ipv4": "100.64.0.1", "ipv6": "fd7a::1", "tags": [], "user": "alice"},
//         "server":       {"addresses": ["100.64.0.2"], "tags": ["tag:server"], "attributes": {"node:os": "linux"}}
//       }
//     }
//
// It is HuJSON, and the form of the corpus in tests/data/policy. Members that are not named here say nothing to us and are left
// alone, so a whole case of the corpus is a network file, too.
namespace postern::auth::policy {

struct NetworkFile {
  Network network;                   ///< nodes in the file's order
  /// What user:*@… and localpart:*@… may name (LoadOptions::domains): `domains`; else the domain of `tailnet`; else of the user with the
  /// lowest id, who made the network; else none are known.
  std::vector<std::string> domains = {};
  // How posternd judges, where it is posternd that answered.
  std::optional<std::string> session_capability = {};
  std::optional<bool> require_network_rule = {};
};

/// All problems at once, with their places in `file_name`.
Expected<NetworkFile, std::vector<Problem>> read_network(std::string_view text, std::string file_name);

/// That form, in one line. Its users get no id: a provider does not know who came first, and nothing shall be read into an order. A
/// capability that is not JSON is left out: nobody could read the rest.
std::string network_text(const NetworkFile& file);

}  // namespace postern::auth::policy
