#pragma once

#include "auth/policy/session_rules.h"
#include "base/expected.h"
#include "base/node.h"

#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace postern::auth::policy {

struct Compiled;  // compiled.h

/// Of one ssh rule: more than a login can be described with to its session (sshd/protocol/facts.h).
inline constexpr std::size_t most_accept_env = 64;
inline constexpr std::size_t longest_accept_env = 128;

/// What one evaluation found.
enum class Outcome { accept, check, deny };

/// Why a peer was denied; the user is told the sentence of denial_text(), the log has the rest.
enum class Denial {
  none,
  invalid_user_name,   ///< could never be an account (see is_mappable_user_name)
  no_rule,             ///< no ssh rule matches this peer and this node
  user_not_permitted,  ///< rules match the peer, none the user name
  posture,             ///< a rule would allow it, but the device does not meet its srcPosture
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
  /// Of a check: how long an earlier proof of identity counts; absent: none does ("always"). 12 h where the rule says nothing.
  std::optional<std::chrono::seconds> check_period;
  SessionRules session_rules;           ///< of the app grants that match; what else narrows them (whois, posternd.toml) is the caller's

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

/// What load() has to know beside the file.
struct LoadOptions {
  std::string session_capability{default_session_capability};
  /// Domains of the network, for "user:*@domain" and "localpart:*@domain": others are refused, as the real service does. Empty: not known,
  /// every domain will do (Headscale).
  std::vector<std::string> domains = {};
};

/// What one ssh rule says to a question, for people.
struct RuleTrace {
  Place rule;
  std::string field;      ///< "ssh[3]"
  Outcome action = Outcome::accept;
  bool src = false, dst = false, user = false, posture = true;  ///< which of its conditions hold
  bool decides = false;   ///< the first rule of which all hold
  std::string why;        ///< "src does not name alice-laptop (alice@example.com)", "src \"group:eng\", dst \"tag:server\", user \"root\""
};

/// A decision and how it came about.
struct Explanation {
  Verdict verdict;
  std::vector<RuleTrace> rules;      ///< in the order of evaluation: check before accept, then as in the file
  bool network_open = false;         ///< an acl or grant opens the port (whether or not that was required)
  Place network_rule;                ///< the first that does; line 0: none, or the file has neither acls nor grants and all is open
  std::string network_why;           ///< a sentence
};

/// What the file's own tests found.
struct TestReport {
  std::size_t passed = 0;         ///< entries of `tests` and `sshTests`
  std::vector<Problem> failed;    ///< "test(s) failed: ..." at each assertion that does not hold, in file order; at most 200
  std::vector<Problem> left_out;  ///< entries that could not be tried, and why
};

/// A policy file, loaded and checked. Immutable, cheap to copy (shared). Evaluation is pure: no clock, no sockets, no files.
///
/// Tailscale's language (HuJSON); docs/POLICY.md says what is understood. What is not understood is refused by load() with its
/// place, never ignored, so that no member which restricts access can be lost.
class Policy {
 public:
  /// Loads `text`. All problems that can be found are reported at once, in file order; `file_name` stands in their places.
  static Expected<Policy, std::vector<Problem>> load(std::string_view text, std::string file_name, const LoadOptions& options = {});

  /// First match wins; check rules come before accept rules; nothing is merged. `require_network_rule`: an acl or grant must
  /// open question.port from source to destination as well (a plain WireGuard network has no packet filter).
  Verdict decide(const Network& network, const Question& question, bool require_network_rule = true) const;

  /// decide(), with every rule's say. Slower (it looks at each rule), and never of another opinion.
  Explanation explain(const Network& network, const Question& question, bool require_network_rule = true) const;

  /// Runs the file's `tests` and `sshTests` on `network`. The policy's own decisions do not depend on them; the real service does not take
  /// a file of which one fails. `whole_network`: a source or destination that is no node of `network` fails its test, as the service has
  /// it; without, such a test is left out (the network that one host sees may be a part, an imagined one has no given addresses).
  TestReport run_tests(const Network& network, bool whole_network = true, std::size_t most_pairs = any_number_of_pairs) const;
  /// Pairs of a source and a destination that are looked at; a test that would need more is left out. posternd has no time for more.
  static constexpr std::size_t any_number_of_pairs = std::numeric_limits<std::size_t>::max();

  /// A network that has what the file itself names: a node for each user and each tag. For run_tests() where no network is known.
  Network imagined_network() const;

  std::size_t ssh_rule_count() const noexcept;

  /// Names that some rule's `users` writes out, sorted; `nonroot`: some rule takes autogroup:nonroot; `localparts`: some rule takes localpart:*@…
  struct UserNames {
    std::vector<std::string> literal;
    bool nonroot = false;
    bool localparts = false;
  };
  UserNames user_names() const;

  /// Things an admin may have meant otherwise (an ssh rule that no network rule lets anybody reach); never errors.
  const std::vector<Problem>& warnings() const noexcept;

 private:
  explicit Policy(std::shared_ptr<const Compiled> compiled) : compiled_{std::move(compiled)} {}
  std::shared_ptr<const Compiled> compiled_;
};

/// True when `name` may be the name of a local account at all: 1 to 32 bytes of [A-Za-z0-9_.+-] plus a final "$", beginning with a
/// letter or "_"; so never a number (it would be read as a uid by tools), never "+x", "-x", blanks, "/", ":", or control
/// characters (useradd(8); tailscale f368a96e0, e48e7b730).
bool is_mappable_user_name(std::string_view name) noexcept;

/// acceptEnv: `*` = any run, `?` = one character, case-sensitive, the whole name (tailscale ssh/tailssh/accept_env.go).
bool glob_matches(std::string_view pattern, std::string_view name) noexcept;

}  // namespace postern::auth::policy
