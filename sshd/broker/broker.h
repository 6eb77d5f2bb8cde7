#pragma once

#include "auth/identity/identity.h"
#include "auth/policy/policy.h"
#include "base/id.h"
#include "sshd/broker/config.h"
#include "sshd/broker/host_keys.h"
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
#include <vector>

namespace postern::sshd::broker {

class Connection;

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
  const auth::policy::Policy& policy() const { return *policy_; }
  std::uint64_t policy_version() const { return policy_version_; }
  /// Counts reloads of policy and nodes: what was decided under another number has to be asked again.
  std::uint64_t generation() const { return generation_; }
  Zygote& net_zygote() { return *net_zygote_; }
  Zygote& session_zygote() { return *session_zygote_; }
  bool as_root() const { return as_root_; }
  /// The destination of a connection to `local`, or nullptr when the provider does not know that address.
  const Node* self(const Address& local) const { return provider_->network().find(local); }
  void remove(const Connection* connection);

  struct Worker {
    Child child;
    std::unique_ptr<LocalSocket> socket;
    std::uint64_t token = 0;
  };
  void no_longer_unauthenticated(const Address& source);

 private:
  struct Listener;
  struct ControlClient;

  Expected<Done> load_policy(bool first);
  Expected<Done> open_listeners();
  Expected<Done> open_control();
  Expected<UniqueFd> local_listener(const std::string& path, int type);
  void accept_clients(Listener& listener);
  void accepted(int fd, const Endpoint& local);
  void accept_control();
  void accept_registrations();
  void registration(UniqueFd socket);
  void fill_pool();
  void give_worker(std::shared_ptr<Connection> connection);
  void worker_died(std::uint64_t token, int wait_status);
  void re_evaluate();
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
  std::optional<auth::policy::Policy> policy_;
  std::uint64_t policy_version_ = 0;
  std::uint64_t generation_ = 0;
  std::unique_ptr<HostKeys> keys_;
  std::optional<Program> net_program_, session_program_;
  std::unique_ptr<Zygote> net_zygote_, session_zygote_;

  std::vector<std::unique_ptr<Listener>> listeners_;
  std::unique_ptr<boost::asio::posix::stream_descriptor> registrations_;
  std::unique_ptr<boost::asio::local::stream_protocol::acceptor> control_;
  boost::asio::steady_timer registrations_pause_, control_pause_;
  std::set<std::string> sockets_to_remove_;
  boost::asio::signal_set child_signals_;

  std::deque<Worker> pool_;
  std::size_t pool_asked_ = 0;
  std::deque<std::weak_ptr<Connection>> want_worker_;
  std::map<std::uint64_t, Address> serving_;  // net zygote's token -> whom it serves
  std::map<Address, std::chrono::steady_clock::time_point> penalties_;
  std::map<Address, std::uint32_t> unauthenticated_;
  std::uint32_t unauthenticated_in_all_ = 0;
  std::map<const Connection*, std::shared_ptr<Connection>> connections_;
  friend class Connection;
};

}  // namespace postern::sshd::broker
