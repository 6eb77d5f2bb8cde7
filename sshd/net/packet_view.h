#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

/// What a client's packets say, read without libssh: bounds-checked, from a stranger. What cannot be read is never guessed.
namespace postern::sshd::net::ext {

struct ChannelOpen {
  std::string type;
  std::uint32_t sender = 0;  ///< the client's number
  std::uint32_t window = 0;
  std::uint32_t max_packet = 0;
  std::string target;      ///< direct-tcpip: host; direct-streamlocal@openssh.com: path
  std::uint32_t port = 0;  ///< direct-tcpip
  bool malformed = false;  ///< what those two have beyond other channels cannot be read
};

struct GlobalRequest {
  enum class Kind { listen_tcp, cancel_tcp, listen_socket, cancel_socket, no_more_sessions, prove_host_keys, other };
  Kind kind = Kind::other;
  bool want_reply = false;
  std::string target;
  std::uint32_t port = 0;
  static constexpr std::size_t most_keys = 16;  ///< each costs a signature
  std::vector<std::string> keys;  ///< prove_host_keys: public blobs
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

struct AddressedRequest {
  std::uint32_t channel = 0;  ///< our number
  std::string name;
  ChannelRequest request;
};

/// USERAUTH_REQUEST: a name of 1 to 255 bytes without control characters.
struct AuthRequest {
  bool acceptable = false;
  std::string method;  ///< empty when it cannot be read
};

// `payload` is what follows the message's number. Nothing: what such a message has before its type-specific part cannot be read.
AuthRequest read_auth_request(std::string_view payload);
std::optional<ChannelOpen> read_channel_open(std::string_view payload);
/// A known request whose own part cannot be read is one of kind `other`.
std::optional<AddressedRequest> read_channel_request(std::string_view payload);
std::optional<GlobalRequest> read_global_request(std::string_view payload);

}  // namespace postern::sshd::net::ext
