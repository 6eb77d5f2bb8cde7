#include "sshd/broker/config.h"

#include "sshd/protocol/net.h"

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

std::optional<PolicySource> policy_source(const std::string& text) {
  if (text == "file") return PolicySource::file;
  if (text == "grants") return PolicySource::grants;
  if (text == "tailnet") return PolicySource::tailnet;
  return std::nullopt;
}

std::optional<std::string> absolute_path(const std::string& text) {
  return text.size() > 1 && text.front() == '/' && text.find('\0') == std::string::npos ? std::optional{text} : std::nullopt;
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
           "\"100.64.0.1:22\", \"[fd7a::1]:22\"");
    r.number("port", c.listen.port, 1, 65535);
    r.one_of("takeover", c.listen.takeover, {"none", "nft"});
    r.number("takeover_port", c.listen.takeover_port, 1, 65535);
    r.path("nft", c.listen.nft);
    r.duration("nft_timeout", c.listen.nft_timeout, 100ms, 60s);
  });
  const auto capability = [&](const char* key, std::string& name) {
    r.text(key, name);
    if (name.size() > 255 || name.find('/') == std::string::npos || !std::all_of(name.begin(), name.end(), [](unsigned char ch) { return ch > 0x20 && ch < 0x7f; }))
      r.refuse(key, "must be the name of an app capability, at most 255 characters", "\"example.com/cap/ssh\"");
  };
  r.table("policy", [&] {
    r.list("source", c.policy.source, policy_source, "where rules come from", "\"file\", \"grants\" or \"tailnet\"");
    r.path("file", c.policy.file);
    r.flag("watch", c.policy.watch);
    capability("login_capability", c.policy.login_capability);
    r.duration("tailnet_check_period", c.policy.tailnet_check_period, 1min, 168h);
    r.flag("require_network_rule", c.policy.require_network_rule);
    capability("session_capability", c.policy.session_capability);
    r.list("domains", c.policy.domains, domain, "a domain", "\"example.com\"");
  });
  r.table("session_rules", [&] { c.session_rules = read_session_rules(r, std::string{file_name}); });
  r.table("identity", [&] {
    r.one_of("provider", c.identity.provider, {"static", "tailscaled", "wireguard"});
    r.path("file", c.identity.file);
  });
  r.table("tailscaled", [&] {
    r.path("socket", c.tailscaled.socket, false, true);
    r.duration("timeout", c.tailscaled.timeout, 100ms, 30s);
    r.flag("shared_users", c.tailscaled.shared_users);
  });
  r.table("wireguard", [&] {
    r.text("interface", c.wireguard.interface);
    if (c.wireguard.interface.empty() || c.wireguard.interface.size() > 15 || c.wireguard.interface.find_first_of("/ ") != std::string::npos)
      r.refuse("interface", "must be the name of a network interface, at most 15 characters", "\"wg0\"");
    r.path("file", c.wireguard.file);
    r.path("uapi_dir", c.wireguard.uapi_dir);
    r.duration("poll", c.wireguard.poll, 50ms, 60s);
    r.duration("timeout", c.wireguard.timeout, 100ms, 30s);
  });
  r.table("host_keys", [&] {
    r.path("dir", c.host_keys.dir);
    r.list("files", c.host_keys.files, absolute_path, "an absolute path", "\"/etc/ssh/ssh_host_ed25519_key\"");
    if (c.host_keys.files.size() > net::max_host_keys) r.refuse("files", "at most " + std::to_string(net::max_host_keys) + " host keys");
  });
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
    r.one_of("on_disconnect", c.session.on_disconnect, {"hangup", "kill"});
    r.duration("hang_up_time", c.session.hang_up_time, 0ms, 1h);
    r.duration("farewell_time", c.session.farewell_time, 50ms, 60s);
    r.duration("kill_time", c.session.kill_time, 10ms, 60s);
  });
  r.table("forwarding", [&] {
    r.one_of("gateway_ports", c.forwarding.gateway_ports, {"no", "clientspecified"});
    r.flag("unlink_sockets", c.forwarding.unlink_sockets);
    r.duration("connect_timeout", c.forwarding.connect_timeout, 100ms, 10min);
    r.path("xauth", c.forwarding.xauth, true);
  });
  r.table("limits", [&] {
    r.duration("login_grace_time", c.limits.login_grace_time, 100ms, 1h);
    r.duration("refusal_time", c.limits.refusal_time, 10ms, 60s);
    r.number("auth_attempts", c.limits.auth_attempts, 1, 100);
    r.number("unauthenticated_connections", c.limits.unauthenticated_connections, 1, 100'000);
    r.number("unauthenticated_connections_per_source", c.limits.unauthenticated_connections_per_source, 1, 100'000);
    r.number("sessions_per_connection", c.limits.sessions_per_connection, 0, 10'000);
    r.number("forwards_per_connection", c.limits.forwards_per_connection, 0, 4000);
    r.number("connections", c.limits.connections, 1, 1'000'000);
    r.number("warm_workers", c.limits.warm_workers, 0, 1000);
    r.duration("crash_penalty", c.limits.crash_penalty, 0ms, 24h);
    r.duration("penalty_auth_failed", c.limits.penalties.auth_failed, 0ms, 24h);
    r.duration("penalty_no_auth", c.limits.penalties.no_auth, 0ms, 24h);
    r.duration("penalty_key_scan", c.limits.penalties.key_scan, 0ms, 24h);
    r.duration("penalty_grace_exceeded", c.limits.penalties.grace_exceeded, 0ms, 24h);
    r.duration("penalty_min", c.limits.penalties.min, 0ms, 24h);
    r.duration("penalty_max", c.limits.penalties.max, 0ms, 24h);
    if (c.limits.penalties.min > c.limits.penalties.max) r.refuse("penalty_min", "is more than penalty_max: nobody would ever be refused");
    r.number("penalty_sources", c.limits.penalties.sources, 0, 1'000'000);
    r.list("penalty_exempt", c.limits.penalty_exempt, [](const std::string& range) { return Prefix::parse(range); }, "an address or a range of them", "[\"192.0.2.1\", \"10.0.0.0/8\"]");
    r.size("bytes_before_login", c.limits.bytes_before_login, 16 * 1024, 1 << 30);
    r.number("packets_before_login", c.limits.packets_before_login, 20, 1'000'000);
  });
  r.table("audit", [&] {
    r.path("file", c.audit.file, true);
    r.path("journal_socket", c.audit.journal_socket, true, true);
    r.flag("auditd", c.audit.auditd);
  });
  r.table("log", [&] { r.one_of("level", c.log.level, {"trace", "debug", "info", "warning", "error"}); });
  r.table("ssh", [&] {
    r.one_of("algorithms", c.ssh.algorithms, {"compatible", "strict", "legacy"});
    r.text("version_string", c.ssh.version_string);
    const auto& v = c.ssh.version_string;
    const bool printable = std::all_of(v.begin(), v.end(), [](unsigned char ch) { return ch > 0x20 && ch < 0x7f && ch != '-'; });
    if (!printable || v.size() > 64)
      r.refuse("version_string", "must be 1 to 64 printable characters without blanks or \"-\" (RFC 4253 section 4.2)");
    r.duration("tcp_keepalive", c.ssh.tcp_keepalive, 0ms, 24h);
    r.duration("tcp_user_timeout", c.ssh.tcp_user_timeout, 0ms, 24h);
    r.duration("client_alive_interval", c.ssh.client_alive_interval, 0ms, 24h);
    r.number("client_alive_count_max", c.ssh.client_alive_count_max, 0, 1'000'000);
    r.size("rekey_bytes", c.ssh.rekey_bytes, 0, std::uint64_t{1} << 50);
    if (c.ssh.rekey_bytes != 0 && c.ssh.rekey_bytes < 64 * 1024)
      r.refuse("rekey_bytes", "must be 64KiB or more, or 0B: a key exchange itself is some KiB", "\"1GiB\"");
    r.duration("rekey_interval", c.ssh.rekey_interval, 0ms, 7 * 24h);
    if (c.ssh.rekey_interval != 0s && c.ssh.rekey_interval < 1s) r.refuse("rekey_interval", "must be a second or more, or 0s", "\"1h\"");
    r.duration("sign_timeout", c.ssh.sign_timeout, 100ms, 10min);
  });
  if (auto problems = r.finish(); !problems.empty()) return Unexpected{std::move(problems)};
  // What only together is wrong.
  std::vector<Problem> problems;
  const auto refuse = [&](const char* field, std::string what, std::string hint) { problems.push_back({{std::string{file_name}, 1, 1}, field, std::move(what), std::move(hint)}); };
  c.tailscaled.ssh_policy = c.policy.has(PolicySource::tailnet);
  if (c.policy.source.empty()) refuse("policy.source", "must name at least one", "[\"file\"]");
  if (c.policy.has(PolicySource::tailnet) && c.identity.provider != "tailscaled")
    refuse("policy.source", "\"tailnet\" needs the rules that tailscaled has", "[identity] provider = \"tailscaled\"");
  if (c.listen.addresses.empty() && c.identity.provider == "static")
    refuse("listen.addresses", "is missing: the provider \"static\" does not know this machine's addresses", "[\"100.64.0.1:22\", \"[fd7a::1]:22\"]");
  if (c.listen.takeover != "none" && c.listen.takeover_port == c.listen.port)
    refuse("listen.takeover_port", "is the port that is taken over: another server has that one", "22022");
  if (!problems.empty()) return Unexpected{std::move(problems)};
  return c;
}

}  // namespace postern::sshd::broker
