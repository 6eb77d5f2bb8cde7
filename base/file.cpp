#include "base/file.h"

#include "base/unique_fd.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

namespace postern {

Expected<std::string> read_whole_file(const std::string& path, std::size_t largest) {
  const UniqueFd fd{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)};
  if (!fd) return Unexpected{system_error("open " + path)};
  struct stat s {};
  if (::fstat(fd.get(), &s) != 0) return Unexpected{system_error("read " + path)};
  if (S_ISDIR(s.st_mode)) return Unexpected{system_error("read " + path, EISDIR)};
  if (!S_ISREG(s.st_mode)) return Unexpected{Error{EINVAL, "read " + path + ": not a regular file"}};
  return read_to_end(fd.get(), path, largest);
}

Expected<std::string> read_to_end(int fd, const std::string& name, std::size_t largest) {
  std::string out;
  char buffer[65536];
  for (;;) {
    const ssize_t n = ::read(fd, buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Unexpected{system_error("read " + name)};
    if (n == 0) return out;
    if (out.size() + static_cast<std::size_t>(n) > largest) return Unexpected{system_error("read " + name, EFBIG)};
    out.append(buffer, static_cast<std::size_t>(n));
  }
}

}  // namespace postern
