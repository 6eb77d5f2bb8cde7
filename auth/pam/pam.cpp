#include "auth/pam/pam.h"

#include <security/pam_appl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace postern::auth::pam {
namespace {

constexpr std::size_t most_text = 16 * 1024;  // of all modules of one login; the rest is not shown

// pam_conv(3). Questions are refused: there is nobody to answer before the login, and no secret that we could ask for.
int converse(int count, const pam_message** messages, pam_response** responses, void* data) {
  auto& texts = *static_cast<std::string*>(data);
  if (count <= 0 || count > PAM_MAX_NUM_MSG) return PAM_CONV_ERR;
  for (int i = 0; i < count; i++)
    if (messages[i]->msg_style != PAM_TEXT_INFO && messages[i]->msg_style != PAM_ERROR_MSG) return PAM_CONV_ERR;
  auto* answers = static_cast<pam_response*>(std::calloc(static_cast<std::size_t>(count), sizeof(pam_response)));
  if (answers == nullptr) return PAM_BUF_ERR;
  for (int i = 0; i < count; i++) {
    const std::string_view text = messages[i]->msg != nullptr ? messages[i]->msg : "";
    if (text.empty() || texts.size() + text.size() + 1 > most_text) continue;
    texts.append(text);
    if (texts.back() != '\n') texts += '\n';
  }
  *responses = answers;
  return PAM_SUCCESS;
}

}  // namespace

Expected<std::unique_ptr<PamSession>> PamSession::start(const Request& request) {
  std::unique_ptr<PamSession> s{new PamSession{request.user}};
  const pam_conv conversation{converse, &s->texts_};
  const int r = request.confdir.empty()
                    ? ::pam_start(request.service.c_str(), request.user.c_str(), &conversation, &s->handle_)
                    : ::pam_start_confdir(request.service.c_str(), request.user.c_str(), &conversation, request.confdir.c_str(), &s->handle_);
  if (r != PAM_SUCCESS) {
    s->handle_ = nullptr;
    return Unexpected{Error{r, "start PAM", "The server cannot check this account now."}};
  }
  s->last_ = r;
  // As sshd (auth-pam.c sshpam_init): modules log and judge by these.
  int set = ::pam_set_item(s->handle_, PAM_RHOST, request.remote_host.c_str());
  if (set == PAM_SUCCESS) set = ::pam_set_item(s->handle_, PAM_TTY, "ssh");
  if (set == PAM_SUCCESS && !request.ssh_connection.empty())
    set = ::pam_putenv(s->handle_, ("SSH_CONNECTION=" + request.ssh_connection).c_str());
  if (set != PAM_SUCCESS) return Unexpected{s->error("set PAM's items", set)};
  return s;
}

PamSession::~PamSession() {
  close();
  if (handle_ != nullptr) ::pam_end(handle_, last_);
}

Error PamSession::error(const char* doing, int code) {
  last_ = code;
  return Error{code, std::string{doing} + ": " + ::pam_strerror(handle_, code)};
}

Expected<Done> PamSession::account() {
  last_ = ::pam_acct_mgmt(handle_, 0);
  if (last_ == PAM_SUCCESS && !same_user()) {
    auto e = error("check the account: a module changed the user", PAM_PERM_DENIED);
    e.user_message = "This account is mapped to another one, which is not allowed here.";
    return Unexpected{std::move(e)};
  }
  if (last_ == PAM_SUCCESS) return Done{};
  auto e = error("check the account", last_);
  switch (e.code) {
    case PAM_NEW_AUTHTOK_REQD: e.user_message = "The password of this account has expired: change it on the machine itself."; break;
    case PAM_ACCT_EXPIRED: e.user_message = "This account has expired."; break;
    case PAM_USER_UNKNOWN: e.user_message = "There is no such account."; break;
    default: e.user_message = "This account may not log in now."; break;
  }
  // pam_nologin and others say it better: their text first, on one line.
  std::string text = take_texts();
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r' || text.back() == ' ')) text.pop_back();
  for (auto& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  if (!text.empty()) e.user_message = text.substr(0, 400);
  return Unexpected{std::move(e)};
}

Expected<Done> PamSession::establish_credentials() {
  const int r = ::pam_setcred(handle_, PAM_ESTABLISH_CRED);
  if (r != PAM_SUCCESS) return Unexpected{error("establish PAM credentials", r)};
  credentials_ = true;
  return Done{};
}

Expected<Done> PamSession::open_session() {
  const int r = ::pam_open_session(handle_, 0);
  if (r != PAM_SUCCESS) {
    auto e = error("open the PAM session", r);
    e.user_message = "The server cannot open a session for this account.";
    return Unexpected{std::move(e)};
  }
  session_ = true;
  last_ = r;
  if (!same_user()) {
    auto e = error("open the PAM session: a module changed the user", PAM_PERM_DENIED);
    e.user_message = "This account is mapped to another one, which is not allowed here.";
    return Unexpected{std::move(e)};
  }
  return Done{};
}

bool PamSession::same_user() const {
  const void* now = nullptr;
  return ::pam_get_item(handle_, PAM_USER, &now) == PAM_SUCCESS && now != nullptr && user_ == static_cast<const char*>(now);
}

std::vector<std::string> PamSession::environment() const {
  std::vector<std::string> result;
  char** list = ::pam_getenvlist(handle_);
  if (list == nullptr) return result;
  for (char** e = list; *e != nullptr; e++) {
    const std::string_view entry{*e};
    // session.c PAM_ENV_DENYLIST.
    if (!entry.starts_with("SSH_AUTH_INFO") && !entry.starts_with("SSH_CONNECTION") && entry.find('=') != std::string_view::npos &&
        entry.find('=') != 0)
      result.emplace_back(entry);
    std::free(*e);
  }
  std::free(list);
  return result;
}

std::string PamSession::take_texts() { return std::exchange(texts_, {}); }

void PamSession::close() {
  if (handle_ == nullptr) return;
  if (credentials_) {  // sshd's order (auth-pam.c sshpam_cleanup)
    credentials_ = false;
    last_ = ::pam_setcred(handle_, PAM_DELETE_CRED);
  }
  if (session_) {
    session_ = false;
    last_ = ::pam_close_session(handle_, 0);
  }
}

}  // namespace postern::auth::pam
