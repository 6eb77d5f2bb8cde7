#pragma once

namespace postern::sshd::session {

/// The warmed parent of all session processes: NSS and the PAM modules are loaded, nothing else is (no pam_start, no user's data). Takes
/// fork requests of the broker on descriptor `control` until that closes; sessions live on.
int run_zygote(int control);

}  // namespace postern::sshd::session
