#include "sshd/session/environment.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdlib>

namespace postern::sshd::session {
namespace {

// Debian's sshd is built with these (debian/rules --with-default-path, --with-superuser-path).
constexpr const char* user_path = "/usr/local/bin:/usr/bin:/bin:/usr/games";
constexpr const char* root_path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

// shared/research/security.md 1a. Prefixes end in '*'. Compared in upper case: macOS' and musl's linkers are not all that care for case.
constexpr std::array<std::string_view, 34> never{
    "LD_*",     "DYLD_*",         "BASH_ENV",     "ENV",       "SHELLOPTS", "BASHOPTS",    "PS4",       "IFS",      "PATH",
    "GCONV_PATH", "GLIBC_TUNABLES", "MALLOC_*",   "NODE_OPTIONS", "PYTHON*", "PERL5*",     "PERLLIB",   "RUBYOPT",  "RUBYLIB",
    "LOCPATH",  "NLSPATH",        "TERMINFO*",    "TERMCAP",   "SSH_*",     "XDG_RUNTIME_DIR", "GOTRACEBACK", "PROMPT_COMMAND", "HOME",
    "USER",     "LOGNAME",        "SHELL",        "MAIL",      "HOSTALIASES", "RESOLV_HOST_CONF", "KRB5CCNAME"};

bool denied(std::string_view name, std::string_view value) {
  std::string upper{name};
  for (auto& c : upper) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  for (const auto pattern : never)
    if (glob_matches(pattern, upper)) return true;
  // A time zone is a name; as a path it makes programs that run as others read a file of the user's choice.
  return upper == "TZ" && (value.starts_with('/') || value.starts_with(':') || value.find("..") != std::string_view::npos);
}

void set(Variables& all, std::string_view name, std::string_view value) {
  for (auto& [n, v] : all)
    if (n == name) {
      v = value;
      return;
    }
  all.emplace_back(name, value);
}

}  // namespace

bool glob_matches(std::string_view pattern, std::string_view text) {
  std::size_t p = 0, t = 0, star = std::string_view::npos, mark = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      mark = t;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == text[t])) {
      p++;
      t++;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      t = ++mark;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') p++;
  return p == pattern.size();
}

bool accepts_environment(const ConnectionFacts& facts, std::string_view name, std::string_view value) {
  if (name.empty() || !std::all_of(name.begin(), name.end(), [](unsigned char c) { return c < 0x80 && (std::isalnum(c) || c == '_'); }))
    return false;
  if (value.find('\0') != std::string_view::npos) return false;
  if (denied(name, value)) return false;
  if (name == "LANG" || name.starts_with("LC_")) return true;
  for (std::uint32_t i = 0; i < facts.accept_env_count && i < facts.accept_env.size(); i++)
    if (glob_matches(facts.accept_env[i].get(), name)) return true;
  return false;
}

std::string ssh_connection(const ConnectionFacts& facts) {
  return std::string{facts.peer_address.get()} + " " + std::to_string(facts.peer_port) + " " + std::string{facts.server_address.get()} +
         " " + std::to_string(facts.server_port);
}

std::vector<std::string> make_environment(const EnvironmentRequest& request) {
  Variables all = request.client;
  const auto& user = request.user;
  set(all, "USER", user.name);
  set(all, "LOGNAME", user.name);
  set(all, "HOME", user.home);
  set(all, "PATH", user.uid == 0 ? root_path : user_path);
  set(all, "MAIL", "/var/mail/" + user.name);
  set(all, "SHELL", user.shell.empty() ? "/bin/sh" : user.shell);
  if (const char* tz = std::getenv("TZ")) set(all, "TZ", tz);
  if (!request.term.empty()) set(all, "TERM", request.term);
  for (const auto& entry : request.pam)
    if (const auto equals = entry.find('='); equals != std::string::npos && equals > 0)
      set(all, std::string_view{entry}.substr(0, equals), std::string_view{entry}.substr(equals + 1));
  const auto& f = request.facts;
  set(all, "SSH_CLIENT",
      std::string{f.peer_address.get()} + " " + std::to_string(f.peer_port) + " " + std::to_string(f.server_port));
  set(all, "SSH_CONNECTION", ssh_connection(f));
  // Who is here, for people's scripts and prompts. A tagged node has no user, a user's node has no tags.
  set(all, "POSTERN_USER", f.login.get());
  set(all, "POSTERN_NODE", f.node_name.get());
  set(all, "POSTERN_TAGS", f.tags.get());
  set(all, "POSTERN_CONNECTION_ID", f.id().text());
  if (!request.terminal.empty()) set(all, "SSH_TTY", request.terminal);
  if (!request.display.empty()) set(all, "DISPLAY", request.display);
  if (!request.agent_socket.empty()) set(all, "SSH_AUTH_SOCK", request.agent_socket);
  if (request.original_command) set(all, "SSH_ORIGINAL_COMMAND", *request.original_command);
  std::vector<std::string> result;
  result.reserve(all.size());
  for (const auto& [name, value] : all) result.push_back(name + "=" + value);
  return result;
}

}  // namespace postern::sshd::session
