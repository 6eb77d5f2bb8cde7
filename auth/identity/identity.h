#pragma once

#include "base/expected.h"
#include "base/node.h"

#include <boost/asio/io_context.hpp>

#include <sys/types.h>

#include <cerrno>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace postern::auth::identity {

/// Who is at an address of the network. One implementation a kind of network: static, tailscaled, wireguard.
///
/// The broker asks with the kernel's peer address of the accepted socket and nothing else. Answers come by callback because real
/// providers ask a daemon; a provider may call back before who_is() returns. It never blocks and never throws. One thread, the broker's.
class Provider {
 public:
  /// A node, nothing (a stranger), or an error (the login is refused): the provider cannot say now, or (user_message set: one clear sentence
  /// for the client) it knows the node and the network no longer stands for it: expired, jailed, this machine itself ...
  /// Error::code is EAGAIN for the first kind, after which live sessions go on; anything else ends them.
  using Answer = std::function<void(Expected<std::optional<Node>>)>;

  virtual ~Provider() = default;
  /// Once, before anything else. `ready`: network() is filled, or why logins will never be possible with these settings (start-up fails with it).
  /// A daemon that is away is no such reason: ready then comes all the same, and who_is() answers EAGAIN until it is there.
  /// `changed`: from then on whenever who_is(), network(), own_addresses() or ssh_policy() may answer something else than before.
  virtual void start(std::function<void(Expected<Done>)> ready, std::function<void()> changed) {
    static_cast<void>(changed);
    ready(Done{});
  }
  /// `peer`: the kernel's, with the port, which counts only where a daemon passes connections on from its own address (userspace networking).
  virtual void who_is(const Endpoint& peer, Answer answer) = 0;
  /// Peers come from this machine's own address, by a proxy (userspace networking): only connections of the user who runs it are peers' at all, since any
  /// user of this machine can have the same port to another destination. Nothing: its user is not known now.
  virtual bool behind_proxy() const { return false; }
  virtual std::optional<uid_t> proxy_user() const { return {}; }
  /// What the provider knows of the network now. Valid until the next reload() or change.
  virtual const Network& network() const = 0;
  /// The addresses that the network gave this machine, to listen on; empty where the provider does not know.
  virtual std::vector<Address> own_addresses() const { return {}; }
  /// The network's own compiled ssh rules for this machine, as JSON (Tailscale's tailcfg.SSHPolicy).
  virtual Expected<std::string> ssh_policy() const { return Unexpected{Error{ENOTSUP, "this identity provider has no ssh rules of the network"}}; }
  /// The wall clock was set, or the machine slept: what waits for a time of day waits for the wrong one.
  virtual void clock_changed() {}
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

struct TailscaledSettings {
  std::string socket = "/var/run/tailscale/tailscaled.sock";
  std::chrono::milliseconds timeout{2000};  ///< for each answer of the LocalAPI
  bool shared_users = false;                ///< users of other tailnets whose node was shared into this one may be matched by their login
  bool ssh_policy = false;                  ///< fetch ssh_policy(), too
  bool server = true;                       ///< false: a client asks, whose own Tailscale SSH is its own affair
};
/// Asks tailscaled (Tailscale or Headscale) by its LocalAPI: whois by address, status, and watch-ipn-bus for changes. By port as well where tailscaled
/// has no TUN device: then peers come from 127.0.0.1, by its proxy, and whoever comes from elsewhere is a stranger.
std::unique_ptr<Provider> make_tailscaled_provider(boost::asio::io_context& io, TailscaledSettings settings);

struct WireguardSettings {
  std::string interface = "wg0";
  std::string file = "/etc/postern/wireguard.toml";  ///< names of public keys
  std::string uapi_dir = "/var/run/wireguard";       ///< of user space implementations: INTERFACE.sock; where there is none, the kernel is asked
  std::chrono::milliseconds poll{500};               ///< nobody is told of a peer that goes
  std::chrono::milliseconds timeout{2000};           ///< for each answer
};
/// Asks WireGuard which public key an address belongs to, as WireGuard itself routes, and a file for its name:
///
///     [self]                                          # this machine; addresses are those of the interface
///     name = "server"
///     tags = ["tag:server"]                           # or user
///
///     [[peer]]
///     public_key = "nG…="                             # required, as `wg show` prints it
///     name = "alice-laptop"                           # the rest as in make_static_provider(), without addresses; id: default the public key
///     user = "alice@example.com"
///     networks = ["10.1.0.0/24"]                      # allowed IPs that are more than one address and nevertheless this peer's own
///
/// An address in a wider allowed IP that is not named belongs to somebody behind that peer: a stranger.
Expected<std::unique_ptr<Provider>, std::vector<Problem>> make_wireguard_provider(boost::asio::io_context& io, WireguardSettings settings);

}  // namespace postern::auth::identity
