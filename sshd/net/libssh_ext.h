#pragma once

#include "base/expected.h"
#include "sshd/protocol/net.h"

#include <libssh/libssh.h>
#include <libssh/server.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

/// What postern-net needs of libssh beyond its public API. This header shows none of libssh's internals; libssh_ext.cpp is the one
/// file that includes them (research/libssh-0.12.md section 3 proves each technique).
///
/// Mechanism: our packet callbacks are set *before* the handshake, so libssh, which appends its own table only at the client's
/// banner, asks ours first. A handler peeks at a packet (bounds-checked, the read position never moves) and uses it or passes it on.
/// Host key signatures: the linker's --wrap replaces one function of libssh. Without the wrap every handshake fails, never the
/// other way round ("Could not sign the session id"), and the self-test at start notices.
namespace postern::sshd::net::ext {

/// Makes signatures with host key number `key` (order of Server::make). Empty = refused. Called in the middle of a key exchange.
class Signer {
 public:
  virtual ~Signer() = default;
  virtual std::string sign(std::size_t key, Digest digest, std::string_view hash) = 0;
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
  /// `blobs`: SSH wire form (RFC 4253 section 6.6), at most one of each type. `version`: what follows "SSH-2.0-".
  static Expected<std::unique_ptr<Server>> make(const std::vector<std::string>& blobs, const std::string& version);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  /// A session on a connected, non-blocking socket, which libssh then owns. Nothing is sent yet.
  Expected<ssh_session> accept(int socket);

 private:
  Server() = default;
  ssh_bind bind_ = nullptr;
};

struct ChannelOpen {
  std::string type;
  std::uint32_t sender = 0;  ///< the client's number
  std::uint32_t window = 0;
  std::uint32_t max_packet = 0;
  std::string target;      ///< direct-tcpip: host; direct-streamlocal@openssh.com: path
  std::uint32_t port = 0;  ///< direct-tcpip
  bool malformed = false;  ///< what those two have beyond other channels cannot be read
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

struct GlobalRequest {
  enum class Kind { listen_tcp, cancel_tcp, listen_socket, cancel_socket, no_more_sessions, other };
  Kind kind = Kind::other;
  bool want_reply = false;
  std::string target;
  std::uint32_t port = 0;
};

struct ChannelRequest {
  enum class Kind { pty, env, shell, exec, subsystem, window_change, signal, send_break, end_of_write, agent, x11, other };
  Kind kind = Kind::other;
  bool want_reply = false;
  std::string text;   ///< pty: TERM; env: name; exec: command; subsystem, signal: name; x11: authentication protocol
  std::string value;  ///< pty: encoded terminal modes (RFC 4254 section 8); env: value; x11: cookie
  bool single = false;       ///< x11: one connection only
  std::uint32_t screen = 0;  ///< x11
  std::uint32_t cols = 0, rows = 0, xpixels = 0, ypixels = 0;
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
  /// Every CHANNEL_REQUEST on a channel of ours; the observer answers by reply_request() if want_reply, in the order of the requests.
  virtual void on_channel_request(ssh_channel channel, ChannelRequest request) = 0;
  /// Every GLOBAL_REQUEST after authentication; the observer answers by reply_global() if want_reply, in the order of the requests (RFC 4254
  /// section 4: replies name no request).
  virtual void on_global_request(GlobalRequest request) = 0;
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
/// The client opens no session any more (OpenSSH PROTOCOL 2.2); forwardings it may.
void refuse_more_sessions(ssh_session session);
/// Asks the client for a channel. libssh takes the answer: channel_open_response_function of its callbacks. nullptr = out of memory. Not to
/// be freed before the answer: one to a channel that is not there ends the connection.
ssh_channel open_outgoing(ssh_session session, const OutgoingOpen& open);
/// A key exchange runs: libssh takes no channel data now.
bool exchanging_keys(ssh_session session);
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

}  // namespace postern::sshd::net::ext
