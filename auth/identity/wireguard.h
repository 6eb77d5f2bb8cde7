#pragma once

#include "auth/identity/toml_nodes.h"
#include "base/address.h"
#include "base/expected.h"

#include <boost/asio/io_context.hpp>

#include <chrono>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

/// What WireGuard says of its peers. Of keys only the public ones leave these functions.
namespace postern::auth::identity {

/// Which peer each address belongs to, as WireGuard routes: the longest of the allowed prefixes ("cryptokey routing", wireguard.com).
class PeerTable {
 public:
  /// An allowed IP is one peer's: the last one that was given it (wg(8)).
  void allow(const Prefix& prefix, const PublicKey& key) { peers_[{prefix.address.v4(), prefix.length, network_of(prefix)}] = key; }
  void add(const PublicKey& key) { known_.insert(key); }

  struct Match {
    PublicKey key{};
    Prefix prefix;
  };
  std::optional<Match> find(const Address& address) const;
  /// Allowed IPs that are one address each, by their peer.
  std::map<PublicKey, std::vector<Address>> hosts() const;
  bool has(const PublicKey& key) const { return known_.contains(key); }
  bool operator==(const PeerTable&) const = default;

 private:
  static Address network_of(const Prefix& prefix);
  std::map<std::tuple<bool, unsigned, Address>, PublicKey> peers_;
  std::set<PublicKey> known_;
};

/// Bounds on what WireGuard says. A peer is about 400 bytes in the UAPI's text.
inline constexpr std::size_t max_wireguard_bytes = 64 * 1024 * 1024;
inline constexpr std::size_t max_wireguard_line_bytes = 512;

/// The answer to "get=1" of the userspace API (wireguard.com/xplatform), as it comes. Keeps no byte of a private or preshared key beyond put().
class UapiReader {
 public:
  UapiReader() { line_.reserve(max_wireguard_line_bytes); }
  ~UapiReader();
  UapiReader(const UapiReader&) = delete;
  UapiReader& operator=(const UapiReader&) = delete;

  /// True when the answer is whole. Wipes `bytes`.
  Expected<bool> put(std::span<char> bytes);
  PeerTable take() { return std::move(table_); }

 private:
  Expected<bool> line(std::string_view text);
  std::string line_;  ///< never reallocated: a copy that is left behind could hold a key
  PeerTable table_;
  std::optional<PublicKey> peer_;
  std::size_t taken_ = 0;
  bool failed_ = false;
};

/// One datagram of the answer to WG_CMD_GET_DEVICE (linux/wireguard.h): adds its peers to `table`. A peer that does not fit goes on in the next one,
/// which `last` remembers. True: the dump has ended. Error{EINTR, ...}: it is to be asked for again. Error{ENODEV, ...}: the kernel has no such device, or no WireGuard.
Expected<bool> read_wireguard_netlink(std::span<const std::byte> datagram, PeerTable& table, std::optional<PublicKey>& last);

/// Asks the kernel, by generic netlink; needs CAP_NET_ADMIN. Blocks no longer than the kernel takes, at most `timeout` for a message.
Expected<PeerTable> ask_kernel(const std::string& interface, std::chrono::milliseconds timeout);

/// Asks a user space implementation by its socket. Calls back once, within `timeout`, unless destroyed before.
class UapiQuestion {
 public:
  UapiQuestion(boost::asio::io_context& io, const std::string& socket, std::chrono::milliseconds timeout, std::function<void(Expected<PeerTable>)> answer);
  ~UapiQuestion();
  UapiQuestion(const UapiQuestion&) = delete;
  UapiQuestion& operator=(const UapiQuestion&) = delete;

 private:
  class State;
  std::shared_ptr<State> state_;
};

}  // namespace postern::auth::identity
