#include "sshd/session/close_elsewhere.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

namespace postern::sshd::session {

bool close_elsewhere(std::vector<UniqueFd>& fds) {
  if (fds.empty()) return true;
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return false;
  UniqueFd read_end{ends[0]}, write_end{ends[1]};
  const pid_t pid = ::fork();  // reaped with the programs
  if (pid < 0) return false;
  if (pid == 0) {
    ::close(write_end.get());
    char byte;
    while (::read(read_end.get(), &byte, 1) < 0 && errno == EINTR) {
    }
    ::_exit(0);
  }
  fds.clear();  // never the last ones: the child has them until write_end closes
  return true;
}

bool may_block_in_close(int fd) {
  struct stat st {};
  return ::fstat(fd, &st) == 0 && S_ISSOCK(st.st_mode);
}

}  // namespace postern::sshd::session
