#include "base/daemon.h"

#include "base/unique_fd.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace postern {

std::variant<DaemonOptions, int> read_daemon_options(int argc, char** argv, const std::string& about, const std::string& default_config,
                                                     const std::string& settings_page, const std::string& version) {
  DaemonOptions options;
  options.config = default_config;
  CLI::App app{about};
  app.add_option("--config", options.config, "settings (" + settings_page + ")")->capture_default_str();
  app.add_flag("--check-config", options.check, "read the settings, name what is wrong (file:line:column), and exit 0 or 1");
  app.add_option("--ready-fd", options.ready_fd, "write one line of JSON to this descriptor when serving");
  app.set_version_flag("--version", version);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  return options;
}

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
