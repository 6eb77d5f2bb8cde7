#pragma once

#include "pty/become_user.h"
#include "sshd/protocol/facts.h"

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace postern::sshd::session {

/// `*` and `?`, whole text, case counts (as AcceptEnv of sshd_config(5)).
bool glob_matches(std::string_view pattern, std::string_view text);

/// May a client set this variable? The name is [A-Za-z0-9_]+; LANG and LC_* always, others by the rule's globs, and whatever a
/// glob says never what changes how the user's shell or the dynamic linker load code (Tailscale 651049ec1: acceptEnv "*" let LD_PRELOAD
/// through), nor what only the server may say (SSH_*, PATH, HOME ...).
bool accepts_environment(const ConnectionFacts& facts, std::string_view name, std::string_view value);

using Variables = std::vector<std::pair<std::string, std::string>>;

struct EnvironmentRequest {
  const ConnectionFacts& facts;
  const pty::LocalUser& user;
  const Variables& client;                    ///< accepted ones
  const std::vector<std::string>& pam;        ///< "NAME=value"
  std::string terminal;                       ///< "/dev/pts/7" or empty
  std::string term;                           ///< TERM, or empty
  std::optional<std::string> original_command = {};  ///< SSH_ORIGINAL_COMMAND, where another command is forced
  std::string agent_socket = {};  ///< SSH_AUTH_SOCK, or empty
  std::string display = {};       ///< DISPLAY, or empty
};
/// In the order of sshd 9.2 (session.c do_setup_env), later ones win: client, USER LOGNAME HOME PATH MAIL SHELL TZ TERM, PAM, SSH_*.
std::vector<std::string> make_environment(const EnvironmentRequest& request);

/// "192.0.2.1 50000 192.0.2.2 22"
std::string ssh_connection(const ConnectionFacts& facts);

}  // namespace postern::sshd::session
