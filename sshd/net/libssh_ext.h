#pragma once

#include "base/expected.h"
#include "sshd/net/packet_view.h"
#include "sshd/protocol/net.h"

#include <libssh/libssh.h>
#include <libssh/server.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

/// What postern-net needs of libssh beyond its public API. This header shows none of libssh's internals; libssh_ext.cpp is the one
/// file that includes them (research/libssh-0.12.md section 3 proves each technique).
///
/// Mechanism: our packet callbacks are set *before* the handshake, so libssh, which appends its own table only at the client's
/// banner, asks ours first. A handler peeks at a packet (bounds-checked, the read position never moves) and uses it or passes it on.
/// Channel messages in the middle of the client's key exchange (RFC 4253 section 7.1 forbids them, asyncssh 2.10 to 2.14 sends them, sshd
/// takes them): --wrap around libssh's verification of a packet lets its filter see them in the state in which it takes them.
/// Host key signatures: the linker's --wrap replaces one function of libssh. Without the wrap every handshake fails, never the
/// other way round ("Could not sign the session id"), and the self-test at start notices. A second wrap sees each packet's type before
/// libssh's filter does, which knows none above 100 (ping@openssh.com).
namespace postern::sshd::net::ext {

/// Makes signatures with host key `key` (net::key_id). Empty = refused. Called in the middle of a key exchange.
class Signer {
 public:
  virtual ~Signer() = default;
  virtual std::string sign(std::uint32_t key, Digest digest, std::string_view hash) = 0;
};
/// One signer a process; nullptr = every signature is refused. Not owned.
void set_signer(Signer* signer);

/// A key with its private half, made here: for the self-test's handshake and for tests. Real host keys never come into this process.
class LocalKey {
 public:
  static Expected<LocalKey> generate();  ///< ed25519
  LocalKey(LocalKey&& other) noexcept;
  LocalKey& operator=(LocalKey&&) = delete;
  ~LocalKey();
  std::string public_blob() const;
  std::string sign(Digest digest, std::string_view data) const;

 private:
  explicit LocalKey(ssh_key key) : key_{key} {}
  ssh_key key_;
};

/// The server side's fixed settings: algorithms, version string, public host keys. Made once before the fork of workers.
class Server {
 public:
  /// `blobs`: SSH wire form (RFC 4253 section 6.6); the first of each type is offered. `version`: what follows "SSH-2.0-".
  static Expected<std::unique_ptr<Server>> make(const std::vector<std::string>& blobs, const std::string& version, Algorithms algorithms = Algorithms::compatible);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  /// A session on a connected, non-blocking socket, which libssh then owns. Nothing is sent yet.
  Expected<ssh_session> accept(int socket);

 private:
  Server() = default;
  ssh_bind bind_ = nullptr;
};

/// A channel that the server opens.
struct OutgoingOpen {
  enum class Type { forwarded_tcpip, forwarded_socket, agent, x11 };
  Type type = Type::forwarded_tcpip;
  std::string target;  ///< listen address as the client asked for it, or the path
  std::uint32_t port = 0;
  std::string origin;
  std::uint32_t origin_port = 0;
};

/// Hears of packets while libssh is reading one: may send, must not read nor free channels.
class PacketObserver {
 public:
  virtual ~PacketObserver() = default;
  /// A USERAUTH_REQUEST came in. libssh hands it on as a message, or drops it without a word (a key that it cannot parse, a bad
  /// signature): comparing counts tells. `acceptable` false: no name, one over 255 bytes, or one with control characters.
  virtual void on_auth_request(bool acceptable) = 0;
  /// Every CHANNEL_OPEN after authentication; the observer answers by accept_open() or refuse_open(), at any time.
  virtual void on_channel_open(const ChannelOpen& open) = 0;
  /// The client's answer to open_outgoing(). (libssh's own callback for it came with 0.11.)
  virtual void on_open_answer(ssh_channel channel, bool success) = 0;
  /// Every CHANNEL_REQUEST on a channel of ours; the observer answers by reply_request() if want_reply, in the order of the requests.
  virtual void on_channel_request(ssh_channel channel, ChannelRequest request) = 0;
  /// Every GLOBAL_REQUEST after authentication; the observer answers by reply_global() if want_reply, in the order of the requests (RFC 4254
  /// section 4: replies name no request).
  virtual void on_global_request(GlobalRequest request) = 0;
  /// The client's KEXDH_INIT: what follows at once is our answer and our NEWKEYS, in two writes.
  virtual void on_key_exchange_answer() = 0;
  /// An answer to one of our global requests: only ask_alive() asks for any.
  virtual void on_global_reply() = 0;
};
/// Before the handshake. One session a process.
void observe_packets(ssh_session session, PacketObserver& observer);

/// Accepts with a window and packet size of our own (libssh would say 32000 and 35000). nullptr = out of memory.
ssh_channel accept_open(ssh_session session, const ChannelOpen& open);
inline constexpr std::uint32_t initial_window = 2 * 1024 * 1024;  ///< what OpenSSH uses; libssh grows it back to this
inline constexpr std::uint32_t max_packet = 32 * 1024;            ///< OpenSSH's CHAN_SES_PACKET_DEFAULT

enum class OpenFailure : std::uint32_t { prohibited = 1, connect_failed = 2, unknown_type = 3, resource_shortage = 4 };
void refuse_open(ssh_session session, const ChannelOpen& open, OpenFailure reason, const std::string& text);
void reply_request(ssh_channel channel, bool success);
/// REQUEST_SUCCESS, with `port` where one was asked for (tcpip-forward of port 0), or REQUEST_FAILURE.
void reply_global(ssh_session session, bool success, std::uint32_t port = 0);
/// REQUEST_SUCCESS of hostkeys-prove-00@openssh.com (OpenSSH PROTOCOL 2.5): the signatures in the order of the keys asked for.
void reply_with_signatures(ssh_session session, const std::vector<std::string>& signatures);
/// hostkeys-00@openssh.com (OpenSSH PROTOCOL 2.5): all host keys, for clients with UpdateHostKeys. Not to clients that cannot bear it.
void send_host_keys(ssh_session session);
/// One of Server::make's; and the digest with which it signs in this connection (Digest::none where the type says it).
struct KnownKey {
  std::uint32_t id;
  Digest digest;
};
std::optional<KnownKey> find_host_key(ssh_session session, std::string_view blob);
/// keepalive@openssh.com, which every client has to answer, if only by REQUEST_FAILURE (RFC 4254 section 4).
void ask_alive(ssh_session session);
/// The client opens no session any more (OpenSSH PROTOCOL 2.2); forwardings it may.
void refuse_more_sessions();
/// Asks the client for a channel. on_open_answer() tells the answer. nullptr = out of memory. Not to
/// be freed before the answer: one to a channel that is not there ends the connection.
ssh_channel open_outgoing(ssh_session session, const OutgoingOpen& open);
/// A key exchange runs: libssh takes no channel data now.
bool exchanging_keys(ssh_session session);
/// Bytes that wait for the client to read, or for the end of a key exchange.
std::size_t unsent(ssh_session session);
/// The next message of the client's that libssh has read, to be freed by ssh_message_free(), or nullptr. Unlike ssh_message_get() it reads nothing: that one
/// goes on for as long as a client has more to say.
ssh_message take_message(ssh_session session);
/// How many bytes to take from a program now: the client's window, at most `most`, and not in more than 64 packets of the size that it takes.
std::size_t room(ssh_channel channel, std::size_t most);
/// Bytes of the client's that libssh holds for us.
std::size_t unread(ssh_channel channel);
/// No WINDOW_ADJUST any more, which must not follow our CLOSE (RFC 4254 section 5.3; asyncssh ends the connection). Before ssh_channel_close().
void keep_window(ssh_channel channel);
/// eow@openssh.com (OpenSSH PROTOCOL 2.1): the program reads no more.
void send_end_of_write(ssh_channel channel);

/// USERAUTH_FAILURE with this name-list, which may be empty: nothing can continue (RFC 4252 section 5.1).
void send_auth_failure(ssh_session session, const std::string& methods);
/// SSH_MSG_DISCONNECT (RFC 4253 section 11.1). Unlike ssh_disconnect() it closes nothing, so that what is queued still goes out.
enum class DisconnectReason : std::uint32_t {
  protocol_error = 2, service_not_available = 7, by_application = 11, no_more_auth_methods = 14, illegal_user_name = 15
};
void send_disconnect(ssh_session session, DisconnectReason reason, const std::string& text);

/// "0.12.2"
std::string library_version();
/// That libssh's private structs are those that the private headers describe: an archive and headers that do not belong together would
/// read and write beside each other. Part of the self-test.
Expected<Done> check_layout();
/// For its test: with a cipher that fails, nothing of the packet is left to be sent, and the session is over.
bool failed_encryption_leaves_no_plaintext();

}  // namespace postern::sshd::net::ext
