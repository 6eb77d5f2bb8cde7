#pragma once

#include "base/expected.h"
#include "pty/become_user.h"
#include "pty/process_settings.h"

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace postern::pty {

/// A program to start as a user, the way sshd of OpenSSH 9.2 does it (session.c do_child).
struct Launch {
  LocalUser user;
  std::vector<std::string> environment;  ///< "NAME=value": all of it, nothing is inherited
  std::optional<std::string> command;    ///< `shell -c command`; nothing: a login shell, argv[0] = "-bash"
  int input = -1, output = -1, error = -1;
  bool terminal = false;                 ///< `input` is a pseudo-terminal's follower: it becomes the controlling terminal
  std::string greeting;                  ///< for a login shell on a terminal; shown unless ~/.hushlogin is there
  std::optional<ProcessSettings> settings;
  std::function<void()> before;          ///< runs in the child before it becomes the user (login records: who(1) in .profile sees itself)
  int cgroup = -1;                       ///< open folder of the cgroup that the program is to live in
};

/// Exit status of a child that could not become the user (nothing ran), and of one whose shell could not be executed (sshd: 1).
inline constexpr int could_not_become_user = 255;
inline constexpr int could_not_execute = 1;

/// Forks; the child never returns. The descriptors stay the caller's. `sibling`: fork_into()'s.
Expected<pid_t> launch(const Launch& what, bool sibling = false);

/// Sends `signal` to the process group of a program that launch() began and that nobody has reaped yet (its number can then be nobody else's). A
/// program has no group of its own before it comes to setsid(2): until then the signal goes to the process alone, and waits there for the
/// dispositions that the program is to begin with. So one that is told to go as it starts does not stay.
void signal_program(pid_t program, int signal);

/// The same with the rights of `user` (kill(2)): of a group in which something runs as another one, sudo for instance, only what the user could signal gets it.
/// By a short-lived child, which the caller reaps as it does the others. It is waited for, so that signals come in their order; but it is the user's to stop,
/// so not for longer than 0.1 s: then it is killed, and the signal may be lost.
void signal_program_as(const LocalUser& user, pid_t program, int signal);

}  // namespace postern::pty
