#include "pty/oom_score.h"

#include <fcntl.h>
#include <unistd.h>

namespace postern::pty {

void reset_oom_score() {
  const int fd = ::open("/proc/self/oom_score_adj", O_RDWR | O_CLOEXEC);
  if (fd < 0) return;
  char now[16] = {};
  const ssize_t n = ::read(fd, now, sizeof now - 1);
  if (n > 0 && now[0] == '-' && ::pwrite(fd, "0", 1, 0) < 0) {  // sshd leaves it, too, when it may not
  }
  ::close(fd);
}

}  // namespace postern::pty
