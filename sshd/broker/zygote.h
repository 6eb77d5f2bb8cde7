#pragma once

#include "base/expected.h"
#include "base/unique_fd.h"
#include "sshd/broker/local_socket.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>

#include <sys/resource.h>
#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace postern::sshd::broker {

/// A program of ours, opened once and started by descriptor, so that an upgrade on disk never mixes versions.
struct Program {
  std::string name;
  UniqueFd fd;

  static Expected<Program> open(const std::string& dir, const std::string& name);
};

/// What was forked for us.
struct Child {
  pid_t pid = -1;
  UniqueFd pidfd;
};

/// How one kind of zygote talks: the numbers of its messages (sshd/protocol/{net,session}.h share the shapes).
struct ZygoteProtocol {
  std::uint16_t version;
  std::uint16_t hello, fork, ready, forked, died;
};

/// A single-threaded program of ours, exec'ed once and warmed up, that forks a worker whenever it is told to (DESIGN section 1).
///
/// It is replaced before the next fork when one of `watched` files changed (new libraries, PAM modules), when a worker of it died by
/// a signal that we did not send (fresh ASLR and canary), or when it died itself. A replacement because of a dead worker comes at
/// most once a `replace_interval`. Workers outlive their zygote; one that was replaced stays, without work, until it has answered what
/// it was asked and told of the deaths of its workers.
class Zygote {
 public:
  using OnForked = std::function<void(Expected<Child>)>;
  /// A worker ended, or (status 0) its zygote is gone and nobody will tell when it does. Once a worker that was forked.
  using OnDied = std::function<void(std::uint64_t token, int wait_status)>;

  static constexpr std::chrono::seconds replace_interval{60};
  static constexpr std::size_t most_asked = 32;    ///< forks that it is told before it has answered some
  static constexpr std::size_t most_replaced = 8;  ///< waiting for their workers; beyond that the oldest goes
  static constexpr std::chrono::seconds start_timeout{20};

  Zygote(boost::asio::io_context& io, const Program& program, ZygoteProtocol protocol, std::vector<std::byte> hello,
         std::vector<std::string> watched, OnDied on_died);
  ~Zygote();

  /// Starts it; `ready` runs once, with what it said of itself (warnings), or why it failed.
  void start(std::function<void(Expected<std::string>)> ready);
  /// Forks a worker that gets `socket` as its end. The token comes back in on_died.
  std::uint64_t fork(UniqueFd socket, OnForked forked);
  /// A worker crashed: replace the zygote before the next fork. False when that was done less than replace_interval ago.
  bool replace_after_crash();
  /// From the next fork on one that got `hello` runs.
  void replace(std::vector<std::byte> hello) {
    hello_ = std::move(hello);
    stale_ = true;
  }

  pid_t pid() const noexcept { return now_ ? now_->pid : -1; }

  /// The broker raises its own RLIMIT_NOFILE; what it starts, and so the users' programs, must have the one it was started with.
  static void set_child_file_limit(const rlimit& limit) { child_files_ = limit; }

 private:
  struct Waiting {
    std::uint64_t token;
    UniqueFd socket;
    OnForked forked;
  };
  /// One exec'ed zygote.
  struct Process {
    pid_t pid = -1;
    bool ready = false;
    std::unique_ptr<LocalSocket> socket;
    std::map<std::uint64_t, OnForked> asked;
    std::set<std::uint64_t> workers;  ///< forked, and not told dead yet
  };
  void launch();
  void lost(const std::shared_ptr<Process>& process, const std::string& why);
  void restart_later(bool was_ready, const std::string& why);
  void on_message(const std::shared_ptr<Process>& process, Message message);
  void forget_idle();
  void pump();
  bool files_changed();

  static std::optional<rlimit> child_files_;

  boost::asio::io_context& io_;
  const Program& program_;
  ZygoteProtocol protocol_;
  std::vector<std::byte> hello_;
  std::vector<std::string> watched_;
  std::vector<std::int64_t> seen_;
  OnDied on_died_;
  std::function<void(Expected<std::string>)> ready_;
  boost::asio::steady_timer timer_;
  std::shared_ptr<Process> now_;
  std::deque<std::shared_ptr<Process>> replaced_;
  bool stale_ = false;
  std::chrono::steady_clock::time_point last_replacement_{};
  std::uint64_t next_token_ = 1;
  std::deque<Waiting> waiting_;
};

}  // namespace postern::sshd::broker
