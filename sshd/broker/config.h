#pragma once

#include "auth/policy/policy.h"
#include "base/address.h"
#include "base/expected.h"
#include "base/node.h"
#include "base/settings.h"

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace postern::sshd::broker {

/// posternd.toml, read and checked. docs/SETTINGS.md says what each key means.
struct Config {
  struct Listen {
    std::vector<Endpoint> addresses;
  } listen;
  struct Policy {
    std::string file = "/etc/postern/policy.hujson";
    bool require_network_rule = true;
    std::string session_capability{auth::policy::default_session_capability};
    std::vector<std::string> domains;
  } policy;
  auth::policy::SessionRules session_rules;  ///< of every session on this host
  struct Identity {
    std::string provider = "static";
    std::string file = "/etc/postern/nodes.toml";
  } identity;
  struct HostKeys {
    std::string dir = "/var/lib/postern/host-keys";
  } host_keys;
  struct Programs {
    std::string dir;
  } programs;
  struct Control {
    std::string socket = "/run/postern/control.sock";
    std::string registration_socket = "/run/postern/registration.sock";
  } control;
  struct Relay {
    std::string socket = "/run/postern-relay/relay.sock";
  } relay;
  struct Recorder {
    std::uint16_t port = 80;
    std::chrono::milliseconds start_timeout{1000};
    std::chrono::milliseconds grace{10'000};
  } recorder;
  struct Sandbox {
    std::string user = "postern-net";
    std::string empty_root = "/run/postern/empty";
  } sandbox;
  struct Pam {
    std::string service = "postern";
    std::string confdir;
  } pam;
  struct Session {
    std::string sftp_server = "/usr/lib/openssh/sftp-server";
    std::chrono::seconds orphan_limit{300};
  } session;
  struct Forwarding {
    std::string gateway_ports = "no";  ///< "clientspecified"
    bool unlink_sockets = false;
    std::chrono::milliseconds connect_timeout{30'000};
    std::string xauth = "/usr/bin/xauth";
  } forwarding;
  struct Limits {
    std::chrono::milliseconds login_grace_time{30'000};
    std::uint32_t auth_attempts = 6;
    std::uint32_t unauthenticated_connections = 1000;
    std::uint32_t unauthenticated_connections_per_source = 100;
    std::uint32_t sessions_per_connection = 10;
    std::uint32_t forwards_per_connection = 1024;
    std::uint32_t connections = 10'000;
    std::uint32_t warm_workers = 4;
    std::chrono::milliseconds crash_penalty{60'000};
  } limits;
  struct Log {
    std::string level = "info";
  } log;
  struct Ssh {
    std::string version_string = "OpenSSH_9.9_Postern_0.1";  ///< clients look for OpenSSH and its number: docs/CLIENTS.md
  } ssh;
};

/// Reads `text`; all problems at once, with their places. Unknown sections, unknown keys, wrong types and values out of range are problems.
Expected<Config, std::vector<Problem>> parse_config(std::string_view text, std::string_view file_name);

/// What Policy::load() has to know of them.
auth::policy::LoadOptions load_options(const Config& config);

}  // namespace postern::sshd::broker
