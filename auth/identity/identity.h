#pragma once

#include "base/expected.h"
#include "base/node.h"

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace postern::auth::identity {

/// Who is at an address of the network. One implementation a kind of network (static; later tailscaled, wireguard).
///
/// The broker asks with the kernel's peer address of the accepted socket and nothing else. Answers come by callback because real
/// providers ask a daemon; a provider may call back before who_is() returns. It never blocks and never throws.
class Provider {
 public:
  /// A node, nothing (a stranger), or an error (the provider cannot say now: the login is refused).
  using Answer = std::function<void(Expected<std::optional<Node>>)>;

  virtual ~Provider() = default;
  virtual void who_is(const Address& peer, Answer answer) = 0;
  /// What the provider knows of the network now. Valid until the next reload() or change.
  virtual const Network& network() const = 0;
  /// Reads again what the answers come from. On problems the old state stays.
  virtual Expected<Done, std::vector<Problem>> reload() = 0;
};

/// Reads a TOML file of nodes:
///
///     [[node]]
///     name = "alice-laptop"            # required, unique
///     id = "n1"                        # optional; default: the name
///     addresses = ["127.0.0.1"]        # required, at least one, each address in one node only
///     user = "alice@example.com"       # either user ...
///     tags = ["tag:server"]            # ... or tags, not both, not neither
///     capabilities = {"postern.internal/cap/ssh" = '[{"sftp": "read-only"}]'}   # optional: what whois's CapMap would say, JSON arrays
///     attributes = {"node:os" = "linux", "custom:level" = 3}                     # optional: for srcPosture
///
/// Unknown keys, wrong types and duplicates are problems with their place.
Expected<std::unique_ptr<Provider>, std::vector<Problem>> make_static_provider(std::string file);

/// The pure part of it, for tests: the nodes of `text`.
Expected<Network, std::vector<Problem>> parse_static_nodes(std::string_view text, std::string file_name);

}  // namespace postern::auth::identity
