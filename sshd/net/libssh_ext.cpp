#include "sshd/net/libssh_ext.h"

// The only file that may include libssh's private headers. config.h is that of the library's own build: struct layouts depend on it.
#include "config.h"
extern "C" {
#include "libssh/priv.h"
#include "libssh/session.h"
#include "libssh/channels.h"
#include "libssh/packet.h"
#include "libssh/buffer.h"
#include "libssh/crypto.h"
#include "libssh/pki.h"
#include "libssh/pki_priv.h"
#include "libssh/ssh2.h"
#include "libssh/string.h"
#include "libssh/bind.h"
#include "libssh/callbacks.h"
}

#include <cstring>
#include <utility>

// Private structs are used below: another series needs a new look at each of them, and the suite.
static_assert(LIBSSH_VERSION_INT >= SSH_VERSION_INT(0, 12, 2) && LIBSSH_VERSION_INT < SSH_VERSION_INT(0, 13, 0));

extern "C" ssh_string __real_ssh_srv_pki_do_sign_sessionid(ssh_session, const ssh_key, const enum ssh_digest_e);
extern "C" ssh_string __wrap_ssh_srv_pki_do_sign_sessionid(ssh_session, const ssh_key, const enum ssh_digest_e);

namespace postern::sshd::net::ext {
namespace {

// ld says nothing when the target of --wrap is gone from the library; taking its address makes that a link error.
[[maybe_unused]] void* volatile wrapped_function_exists = reinterpret_cast<void*>(&__real_ssh_srv_pki_do_sign_sessionid);

Signer* the_signer = nullptr;
std::vector<ssh_key> host_keys;  // public halves, order of Server::make
const Server* owner_of_host_keys = nullptr;  // the last one made
PacketObserver* the_observer = nullptr;

/// A packet read without moving libssh's position.
class View {
 public:
  explicit View(ssh_buffer buffer) : at_{static_cast<const std::uint8_t*>(ssh_buffer_get(buffer))}, left_{ssh_buffer_get_len(buffer)} {}
  bool ok() const { return ok_; }
  std::uint8_t u8() {
    if (left_ < 1) return fail();
    left_--;
    return *at_++;
  }
  std::uint32_t u32() {
    if (left_ < 4) return fail();
    std::uint32_t value = 0;
    for (int i = 0; i < 4; i++) value = value << 8 | *at_++;
    left_ -= 4;
    return value;
  }
  std::string text() {
    const std::uint32_t length = u32();
    if (!ok_ || length > left_) {
      fail();
      return {};
    }
    std::string result(reinterpret_cast<const char*>(at_), length);
    at_ += length;
    left_ -= length;
    return result;
  }

 private:
  std::uint8_t fail() {
    ok_ = false;
    return 0;
  }
  const std::uint8_t* at_;
  std::size_t left_;
  bool ok_ = true;
};

template <class... Parts>
void send_packet(ssh_session session, const char* format, Parts... parts) {
  // The macro ssh_buffer_pack counts its arguments, and would count a pack of them as one.
  if (_ssh_buffer_pack(session->out_buffer, format, sizeof...(parts), parts..., SSH_BUFFER_PACK_END) == SSH_OK)
    ssh_packet_send(session);
  else
    ssh_buffer_reinit(session->out_buffer);
}

std::string blob_of(ssh_key key) {
  ssh_string blob = nullptr;
  std::string result;
  if (ssh_pki_export_pubkey_blob(key, &blob) == SSH_OK) result.assign(static_cast<const char*>(ssh_string_data(blob)), ssh_string_len(blob));
  ssh_string_free(blob);
  return result;
}

Digest to_digest(ssh_key key, ssh_digest_e digest) {
  if (ssh_key_type(key) != SSH_KEYTYPE_RSA) return Digest::none;  // the key type says it
  return digest == SSH_DIGEST_SHA512 ? Digest::sha512 : digest == SSH_DIGEST_SHA256 ? Digest::sha256 : Digest::none;
}

int on_auth_request(ssh_session, std::uint8_t, ssh_buffer packet, void*) {
  View view{packet};
  const std::string user = view.text();
  bool acceptable = view.ok() && !user.empty() && user.size() <= 255;
  for (const char c : user) acceptable = acceptable && static_cast<unsigned char>(c) >= 0x20 && c != 0x7f;
  if (the_observer != nullptr) the_observer->on_auth_request(acceptable);
  return SSH_PACKET_NOT_USED;  // libssh parses, verifies signatures and queues the message
}

int on_channel_open(ssh_session session, std::uint8_t, ssh_buffer packet, void*) {
  View view{packet};
  ChannelOpen open;
  open.type = view.text();
  open.sender = view.u32();
  open.window = view.u32();
  open.max_packet = view.u32();
  // libssh's own ways out: a malformed one, packet size 0 (CVE-2026-59843), before authentication, after no-more-sessions@openssh.com
  if (!view.ok() || open.max_packet == 0 || the_observer == nullptr || (session->flags & SSH_SESSION_FLAG_AUTHENTICATED) == 0 ||
      (open.type == "session" && (session->flags & SSH_SESSION_FLAG_NO_MORE_SESSIONS) != 0))
    return SSH_PACKET_NOT_USED;
  if (open.type == "direct-tcpip") {  // RFC 4254 section 7.2; where the client's connection comes from is its own tale
    open.target = view.text();
    open.port = view.u32();
    view.text();
    view.u32();
    open.malformed = !view.ok();
  } else if (open.type == "direct-streamlocal@openssh.com") {  // OpenSSH PROTOCOL 2.4
    open.target = view.text();
    open.malformed = !view.ok();
  }
  the_observer->on_channel_open(open);
  return SSH_PACKET_USED;
}

int on_channel_request(ssh_session session, std::uint8_t, ssh_buffer packet, void*) {
  using Kind = ChannelRequest::Kind;
  View view{packet};
  ssh_channel channel = ssh_channel_from_local(session, view.u32());
  const std::string name = view.text();
  ChannelRequest request;
  request.want_reply = view.u8() != 0;
  if (!view.ok() || channel == nullptr || the_observer == nullptr) return SSH_PACKET_NOT_USED;
  const auto size = [&] {
    request.cols = view.u32();
    request.rows = view.u32();
    request.xpixels = view.u32();
    request.ypixels = view.u32();
  };
  if (name == "keepalive@openssh.com") return SSH_PACKET_NOT_USED;  // libssh answers it
  if (name == "pty-req") {
    request.kind = Kind::pty;
    request.text = view.text();
    size();
    request.value = view.text();
  } else if (name == "env") {
    request.kind = Kind::env;
    request.text = view.text();
    request.value = view.text();
  } else if (name == "shell") {
    request.kind = Kind::shell;
  } else if (name == "exec") {
    request.kind = Kind::exec;
    request.text = view.text();
  } else if (name == "subsystem") {
    request.kind = Kind::subsystem;
    request.text = view.text();
  } else if (name == "window-change") {
    request.kind = Kind::window_change;
    size();
  } else if (name == "signal") {
    request.kind = Kind::signal;
    request.text = view.text();
  } else if (name == "break") {
    request.kind = Kind::send_break;
    view.u32();  // milliseconds (RFC 4335); tcsendbreak has one length
  } else if (name == "eow@openssh.com") {  // OpenSSH PROTOCOL 2.1: nobody reads the output any more
    request.kind = Kind::end_of_write;
  } else if (name == "auth-agent-req@openssh.com") {
    request.kind = Kind::agent;
  } else if (name == "x11-req") {  // RFC 4254 section 6.3.1
    request.kind = Kind::x11;
    request.single = view.u8() != 0;
    request.text = view.text();
    request.value = view.text();
    request.screen = view.u32();
  }
  if (!view.ok()) request.kind = Kind::other;  // malformed: refused like an unknown one
  the_observer->on_channel_request(channel, std::move(request));
  return SSH_PACKET_USED;
}

int on_global_request(ssh_session session, std::uint8_t, ssh_buffer packet, void*) {
  using Kind = GlobalRequest::Kind;
  View view{packet};
  const std::string name = view.text();
  GlobalRequest request;
  request.want_reply = view.u8() != 0;
  if (!view.ok() || the_observer == nullptr || (session->flags & SSH_SESSION_FLAG_AUTHENTICATED) == 0) return SSH_PACKET_NOT_USED;
  if (name == "tcpip-forward" || name == "cancel-tcpip-forward") {  // RFC 4254 section 7.1
    request.kind = name == "tcpip-forward" ? Kind::listen_tcp : Kind::cancel_tcp;
    request.target = view.text();
    request.port = view.u32();
  } else if (name == "streamlocal-forward@openssh.com" || name == "cancel-streamlocal-forward@openssh.com") {  // OpenSSH PROTOCOL 2.4
    request.kind = name == "streamlocal-forward@openssh.com" ? Kind::listen_socket : Kind::cancel_socket;
    request.target = view.text();
  } else if (name == "no-more-sessions@openssh.com") {
    request.kind = Kind::no_more_sessions;
  }
  if (!view.ok()) request.kind = Kind::other;
  the_observer->on_global_request(std::move(request));
  return SSH_PACKET_USED;
}

}  // namespace

void set_signer(Signer* signer) { the_signer = signer; }

Expected<LocalKey> LocalKey::generate() {
  ssh_key key = nullptr;
  if (ssh_pki_generate_key(SSH_KEYTYPE_ED25519, nullptr, &key) != SSH_OK) return Unexpected{Error{0, "make an ed25519 key"}};
  return LocalKey{key};
}
LocalKey::LocalKey(LocalKey&& other) noexcept : key_{std::exchange(other.key_, nullptr)} {}
LocalKey::~LocalKey() { ssh_key_free(key_); }
std::string LocalKey::public_blob() const { return blob_of(key_); }
std::string LocalKey::sign(Digest, std::string_view data) const {
  std::string result;
  ssh_signature signature = pki_do_sign(key_, reinterpret_cast<const unsigned char*>(data.data()), data.size(), SSH_DIGEST_AUTO);
  ssh_string blob = nullptr;
  if (signature != nullptr && ssh_pki_export_signature_blob(signature, &blob) == SSH_OK)
    result.assign(static_cast<const char*>(ssh_string_data(blob)), ssh_string_len(blob));
  ssh_string_free(blob);
  ssh_signature_free(signature);
  return result;
}

Expected<std::unique_ptr<Server>> Server::make(const std::vector<std::string>& blobs, const std::string& version) {
  std::unique_ptr<Server> server{new Server};
  server->bind_ = ssh_bind_new();
  if (server->bind_ == nullptr) return Unexpected{Error{ENOMEM, "make the SSH server settings"}};
  const auto fail = [&](const char* what) {
    return Unexpected{Error{0, std::string{what} + ": " + ssh_get_error(server->bind_)}};
  };
  const bool no = false;
  const auto set = [&](ssh_bind_options_e option, const void* value) { return ssh_bind_options_set(server->bind_, option, value) == SSH_OK; };
  if (!set(SSH_BIND_OPTIONS_PROCESS_CONFIG, &no)) return fail("switch the configuration file off");
  if (!set(SSH_BIND_OPTIONS_BANNER, version.c_str())) return fail("set the version string");
  // Post-quantum first. No group exchange (it reads /etc/ssh/moduli), no group18 (its cost before authentication), no SHA-1, no zlib.
  // Strict key exchange (CVE-2023-48795) is always on in libssh >= 0.10.6.
  if (!set(SSH_BIND_OPTIONS_KEY_EXCHANGE,
           "mlkem768x25519-sha256,sntrup761x25519-sha512,sntrup761x25519-sha512@openssh.com,mlkem768nistp256-sha256,curve25519-sha256,"
           "curve25519-sha256@libssh.org,ecdh-sha2-nistp256,ecdh-sha2-nistp384,ecdh-sha2-nistp521,diffie-hellman-group16-sha512,"
           "diffie-hellman-group14-sha256"))
    return fail("set the key exchange algorithms");
  for (const auto option : {SSH_BIND_OPTIONS_CIPHERS_C_S, SSH_BIND_OPTIONS_CIPHERS_S_C})
    if (!set(option, "chacha20-poly1305@openssh.com,aes256-gcm@openssh.com,aes128-gcm@openssh.com,aes256-ctr,aes192-ctr,aes128-ctr"))
      return fail("set the ciphers");
  for (const auto option : {SSH_BIND_OPTIONS_HMAC_C_S, SSH_BIND_OPTIONS_HMAC_S_C})
    if (!set(option, "hmac-sha2-256-etm@openssh.com,hmac-sha2-512-etm@openssh.com,hmac-sha2-256,hmac-sha2-512"))
      return fail("set the message authentication codes");
  for (const auto key : host_keys) ssh_key_free(key);
  host_keys.clear();
  owner_of_host_keys = server.get();
  for (const auto& blob : blobs) {
    ssh_string text = ssh_string_new(blob.size());
    if (text == nullptr || ssh_string_fill(text, blob.data(), blob.size()) != 0) return fail("copy a host key");
    ssh_key key = nullptr;
    const int rc = ssh_pki_import_pubkey_blob(text, &key);
    ssh_string_free(text);
    if (rc != SSH_OK) return fail("read a public host key");
    host_keys.push_back(key);
    ssh_key copy = ssh_key_dup(key);
    if (copy == nullptr || !set(SSH_BIND_OPTIONS_IMPORT_KEY, copy)) return fail("use a public host key");
  }
  return server;
}

Server::~Server() {
  ssh_bind_free(bind_);
  if (owner_of_host_keys != this) return;
  for (const auto key : host_keys) ssh_key_free(key);
  host_keys.clear();
  owner_of_host_keys = nullptr;
}

Expected<ssh_session> Server::accept(int socket) {
  ssh_session session = ssh_new();
  if (session == nullptr) return Unexpected{Error{ENOMEM, "make an SSH session"}};
  if (ssh_bind_accept_fd(bind_, session, socket) != SSH_OK) {
    Error error{0, std::string{"take the client's socket: "} + ssh_get_error(bind_)};
    ssh_free(session);
    return Unexpected{std::move(error)};
  }
  // libssh calls the (wrapped) signing function only for a key with the PRIVATE flag. There is no private half behind it.
  for (const ssh_key key : {session->srv.ed25519_key, session->srv.ecdsa_key, session->srv.rsa_key})
    if (key != nullptr) key->flags |= SSH_KEY_FLAG_PRIVATE;
  ssh_set_blocking(session, 0);
  return session;
}

void observe_packets(ssh_session session, PacketObserver& observer) {
  static ssh_packet_callback table[SSH2_MSG_CHANNEL_REQUEST + 1] = {};
  static ssh_packet_callbacks_struct callbacks{0, SSH2_MSG_CHANNEL_REQUEST + 1, table, nullptr};
  table[SSH2_MSG_USERAUTH_REQUEST] = on_auth_request;
  table[SSH2_MSG_GLOBAL_REQUEST] = on_global_request;
  table[SSH2_MSG_CHANNEL_OPEN] = on_channel_open;
  table[SSH2_MSG_CHANNEL_REQUEST] = on_channel_request;
  the_observer = &observer;
  ssh_packet_set_callbacks(session, &callbacks);
}

ssh_channel accept_open(ssh_session session, const ChannelOpen& open) {
  ssh_channel channel = ssh_channel_new(session);
  if (channel == nullptr) return nullptr;
  channel->local_channel = ssh_channel_new_id(session);
  channel->local_window = initial_window;
  channel->local_maxpacket = max_packet;
  channel->remote_channel = open.sender;
  channel->remote_window = open.window;
  channel->remote_maxpacket = open.max_packet;
  channel->state = SSH_CHANNEL_STATE_OPEN;
  channel->flags &= ~SSH_CHANNEL_FLAG_NOT_BOUND;
  send_packet(session, "bdddd", SSH2_MSG_CHANNEL_OPEN_CONFIRMATION, channel->remote_channel, channel->local_channel, channel->local_window,
              channel->local_maxpacket);
  return channel;
}

void refuse_open(ssh_session session, const ChannelOpen& open, OpenFailure reason, const std::string& text) {
  send_packet(session, "bddss", SSH2_MSG_CHANNEL_OPEN_FAILURE, open.sender, static_cast<std::uint32_t>(reason), text.c_str(), "");
}

void reply_request(ssh_channel channel, bool success) {
  // After our CLOSE the client's number may be nobody's, or another channel's (RFC 4254 section 5.3); sshd sends nothing either (serverloop.c,
  // CHAN_CLOSE_SENT). PuTTY asks winadj@putty.projects.tartarus.org while our CLOSE is under way, and ended the connection at the answer.
  if ((channel->flags & SSH_CHANNEL_FLAG_CLOSED_LOCAL) != 0) return;
  send_packet(channel->session, "bd", success ? SSH2_MSG_CHANNEL_SUCCESS : SSH2_MSG_CHANNEL_FAILURE, channel->remote_channel);
}

void reply_global(ssh_session session, bool success, std::uint32_t port) {
  if (success && port != 0)
    send_packet(session, "bd", SSH2_MSG_REQUEST_SUCCESS, port);
  else
    send_packet(session, "b", success ? SSH2_MSG_REQUEST_SUCCESS : SSH2_MSG_REQUEST_FAILURE);
}

void refuse_more_sessions(ssh_session session) { session->flags |= SSH_SESSION_FLAG_NO_MORE_SESSIONS; }

std::size_t unread(ssh_channel channel) { return channel->stdout_buffer != nullptr ? ssh_buffer_get_len(channel->stdout_buffer) : 0; }

void keep_window(ssh_channel channel) { channel->local_window = 1U << 30; }  // more than the client has of it, so libssh never grows it

ssh_channel open_outgoing(ssh_session session, const OutgoingOpen& open) {
  ssh_channel channel = ssh_channel_new(session);
  if (channel == nullptr) return nullptr;
  channel->local_channel = ssh_channel_new_id(session);
  channel->local_window = initial_window;
  channel->local_maxpacket = max_packet;
  channel->state = SSH_CHANNEL_STATE_OPENING;
  const auto send = [&](const char* format, const char* type, auto... more) {
    send_packet(session, format, SSH2_MSG_CHANNEL_OPEN, type, channel->local_channel, channel->local_window, channel->local_maxpacket, more...);
  };
  switch (open.type) {
    case OutgoingOpen::Type::forwarded_tcpip:
      send("bsdddsdsd", "forwarded-tcpip", open.target.c_str(), open.port, open.origin.c_str(), open.origin_port);
      break;
    case OutgoingOpen::Type::forwarded_socket: send("bsdddss", "forwarded-streamlocal@openssh.com", open.target.c_str(), ""); break;
    case OutgoingOpen::Type::agent: send("bsddd", "auth-agent@openssh.com"); break;
    case OutgoingOpen::Type::x11: send("bsdddsd", "x11", open.origin.c_str(), open.origin_port); break;
  }
  return channel;
}

bool exchanging_keys(ssh_session session) {
  switch (session->session_state) {  // as ssh_waitsession_unblocked() in channels.c
    case SSH_SESSION_STATE_DH:
    case SSH_SESSION_STATE_INITIAL_KEX:
    case SSH_SESSION_STATE_KEXINIT_RECEIVED: return true;
    default: return false;
  }
}

void send_end_of_write(ssh_channel channel) {
  send_packet(channel->session, "bdsb", SSH2_MSG_CHANNEL_REQUEST, channel->remote_channel, "eow@openssh.com", 0);
}

void send_auth_failure(ssh_session session, const std::string& methods) {
  send_packet(session, "bsb", SSH2_MSG_USERAUTH_FAILURE, methods.c_str(), 0);
}

void send_disconnect(ssh_session session, DisconnectReason reason, const std::string& text) {
  send_packet(session, "bdss", SSH2_MSG_DISCONNECT, static_cast<std::uint32_t>(reason), text.c_str(), "");
}

std::string library_version() { return ssh_version(0); }

/// For the wrap below.
std::string sign_with_signer(ssh_key key, ssh_digest_e digest, std::string_view hash) {
  if (the_signer == nullptr) return {};
  for (std::size_t i = 0; i < host_keys.size(); i++)
    if (ssh_key_cmp(host_keys[i], key, SSH_KEY_CMP_PUBLIC) == 0) return the_signer->sign(i, to_digest(key, digest), hash);
  return {};
}

}  // namespace postern::sshd::net::ext

// Replaces libssh's function of this name (defined in pki.c, called from every key exchange): -Wl,--wrap in cmake/PosternLibssh.cmake.
extern "C" ssh_string __wrap_ssh_srv_pki_do_sign_sessionid(ssh_session session, const ssh_key key, const enum ssh_digest_e digest) {
  const struct ssh_crypto_struct* crypto = session->next_crypto != nullptr ? session->next_crypto : session->current_crypto;
  if (crypto == nullptr || crypto->secret_hash == nullptr) return nullptr;
  const std::string signature = postern::sshd::net::ext::sign_with_signer(
      key, digest, std::string_view{reinterpret_cast<const char*>(crypto->secret_hash), crypto->digest_len});
  if (signature.empty()) {
    ssh_set_error(session, SSH_FATAL, "the host key's signer refused");
    return nullptr;
  }
  ssh_string result = ssh_string_new(signature.size());
  if (result != nullptr) ssh_string_fill(result, signature.data(), signature.size());
  return result;
}
