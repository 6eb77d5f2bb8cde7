#include "catch.h"

#include "base/unique_fd.h"
#include "sshd/session/logins.h"
#include "temp_dir.h"

#include <fcntl.h>
#include <paths.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>

using namespace postern;
using namespace postern::sshd::session;

TEST_CASE("a lock that somebody holds on wtmp holds up neither login nor logout", "[session][logins][root]") {
  if (::geteuid() != 0) return;  // only root writes there
  const TempDir dir;
  const std::string file = dir.file("wtmp");
  std::ofstream{file}.flush();
  // Its end by F_RDLCK, as anybody who may read the file can; in a mount namespace, so that the machine's own file is left alone.
  const pid_t child = ::fork();
  if (child == 0) {
    if (::unshare(CLONE_NEWNS) != 0 || ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 || ::mount(file.c_str(), _PATH_WTMP, nullptr, MS_BIND, nullptr) != 0) ::_exit(3);
    int ready[2];
    if (::pipe(ready) != 0) ::_exit(3);
    const pid_t holder = ::fork();
    if (holder == 0) {
      const UniqueFd held{::open(_PATH_WTMP, O_RDONLY)};
      struct flock lock {};
      lock.l_type = F_RDLCK;
      const bool holds = ::fcntl(held.get(), F_SETLK, &lock) == 0;
      if (::write(ready[1], holds ? "y" : "n", 1) == 1) ::pause();
      ::_exit(0);
    }
    char held = 0;
    if (::read(ready[0], &held, 1) != 1 || held != 'y') ::_exit(3);
    const auto begin = std::chrono::steady_clock::now();
    record_logout("/dev/pts/999", ::getpid());
    const bool quick = std::chrono::steady_clock::now() - begin < std::chrono::seconds{5};  // libc waits 10
    ::kill(holder, SIGKILL);
    ::_exit(quick ? 0 : 1);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WEXITSTATUS(status) == 0);
}
