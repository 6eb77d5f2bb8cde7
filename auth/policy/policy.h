#pragma once

#include "base/expected.h"
#include "base/node.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace postern::auth::policy {

struct Compiled;  // policy.cpp

/// What one evaluation found.
enum class Outcome { accept, check, deny };

/// Why a peer was denied; the user is told the sentence of denial_text(), the log has the rest.
enum class Denial {
  none,
  invalid_user_name,   ///< could never be an account (see is_mappable_user_name)
  no_rule,             ///< no ssh rule matches this peer and this node
  user_not_permitted,  ///< rules match the peer, none the user name
  no_network_rule,     ///< an ssh rule would allow it, but no acl or grant opens port 22
};

/// A decision. Pure data; nothing in it refers to the policy it came from.
struct Verdict {
  Outcome outcome = Outcome::deny;
  Denial denial = Denial::no_rule;
  Place rule;                           ///< the ssh rule that decided; line 0 when none did
  std::string local_user;               ///< the account
  std::vector<std::string> accept_env;  ///< globs, as written
  std::vector<Node> recorders;          ///< nodes that carry the rule's recorder tag, sorted by their lowest address
  std::string recorder_tag;             ///< "tag:recorder" of the rule; empty: no recording
  bool record = false;                  ///< the rule names a recorder tag (even when no node carries it)
  bool enforce_recorder = false;

  bool operator==(const Verdict&) const = delete;
};

/// One sentence for the person at the other end, without a line end: "tailnet policy does not permit you to SSH as user "root"".
std::string denial_text(Denial denial, std::string_view ssh_user);

struct Question {
  const Node& source;
  Address source_address;
  const Node& destination;
  std::string_view ssh_user;
  /// uid of the account that `ssh_user` maps to. Absent in phase 1, where nothing may be looked up yet: then the answer is
  /// "accept" when some uid could make it so (autogroup:nonroot then takes every name but root's).
  std::optional<std::uint32_t> uid;
  std::uint16_t port = 22;  ///< the policy's port, whatever port we listen on
  /// The address that the peer dialled, for network rules that name addresses. Absent: any address of the destination that has
  /// the source's family.
  std::optional<Address> destination_address = std::nullopt;
};

/// A policy file, loaded and checked. Immutable, cheap to copy (shared). Evaluation is pure: no clock, no sockets, no files.
///
/// Tailscale's language (HuJSON); docs/POLICY.md says what is understood. What is not understood is refused by load() with its
/// place, never ignored, so that no member which restricts access can be lost.
class Policy {
 public:
  /// Loads `text`. All problems that can be found are reported at once, in file order; `file_name` stands in their places.
  static Expected<Policy, std::vector<Problem>> load(std::string_view text, std::string file_name);

  /// First match wins; check rules come before accept rules; nothing is merged. `require_network_rule`: an acl or grant must
  /// open question.port from source to destination as well (a plain WireGuard network has no packet filter).
  Verdict decide(const Network& network, const Question& question, bool require_network_rule = true) const;

  /// Things an admin may have meant otherwise (an ssh rule that no network rule lets anybody reach); never errors.
  const std::vector<Problem>& warnings() const noexcept;

 private:
  explicit Policy(std::shared_ptr<const Compiled> compiled) : compiled_{std::move(compiled)} {}
  std::shared_ptr<const Compiled> compiled_;
};

/// True when `name` may be the name of a local account at all: 1 to 32 bytes of [A-Za-z0-9_.-] plus a final "$", beginning with a
/// letter or "_"; so never a number (it would be read as a uid by tools), never "+x", "-x", blanks, "/", ":", or control
/// characters (useradd(8); tailscale f368a96e0, e48e7b730).
bool is_mappable_user_name(std::string_view name) noexcept;

/// acceptEnv: `*` = any run, `?` = one character, case-sensitive, the whole name (tailscale ssh/tailssh/accept_env.go).
bool glob_matches(std::string_view pattern, std::string_view name) noexcept;

}  // namespace postern::auth::policy
