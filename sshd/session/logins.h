#pragma once

#include "sshd/protocol/facts.h"

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>

namespace postern::sshd::session {

struct LastLogin {
  std::int64_t time = 0;
  std::string host;
};

/// lastlog(8): when this account last logged in on a terminal.
std::optional<LastLogin> last_login(uid_t uid);

/// Writes utmp(5), wtmp(5) and lastlog for a login on terminal `path` ("/dev/pts/7") by process `pid`. What is missing or not ours to
/// write (an ordinary user) is passed over, as sshd does. Neither waits longer than 0.2 s for who holds a lock on those files; then a child of the caller's
/// does, and ends by itself.
void record_login(const ConnectionFacts& facts, uid_t uid, const std::string& path, pid_t pid);
void record_logout(const std::string& path, pid_t pid);

/// What a login shell on a terminal is greeted with: the message of the day (/run/motd.dynamic, /etc/motd), then the last login.
std::string greeting(const std::optional<LastLogin>& last);

}  // namespace postern::sshd::session
