#include "pty/launch.h"

#include "base/processes.h"
#include "base/unique_fd.h"

#include "pty/oom_score.h"

#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>

namespace postern::pty {
namespace {

void write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = ::write(fd, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;
    text.remove_prefix(static_cast<std::size_t>(n));
  }
}

[[noreturn]] void fail(const std::string& what, int status) {
  write_all(STDERR_FILENO, "postern: " + what + "\r\n");
  ::_exit(status);
}

void fresh_signals() {
  // By the system call: libc's sigaction refuses its own two (32, 33), which posix_spawn(3) leaves ignored (glibc spawni.c). All zero is
  // SIG_DFL without flags on every architecture; KILL and STOP refuse.
  static const unsigned char default_action[128] = {};
  for (int s = 1; s < NSIG; s++) ::syscall(SYS_rt_sigaction, s, default_action, nullptr, static_cast<std::size_t>(NSIG / 8));
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
}

std::string base_name(const std::string& path) {
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

/// What the child does between fork and exec: fresh signals, own session, terminal, limits, the user, nothing open but 0, 1, 2, exec.
/// Anything that fails is a line on its stderr and an exit; a shell with wrong ids is never run.
/// `cgroup_error`: fork_into()'s.
[[noreturn]] void run_as_user(const Launch& what, int cgroup_error) {
  ::prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0);
  fresh_signals();
  if (::dup2(what.error, STDERR_FILENO) < 0 || ::dup2(what.input, STDIN_FILENO) < 0 || ::dup2(what.output, STDOUT_FILENO) < 0)
    ::_exit(could_not_become_user);
  if (::setsid() < 0) fail(std::string{"setsid: "} + std::strerror(errno), could_not_become_user);
  if (what.terminal && ::ioctl(STDIN_FILENO, TIOCSCTTY, 0) != 0)
    fail(std::string{"no controlling terminal: "} + std::strerror(errno), could_not_become_user);
  // In the leaf before anything of the user's runs: what is in it can be ended as one, whatever it ignores.
  if (cgroup_error != 0) fail(std::string{"cannot enter the session's cgroup: "} + std::strerror(cgroup_error), could_not_become_user);
  reset_oom_score();
  if (what.before) what.before();
  if (what.settings) what.settings->apply();
  if (const auto became = become_user(what.user); !became) fail(became.error().doing, could_not_become_user);
  if (::syscall(SYS_close_range, 3U, ~0U, 0U) != 0) {
    for (int fd = 3; fd < 65536; fd++) ::close(fd);
  }

  const std::string shell = what.user.shell.empty() ? "/bin/sh" : what.user.shell;
  // sshd's order: chdir, else its message and "/" (session.c do_child); a login shell then gets its greeting.
  if (::chdir(what.user.home.c_str()) != 0) {
    write_all(STDERR_FILENO, "Could not chdir to home directory " + what.user.home + ": " + std::strerror(errno) + "\n");
    if (::chdir("/") != 0) ::_exit(could_not_execute);
  }
  if (!what.command && what.terminal && !what.greeting.empty()) {
    struct stat st {};
    if (::stat((what.user.home + "/.hushlogin").c_str(), &st) != 0) write_all(STDOUT_FILENO, what.greeting);
  }

  std::vector<char*> environment;
  environment.reserve(what.environment.size() + 1);
  for (const auto& e : what.environment) environment.push_back(const_cast<char*>(e.c_str()));
  environment.push_back(nullptr);
  std::string name = (what.command ? "" : "-") + base_name(shell);
  std::vector<char*> arguments{name.data()};
  static char dash_c[] = "-c";
  if (what.command) {
    arguments.push_back(dash_c);
    arguments.push_back(const_cast<char*>(what.command->c_str()));
  }
  arguments.push_back(nullptr);
  ::execve(shell.c_str(), arguments.data(), environment.data());
  write_all(STDERR_FILENO, shell + ": " + std::strerror(errno) + "\n");
  ::_exit(could_not_execute);
}

}  // namespace

Expected<pid_t> launch(const Launch& what, bool sibling) {
  // All signals blocked across fork: none may run a handler of ours in the child, nor be lost to one that we ignore, before it has fresh ones.
  sigset_t all, before;
  ::sigfillset(&all);
  ::sigprocmask(SIG_BLOCK, &all, &before);
  const auto child = fork_into(what.cgroup, sibling);
  if (child.pid == 0) run_as_user(what, child.cgroup_error);
  const int e = errno;
  ::sigprocmask(SIG_SETMASK, &before, nullptr);
  if (child.pid < 0) return Unexpected{system_error("fork a program", e)};
  return child.pid;
}

void signal_program(pid_t program, int signal) {
  if (::kill(-program, signal) != 0 && errno == ESRCH) ::kill(program, signal);
}

void signal_program_as(const LocalUser& user, pid_t program, int signal) {
  const pid_t child = ::fork();
  if (child > 0) {
    const UniqueFd held{static_cast<int>(::syscall(SYS_pidfd_open, child, 0))};  // not reaped yet: the number is its own
    pollfd ended{held.get(), POLLIN, 0};
    if (held && ::poll(&ended, 1, 100) == 0) ::syscall(SYS_pidfd_send_signal, held.get(), SIGKILL, nullptr, 0);
  }
  if (child != 0) return;
  // It is to hold nothing open when it is the user's to stop, nor outlive us.
  ::syscall(SYS_close_range, 0U, ~0U, 0U);
  if (!become_user(user)) ::_exit(could_not_become_user);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
  signal_program(program, signal);
  ::_exit(0);
}

}  // namespace postern::pty
