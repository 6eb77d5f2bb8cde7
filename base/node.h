#pragma once

#include "base/address.h"

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace postern {

/// A value of a device's posture attribute (tailscale.com/kb/1288/device-posture).
using Attribute = std::variant<bool, double, std::string>;

/// A machine of the network, as the identity provider knows it. Either a user's (`login` set, no tags) or tagged (no login).
struct Node {
  std::string id;    ///< stable: survives a rename
  std::string name;  ///< "alice-laptop"
  std::vector<Address> addresses;
  std::string login;              ///< "alice@example.com", empty when tagged
  std::vector<std::string> tags;  ///< "tag:server", sorted
  /// What is known of the device, for srcPosture: "node:os" -> "macos". What is not here is not set.
  std::map<std::string, Attribute> attributes = {};
  /// App capabilities that this node has at us (whois's CapMap): name -> JSON text of the array.
  std::map<std::string, std::string> capabilities = {};
  bool shared = false;  ///< of another network, whose user shared it into this one: no member here

  bool tagged() const noexcept { return !tags.empty(); }
};

/// What is wrong with "tag:server" as a tag; empty when nothing is. Sentences of tailscale tailcfg.CheckTag.
std::string_view problem_of_tag(std::string_view tag) noexcept;

/// What is wrong with "alice@example.com" as a login; empty when nothing is. "alice@github" and headscale's "alice@" are fine.
std::string_view problem_of_login(std::string_view login) noexcept;

/// What the provider knows of the network: needed to expand tags, autogroups and host names of a policy.
class Network {
 public:
  Network() = default;
  Network(std::vector<Node> all, std::vector<std::string> logins = {}) : nodes{std::move(all)}, users{std::move(logins)} { index(); }

  std::vector<Node> nodes;
  std::vector<std::string> users;  ///< logins that exist, also those without a node

  /// Makes find() and with_tag() quick. To be called when `nodes` are complete; where they have another number now, all are looked at.
  void index();
  /// The node that has this address, or nullptr.
  const Node* find(const Address& address) const noexcept;
  /// The nodes that carry this tag, in the order of `nodes`.
  std::vector<const Node*> with_tag(std::string_view tag) const;

 private:
  std::size_t indexed_ = 0;  ///< nodes, when index() was called
  std::map<Address, std::size_t> by_address_;
  std::map<std::string, std::vector<std::size_t>, std::less<>> by_tag_;
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
