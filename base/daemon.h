#pragma once

#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace postern {

/// What every daemon of ours is started with.
struct DaemonOptions {
  std::string config;
  bool check = false;  ///< --check-config: read the settings, tell what is wrong, and end
  int ready_fd = -1;   ///< --ready-fd N: see tell_ready()
};
/// Reads the command line. A number is the exit status to leave with: 0 after --help and --version, 2 for a wrong call.
std::variant<DaemonOptions, int> read_daemon_options(int argc, char** argv, const std::string& about, const std::string& default_config,
                                                     const std::string& settings_page, const std::string& version);

/// sd_notify(3) without libsystemd: one datagram ("READY=1") to NOTIFY_SOCKET, if there is one. Never blocks, never fails.
void notify_systemd(std::string_view state);

/// The daemon serves: tells systemd, and writes one line of JSON to `ready_fd` (-1: none), which it closes:
/// {"listening":["127.0.0.1:2222"],"pid":7, ...more}. That is how a script learns a port that the kernel chose.
void tell_ready(int ready_fd, const std::vector<std::string>& listening, const std::map<std::string, std::string>& more = {});

}  // namespace postern
