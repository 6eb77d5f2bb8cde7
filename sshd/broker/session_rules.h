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

/// As the session gets them. False when the command does not fit. (Forwardings are not in the facts yet: all are refused today.)
[[nodiscard]] bool write_rules(const auth::policy::SessionRules& rules, ConnectionFacts::Rules& into);

}  // namespace postern::sshd::broker
