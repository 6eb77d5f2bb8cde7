#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace postern {

/// sd_notify(3) without libsystemd: one datagram ("READY=1") to NOTIFY_SOCKET, if there is one. Never blocks, never fails.
void notify_systemd(std::string_view state);

/// The daemon serves: tells systemd, and writes one line of JSON to `ready_fd` (-1: none), which it closes:
/// {"listening":["127.0.0.1:2222"],"pid":7, ...more}. That is how a script learns a port that the kernel chose.
void tell_ready(int ready_fd, const std::vector<std::string>& listening, const std::map<std::string, std::string>& more = {});

}  // namespace postern
