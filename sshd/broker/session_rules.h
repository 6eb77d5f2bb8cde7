#pragma once

#include "auth/policy/session_rules.h"
#include "base/expected.h"
#include "base/node.h"
#include "sshd/broker/config.h"
#include "sshd/protocol/facts.h"

namespace postern::sshd::broker {

/// The rules of our own that hold for a connection of `source`: the strictest of what the policy grants it (Verdict::session_rules), what the
/// network says of the node (its capability policy.session_capability), and [session_rules]. Pure.
///
/// An error (`doing` names the problem and its place) when the capability cannot be read: then nobody knows what it forbids, and the login is
/// denied. command_conflict is a value, and denies, too.
Expected<auth::policy::SessionRules> effective_rules(const auth::policy::SessionRules& granted, const Node& source, const Config& config);

/// As the session gets them. False when the command does not fit.
[[nodiscard]] bool write_rules(const auth::policy::SessionRules& rules, ConnectionFacts::Rules& into);

/// What of forwardings they leave. Under `enforce_recorder` (DESIGN section 1) that is what they name: a forwarding goes around the recording.
/// False when the targets do not fit (4 KiB each way): half a list would allow too much or too little.
[[nodiscard]] bool write_forwarding(const auth::policy::SessionRules& rules, bool enforce_recorder, ConnectionFacts::Forwarding& into);

}  // namespace postern::sshd::broker
