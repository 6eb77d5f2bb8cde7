#pragma once

#include "base/poller.h"
#include "sshd/net/channel_forward.h"
#include "sshd/net/channel_session.h"
#include "sshd/net/libssh_ext.h"
#include "sshd/net/link.h"

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace postern::sshd::net {

/// One client's connection, in its own sandboxed process: from the first byte to the last.
///
/// Speaks SSH; decides nothing. Every way to authenticate leads to one question to the broker (AskLogin); after its yes, the client's
/// channel requests go to postern-session and are answered as that answers. Never opens, connects or signs anything itself. Ends by
/// returning from run(): the caller exits the process.
class Connection : private ext::PacketObserver, private ext::Signer {
 public:
  static constexpr std::chrono::milliseconds flush_limit{200};     ///< for the last words on a live connection
  static constexpr std::chrono::milliseconds release_delay{300};    ///< after the login: memory of the key exchange goes back
  static constexpr std::size_t max_waiting_auth_requests = 32;     ///< sent ahead without waiting for answers (RFC 4252 section 5.1)
  static constexpr std::size_t max_channels = 128;                 ///< session channels; those that wait for the client's CLOSE included
  /// Likewise; session's own limit (limits.forwards_per_connection) is lower or this holds.
  static constexpr std::size_t max_forwards = 4096;
  static constexpr std::size_t max_kept = 64 * 1024 * 1024;  ///< bytes of the client's that forwardings' sockets do not take
  static constexpr std::size_t max_waiting_requests = 512;  ///< global ones, and of one channel, that wait for their answers
  /// Bytes that the client does not read: beyond it, it is not read either; and what waits for a key exchange that does not end, and then the
  /// connection does.
  static constexpr std::size_t max_unsent = 2 * 1024 * 1024;

  /// `socket`: the client's, connected. `broker`: our socketpair's end.
  Connection(ext::Server& server, UniqueFd socket, Link broker, const Serve& settings);
  ~Connection() override;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  void run();

 private:
  enum class Login { open, asked, accepted };
  /// nullptr: libssh dropped the request without a word.
  using AuthMessage = ssh_message;

  // ext::PacketObserver
  void on_auth_request(bool acceptable) override;
  void on_channel_open(const ext::ChannelOpen& open) override;
  void on_open_answer(ssh_channel handle, bool success) override;
  void on_channel_request(ssh_channel handle, ext::ChannelRequest request) override;
  void on_global_request(ext::GlobalRequest request) override;
  void on_key_exchange_answer() override { cork(true); }
  void on_global_reply() override {}  // that it came is all: on_client_socket()
  // ext::Signer
  std::string sign(std::uint32_t key, Digest digest, std::string_view hash) override;

  void on_client_socket();
  void turn();
  void collect_messages();
  void handle_service(ssh_message message);
  void handle_auth_requests();
  void answer_accepted(AuthMessage message);
  void fail_auth();
  void check_amounts();
  void authenticated();
  std::string ask_sign(const AskSign& ask);
  /// All signatures, or none.
  std::vector<std::string> prove(const std::vector<std::string>& keys);
  void ask_alive_later();

  void handle_link();
  void on_broker_message(Message message);
  void on_session_message(Message message);
  void on_verdict(Message message);
  void on_disconnect(const std::string& text);
  void handle_request(SessionChannel& channel, ext::ChannelRequest request);

  void ask_forward(const ext::ChannelOpen& open);
  void on_forward_ready(Message message);
  void on_forward_failed(const channel::ForwardFailed& failed);
  void on_forward_incoming(Message message);
  void tell_forward_closed(std::uint32_t number, std::uint64_t from_client, std::uint64_t to_client);
  void send_global_replies();
  bool may_send() const;
  bool serve_forwards(bool alone, bool& moved);

  SessionChannel* find(std::uint32_t number);
  SessionChannel* find(ssh_channel handle);
  void serve_channels();
  void report_activity();
  void update_watches();
  bool client_gone() const;
  /// Says goodbye (SSH_MSG_DISCONNECT), sends what is queued for at most `limit`, and ends run().
  void disconnect(ext::DisconnectReason reason, const std::string& text);
  void flush(std::chrono::steady_clock::time_point deadline);
  void note(const std::string& text);
  void quick_ack();
  void cork(bool on);

  ext::Server& server_;
  UniqueFd socket_;  ///< until libssh owns it
  const int client_fd_;
  const Serve settings_;
  Poller poller_;
  std::optional<Link> link_;  ///< to the broker, from the verdict on to the session
  bool link_ready_ = false;
  ssh_session session_ = nullptr;
  ssh_event event_ = nullptr;

  Login login_ = Login::open;
  bool authenticated_ = false;
  std::string user_;                       ///< pinned by the first request
  std::deque<AuthMessage> auth_requests_;  ///< in the order they came
  std::uint64_t auth_seen_ = 0, auth_got_ = 0;
  std::uint32_t auth_failures_ = 0;
  ssh_counter_struct socket_count_{}, packet_count_{};  ///< until the login
  bool bad_user_name_ = false;
  Poller::TimerId grace_timer_ = 0;
  std::uint32_t alive_unanswered_ = 0;
  bool heard_ = false;              ///< from the client, since the last look
  bool keys_proven_ = false;
  bool corked_ = false;  ///< TCP_CORK is set

  std::map<std::uint32_t, std::unique_ptr<SessionChannel>> channels_;
  struct Limits {
    std::size_t env = 0, env_bytes = 0;
    bool pty = false;
  };
  std::map<std::uint32_t, Limits> limits_;
  std::uint32_t next_number_ = 0;
  std::map<std::uint32_t, std::unique_ptr<ForwardChannel>> forwards_;
  std::uint32_t next_forward_ = 0;
  std::uint32_t last_served_ = 0;  ///< the forwarding that sent last: the next one comes first
  bool forwards_first_ = false;    ///< sessions and forwardings take turns
  struct GlobalReply {
    std::uint32_t number;
    bool want_reply;
    bool show_port;  ///< port 0 was asked for
    std::optional<bool> result;
    std::uint32_t port = 0;
    std::vector<std::string> signatures = {};
  };
  std::deque<GlobalReply> global_replies_;  ///< in the order of the requests, whoever answers them
  std::uint32_t next_request_ = 0;
  std::chrono::milliseconds report_interval_{0};  ///< 0: nobody asked whether bytes move
  Poller::TimerId report_timer_ = 0;
  bool unreported_ = false;
  bool done_ = false;
};

}  // namespace postern::sshd::net
