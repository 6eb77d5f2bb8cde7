#include "sshd/net/self_test.h"

#include "base/unique_fd.h"
#include "sshd/net/libssh_ext.h"

#include <fcntl.h>
#include <sys/socket.h>

#include <chrono>

namespace postern::sshd::net {
namespace {

class CountingSigner : public ext::Signer {
 public:
  explicit CountingSigner(const ext::LocalKey& key) : key_{key} { ext::set_signer(this); }
  ~CountingSigner() override { ext::set_signer(nullptr); }
  std::string sign(std::uint32_t, Digest digest, std::string_view hash) override {
    signatures++;
    return key_.sign(digest, hash);
  }
  int signatures = 0;

 private:
  const ext::LocalKey& key_;
};

struct Session {
  ssh_session session = nullptr;
  ~Session() { ssh_free(session); }
};

/// One login with these algorithms.
Expected<Done> one_login(ext::Server& server, const char* key_exchange, const char* cipher, std::chrono::steady_clock::time_point deadline) {
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0) return Unexpected{system_error("make a socket pair")};
  UniqueFd client_end{pair[0]}, server_end{pair[1]};
  Session client{ssh_new()};
  const bool no = false;
  const int off = 0;
  int fd = client_end.get();
  if (client.session == nullptr) return Unexpected{Error{ENOMEM, "make a client session"}};
  const auto set = [&](ssh_options_e option, const void* value) { return ssh_options_set(client.session, option, value) == SSH_OK; };
  if (!set(SSH_OPTIONS_PROCESS_CONFIG, &no) || !set(SSH_OPTIONS_HOST, "self-test") || !set(SSH_OPTIONS_USER, "self-test") ||
      !set(SSH_OPTIONS_SSH_DIR, "/nonexistent") || !set(SSH_OPTIONS_KNOWNHOSTS, "/dev/null") ||
      !set(SSH_OPTIONS_GLOBAL_KNOWNHOSTS, "/dev/null") || !set(SSH_OPTIONS_KEY_EXCHANGE, key_exchange) ||
      !set(SSH_OPTIONS_CIPHERS_C_S, cipher) || !set(SSH_OPTIONS_CIPHERS_S_C, cipher) || !set(SSH_OPTIONS_NODELAY, &off) || !set(SSH_OPTIONS_FD, &fd))
    return Unexpected{Error{0, std::string{"set up the client: "} + ssh_get_error(client.session)}};
  client_end.release();  // libssh's from here on
  auto accepted = server.accept(server_end.release());
  if (!accepted) return Unexpected{accepted.error()};
  Session served{*accepted};
  ssh_set_blocking(client.session, 0);

  bool connected = false, kex_done = false;
  for (;;) {
    if (std::chrono::steady_clock::now() > deadline) return Unexpected{Error{ETIMEDOUT, "the handshake does not end"}};
    if (!kex_done) {
      const int rc = ssh_handle_key_exchange(served.session);
      if (rc == SSH_ERROR) return Unexpected{Error{0, std::string{"the server's handshake failed: "} + ssh_get_error(served.session)}};
      kex_done = rc == SSH_OK;
    } else {
      while (ssh_message message = ssh_message_get(served.session)) {
        if (ssh_message_type(message) == SSH_REQUEST_AUTH)
          ssh_message_auth_reply_success(message, 0);
        else
          ssh_message_reply_default(message);
        ssh_message_free(message);
      }
    }
    if (!connected) {
      const int rc = ssh_connect(client.session);
      if (rc == SSH_ERROR) return Unexpected{Error{0, std::string{"the client's handshake failed: "} + ssh_get_error(client.session)}};
      connected = rc == SSH_OK;
    } else {
      const int rc = ssh_userauth_none(client.session, nullptr);
      if (rc == SSH_AUTH_SUCCESS) return Done{};
      if (rc != SSH_AUTH_AGAIN) return Unexpected{Error{0, std::string{"the login failed: "} + ssh_get_error(client.session)}};
    }
  }
}

}  // namespace

Expected<Done> self_test() {
  if (auto fits = ext::check_layout(); !fits) return fits;
  auto key = ext::LocalKey::generate();
  if (!key) return Unexpected{key.error()};
  auto server = ext::Server::make({key->public_blob()}, "self-test");
  if (!server) return Unexpected{server.error()};
  CountingSigner signer{*key};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds{20};
  int logins = 0;
  // The three families of ciphers and of key exchange that clients choose; sntrup is left out: its key generation alone takes 150 ms.
  const bool post_quantum = LIBSSH_VERSION_INT >= SSH_VERSION_INT(0, 12, 0);
  for (const auto& [key_exchange, cipher] : {std::pair{post_quantum ? "mlkem768x25519-sha256" : "curve25519-sha256", "chacha20-poly1305@openssh.com"},
                                             std::pair{"curve25519-sha256", "aes128-gcm@openssh.com"},
                                             std::pair{"curve25519-sha256@libssh.org", "aes256-ctr"}}) {
    auto done = one_login(**server, key_exchange, cipher, deadline);
    if (!done) return Unexpected{Error{done.error().code, std::string{"libssh self-test ("} + key_exchange + "): " + done.error().doing}};
    logins++;
  }
  if (signer.signatures != logins) return Unexpected{Error{0, "libssh self-test: a host key signature did not go through our signer"}};
  return Done{};
}

}  // namespace postern::sshd::net
