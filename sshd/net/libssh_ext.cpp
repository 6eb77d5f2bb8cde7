#include "sshd/net/libssh_ext.h"

#include "sshd/protocol/ssh_wire.h"

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
#include "libssh/messages.h"
#include "libssh/misc.h"
#include "libssh/socket.h"
}

#include <malloc.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

// Private structs are used below: another series needs a new look at each of them, and the suite.
constexpr bool is_0_12 = LIBSSH_VERSION_INT >= SSH_VERSION_INT(0, 12, 2) && LIBSSH_VERSION_INT < SSH_VERSION_INT(0, 13, 0);
#ifdef POSTERN_LIBSSH_SYSTEM_STATIC
constexpr bool is_0_10 = LIBSSH_VERSION_INT >= SSH_VERSION_INT(0, 10, 6) && LIBSSH_VERSION_INT < SSH_VERSION_INT(0, 11, 0);
static_assert(is_0_12 || is_0_10);  // Debian 12's, tried by scripts/test --libssh system-static
#else
static_assert(is_0_12);
#endif

extern "C" ssh_string __real_ssh_srv_pki_do_sign_sessionid(ssh_session, const ssh_key, const enum ssh_digest_e);
extern "C" ssh_string __wrap_ssh_srv_pki_do_sign_sessionid(ssh_session, const ssh_key, const enum ssh_digest_e);
extern "C" std::uint32_t __real_ssh_buffer_get_u8(ssh_buffer, std::uint8_t*);
extern "C" std::uint32_t __wrap_ssh_buffer_get_u8(ssh_buffer, std::uint8_t*);
extern "C" int __real_ssh_packet_decrypt(ssh_session, std::uint8_t*, std::uint8_t*, std::size_t, std::size_t);
extern "C" int __wrap_ssh_packet_decrypt(ssh_session, std::uint8_t*, std::uint8_t*, std::size_t, std::size_t);
extern "C" int __real_ssh_packet_hmac_verify(ssh_session, const void*, std::size_t, std::uint8_t*, enum ssh_hmac_e);
extern "C" int __wrap_ssh_packet_hmac_verify(ssh_session, const void*, std::size_t, std::uint8_t*, enum ssh_hmac_e);
extern "C" unsigned char* __real_ssh_packet_encrypt(ssh_session, void*, std::size_t);
extern "C" unsigned char* __wrap_ssh_packet_encrypt(ssh_session, void*, std::size_t);

namespace postern::sshd::net::ext {
namespace {

// ld says nothing when the target of --wrap is gone from the library; taking its address makes that a link error.
[[maybe_unused]] void* volatile wrapped_functions_exist[] = {reinterpret_cast<void*>(&__real_ssh_srv_pki_do_sign_sessionid),
                                                             reinterpret_cast<void*>(&__real_ssh_buffer_get_u8),
                                                             reinterpret_cast<void*>(&__real_ssh_packet_decrypt),
                                                             reinterpret_cast<void*>(&__real_ssh_packet_hmac_verify),
                                                             reinterpret_cast<void*>(&__real_ssh_packet_encrypt)};

constexpr std::uint8_t msg_ping = 192, msg_pong = 193;  // OpenSSH PROTOCOL 1.8

Signer* the_signer = nullptr;
std::vector<ssh_key> host_keys;  // public halves, order of Server::make
bool extensions_wanted = false;  // the client's ext-info-c (RFC 8308 section 2.1), until they were sent
ssh_session observed = nullptr;
const Server* owner_of_host_keys = nullptr;  // the last one made
PacketObserver* the_observer = nullptr;
bool no_more_sessions = false;

/// A packet's bytes, without moving libssh's position.
std::string_view bytes_of(ssh_buffer packet) { return {static_cast<const char*>(ssh_buffer_get(packet)), ssh_buffer_get_len(packet)}; }

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

/// Channel messages that the client sends between its KEXINIT and its NEWKEYS.
///
/// RFC 4253 section 7.1 forbids them, asyncssh up to 2.14 sends them all the same, and sshd takes them; libssh's packet filter ends the
/// connection, because it takes them in session state "authenticated" only. So such a packet is shown to the filter in that state, and the
/// handlers, of which on_any is the first, find the true one again. After the login only, and only what a MAC has proven to be the client's
/// (the first key exchange of a connection is strict, and none of this happens in it).
class KeyExchangeGuest {
 public:
  /// A packet has been decrypted and verified; its type is not read yet.
  void arrived(ssh_session session) {
    restore(session);
    if (session->dh_handshake_state == DH_STATE_FINISHED || (session->flags & SSH_SESSION_FLAG_AUTHENTICATED) == 0) return;
    const std::uint8_t type = type_of(session);
    if (type < SSH2_MSG_GLOBAL_REQUEST || type > last_type) return;
    if (session->session_state != SSH_SESSION_STATE_KEXINIT_RECEIVED && session->session_state != SSH_SESSION_STATE_DH) return;
    true_state_ = session->session_state;
    changed_ = true;
    session->session_state = SSH_SESSION_STATE_AUTHENTICATED;
  }
  void restore(ssh_session session) {
    if (std::exchange(changed_, false) && session->session_state == SSH_SESSION_STATE_AUTHENTICATED) session->session_state = true_state_;
  }
  static constexpr std::uint8_t last_type = SSH2_MSG_CHANNEL_FAILURE;

 private:
  /// 0: none. The packet is what libssh will read it from: a length, unless the MAC is over the ciphertext, the padding's length, the type.
  static std::uint8_t type_of(ssh_session session) {
    const struct ssh_crypto_struct* crypto = ssh_packet_get_current_crypto(session, SSH_DIRECTION_IN);
    if (crypto == nullptr) return 0;
    const std::size_t skip = crypto->in_hmac_etm ? 0 : 4;
    const auto* bytes = static_cast<const std::uint8_t*>(ssh_buffer_get(session->in_buffer));
    const std::size_t size = ssh_buffer_get_len(session->in_buffer);
    return size >= skip + 2 && bytes[skip] < size - skip - 1 ? bytes[skip + 1] : 0;
  }

  bool changed_ = false;
  ssh_session_state_e true_state_ = SSH_SESSION_STATE_NONE;
};
KeyExchangeGuest guest;

Digest to_digest(ssh_key key, ssh_digest_e digest) {
  if (ssh_key_type(key) != SSH_KEYTYPE_RSA) return Digest::none;  // the key type says it
  return digest == SSH_DIGEST_SHA512 ? Digest::sha512 : digest == SSH_DIGEST_SHA256 ? Digest::sha256 : Digest::none;
}

int end(ssh_session session, const char* why) {
  ssh_set_error(session, SSH_FATAL, "%s", why);
  session->session_state = SSH_SESSION_STATE_ERROR;
  return SSH_PACKET_USED;
}

// Every packet whose type libssh knows, before all other handlers: what libssh lets pass and sshd ends.
int on_any(ssh_session session, std::uint8_t type, ssh_buffer packet, void*) {
  guest.restore(session);
  // RFC 4253 section 6: at least four bytes of padding. How many there were is no longer told, but libssh's buffer still has it: two bytes back,
  // before the type; both were read from it one after the other (packet.c, ssh_packet_socket_callback).
  if (static_cast<const std::uint8_t*>(ssh_buffer_get(packet))[-2] < 4) return end(session, "too little padding");
  // Strict key exchange: libssh remembers a stranger in the clear and ends at NEWKEYS; here at once.
  if (session->current_crypto == nullptr && (session->flags & SSH_SESSION_FLAG_KEX_STRICT) != 0 && type != SSH2_MSG_DISCONNECT && type != SSH2_MSG_KEXINIT &&
      type != SSH2_MSG_KEXDH_INIT && type != SSH2_MSG_NEWKEYS)
    return end(session, "a packet that strict key exchange does not allow");
  // Version line and KEXINIT of the client come together as a rule, and libssh closes the socket where nothing matches: what we offer, which clients show to
  // their user then, goes out before it looks. The socket takes it: there has been nothing else but our version line.
  if (type == SSH2_MSG_KEXINIT && session->current_crypto == nullptr) {
    ssh_socket_set_write_wontblock(session->socket);
    ssh_socket_nonblocking_flush(session->socket);
  }
  if (type == SSH2_MSG_KEXDH_INIT && the_observer != nullptr) the_observer->on_key_exchange_answer();
  // An answer to an open that we did not ask for, or have an answer to: libssh takes number, window and packet size of it before it looks at the
  // channel's state. With a packet size of 0 it then writes packets of nothing for ever (as in CVE-2026-59843, which was about opens).
  if (type == SSH2_MSG_CHANNEL_OPEN_CONFIRMATION || type == SSH2_MSG_CHANNEL_OPEN_FAILURE) {
    WireView view{bytes_of(packet)};
    const ssh_channel channel = ssh_channel_from_local(session, view.u32());
    if (channel == nullptr) return SSH_PACKET_NOT_USED;  // libssh does nothing with it
    if (channel->state != SSH_CHANNEL_STATE_OPENING) return end(session, "an answer for a channel that was not being opened");
    view.u32();
    view.u32();
    if (type == SSH2_MSG_CHANNEL_OPEN_CONFIRMATION && (view.u32() == 0 || !view.ok())) return end(session, "a channel with packets of nothing");
  }
  return SSH_PACKET_NOT_USED;
}

int on_auth_request(ssh_session, std::uint8_t, ssh_buffer packet, void*) {
  const AuthRequest request = read_auth_request(bytes_of(packet));
  if (the_observer != nullptr) the_observer->on_auth_request(request.acceptable);
  // A distribution's libssh would look for its host's Kerberos keys, and answer besides us.
  if (request.method.starts_with("gssapi")) return SSH_PACKET_USED;
  return SSH_PACKET_NOT_USED;  // libssh parses, verifies signatures and queues the message
}

int on_channel_open(ssh_session session, std::uint8_t, ssh_buffer packet, void*) {
  const auto open = read_channel_open(bytes_of(packet));
  // libssh's own ways out: a malformed one, packet size 0 (CVE-2026-59843), before authentication
  if (!open || open->max_packet == 0 || the_observer == nullptr || (session->flags & SSH_SESSION_FLAG_AUTHENTICATED) == 0) return SSH_PACKET_NOT_USED;
  if (open->type == "session" && no_more_sessions) {  // the end of the connection, as with sshd and libssh 0.12; 0.10 does not know it
    send_disconnect(session, DisconnectReason::protocol_error, "No more sessions allowed!");
    session->session_state = SSH_SESSION_STATE_ERROR;
    return SSH_PACKET_USED;
  }
  the_observer->on_channel_open(*open);
  return SSH_PACKET_USED;
}

int on_open_answer(ssh_session session, std::uint8_t type, ssh_buffer packet, void*) {
  WireView view{bytes_of(packet)};
  ssh_channel channel = ssh_channel_from_local(session, view.u32());
  if (view.ok() && channel != nullptr && channel->state == SSH_CHANNEL_STATE_OPENING && the_observer != nullptr)
    the_observer->on_open_answer(channel, type == SSH2_MSG_CHANNEL_OPEN_CONFIRMATION);
  return SSH_PACKET_NOT_USED;  // the channel is libssh's
}

int on_channel_request(ssh_session session, std::uint8_t, ssh_buffer packet, void*) {
  auto addressed = read_channel_request(bytes_of(packet));
  ssh_channel channel = addressed ? ssh_channel_from_local(session, addressed->channel) : nullptr;
  if (channel == nullptr || the_observer == nullptr) return SSH_PACKET_NOT_USED;
  the_observer->on_channel_request(channel, std::move(addressed->request));
  return SSH_PACKET_USED;
}

int on_global_request(ssh_session session, std::uint8_t, ssh_buffer packet, void*) {
  auto request = read_global_request(bytes_of(packet));
  if (!request || the_observer == nullptr || (session->flags & SSH_SESSION_FLAG_AUTHENTICATED) == 0) return SSH_PACKET_NOT_USED;
  the_observer->on_global_request(std::move(*request));
  return SSH_PACKET_USED;
}

int on_global_reply(ssh_session session, std::uint8_t, ssh_buffer, void*) {
  if (the_observer == nullptr || (session->flags & SSH_SESSION_FLAG_AUTHENTICATED) == 0) return SSH_PACKET_NOT_USED;
  the_observer->on_global_reply();
  return SSH_PACKET_USED;
}

// libssh sends an EXT_INFO of its own from a static function, right after NEWKEYS, if the client wants one. The wish is taken away at the
// first NEWKEYS and ours goes out before the answer to SERVICE_REQUEST: the first packet after our NEWKEYS all the same (RFC 8308 section 2.4).
int on_new_keys(ssh_session session, std::uint8_t, ssh_buffer, void*) {
  if (session->connected == 0) {
    extensions_wanted = (session->extensions & SSH_EXT_NEGOTIATION) != 0;
    session->extensions &= ~static_cast<unsigned>(SSH_EXT_NEGOTIATION);
  }
  return SSH_PACKET_NOT_USED;
}

int on_service_request(ssh_session session, std::uint8_t, ssh_buffer, void*) {
  if (std::exchange(extensions_wanted, false))
    send_packet(session, "bdssssss", SSH2_MSG_EXT_INFO, 3, "server-sig-algs", ssh_kex_get_default_methods(SSH_HOSTKEYS), "publickey-hostbound@openssh.com", "0",
                "ping@openssh.com", "0");
  return SSH_PACKET_NOT_USED;
}

}  // namespace

void set_signer(Signer* signer) { the_signer = signer; }

Expected<LocalKey> LocalKey::generate() {
  ssh_key key = nullptr;
  if (ssh_pki_generate(SSH_KEYTYPE_ED25519, 0, &key) != SSH_OK) return Unexpected{Error{0, "make an ed25519 key"}};
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

Expected<std::unique_ptr<Server>> Server::make(const std::vector<std::string>& blobs, const std::string& version, Algorithms algorithms) {
  const bool strict = algorithms == Algorithms::strict, legacy = algorithms == Algorithms::legacy;
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
  // Post-quantum first. No group exchange (it reads /etc/ssh/moduli), no group18 (its cost before authentication), no SHA-1, no zlib. Kept in spite
  // of a warning, each for clients of docs/CLIENTS.md that have nothing better: curve25519 under both names (dropbear, libssh, libssh2; paramiko),
  // group16 (clients in FIPS mode have no curve25519). `strict` leaves these out, and ecdsa host keys. NIST curves and group14, of which
  // ssh-audit fails and warns, with `legacy` only (net-ssh without its x25519 gem, JSch before 0.1.56).
  // Strict key exchange (CVE-2023-48795) is always on in libssh >= 0.10.6.
  std::string key_exchange = "mlkem768x25519-sha256,sntrup761x25519-sha512,sntrup761x25519-sha512@openssh.com";
  if (!strict) key_exchange += ",curve25519-sha256,curve25519-sha256@libssh.org,diffie-hellman-group16-sha512";
  if (legacy) key_exchange += ",ecdh-sha2-nistp256,ecdh-sha2-nistp384,ecdh-sha2-nistp521,diffie-hellman-group14-sha256";
  if (!set(SSH_BIND_OPTIONS_KEY_EXCHANGE, key_exchange.c_str()))
    return fail("set the key exchange algorithms");
  for (const auto option : {SSH_BIND_OPTIONS_CIPHERS_C_S, SSH_BIND_OPTIONS_CIPHERS_S_C})
    if (!set(option, "chacha20-poly1305@openssh.com,aes256-gcm@openssh.com,aes128-gcm@openssh.com,aes256-ctr,aes192-ctr,aes128-ctr"))
      return fail("set the ciphers");
  std::string macs = "hmac-sha2-256-etm@openssh.com,hmac-sha2-512-etm@openssh.com";
  // For libssh2 before 1.11, which has neither AEAD nor EtM; sequence numbers and our padding check hold there as well.
  if (!strict) macs += ",hmac-sha2-256";
  if (legacy) macs += ",hmac-sha2-512";
  for (const auto option : {SSH_BIND_OPTIONS_HMAC_C_S, SSH_BIND_OPTIONS_HMAC_S_C})
    if (!set(option, macs.c_str()))
      return fail("set the message authentication codes");
  for (const auto key : host_keys) ssh_key_free(key);
  host_keys.clear();
  owner_of_host_keys = server.get();
  std::vector<ssh_keytypes_e> offered;
  for (const auto& blob : blobs) {
    ssh_string text = ssh_string_new(blob.size());
    if (text == nullptr || ssh_string_fill(text, blob.data(), blob.size()) != 0) return fail("copy a host key");
    ssh_key key = nullptr;
    const int rc = ssh_pki_import_pubkey_blob(text, &key);
    ssh_string_free(text);
    if (rc != SSH_OK) return fail("read a public host key");
    host_keys.push_back(key);
    const bool ecdsa = ssh_key_type(key) == SSH_KEYTYPE_ECDSA_P256 || ssh_key_type(key) == SSH_KEYTYPE_ECDSA_P384 || ssh_key_type(key) == SSH_KEYTYPE_ECDSA_P521;
    if (ecdsa && strict && blobs.size() > 1) continue;
    const ssh_keytypes_e type = ecdsa ? SSH_KEYTYPE_ECDSA_P256 : ssh_key_type(key);  // libssh offers one curve
    if (std::find(offered.begin(), offered.end(), type) != offered.end()) continue;
    offered.push_back(type);
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
  // A distribution's libssh has zlib; before authentication or after it, no stranger's compressed bytes here.
  ssh_options_set(session, SSH_OPTIONS_COMPRESSION_C_S, "none");
  ssh_options_set(session, SSH_OPTIONS_COMPRESSION_S_C, "none");
  ssh_set_blocking(session, 0);
  return session;
}

void observe_packets(ssh_session session, PacketObserver& observer) {
  static ssh_packet_callback first[SSH2_MSG_CHANNEL_FAILURE + 1] = {};
  static ssh_packet_callbacks_struct before_all{0, SSH2_MSG_CHANNEL_FAILURE + 1, first, nullptr};
  for (auto& handler : first) handler = on_any;
  ssh_packet_set_callbacks(session, &before_all);
  static ssh_packet_callback table[SSH2_MSG_CHANNEL_REQUEST + 1] = {};
  static ssh_packet_callbacks_struct callbacks{0, SSH2_MSG_CHANNEL_REQUEST + 1, table, nullptr};
  table[SSH2_MSG_SERVICE_REQUEST] = on_service_request;
  table[SSH2_MSG_NEWKEYS] = on_new_keys;
  table[SSH2_MSG_USERAUTH_REQUEST] = on_auth_request;
  table[SSH2_MSG_GLOBAL_REQUEST] = on_global_request;
  table[SSH2_MSG_REQUEST_SUCCESS] = table[SSH2_MSG_REQUEST_FAILURE] = on_global_reply;
  table[SSH2_MSG_CHANNEL_OPEN] = on_channel_open;
  table[SSH2_MSG_CHANNEL_OPEN_CONFIRMATION] = on_open_answer;
  table[SSH2_MSG_CHANNEL_OPEN_FAILURE] = on_open_answer;
  table[SSH2_MSG_CHANNEL_REQUEST] = on_channel_request;
  the_observer = &observer;
  observed = session;
  no_more_sessions = false;
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

void reply_with_signatures(ssh_session session, const std::vector<std::string>& signatures) {
  std::string all;
  for (const auto& signature : signatures) put_string(all, signature);
  send_packet(session, "bP", SSH2_MSG_REQUEST_SUCCESS, all.size(), all.data());
}

void send_host_keys(ssh_session session) {
  // Tera Term's parser breaks at it (OpenSSH compat.c, SSH_BUG_HOSTKEYS).
  const char* const client = ssh_get_clientbanner(session);
  if (client != nullptr && std::strstr(client, "TTSSH/") != nullptr) return;
  std::string all;
  for (const auto key : host_keys) put_string(all, blob_of(key));
  send_packet(session, "bsbP", SSH2_MSG_GLOBAL_REQUEST, "hostkeys-00@openssh.com", 0, all.size(), all.data());
}

std::optional<KnownKey> find_host_key(ssh_session session, std::string_view blob) {
  for (const auto key : host_keys) {
    if (blob_of(key) != blob) continue;
    KnownKey known{key_id(blob), Digest::none};
    if (ssh_key_type(key) == SSH_KEYTYPE_RSA) {
      // As the key exchange did, if it was by RSA: the client holds us to that (clientloop.c, client_global_hostkeys_prove_confirm).
      const char* const used = session->current_crypto != nullptr ? session->current_crypto->kex_methods[SSH_HOSTKEYS] : nullptr;
      known.digest = used != nullptr && std::strcmp(used, "rsa-sha2-256") == 0 ? Digest::sha256 : Digest::sha512;
    }
    return known;
  }
  return std::nullopt;
}

void ask_alive(ssh_session session) { send_packet(session, "bsb", SSH2_MSG_GLOBAL_REQUEST, "keepalive@openssh.com", 1); }

void refuse_more_sessions() { no_more_sessions = true; }

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

std::size_t unsent(ssh_session session) {
  constexpr std::size_t overhead = 64;  // of a packet: padding, code and libssh's own
  auto bytes = static_cast<std::size_t>(ssh_socket_buffered_write_bytes(session->socket));
  for (auto it = ssh_list_get_iterator(session->out_queue); it != nullptr; it = it->next)
    bytes += overhead + ssh_buffer_get_len(static_cast<ssh_buffer>(const_cast<void*>(it->data)));
  return bytes;
}

ssh_message take_message(ssh_session session) { return ssh_message_pop_head(session); }

std::size_t room(ssh_channel channel, std::size_t most) {
  constexpr std::size_t most_packets = 64;
  return std::min({most, static_cast<std::size_t>(ssh_channel_window_size(channel)), most_packets * std::max<std::size_t>(channel->remote_maxpacket, 1)});
}

bool exchanging_keys(ssh_session session) {
  switch (session->session_state) {  // as ssh_waitsession_unblocked() in channels.c
    case SSH_SESSION_STATE_DH:
    case SSH_SESSION_STATE_INITIAL_KEX:
    case SSH_SESSION_STATE_KEXINIT_RECEIVED: return true;
    default: break;
  }
  // Begun by us, and not answered yet: libssh would take it all, and keep it until our NEWKEYS.
  return (session->flags & SSH_SESSION_FLAG_AUTHENTICATED) != 0 && session->dh_handshake_state != DH_STATE_FINISHED;
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

Expected<Done> check_layout() {
  // The size that libssh allocated, and what its own functions read and write, against the same through the headers.
  const auto fits = [](const void* object, std::size_t size) {
    const std::size_t usable = ::malloc_usable_size(const_cast<void*>(object));  // rounded up by less than 32
    return usable >= size && usable < size + 32;
  };
  ssh_session session = ssh_new();
  ssh_bind bind = ssh_bind_new();
  if (session != nullptr) session->flags |= SSH_SESSION_FLAG_AUTHENTICATED;  // else there is no channel
  ssh_channel channel = session != nullptr ? ssh_channel_new(session) : nullptr;
  ssh_key key = ssh_key_new();
  const char* wrong = nullptr;
  const auto check = [&](bool holds, const char* what) {
    if (!holds && wrong == nullptr) wrong = what;
  };
  check(bind != nullptr && channel != nullptr && key != nullptr, "memory");
  if (wrong == nullptr) {
    check(fits(session, sizeof *session) && fits(session->next_crypto, sizeof *session->next_crypto), "session");
    ssh_set_blocking(session, 1);
    const int blocking = session->flags;
    ssh_set_blocking(session, 0);
    check((blocking ^ session->flags) == SSH_SESSION_FLAG_BLOCKING && ssh_buffer_get_len(session->out_buffer) == 0, "session flags");
    char banner[] = "SSH-2.0-layout";
    session->clientbanner = banner;
    check(ssh_get_clientbanner(session) == banner, "session banner");
    session->clientbanner = nullptr;
    session->session_state = SSH_SESSION_STATE_ERROR;
    check((ssh_get_status(session) & SSH_CLOSED_ERROR) != 0, "session state");
    session->session_state = SSH_SESSION_STATE_NONE;
    check(session->opts.fd == -1 && session->opts.port == 22, "session options");
    check(fits(channel, sizeof *channel) && channel->session == session && ssh_channel_get_session(channel) == session, "channel");
    channel->remote_window = 4711;
    channel->state = SSH_CHANNEL_STATE_OPEN;
    session->alive = 1;
    check(ssh_channel_window_size(channel) == 4711 && ssh_channel_is_open(channel) != 0, "channel window");
    channel->remote_eof = 1;
    check(ssh_channel_is_eof(channel) != 0 && ssh_buffer_get_len(channel->stdout_buffer) == 0, "channel buffers");
    channel->state = SSH_CHANNEL_STATE_NOT_OPEN;
    session->alive = 0;
    check(fits(bind, sizeof *bind) && fits(key, sizeof *key), "host keys");
    key->flags = SSH_KEY_FLAG_PRIVATE;
    check(ssh_key_is_private(key) != 0 && ssh_key_is_public(key) == 0, "key flags");
    key->flags = 0;
  }
  ssh_key_free(key);
  ssh_bind_free(bind);
  ssh_free(session);
  if (wrong != nullptr) return Unexpected{Error{0, std::string{"libssh's archive and private headers are of two builds: "} + wrong}};
  return Done{};
}

/// Encrypts a packet where it lies, and returns its tag. libssh's own function does it into fresh zeros and copies them back: 6 % of the CPU time of a
/// download. The cipher does not say that it failed, and here the plaintext would be what is sent then; but its tag is the last that it writes.
unsigned char* encrypt_in_place(ssh_session session, struct ssh_crypto_struct& crypto, void* packet, std::size_t size) {
  struct ssh_cipher_struct& cipher = *crypto.out_cipher;
  constexpr std::array<unsigned char, 16> unwritten{0xa5, 0x5a, 0xa5, 0x5a, 0xa5, 0x5a, 0xa5, 0x5a};  // a tag by a chance of 2^-128
  std::copy(unwritten.begin(), unwritten.end(), crypto.hmacbuf);
  if (size > cipher.lenfield_blocksize && (size - cipher.lenfield_blocksize) % cipher.blocksize == 0)
    cipher.aead_encrypt(&cipher, packet, packet, size, crypto.hmacbuf, session->send_seq);
  if (!std::equal(unwritten.begin(), unwritten.end(), crypto.hmacbuf)) return crypto.hmacbuf;
  explicit_bzero(packet, size);
  end(session, "a packet could not be encrypted");
  return nullptr;
}

bool failed_encryption_leaves_no_plaintext() {
  struct ssh_cipher_struct broken {};
  broken.blocksize = 8;
  broken.lenfield_blocksize = 4;
  broken.aead_encrypt = [](struct ssh_cipher_struct*, void*, void*, std::size_t, std::uint8_t*, std::uint64_t) {};
  struct ssh_crypto_struct crypto {};
  crypto.out_cipher = &broken;
  const auto leaves_none = [&](std::size_t size) {
    ssh_session session = ssh_new();
    std::string packet(size, 'x');
    const bool none = encrypt_in_place(session, crypto, packet.data(), size) == nullptr && packet == std::string(size, '\0') && (ssh_get_status(session) & SSH_CLOSED_ERROR) != 0;
    ssh_free(session);
    return none;
  };
  return leaves_none(4 + 32) && leaves_none(4 + 33);  // and of a size that cannot be
}

/// For the wraps below.
void packet_verified(ssh_session session) { guest.arrived(session); }

std::string sign_with_signer(ssh_key key, ssh_digest_e digest, std::string_view hash) {
  if (the_signer == nullptr) return {};
  return the_signer->sign(key_id(blob_of(key)), to_digest(key, digest), hash);
}

/// For the other wrap: true when this was a ping, which is answered.
bool answer_ping(ssh_buffer packet, const std::uint8_t* type) {
  if (observed == nullptr || type != &observed->in_packet.type || *type != msg_ping || observed->current_crypto == nullptr) return false;
  WireView view{bytes_of(packet)};
  const std::string_view data = view.text();
  // A malformed one is a protocol error in sshd (packet.c); libssh's filter ends the connection at what it does not know: UNIMPLEMENTED.
  if (!view.ok()) return false;
  send_packet(observed, "bdP", msg_pong, static_cast<std::uint32_t>(data.size()), data.size(), data.data());
  return true;
}

}  // namespace postern::sshd::net::ext

// Called by packet.c for every packet: with encrypt-then-MAC ssh_packet_decrypt() comes last, otherwise (AEAD, too) ssh_packet_hmac_verify().
// Both live in packet_crypt.c, whose own call of the first (for a packet's length) is not wrapped.
extern "C" int __wrap_ssh_packet_decrypt(ssh_session session, std::uint8_t* destination, std::uint8_t* source, std::size_t start, std::size_t size) {
  const int rc = __real_ssh_packet_decrypt(session, destination, source, start, size);
  const struct ssh_crypto_struct* crypto = ssh_packet_get_current_crypto(session, SSH_DIRECTION_IN);
  if (rc >= 0 && crypto != nullptr && crypto->in_hmac_etm) postern::sshd::net::ext::packet_verified(session);
  return rc;
}
extern "C" int __wrap_ssh_packet_hmac_verify(ssh_session session, const void* data, std::size_t size, std::uint8_t* mac, enum ssh_hmac_e type) {
  const int rc = __real_ssh_packet_hmac_verify(session, data, size, mac, type);
  const struct ssh_crypto_struct* crypto = ssh_packet_get_current_crypto(session, SSH_DIRECTION_IN);
  if (rc >= 0 && crypto != nullptr && !crypto->in_hmac_etm) postern::sshd::net::ext::packet_verified(session);
  return rc;
}

// Called by packet.c for every packet that is sent.
extern "C" unsigned char* __wrap_ssh_packet_encrypt(ssh_session session, void* data, std::size_t size) {
  struct ssh_crypto_struct* crypto = ssh_packet_get_current_crypto(session, SSH_DIRECTION_OUT);
  if (crypto == nullptr || crypto->out_cipher->aead_encrypt == nullptr) return __real_ssh_packet_encrypt(session, data, size);
  return postern::sshd::net::ext::encrypt_in_place(session, *crypto, data, size);
}

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

// Reads a packet's type (packet.c, ssh_packet_parse_type) among much else.
extern "C" std::uint32_t __wrap_ssh_buffer_get_u8(ssh_buffer buffer, std::uint8_t* data) {
  const std::uint32_t result = __real_ssh_buffer_get_u8(buffer, data);
  if (result == 1 && postern::sshd::net::ext::answer_ping(buffer, data)) *data = SSH2_MSG_IGNORE;
  return result;
}
