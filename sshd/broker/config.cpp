#include "sshd/broker/config.h"

#include <algorithm>

namespace postern::sshd::broker {

Expected<Config, std::vector<Problem>> parse_config(std::string_view text, std::string_view file_name) {
  using namespace std::chrono_literals;
  Config c;
  SettingsReader r{text, std::string{file_name}};
  r.table("listen", [&] {
    r.list("addresses", c.listen.addresses, [](const std::string& t) { return Endpoint::parse(t, 22); }, "address:port with a numeric address",
           "\"100.64.0.1:22\", \"[fd7a::1]:22\"", true);
  });
  r.table("policy", [&] {
    r.path("file", c.policy.file);
    r.flag("require_network_rule", c.policy.require_network_rule);
  });
  r.table("identity", [&] {
    r.one_of("provider", c.identity.provider, {"static"});
    r.path("file", c.identity.file);
  });
  r.table("host_keys", [&] { r.path("dir", c.host_keys.dir); });
  r.table("programs", [&] { r.path("dir", c.programs.dir, true); });
  r.table("control", [&] {
    r.path("socket", c.control.socket, false, true);
    r.path("registration_socket", c.control.registration_socket, false, true);
  });
  r.table("relay", [&] { r.path("socket", c.relay.socket, false, true); });
  r.table("recorder", [&] {
    r.number("port", c.recorder.port, 1, 65535);
    r.duration("start_timeout", c.recorder.start_timeout, 10ms, 60s);
    r.duration("grace", c.recorder.grace, 0ms, 1h);
  });
  r.table("sandbox", [&] {
    r.text("user", c.sandbox.user);
    r.path("empty_root", c.sandbox.empty_root);
  });
  r.table("pam", [&] {
    r.text("service", c.pam.service);
    if (c.pam.service.size() > 64 || c.pam.service.find('/') != std::string::npos)
      r.refuse("service", "must be the name of a file in pam.d, 64 bytes at most");
    r.path("confdir", c.pam.confdir, true);
  });
  r.table("session", [&] {
    r.path("sftp_server", c.session.sftp_server, true);
    r.duration("orphan_limit", c.session.orphan_limit, 1s, 24h);
  });
  r.table("limits", [&] {
    r.duration("login_grace_time", c.limits.login_grace_time, 100ms, 1h);
    r.number("auth_attempts", c.limits.auth_attempts, 1, 100);
    r.number("unauthenticated_connections", c.limits.unauthenticated_connections, 1, 100'000);
    r.number("unauthenticated_connections_per_source", c.limits.unauthenticated_connections_per_source, 1, 100'000);
    r.number("sessions_per_connection", c.limits.sessions_per_connection, 0, 10'000);
    r.number("connections", c.limits.connections, 1, 1'000'000);
    r.number("warm_workers", c.limits.warm_workers, 0, 1000);
    r.duration("crash_penalty", c.limits.crash_penalty, 0ms, 24h);
  });
  r.table("log", [&] { r.one_of("level", c.log.level, {"trace", "debug", "info", "warning", "error"}); });
  r.table("ssh", [&] {
    r.text("version_string", c.ssh.version_string);
    const auto& v = c.ssh.version_string;
    const bool printable = std::all_of(v.begin(), v.end(), [](unsigned char ch) { return ch > 0x20 && ch < 0x7f && ch != '-'; });
    if (!printable || v.size() > 64)
      r.refuse("version_string", "must be 1 to 64 printable characters without blanks or \"-\" (RFC 4253 section 4.2)");
  });
  if (auto problems = r.finish(); !problems.empty()) return Unexpected{std::move(problems)};
  return c;
}

}  // namespace postern::sshd::broker
