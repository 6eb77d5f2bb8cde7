#pragma once

#include "auth/policy/policy.h"

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace postern::auth::policy {

/// Default name of the app grant that carries login rules (setting policy.login_capability).
inline constexpr std::string_view default_login_capability = "postern.internal/cap/login";

/// Rules that the network's administrators write into the app grants of their one policy, and that whois tells with the peer
/// (Node::capabilities): the capability's array holds ssh rules without src and dst, which the grant itself has.
///
///     "grants": [{"src": ["group:sre"], "dst": ["tag:server"], "ip": ["22"],
///                 "app": {"postern.internal/cap/login": [{"action": "accept", "users": ["root", "autogroup:nonroot"]}]}}]
///
/// Judged by the same code as a file's rules. What cannot be read denies. Remembers what it has read; one thread.
class GrantedRules {
 public:
  explicit GrantedRules(std::string capability, LoadOptions options) : capability_{std::move(capability)}, options_{std::move(options)} {}
  /// Verdict::rule: file "grant of NODE", line = the rule's number. `problem`: why the grant could not be read, for the log.
  Verdict decide(const Network& network, const Question& question, std::string& problem) const;

 private:
  static constexpr std::size_t most_remembered = 1024;
  std::string capability_;
  LoadOptions options_;
  mutable std::map<std::string, std::optional<Policy>> read_;  ///< text -> policy; nothing: it has problems
  mutable std::map<std::string, std::string> problems_;
};

/// The ssh rules that the control server compiled for this machine (Tailscale's tailcfg.SSHPolicy), as tailscaled has them: first match wins.
/// Principals by node id, address, login or any; users by name, "*" and "="; accept, reject, a check (Outcome::check with `check_period`); acceptEnv,
/// recorders and what to do without them, session duration and forwardings as compiled. An action of another kind denies.
///
/// Not judged here: recorders are addresses with ports; those of a port other than `recorder_port` are left out, and a rule that only has such
/// ones then names recorders that nobody is (fail closed under its failure action).
class CompiledRules {
 public:
  /// What cannot be read denies at every decision.
  explicit CompiledRules(std::string json);
  ~CompiledRules();
  CompiledRules(CompiledRules&&) noexcept;
  CompiledRules& operator=(CompiledRules&&) noexcept;

  const std::string& text() const { return text_; }
  /// `problem`: why a rule could not be read, for the log.
  Verdict decide(const Question& question, std::chrono::system_clock::time_point now, std::optional<std::chrono::seconds> check_period,
                 std::uint16_t recorder_port, std::string& problem) const;
  /// The next moment at which a rule of it expires; nothing: none does.
  std::optional<std::chrono::system_clock::time_point> next_expiry(std::chrono::system_clock::time_point now) const;

 private:
  struct Read;
  std::string text_;
  std::unique_ptr<Read> read_;
};

/// Both must allow: denies where one does, asks where one does, and takes the stricter of what they say of a session. They must map to the same
/// account, and agree on recorders where both name some (else: denied). Environment variables: the patterns that both have.
Verdict both(Verdict a, const Verdict& b);

}  // namespace postern::auth::policy
