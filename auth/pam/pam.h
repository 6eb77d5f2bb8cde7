#pragma once

#include "base/expected.h"

#include <memory>
#include <string>
#include <vector>

struct pam_handle;

namespace postern::auth::pam {

/// One PAM handle for one connection: account, credentials, session (pam(3)). There is no authentication phase: the network has said
/// who is there. The conversation answers no question (PAM_CONV_ERR) and collects texts.
///
/// Used by one process from start() to the end: modules keep state in it and in the process (keyrings, loginuid, cgroups).
class PamSession {
 public:
  struct Request {
    std::string service;          ///< "postern"
    std::string confdir;          ///< empty: the system's
    std::string user;
    std::string remote_host;      ///< PAM_RHOST, numeric
    std::string ssh_connection;   ///< SSH_CONNECTION for modules, as sshd gives it; not part of environment()
  };

  static Expected<std::unique_ptr<PamSession>> start(const Request& request);
  /// Ends what was opened (credentials, session) and the handle.
  ~PamSession();
  PamSession(const PamSession&) = delete;
  PamSession& operator=(const PamSession&) = delete;

  /// pam_acct_mgmt. The error's user_message is one clear line.
  Expected<Done> account();
  /// pam_setcred(ESTABLISH). sshd goes on when it fails without a password having been asked; so do callers of this.
  Expected<Done> establish_credentials();
  Expected<Done> open_session();
  /// PAM_USER is still who it was: a module may map users, and nobody here has approved of another.
  bool same_user() const;

  /// "NAME=value", without what sshd keeps from leaking back (SSH_AUTH_INFO*, SSH_CONNECTION*).
  std::vector<std::string> environment() const;
  /// What modules told the user so far; forgets it. Lines end in "\n".
  std::string take_texts();

  /// Takes back what open_session() and establish_credentials() did. Once; the destructor calls it.
  void close();

 private:
  explicit PamSession(std::string user) : user_{std::move(user)} {}
  Error error(const char* doing, int code);

  pam_handle* handle_ = nullptr;
  std::string user_;
  std::string texts_;
  int last_ = 0;
  bool credentials_ = false;
  bool session_ = false;
};

/// dlopens every module that the service's file names (following @include, include, substack), so that processes forked from this one
/// find them loaded. No pam_start here. Returns what an administrator should know: no such service ("other" is used), modules that
/// are missing.
std::vector<std::string> warm_up(const std::string& service, const std::string& confdir);

/// The modules that a service's file names, in order, once each; for warm_up() and its test. `found` = the file is there.
std::vector<std::string> modules_of(const std::string& service, const std::string& confdir, bool& found);

}  // namespace postern::auth::pam
