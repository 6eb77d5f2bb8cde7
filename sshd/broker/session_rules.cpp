#include "sshd/broker/session_rules.h"

#include "sshd/protocol/forward_targets.h"

#include <algorithm>

namespace postern::sshd::broker {

namespace policy = auth::policy;

Expected<policy::SessionRules> effective_rules(const policy::SessionRules& granted, const Node& source, const Config& config) {
  auto own = policy::capability_rules(source, config.policy.session_capability);
  if (!own) return Unexpected{own.error()};
  return policy::stricter(policy::stricter(granted, config.session_rules), *own);
}

bool write_rules(const policy::SessionRules& rules, ConnectionFacts::Rules& into) {
  into = {};
  if (!into.command.set(rules.command.value_or(""))) return false;
  const auto seconds = [](const std::optional<std::chrono::seconds>& time) {
    return time ? static_cast<std::uint32_t>(std::clamp<std::int64_t>(time->count(), 1, ConnectionFacts::Rules::no_limit - 1)) : ConnectionFacts::Rules::no_limit;
  };
  into.max_duration_seconds = seconds(rules.max_duration);
  into.idle_timeout_seconds = seconds(rules.idle_timeout);
  into.max_sessions = rules.max_sessions.value_or(ConnectionFacts::Rules::no_limit);
  into.record_input = rules.record_input;
  switch (rules.sftp) {
    case policy::SessionRules::Sftp::full: into.sftp = ConnectionFacts::Rules::Sftp::full; break;
    case policy::SessionRules::Sftp::read_only: into.sftp = ConnectionFacts::Rules::Sftp::read_only; break;
    case policy::SessionRules::Sftp::none: into.sftp = ConnectionFacts::Rules::Sftp::none; break;
  }
  into.no_pty = !rules.pty;
  return true;
}

bool write_forwarding(const policy::SessionRules& rules, bool enforce_recorder, ConnectionFacts::Forwarding& into) {
  into = {};
  const auto named = [&](std::string_view name) { return !enforce_recorder || std::find(rules.named.begin(), rules.named.end(), name) != rules.named.end(); };
  into.local = named("localForward");
  into.remote = named("remoteForward");
  into.agent = rules.agent_forwarding && named("agentForwarding");
  into.x11 = rules.x11_forwarding && named("x11Forwarding");
  return into.local_targets.set(ForwardTargets::encode(rules.local_forward)) && into.remote_targets.set(ForwardTargets::encode(rules.remote_forward));
}

}  // namespace postern::sshd::broker
