#pragma once

#include "base/address.h"
#include "base/expected.h"
#include "recorder/journal/journal.h"

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace postern::recorder::relay {

using Milliseconds = std::chrono::milliseconds;

/// relay.toml; docs/SETTINGS.relay.md describes each.
struct Settings {
  std::string session_socket = "/run/postern-relay/relay.sock";
  std::string control_socket = "/run/postern-relay/control.sock";
  journal::Settings journal{"/var/lib/postern-relay/journal"};
  Milliseconds gap_keep{std::chrono::hours{30 * 24}};

  std::optional<Address> source;  ///< outgoing connections are bound to it
  std::string name;               ///< of this host, for the recorders' lists; default: the host name

  Milliseconds connect_timeout{2000};
  Milliseconds attempt_stagger{150};
  Milliseconds lost_timeout{2000};
  Milliseconds commit_timeout{10'000};
  Milliseconds first_commit_timeout{400};  ///< of a recording that must be recorded: its program waits for it
  Milliseconds backoff_shortest{50};
  Milliseconds backoff_longest{1000};
  Milliseconds penalty{10'000};       ///< how long a recorder that committed nothing is not tried
  Milliseconds keep_warm{10 * 60'000};
  Milliseconds moved_retry{5000};
  unsigned replays = 16;              ///< recordings that catch up at one recorder at a time

  Milliseconds liveness_interval{1000};  ///< how often a session that has gone is looked for
  unsigned sessions = 16'384;            ///< connections of sessions at a time

  std::string log_level = "info";
};

/// `error.doing` is a line for each problem, "FILE:LINE:COLUMN: field: what (hint)".
Expected<Settings> load_settings(const std::string& file);
Expected<Settings> parse_settings(std::string_view text, const std::string& file);

}  // namespace postern::recorder::relay
