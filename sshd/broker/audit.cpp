#include "sshd/broker/audit.h"

#include "base/log.h"

#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <libaudit.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <cstring>

namespace postern::sshd::broker {
namespace {

std::string now_text() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(std::chrono::floor<std::chrono::seconds>(now));
  const auto us = std::chrono::duration_cast<std::chrono::microseconds>(now - std::chrono::floor<std::chrono::seconds>(now)).count();
  std::tm t{};
  ::gmtime_r(&seconds, &t);
  char text[64];
  std::snprintf(text, sizeof text, "%04d-%02d-%02dT%02d:%02d:%02d.%06lldZ", t.tm_year + 1900, t.tm_mon + 1, t.tm_mday, t.tm_hour, t.tm_min, t.tm_sec, static_cast<long long>(us));
  return text;
}

std::string value_of(const Audit::Fields& fields, std::string_view name) {
  for (const auto& [n, v] : fields)
    if (n == name) return v;
  return {};
}

}  // namespace

std::string audit_json(const std::string& time, const char* event, const Audit::Fields& fields) {
  nlohmann::ordered_json line{{"time", time}, {"event", event}};
  for (const auto& [name, value] : fields)
    if (!value.empty()) line[name] = value;
  return line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string audit_journal(const char* event, const Audit::Fields& fields) {
  std::string out;
  const auto field = [&](std::string name, std::string_view value) {
    if (value.empty()) return;
    if (value.find('\n') == std::string_view::npos) {
      out += name + "=" + std::string{value} + "\n";
      return;
    }
    out += name + "\n";
    for (int shift = 0; shift < 64; shift += 8) out += static_cast<char>(static_cast<std::uint64_t>(value.size()) >> shift & 0xff);
    out += std::string{value} + "\n";
  };
  std::string message = std::string{event};
  for (const char* name : {"verdict", "user", "node", "ssh_user", "local_user", "why"})
    if (const auto value = value_of(fields, name); !value.empty()) message += std::string{" "} + name + "=" + safe_quoted(value);
  field("MESSAGE", message);
  const bool refused = value_of(fields, "verdict") == "deny";
  field("PRIORITY", refused ? "5" : "6");  // notice, info (syslog(3))
  field("SYSLOG_FACILITY", "10");          // authpriv
  field("SYSLOG_IDENTIFIER", "posternd");
  field("POSTERN_EVENT", event);
  for (const auto& [name, value] : fields) {
    std::string key = std::string{"POSTERN_"} + name;
    std::transform(key.begin(), key.end(), key.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
    field(std::move(key), value);
  }
  return out;
}

Audit::Audit(const Config::Audit& settings) : settings_{settings} {}

Audit::~Audit() {
  if (kernel_ >= 0) ::audit_close(kernel_);
}

Expected<Done> Audit::open() {
  if (!settings_.file.empty()) {
    UniqueFd file{::open(settings_.file.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600)};
    if (!file) return Unexpected{system_error("audit.file: open " + settings_.file)};
    file_ = std::move(file);
    torn_ = false;
  }
  if (!settings_.journal_socket.empty() && !journal_) journal_ = UniqueFd{::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  // A kernel without it, or a container: EPROTONOSUPPORT, EINVAL, EPERM. Then there is no auditd either.
  if (settings_.auditd && kernel_ < 0 && ::geteuid() == 0) kernel_ = ::audit_open();
  return Done{};
}

void Audit::tell(const char* event, const Fields& fields) {
  if (file_) {
    // After one of which only a part found room this one begins a line of its own: one event is lost, not two.
    const std::string line = (torn_ ? "\n" : "") + audit_json(now_text(), event, fields) + "\n";
    const ssize_t written = ::write(file_.get(), line.data(), line.size());
    if (written > 0) torn_ = line[static_cast<std::size_t>(written) - 1] != '\n';
    if (written != static_cast<ssize_t>(line.size()))
      spdlog::error("event=audit_not_written file={} why={}", safe_quoted(settings_.file), safe_quoted(written < 0 ? std::strerror(errno) : "no room for all of it"));
  }
  if (journal_) {
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    std::memcpy(to.sun_path, settings_.journal_socket.data(), std::min(settings_.journal_socket.size(), sizeof to.sun_path - 1));
    const std::string datagram = audit_journal(event, fields);
    // No journald here (ENOENT, ECONNREFUSED): the log lines on stderr say the same.
    (void)::sendto(journal_.get(), datagram.data(), datagram.size(), MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&to), sizeof to);
  }
}

void Audit::user_login(const std::string& account, const std::string& address, bool success) {
  if (kernel_ < 0) return;
  // As sshd: op=login, acct in hex where it needs it, terminal=ssh. EPERM in a container: nobody listens.
  (void)::audit_log_acct_message(kernel_, AUDIT_USER_LOGIN, nullptr, "login", account.empty() ? "(unknown)" : account.c_str(), static_cast<unsigned>(-1), nullptr, address.c_str(), "ssh",
                                 success ? 1 : 0);
}

}  // namespace postern::sshd::broker
