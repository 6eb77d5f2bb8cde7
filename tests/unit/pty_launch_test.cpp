#include "pty/launch.h"

#include "base/unique_fd.h"

#include "catch.h"

#include <fcntl.h>
#include <seccomp.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

using namespace postern;

namespace {

/// Starts a program whose child is held in the system call `at`, signals it there, lets it go on, and says how it ended: 0 = by that signal.
/// In a process of its own: the filter that holds it is there for good.
int signalled_while_held(int at, int signal) {
  const pid_t runner = ::fork();
  if (runner == 0) {
    ::signal(signal, SIG_IGN);  // as postern-session does
    scmp_filter_ctx filter = ::seccomp_init(SCMP_ACT_ALLOW);
    if (::seccomp_rule_add(filter, SCMP_ACT_NOTIFY, at, 0) != 0 || ::seccomp_load(filter) != 0) ::_exit(10);
    const int held = ::seccomp_notify_fd(filter);
    const UniqueFd null{::open("/dev/null", O_RDWR | O_CLOEXEC)};
    pty::Launch what;
    what.user.name = "nobody";
    what.user.shell = "/bin/sh";
    what.user.home = "/";
    what.command = "exit 5";
    what.input = what.output = what.error = null.get();
    const auto launched = pty::launch(what);
    if (!launched) ::_exit(12);
    const pid_t program = *launched;
    seccomp_notif* request = nullptr;
    seccomp_notif_resp* answer = nullptr;
    ::seccomp_notify_alloc(&request, &answer);
    if (::seccomp_notify_receive(held, request) != 0 || request->pid != static_cast<__u32>(program)) ::_exit(13);
    pty::signal_program(program, signal);
    answer->id = request->id;
    answer->flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    ::seccomp_notify_respond(held, answer);  // refused where the signal has ended it already
    ::close(held);                           // it is not held again
    int status = 0;
    if (::waitpid(program, &status, 0) != program) ::_exit(14);
    ::_exit(WIFSIGNALED(status) && WTERMSIG(status) == signal ? 0 : WIFEXITED(status) ? 100 + WEXITSTATUS(status) : 15);
  }
  int status = 0;
  REQUIRE(::waitpid(runner, &status, 0) == runner);
  REQUIRE(WIFEXITED(status));
  return WEXITSTATUS(status);
}

}  // namespace

TEST_CASE("a program that is told to go while it starts does not stay", "[pty]") {
  const int at = GENERATE(SCMP_SYS(prctl), SCMP_SYS(setsid));  // the child's first step, with all signals blocked; its last one without a group of its own
  const int signal = GENERATE(SIGHUP, SIGINT, SIGTERM);
  CAPTURE(at, signal);
  CHECK(signalled_while_held(at, signal) == 0);
}
