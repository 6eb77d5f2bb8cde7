#include "base/daemon.h"

#include "base/unique_fd.h"

#include <nlohmann/json.hpp>

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace postern {

void notify_systemd(std::string_view state) {
  const char* const path = std::getenv("NOTIFY_SOCKET");
  if (path == nullptr || (path[0] != '/' && path[0] != '@')) return;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::size_t length = std::strlen(path);
  if (length >= sizeof address.sun_path) return;
  std::memcpy(address.sun_path, path, length);
  if (path[0] == '@') address.sun_path[0] = '\0';  // an abstract socket
  const UniqueFd fd{::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  if (!fd) return;
  (void)!::sendto(fd.get(), state.data(), state.size(), MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&address),
                  static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length));
}

void tell_ready(int ready_fd, const std::vector<std::string>& listening, const std::map<std::string, std::string>& more) {
  if (ready_fd >= 0) {
    nlohmann::json line(more);
    line["listening"] = nlohmann::json::array();
    for (const auto& where : listening) line["listening"].push_back(where);
    line["pid"] = ::getpid();
    const std::string text = line.dump() + "\n";
    (void)!::write(ready_fd, text.data(), text.size());
    ::close(ready_fd);
  }
  notify_systemd("READY=1");
}

}  // namespace postern
