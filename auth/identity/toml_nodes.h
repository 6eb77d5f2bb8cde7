#pragma once

#include "base/expected.h"
#include "base/node.h"

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace postern::auth::identity {

/// Largest file of nodes: 100,000 nodes need about 15 MiB.
inline constexpr std::size_t max_nodes_file_bytes = 64 * 1024 * 1024;

/// X25519's public half, as WireGuard names its peers by.
using PublicKey = std::array<std::uint8_t, 32>;
/// As `wg show` prints it: 44 characters of base64.
std::string key_text(const PublicKey& key);

struct TomlNode {
  Node node;  ///< where it has a public key: without addresses, and its id is the key unless the file says another
  PublicKey public_key{};
  std::vector<Prefix> networks;
};
struct TomlNodes {
  std::vector<TomlNode> nodes;
  std::optional<TomlNode> self;
};

/// fixed: [[node]] with addresses (make_static_provider). keys: [self], and [[peer]] with public_key and networks (make_wireguard_provider).
enum class NodesForm { fixed, keys };

/// Unknown keys, wrong types, duplicates and what is missing are problems with their place.
Expected<TomlNodes, std::vector<Problem>> read_toml_nodes(std::string_view text, std::string file_name, NodesForm form);

}  // namespace postern::auth::identity
