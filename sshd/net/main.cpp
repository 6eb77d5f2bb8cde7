// postern-net: the only program of Postern that reads what a stranger sends. Speaks SSH, for one connection a process.
//
// Started by posternd as a zygote, with descriptor 3 as its control socket (sshd/protocol/net.h). It proves libssh by a handshake with
// itself, enters an empty root under its own uid, without capabilities, and forks a worker for each connection; the worker allows itself
// the system calls of sandbox.cpp and only then receives the client's socket.
//
// Never opens files or sockets, knows no policy, decides nothing, holds no private host key.
#include "base/unique_fd.h"
#include "base/process_title.h"
#include "sshd/net/zygote.h"

#include "libssh_text.h"

#include <libssh/libssh.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include <cstdio>
#include <cstring>
#include <exception>

#if defined(__SANITIZE_ADDRESS__)
// LeakSanitizer needs /proc and ptrace, which a worker has not (DESIGN section 6, traps); its symbolizer is another program.
extern "C" const char* __asan_default_options();
extern "C" const char* __asan_default_options() { return "detect_leaks=0:symbolize=0"; }
#endif

int main(int argc, char* argv[]) {
  postern::init_process_title(argv);
  if (argc == 2 && std::strcmp(argv[1], "--version") == 0) {
    std::printf("postern-net %s (%s)\n", POSTERN_VERSION, POSTERN_LIBSSH_TEXT);
    return 0;
  }
  int type = 0;
  socklen_t length = sizeof type;
  if (argc != 1 || ::getsockopt(3, SOL_SOCKET, SO_TYPE, &type, &length) != 0 || type != SOCK_SEQPACKET) {
    std::fprintf(stderr, "postern-net: posternd starts this program; there is nothing to do with it by hand (--version)\n");
    return 2;
  }
  ::prctl(PR_SET_NAME, "postern-net", 0, 0, 0);  // started by descriptor, the kernel calls it by its number
  try {
    if (ssh_init() != SSH_OK) {
      std::fprintf(stderr, "postern-net: libssh does not start\n");
      return 1;
    }
    return postern::sshd::net::run_zygote(postern::UniqueFd{3});
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "postern-net: %s\n", failure.what());
    return 1;
  }
}
