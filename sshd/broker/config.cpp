#include "sshd/broker/config.h"

#include <algorithm>
#include <cctype>
#include <optional>

namespace postern::sshd::broker {
namespace {

namespace hujson = auth::policy::hujson;

/// A setting as the readers of the policy's language see it.
hujson::Value json_of(const SettingsValue& setting) {
  hujson::Value v;
  v.line = setting.line;
  v.column = setting.column;
  v.boolean = setting.boolean;
  v.text = setting.text;
  switch (setting.kind) {
    case SettingsValue::Kind::boolean: v.kind = hujson::Kind::boolean; break;
    case SettingsValue::Kind::number: v.kind = hujson::Kind::number; break;
    case SettingsValue::Kind::text: v.kind = hujson::Kind::string; break;
    case SettingsValue::Kind::list: v.kind = hujson::Kind::array; break;
  }
  for (const auto& item : setting.items) v.items.push_back(json_of(item));
  return v;
}

/// [session_rules]: what a capability may say, said for the whole host, by the same reader.
auth::policy::SessionRules read_session_rules(SettingsReader& r, const std::string& file) {
  hujson::Value table;
  table.kind = hujson::Kind::object;
  for (const auto& name : auth::policy::session_rule_settings())
    if (const auto value = r.any(name.c_str())) table.members.push_back({name, value->line, value->column, json_of(*value)});
  hujson::Problems problems{file};
  auto rules = auth::policy::read_session_rule_settings(table, "session_rules", problems);
  for (auto& p : problems.take()) r.refuse(std::move(p));
  return rules;
}

/// "example.com", and organisations that are no domain ("github").
std::optional<std::string> domain(const std::string& text) {
  const bool good = !text.empty() && text.size() <= 253 && text.front() != '.' && text.back() != '.' &&
                    std::all_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x80 && (std::isalnum(c) != 0 || c == '-' || c == '.' || c == '_'); });
  return good ? std::optional{text} : std::nullopt;
}

}  // namespace

auth::policy::LoadOptions load_options(const Config& config) {
  return {.session_capability = config.policy.session_capability, .domains = config.policy.domains};
}

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
    r.text("session_capability", c.policy.session_capability);
    const auto& name = c.policy.session_capability;
    if (name.size() > 255 || name.find('/') == std::string::npos || !std::all_of(name.begin(), name.end(), [](unsigned char ch) { return ch > 0x20 && ch < 0x7f; }))
      r.refuse("session_capability", "must be the name of an app capability, at most 255 characters", "\"example.com/cap/ssh\"");
    r.list("domains", c.policy.domains, domain, "a domain", "\"example.com\"");
  });
  r.table("session_rules", [&] { c.session_rules = read_session_rules(r, std::string{file_name}); });
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
  r.table("forwarding", [&] {
    r.one_of("gateway_ports", c.forwarding.gateway_ports, {"no", "clientspecified"});
    r.flag("unlink_sockets", c.forwarding.unlink_sockets);
    r.duration("connect_timeout", c.forwarding.connect_timeout, 100ms, 10min);
    r.path("xauth", c.forwarding.xauth, true);
  });
  r.table("limits", [&] {
    r.duration("login_grace_time", c.limits.login_grace_time, 100ms, 1h);
    r.number("auth_attempts", c.limits.auth_attempts, 1, 100);
    r.number("unauthenticated_connections", c.limits.unauthenticated_connections, 1, 100'000);
    r.number("unauthenticated_connections_per_source", c.limits.unauthenticated_connections_per_source, 1, 100'000);
    r.number("sessions_per_connection", c.limits.sessions_per_connection, 0, 10'000);
    r.number("forwards_per_connection", c.limits.forwards_per_connection, 0, 4000);
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
