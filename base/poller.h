#pragma once

#include <poll.h>

#include <chrono>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

namespace postern {

/// A small single-threaded ppoll(2) loop for the per-connection processes (postern-net, postern-session).
///
/// Why not Asio there: a connection's process watches a handful of descriptors, lives in a sandbox whose filter should be short
/// (ppoll alone, instead of epoll, eventfd and timerfd), and is forked a thousand times (its memory counts). The daemons with
/// many connections (posternd, postern-relay, postern-recorder) use Asio.
///
/// Handlers may add, change and remove watches and timers, their own included. Not thread-safe.
class Poller {
 public:
  using Clock = std::chrono::steady_clock;
  using FdHandler = std::function<void(short revents)>;
  using TimerHandler = std::function<void()>;
  using TimerId = unsigned long;

  /// Watches `fd` (not owned) for `events` (POLLIN | POLLOUT; 0 = only errors and hang-up are reported). One watch a descriptor: replaces.
  void watch(int fd, short events, FdHandler handler);
  /// Changes what is watched; no effect for a descriptor that is not. Use disable() to hear nothing, not even hang-up.
  void set_events(int fd, short events);
  /// Hears nothing of `fd`, POLLHUP included (ppoll ignores negative descriptors), until set_events().
  void disable(int fd);
  /// Call before closing the descriptor.
  void forget(int fd);
  bool watches(int fd) const { return watches_.contains(fd); }

  /// Runs once at `when`. The id is never 0.
  TimerId at(Clock::time_point when, TimerHandler handler);
  TimerId after(Clock::duration delay, TimerHandler handler) { return at(Clock::now() + delay, std::move(handler)); }
  void cancel(TimerId id);

  /// One round: waits for the next event or timer (at most `limit`), runs the handlers. False when a signal interrupted.
  bool run_once(std::optional<Clock::duration> limit = std::nullopt);
  /// Rounds until stop().
  void run();
  void stop() { stopped_ = true; }
  bool stopped() const { return stopped_; }

 private:
  struct Watch {
    short events;
    bool enabled;
    unsigned long generation;
    std::shared_ptr<FdHandler> handler;
  };
  struct Timer {
    TimerId id;
    TimerHandler handler;
  };
  std::map<int, Watch> watches_;
  std::multimap<Clock::time_point, Timer> timers_;
  std::vector<pollfd> polled_;
  std::vector<unsigned long> generations_;
  unsigned long next_generation_ = 1;
  TimerId next_timer_ = 1;
  bool stopped_ = false;
};

}  // namespace postern
