#pragma once

#include "auth/identity/identity.h"
#include "auth/policy/policy.h"
#include "auth/policy/sources.h"
#include "sshd/broker/config.h"

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace postern::sshd::broker {

/// Where the rules come from (setting policy.source), and what they say together: each source must allow a login.
///
///   file     the policy file on this host
///   grants   the app grant of whois (setting policy.login_capability), which the network's administrators write in their one policy
///   tailnet  the ssh rules that the control server compiled for this machine
class Rules {
 public:
  explicit Rules(const Config& config);

  /// Reads the policy file, where it is a source. On problems, which are logged, the old one stays. `first`: at the start, when a file of which an
  /// own test fails is taken all the same (without a server nobody could come and mend it; Headscale does the same).
  Expected<Done> load(const Network& network, bool first);
  /// The file's text is another one than at the last load() that took it.
  bool file_changed() const;

  struct Decision {
    auth::policy::Verdict verdict;
    /// A source cannot say now: nobody new is let in, with this sentence; who is in stays.
    std::string unavailable;
    std::string problem;  ///< for the log: what could not be read, and so denied
  };
  Decision decide(const auth::identity::Provider& provider, const auth::policy::Question& question) const;

  /// When a rule ends by itself.
  std::optional<std::chrono::system_clock::time_point> next_expiry(const auth::identity::Provider& provider) const;
  /// How often load() took a file.
  std::uint64_t version() const { return version_; }

 private:
  const auth::policy::CompiledRules* compiled(const auth::identity::Provider& provider, std::string& unavailable) const;

  const Config& config_;
  std::optional<auth::policy::Policy> file_;
  std::string text_;
  auth::policy::GrantedRules granted_;
  mutable std::optional<auth::policy::CompiledRules> compiled_;
  std::uint64_t version_ = 0;
};

}  // namespace postern::sshd::broker
