#pragma once

#include "base/poller.h"
#include "base/seqpacket.h"
#include "sshd/protocol/channel.h"
#include "sshd/protocol/facts.h"
#include "sshd/protocol/forward_targets.h"
#include "sshd/session/forward_helper.h"
#include "sshd/session/outbox.h"

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace postern::sshd::session {

/// Listeners of one connection (-R, each with an address of both families at most), the agent's among them.
inline constexpr std::size_t max_forward_listeners = 256;
/// Lines about forwardings that one connection may write into the log at once, and how soon it may write another.
inline constexpr unsigned forward_log_burst = 200;
inline constexpr std::chrono::milliseconds forward_log_refill{50};
/// Messages that a helper which does not read may leave with us: more than a client has forwardings and listeners.
inline constexpr std::size_t most_waiting = 8192;
/// Helpers that one connection may start at once, and how soon another one: the user may kill them as fast as they come.
inline constexpr unsigned helper_burst = 5;
inline constexpr std::chrono::milliseconds helper_refill{1'000};

/// One connection's forwardings: asks the rules, has the helper (forward_helper.h) connect and listen as the user, and hands what comes of it to
/// net. It never connects, binds or looks a name up, keeps no descriptor of a forwarding, and sees none of its bytes: they are not recorded.
///
/// Requests come from net, which parses strangers' bytes: what a sound net never sends is a violation (false), and ends the connection.
class Forwarding {
 public:
  struct Host {
    Poller& poller;
    const ConnectionFacts& facts;
    std::function<Expected<std::pair<UniqueFd, pid_t>>(helper::Settings settings)> start_helper;  ///< the caller sets user, limits and cgroup
    std::function<void(channel::Type, std::span<const std::byte>, std::vector<UniqueFd>)> to_net;
    std::function<void(const std::string& name, const std::string& fields)> event;
    std::function<void(UniqueFd fd)> let_go;  ///< a descriptor that the helper gave us, or its socket, where closing it cannot block us
  };
  explicit Forwarding(Host host);
  ~Forwarding();
  Forwarding(const Forwarding&) = delete;
  Forwarding& operator=(const Forwarding&) = delete;

  bool connect(const channel::ForwardTarget& request);
  bool listen(const channel::ForwardTarget& request);
  bool cancel(const channel::ForwardTarget& request);
  bool closed(const channel::ForwardClosed& what);
  /// `done` runs once: is there a socket for the client's agent now? Perhaps before it returns.
  void ask_agent(std::function<void(bool)> done);
  /// The socket's path for SSH_AUTH_SOCK; empty: no agent was asked for.
  const std::string& agent_socket() const noexcept { return agent_path_; }

  /// The same for X11 and one session channel.
  void ask_x11(const channel::X11& request, std::function<void(bool)> done);
  /// "localhost:10.0"; empty: no X11 was asked for.
  std::string display(std::uint32_t channel) const;
  /// A session channel is closed: its display goes.
  void channel_closed(std::uint32_t channel);

  /// No forwarding any more: the helper ends, and with `tell_net` those that run.
  void end(bool tell_net);
  /// Was it the helper that died?
  bool child_exited(pid_t pid);
  /// Nothing is left but what net holds.
  bool finished() const noexcept { return pid_ == 0 || abandoned_; }
  /// net was given a descriptor of a forwarding, and may have kept it whatever it says.
  bool handed() const noexcept { return handed_; }

 private:
  using Clock = Poller::Clock;
  enum class Direction { local, remote, agent, x11 };
  struct Forward {
    std::string what;  ///< for the log, safe
    Direction direction = Direction::local;
    channel::ForwardKind kind = channel::ForwardKind::tcp;
    std::string host;  ///< as the client wrote it, or a path
    std::uint16_t port = 0;
    Clock::time_point began;
    std::uint32_t asked = 0;  ///< id of the question to the helper that is not answered; 0: none
    Poller::TimerId watchdog = 0;
  };
  struct Listener {
    channel::ForwardKind kind = channel::ForwardKind::tcp;
    std::string asked;
    std::uint16_t asked_port = 0, port = 0;
    std::uint32_t request = 0;  ///< net's number
    bool pending = true;
    Poller::TimerId watchdog = 0;
    std::uint32_t channel = 0, screen = 0;  ///< of x11
    bool single = false;
    std::function<void(bool)> done;         ///< of agent and x11: who waits
  };

  bool start();
  void read_helper();
  bool on_helper_message(Message& m);
  void helper_gone();
  void drop_helper();
  void on_connected(std::uint32_t id, UniqueFd& fd);
  void on_incoming(const helper::Incoming& said, UniqueFd& fd);
  static std::string describe(const Forward& forward);
  bool is_what_was_asked(const Forward& forward, int fd) const;
  void refuse(std::uint32_t number, std::uint32_t reason, const std::string& text);
  void fail(std::uint32_t number, std::uint32_t reason, const std::string& text);
  void answer_listen(std::uint32_t request, bool ok, std::uint16_t port);
  void listen_failed(std::uint32_t id, const std::string& why);
  void listener_over(std::uint32_t id, Listener listener, const std::string& why);
  void begin_listening(std::uint32_t id, Listener listener);
  void log(const std::string& name, const std::string& fields);
  template <class Body>
  void tell_helper(helper::Type type, const Body& body) {
    helper_.send(helper::version, static_cast<std::uint16_t>(type), body);
    if (helper_.waiting() > most_waiting && !std::exchange(full_, true))  // not from in here: callers hold iterators
      host_.poller.after(std::chrono::milliseconds{0}, [this] {
        full_ = false;
        if (helper_.waiting() > most_waiting) drop_helper();
      });
  }
  template <class Body>
  void tell(channel::Type type, const Body& body, std::vector<UniqueFd> fds = {}) {
    host_.to_net(type, std::as_bytes(std::span{&body, 1}), std::move(fds));
  }

  Host host_;
  ForwardTargets local_, remote_;
  bool local_allowed_ = false, remote_allowed_ = false, agent_allowed_ = false, x11_allowed_ = false;
  Outbox helper_;
  pid_t pid_ = 0;
  bool over_ = false;
  bool falling_ = false;    // helper_gone() is telling who waits
  bool abandoned_ = false;  // killed, and not gone for too long
  bool full_ = false;
  bool handed_ = false;
  unsigned start_tokens_ = helper_burst;
  Clock::time_point start_refilled_ = Clock::now();
  std::map<std::uint32_t, Forward> forwards_;    // by net's or our number, pending ones too
  std::map<std::uint32_t, std::uint32_t> asked_; // the helper's id -> number: net uses numbers again
  std::map<std::uint32_t, Listener> listeners_;  // by the helper's id
  std::uint32_t next_id_ = 1;
  std::uint32_t next_incoming_ = channel::first_incoming;
  std::uint32_t agent_listener_ = 0;
  std::string agent_path_;
  unsigned log_tokens_ = forward_log_burst;
  unsigned unlogged_ = 0;
  Clock::time_point log_refilled_ = Clock::now();
};

}  // namespace postern::sshd::session
