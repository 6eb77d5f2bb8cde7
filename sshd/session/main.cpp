// postern-session: privileged half of one allowed connection.
//
// Runs as root, single-threaded. Started by posternd as a zygote that forks one process per connection. Such a process reads from the
// broker, from its connection's postern-net (fixed frames, taken as hostile) and from the programs' terminals and pipes. It does PAM,
// starts programs as the local user, and copies what they write into the recording.
//
// Never parses SSH or HTTP, never reads from the network, holds no key.
#include "sshd/session/zygote.h"

#include "base/process_title.h"

#include <sys/prctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

int main(int argc, char** argv) {
  postern::init_process_title(argv);
  if (argc == 2 && std::strcmp(argv[1], "--version") == 0) {
    std::printf("postern-session %s\n", POSTERN_VERSION);
    return 0;
  }
  if (argc != 1) {
    std::fprintf(stderr, "usage: postern-session [--version]\nStarted by posternd, with its control socket as descriptor 3.\n");
    return 2;
  }
  ::prctl(PR_SET_NAME, "postern-session", 0, 0, 0);  // started by descriptor, the kernel calls it by its number
  const int status = postern::sshd::session::run_zygote(3);
  std::fflush(nullptr);
  ::_exit(status);  // a forked session has nothing of the zygote's to tear down
}
