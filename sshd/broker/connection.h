#pragma once

#include "sshd/broker/broker.h"
#include "sshd/protocol/session.h"

namespace postern::sshd::broker {

/// One client's connection as the broker sees it. Phases, each with the only messages it takes:
///
///   identifying   who_is is asked; nothing of ours reads the socket yet
///   handshake     net: one ask_sign (the session id), then ask_login
///   looking_up    session (forked now): user
///   opening       session: ready
///   live          session: ask_sign (from a bucket), channels, event; net is out of our reach but for its pidfd
///   ending        revoked or dying
///
/// Anything else ends the connection: net is killed by pidfd and a session that has no grant yet is told to go.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  enum class Phase { identifying, handshake, looking_up, opening, live, ending };

  /// `source`: whom it counts for (source_of).
  Connection(Broker& broker, UniqueFd client, Endpoint peer, Endpoint local, std::string source);
  /// One that a session of an earlier broker brought back.
  Connection(Broker& broker, const ConnectionFacts& facts, std::unique_ptr<LocalSocket> session, UniqueFd session_pidfd, UniqueFd net_pidfd);
  ~Connection();

  void start();
  void start_registered();
  /// Its session lost the socket to us, and lives: it may register again, over `socket`.
  bool comes_back() const { return granted_ && !done_ && phase_ == Phase::live && session_ && !session_->open(); }
  void session_returns(std::unique_ptr<LocalSocket> socket);
  /// A worker of the pool takes the client's socket.
  void serve(Broker::Worker worker);
  /// Asks again what was asked at the login; ends the connection when the answer changed.
  void re_evaluate();
  /// Shows `text`, then ends everything: net after `session.farewell_time`, then the session's process tree, killed after `session.kill_time`.
  void revoke(const std::string& text, const std::string& why);
  /// The broker stops: what has no session yet ends; live sessions go on.
  void abandon();

  Phase phase() const { return phase_; }
  bool authenticated() const { return phase_ == Phase::live || phase_ == Phase::ending; }
  const Endpoint& peer() const { return peer_; }
  const std::string& counted_as() const { return counted_as_; }
  const ConnectionFacts& facts() const { return facts_; }
  const std::string& id() const { return id_; }
  std::uint32_t channels() const { return channels_; }
  pid_t session_pid() const { return session_pid_; }
  pid_t net_pid() const { return net_pid_; }

 private:
  void identified(Expected<std::optional<Node>> answer);
  void refuse_unidentified(const std::string& reason);
  void on_net(Message message);
  void on_session(Message message);
  void login();
  void found(const session::User& user);
  void opened(const session::Ready& answer);
  void accept();
  /// `go_on` when policy and nodes are those that this connection was judged by, or the peer is still the same node; else the end.
  void when_still_the_same(std::function<void()> go_on);
  /// What makes `node` at the peer's address now another answer than the facts; empty: nothing. None: that cannot be said just now.
  std::optional<std::string> difference(const Node& node) const;
  void listen_to_session();
  void kill_session();
  void deny(const std::string& text, const std::string& why);
  void break_off(const std::string& why);
  void cut_off(std::string why);
  void kill_net();
  void watch_session();
  void watch_net();
  using Watch = std::unique_ptr<boost::asio::posix::stream_descriptor> Connection::*;
  /// Calls `then` once the process behind that pidfd has ended.
  void when_ended(Watch watch, void (Connection::*then)());
  void net_ended();
  void session_ended();
  void uncount();
  void punish(Offence offence);
  /// What was decided of this connection, for the audit.
  void tell(const char* event, const char* verdict, const std::string& why, const std::string& detail = "");
  void over();
  /// True when `decision` lets the peer in (then in `verdict_`) and its rules (then in `rules_`) can be obeyed; else it was denied.
  bool let_in(Rules::Decision decision);
  /// The kernel's, or the node's own where the network is behind a proxy (userspace networking).
  Address address_in_network(const Node& node) const;
  Rules::Decision decide(const Node& source, const Node& destination, std::optional<std::uint32_t> uid) const;

  Broker& broker_;
  UniqueFd client_;
  Endpoint peer_, local_;
  std::string counted_as_;
  Phase phase_ = Phase::identifying;
  std::string id_;
  Node source_;
  ConnectionFacts facts_;
  std::string ssh_user_;
  std::string client_version_;
  auth::policy::Verdict verdict_;
  auth::policy::SessionRules rules_;
  bool signed_once_ = false;
  bool granted_ = false;
  bool counted_ = true;  ///< among the unauthenticated
  bool cut_off_ = false;  ///< no longer allowed, and in the broker's queue
  bool done_ = false;
  bool session_answered_ = false;  ///< said ready, or that PAM refuses
  bool session_ready_ = false;
  unsigned notes_ = 0;
  static constexpr std::uint64_t never = ~std::uint64_t{0};
  std::uint64_t generation_ = 0;  ///< Broker::generation() when the peer was identified
  std::string cgroup_;            ///< the one below which the session made its leaf
  std::uint32_t channels_ = 0;
  double sign_tokens_ = 5;
  std::chrono::steady_clock::time_point sign_refilled_ = std::chrono::steady_clock::now();

  std::uint64_t net_token_ = 0;
  std::unique_ptr<LocalSocket> net_;
  std::unique_ptr<LocalSocket> session_;
  UniqueFd net_pidfd_;
  UniqueFd net_end_;  // net's end of its socket to the session, until the verdict
  pid_t net_pid_ = -1;
  pid_t session_pid_ = -1;
  std::unique_ptr<boost::asio::posix::stream_descriptor> net_watch_, session_watch_;
  boost::asio::steady_timer grace_, end_timer_;
  std::chrono::steady_clock::time_point accepted_at_ = std::chrono::steady_clock::now();
};

}  // namespace postern::sshd::broker
