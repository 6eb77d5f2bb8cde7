#include "base/file.h"

#include "base/unique_fd.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace postern {

Expected<std::string> read_whole_file(const std::string& path, std::size_t largest) {
  const UniqueFd fd{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (!fd) return Unexpected{system_error("open " + path)};
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
