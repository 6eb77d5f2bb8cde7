#pragma once

#include "auth/identity/identity.h"
#include "base/id.h"
#include "sshd/broker/audit.h"
#include "sshd/broker/config.h"
#include "base/clock_watch.h"
#include "base/file_watch.h"
#include "sshd/broker/host_keys.h"
#include "sshd/broker/penalties.h"
#include "sshd/broker/refusal.h"
#include "sshd/broker/rules.h"
#include "sshd/broker/takeover.h"
#include "sshd/broker/zygote.h"
#include "sshd/protocol/facts.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace postern::sshd::broker {

class Connection;

/// The provider that the settings choose, not started yet.
Expected<std::unique_ptr<auth::identity::Provider>, std::vector<Problem>> make_provider(boost::asio::io_context& io, const Config& config);

/// The privileged half of the whole server: accepts, asks who is there, decides, hands sockets on, and remembers who is in.
///
/// Never parses an SSH byte, never asks NSS or PAM (but for its own sandbox user, once), never blocks. One io_context, one thread
/// (a second thread signs with RSA and touches nothing else).
class Broker {
 public:
  Broker(boost::asio::io_context& io, Config config, std::string config_file, std::string own_dir);
  ~Broker();

  /// Loads policy, nodes and keys, starts the zygotes, opens the sockets. `ready` runs when logins are possible, or with the reason why not.
  void start(std::function<void(Expected<Done>)> ready);
  /// SIGHUP: reads policy and nodes again and re-evaluates every live connection. On problems the old ones stay, and the log says so.
  void reload();
  /// Stops listening; live sessions go on without a broker.
  void stop();

  std::vector<Endpoint> listening() const;

  // For Connection.
  boost::asio::io_context& io() { return io_; }
  const Config& config() const { return config_; }
  HostKeys& keys() { return *keys_; }
  auth::identity::Provider& provider() { return *provider_; }
  const Rules& rules() const { return rules_; }
  /// Counts changes of rules and network: what was decided under another number has to be asked again.
  std::uint64_t generation() const { return generation_; }
  Audit& audit() { return audit_; }
  /// Ends a connection that is no longer allowed: soon, when many are.
  void cut_off(const std::shared_ptr<Connection>& connection, std::string why);
  /// Whether it is still allowed could not be said just now: it is asked again, until it can.
  void ask_again(const std::shared_ptr<Connection>& connection);
  /// A connection is being ended: its end costs CPU time that those who log in now want as well. How long what is not urgent of it may wait.
  std::chrono::milliseconds count_revocation();
  Zygote& net_zygote() { return *net_zygote_; }
  Zygote& session_zygote() { return *session_zygote_; }
  bool as_root() const { return as_root_; }
  /// The destination of a connection to `local`, or nullptr when the provider does not know that address.
  const Node* self(const Address& local) const { return provider_->network().find(local); }
  void remove(const Connection* connection);
  /// The client is told why and put out.
  void turn_away(UniqueFd client, std::string_view reason);

  struct Worker {
    Child child;
    std::unique_ptr<LocalSocket> socket;
    std::uint64_t token = 0;
  };
  /// Who it is, is known: from now on it counts as that (`counted`, so far). False: that one has too many connections already, or a penalty.
  bool count_as(std::string& counted, const Node& node, const Address& peer);
  void no_longer_unauthenticated(const std::string& source);
  /// A client that was not let in did this: its source, when it is not exempt, may have to stay away for a while.
  void punish(const Address& peer, const std::string& source, Offence offence);
  void forgive(const std::string& source) { penalties_.forgive(source); }

 private:
  struct Listener;
  struct ControlClient;

  void set_up(std::function<void(Expected<Done>)> ready);
  /// The provider may answer something else than before.
  void network_changed();
  void clock_changed();
  void policy_file_changed();
  /// Everything that was decided may be another decision now.
  void judge_again();
  void wait_for_expiry();
  Expected<Done> load_keys();
  Expected<Done> rotate_keys(bool finish);
  void set_patience(int fd) const;
  void log_key(std::size_t i) const;
  struct Wanted {
    Endpoint dialled;  ///< by clients
    Endpoint bound;    ///< by us: the same, but under a takeover
    bool operator==(const Wanted&) const = default;
  };
  std::vector<Wanted> wanted_listeners() const;
  /// Opens what is wanted and not there, closes what is no longer wanted. `first`: what cannot be opened is an error; later it is tried again.
  Expected<Done> update_listeners(bool first);
  /// Sets the takeover's redirects again when another program took them away.
  void look_at_takeover();
  Expected<Done> open_listener(const Wanted& wanted);
  Expected<Done> open_control();
  Expected<UniqueFd> local_listener(const std::string& path, int type);
  void accept_clients(const std::shared_ptr<Listener>& listener);
  /// `dialled_port`: that clients use, 0 = the socket's own.
  void accepted(int fd, std::uint16_t dialled_port);
  /// False: it comes from this machine, and not from the proxy that stands for the network's peers here (userspace networking).
  bool is_networks_own(int fd, const Endpoint& peer, const Endpoint& local) const;
  void accept_control();
  void accept_registrations();
  void registration(UniqueFd socket);
  void fill_pool();
  void give_worker(std::shared_ptr<Connection> connection);
  /// Of those that wait for a worker the first one of the source that has the fewest connections: one that sends hundreds waits for itself.
  std::shared_ptr<Connection> next_in_line();
  void worker_died(std::uint64_t token, int wait_status);
  void re_evaluate();
  void re_evaluate(const std::unordered_map<const Connection*, std::weak_ptr<Connection>>& some);
  void re_evaluate_some();
  void cut_off_later();
  void cut_off_some();
  void reap();
  std::string answer_control(const std::string& request);
  void adopt(std::shared_ptr<Connection> connection);

  boost::asio::io_context& io_;
  Config config_;
  std::string config_file_;
  std::string own_dir_;
  bool as_root_;
  bool stopping_ = false;

  std::unique_ptr<auth::identity::Provider> provider_;
  Rules rules_;
  Audit audit_;
  std::unique_ptr<FileWatch> policy_watch_;
  std::unique_ptr<ClockWatch> clock_watch_;
  boost::asio::steady_timer expiry_;
  std::uint64_t generation_ = 0;
  bool serving_ = false;  ///< the listeners are open
  std::unique_ptr<HostKeys> keys_;
  net::ZygoteHello net_hello_;
  std::optional<Program> net_program_, session_program_;
  std::unique_ptr<Zygote> net_zygote_, session_zygote_;

  std::vector<std::shared_ptr<Listener>> listeners_;
  boost::asio::steady_timer listen_again_, read_again_, again_, revoke_pause_;
  Takeover takeover_;
  std::unique_ptr<RulesetWatch> ruleset_watch_;
  std::unique_ptr<boost::asio::posix::stream_descriptor> registrations_;
  std::unique_ptr<boost::asio::local::stream_protocol::acceptor> control_;
  boost::asio::steady_timer registrations_pause_, control_pause_;
  std::set<std::string> sockets_to_remove_;
  boost::asio::signal_set child_signals_;

  std::deque<Worker> pool_;
  std::size_t pool_asked_ = 0;
  std::deque<std::weak_ptr<Connection>> want_worker_;
  std::map<std::uint64_t, Address> served_;  // net zygote's token -> whom it serves
  Penalties penalties_;
  LogLimit refusals_logged_{100, 10};
  TurnedAway turned_away_;
  std::map<std::string, std::uint32_t> unauthenticated_;  ///< by source_of()
  std::uint32_t unauthenticated_in_all_ = 0;
  std::map<const Connection*, std::shared_ptr<Connection>> connections_;
  std::deque<std::weak_ptr<Connection>> to_re_evaluate_;
  struct CutOff {
    std::weak_ptr<Connection> connection;
    std::string why;
  };
  std::unordered_map<const Connection*, std::weak_ptr<Connection>> to_ask_again_;  ///< not empty: again_ runs
  std::deque<CutOff> to_cut_off_;
  bool cutting_off_ = false;
  double revoke_tokens_ = 0;
  std::chrono::steady_clock::time_point cleared_up_;
  std::chrono::steady_clock::time_point revoke_refilled_;
  bool re_evaluating_ = false;
  friend class Connection;
};

}  // namespace postern::sshd::broker
