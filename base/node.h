#pragma once

#include "base/address.h"

#include <string>
#include <string_view>
#include <vector>

namespace postern {

/// A machine of the network, as the identity provider knows it. Either a user's (`login` set, no tags) or tagged (no login).
struct Node {
  std::string id;    ///< stable: survives a rename
  std::string name;  ///< "alice-laptop"
  std::vector<Address> addresses;
  std::string login;              ///< "alice@example.com", empty when tagged
  std::vector<std::string> tags;  ///< "tag:server", sorted

  bool tagged() const noexcept { return !tags.empty(); }
};

/// What is wrong with "tag:server" as a tag; empty when nothing is. Sentences of tailscale tailcfg.CheckTag.
std::string_view problem_of_tag(std::string_view tag) noexcept;

/// What is wrong with "alice@example.com" as a login; empty when nothing is. "alice@github" and headscale's "alice@" are fine.
std::string_view problem_of_login(std::string_view login) noexcept;

/// What the provider knows of the network: needed to expand tags, autogroups and host names of a policy.
struct Network {
  std::vector<Node> nodes;

  /// The node that has this address, or nullptr.
  const Node* find(const Address& address) const noexcept {
    for (const auto& n : nodes)
      for (const auto& a : n.addresses)
        if (a == address) return &n;
    return nullptr;
  }
};

/// A place in a file that a person wrote. Lines and columns count from 1; columns count bytes.
struct Place {
  std::string file;
  unsigned line = 0;
  unsigned column = 0;

  std::string text() const { return file + ":" + std::to_string(line) + ":" + std::to_string(column); }
};

/// What is wrong in such a file.
struct Problem {
  Place place;
  std::string field;    ///< "ssh[2].users[0]"; may be empty
  std::string message;  ///< what is wrong
  std::string hint;     ///< what to write instead; may be empty

  std::string text() const {
    return place.text() + ": " + (field.empty() ? "" : field + ": ") + message + (hint.empty() ? "" : " (" + hint + ")");
  }
};

}  // namespace postern
