#pragma once

#include "base/unique_fd.h"
#include "sshd/broker/config.h"

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace postern::sshd::broker {

/// What was decided, for those who have to answer for it later: a JSON line, fields for journald, and the kernel's audit.
///
/// Written before the client hears of it, but never waited for: an audit that cannot be written is an error in the log and no reason to lock
/// everybody out (sshd does the same). One thread.
class Audit {
 public:
  using Fields = std::vector<std::pair<const char*, std::string>>;

  explicit Audit(const Config::Audit& settings);
  ~Audit();
  Audit(const Audit&) = delete;
  Audit& operator=(const Audit&) = delete;

  /// Opens the file anew (after logrotate); also what the constructor does not do. An error names the file.
  Expected<Done> open();
  /// `event`: "login", "revoked" ... Empty fields are left out.
  void tell(const char* event, const Fields& fields);
  /// USER_LOGIN for auditd, as sshd's with Linux audit: `account` as the client wrote it, from `address`.
  void user_login(const std::string& account, const std::string& address, bool success);

 private:
  const Config::Audit& settings_;
  UniqueFd file_, journal_;
  bool torn_ = false;  // the file ends in the middle of a line
  int kernel_ = -1;
};

/// {"time":"2026-11-26T06:54:00.123456Z","event":"login",...}, without a line end. Bytes that are no UTF-8 are replaced. Pure.
std::string audit_json(const std::string& time, const char* event, const Audit::Fields& fields);
/// journald's native protocol (systemd.io, "Native Journal Protocol"): MESSAGE and POSTERN_EVENT, POSTERN_NODE ... Pure.
std::string audit_journal(const char* event, const Audit::Fields& fields);

}  // namespace postern::sshd::broker
