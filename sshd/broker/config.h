#pragma once

#include "auth/identity/identity.h"
#include "auth/policy/policy.h"
#include "auth/policy/sources.h"
#include "base/address.h"
#include "base/expected.h"
#include "base/node.h"
#include "base/settings.h"
#include "sshd/broker/penalties.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace postern::sshd::broker {

enum class PolicySource { file, grants, tailnet };

/// posternd.toml, read and checked. docs/SETTINGS.md says what each key means.
struct Config {
  struct Listen {
    std::vector<Endpoint> addresses;  ///< empty: those that the network gave this machine
    std::uint16_t port = 22;          ///< for those
    std::string takeover = "none";    ///< "nft"
    std::uint16_t takeover_port = 22022;
    std::string nft = "/usr/sbin/nft";
    std::chrono::milliseconds nft_timeout{5'000};
  } listen;
  struct Policy {
    std::vector<PolicySource> source{PolicySource::file};  ///< all must allow
    bool has(PolicySource s) const { return std::find(source.begin(), source.end(), s) != source.end(); }
    std::string file = "/etc/postern/policy.hujson";
    bool watch = true;
    std::string login_capability{auth::policy::default_login_capability};
    std::chrono::seconds tailnet_check_period = std::chrono::hours{12};
    bool require_network_rule = true;
    std::string session_capability{auth::policy::default_session_capability};
    std::vector<std::string> domains;
  } policy;
  auth::policy::SessionRules session_rules;  ///< of every session on this host
  struct Identity {
    std::string provider = "static";  ///< "tailscaled", "wireguard"
    std::string file = "/etc/postern/nodes.toml";
  } identity;
  auth::identity::TailscaledSettings tailscaled;
  auth::identity::WireguardSettings wireguard;
  struct HostKeys {
    std::string dir = "/var/lib/postern/host-keys";
    std::vector<std::string> files;  ///< in place of dir
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
    std::string on_disconnect = "hangup";  ///< "kill"
    std::chrono::milliseconds hang_up_time{10'000};
    std::chrono::milliseconds farewell_time{600};
    std::chrono::milliseconds kill_time{2'000};
  } session;
  struct Forwarding {
    std::string gateway_ports = "no";  ///< "clientspecified"
    bool unlink_sockets = false;
    std::chrono::milliseconds connect_timeout{30'000};
    std::string xauth = "/usr/bin/xauth";
  } forwarding;
  struct Limits {
    std::chrono::milliseconds login_grace_time{30'000};
    std::chrono::milliseconds refusal_time{1'000};
    std::uint32_t auth_attempts = 6;
    std::uint32_t unauthenticated_connections = 1000;
    std::uint32_t unauthenticated_connections_per_source = 100;
    std::uint32_t sessions_per_connection = 10;
    std::uint32_t forwards_per_connection = 1024;
    std::uint32_t connections = 10'000;
    std::uint32_t warm_workers = 4;
    std::chrono::milliseconds crash_penalty{60'000};
    Penalties::Terms penalties;
    std::vector<Prefix> penalty_exempt;
    std::uint32_t bytes_before_login = 128 * 1024;
    std::uint32_t packets_before_login = 500;
  } limits;
  struct Log {
    std::string level = "info";
  } log;
  struct Audit {
    std::string file;     ///< JSON lines; empty: none
    std::string journal_socket = "/run/systemd/journal/socket";  ///< fields, to journald, where it is; empty: none
    bool auditd = true;   ///< the kernel's audit, where it is
  } audit;
  struct Ssh {
    std::string algorithms = "compatible";  ///< or "strict", "legacy"
    std::string version_string = "OpenSSH_9.9_Postern_0.1";  ///< clients look for OpenSSH and its number: docs/CLIENTS.md
    std::chrono::milliseconds tcp_keepalive{60'000};      ///< 0: off
    std::chrono::milliseconds tcp_user_timeout{900'000};  ///< 0: the kernel's
    std::chrono::milliseconds client_alive_interval{0};   ///< 0: off
    std::uint32_t client_alive_count_max = 3;
    std::uint64_t rekey_bytes = 0;           ///< 0 = the cipher's own limit alone
    std::chrono::milliseconds rekey_interval{0};  ///< 0 = never for time alone
    std::chrono::milliseconds sign_timeout{30'000};
  } ssh;
};

/// Reads `text`; all problems at once, with their places. Unknown sections, unknown keys, wrong types and values out of range are problems.
Expected<Config, std::vector<Problem>> parse_config(std::string_view text, std::string_view file_name);

/// What Policy::load() has to know of them.
auth::policy::LoadOptions load_options(const Config& config);

}  // namespace postern::sshd::broker
