#pragma once

namespace postern::pty {

/// The broker may protect itself from the OOM killer (systemd OOMScoreAdjust); what runs as a user is not to inherit that. Before it is the user.
void reset_oom_score();

}  // namespace postern::pty
