#include "base/processes.h"
#include "catch.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>

using namespace postern;
using namespace std::chrono_literals;

namespace {
/// A child that does `what` until it is killed at the end of the test.
struct Child {
  template <class What>
  explicit Child(What what) : pid{::fork()} {
    if (pid != 0) return;
    what();
    ::_exit(0);
  }
  ~Child() {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  pid_t pid;
};
void for_ever() {
  for (;;) ::pause();
}
bool has(const std::vector<pid_t>& all, pid_t one) { return std::find(all.begin(), all.end(), one) != all.end(); }
}  // namespace

TEST_CASE("a process is found with its parent, its state and the time of its start, whatever it is called", "[base][processes]") {
  std::array<int, 2> go{};
  REQUIRE(::pipe(go.data()) == 0);
  const auto before = stat_of(::getpid());
  REQUIRE(before);
  const Child child{[&] {
    for (char c = 0; ::read(go[0], &c, 1) < 0;) {
    }
    ::close(STDOUT_FILENO);
    ::execl("/bin/sh", "a) Z 1 (b", "-c", "printf 'x) Z 1 (' >/proc/$$/comm; exec 1>&-; while :; do sleep 1000; done", nullptr);
  }};
  const auto waits = stat_of(child.pid);
  REQUIRE(waits);
  CHECK(waits->parent == ::getpid());
  CHECK(waits->living());
  CHECK(waits->start_time >= before->start_time);
  REQUIRE(::write(go[1], "g", 1) == 1);
  for (const auto end = std::chrono::steady_clock::now() + 20s; descendants_of(child.pid).empty() && std::chrono::steady_clock::now() < end;) ::usleep(1000);  // its sleep
  const auto named = stat_of(child.pid);
  REQUIRE(named);
  CHECK(named->parent == ::getpid());
  CHECK(named->living());
  CHECK(named->start_time == waits->start_time);
  for (const pid_t p : descendants_of(child.pid)) ::kill(p, SIGKILL);
  ::close(go[0]);
  ::close(go[1]);
}

TEST_CASE("one that has ended is no longer living, and then not there", "[base][processes]") {
  const pid_t pid = ::fork();
  if (pid == 0) ::_exit(0);
  siginfo_t ended{};
  REQUIRE(::waitid(P_PID, static_cast<id_t>(pid), &ended, WEXITED | WNOWAIT) == 0);
  const auto stat = stat_of(pid);
  REQUIRE(stat);
  CHECK_FALSE(stat->living());
  CHECK_FALSE(has(descendants_of(::getpid()), pid));
  ::waitpid(pid, nullptr, 0);
  CHECK_FALSE(stat_of(pid));
}

TEST_CASE("processes that end while one looks at them are no error", "[base][processes]") {
  const Child stays{for_ever};
  const auto churn = [] {
    for (;;) {
      const pid_t p = ::fork();
      if (p == 0) ::_exit(0);
      ::waitpid(p, nullptr, 0);
    }
  };
  const Child one{churn}, two{churn};
  for (const auto end = std::chrono::steady_clock::now() + 2s; std::chrono::steady_clock::now() < end;) REQUIRE(has(descendants_of(::getpid()), stays.pid));
}

TEST_CASE("the boot has a name", "[base][processes]") {
  CHECK(boot_id().size() == 36);
  CHECK(boot_id() == boot_id());
}
