#include "base/poller.h"

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace postern {

void Poller::watch(int fd, short events, FdHandler handler) {
  watches_.insert_or_assign(fd, Watch{events, true, next_generation_++, std::make_shared<FdHandler>(std::move(handler))});
}

void Poller::set_events(int fd, short events) {
  if (auto it = watches_.find(fd); it != watches_.end()) {
    it->second.events = events;
    it->second.enabled = true;
  }
}

void Poller::disable(int fd) {
  if (auto it = watches_.find(fd); it != watches_.end()) it->second.enabled = false;
}

void Poller::forget(int fd) { watches_.erase(fd); }

Poller::TimerId Poller::at(Clock::time_point when, TimerHandler handler) {
  const TimerId id = next_timer_++;
  timers_.emplace(when, Timer{id, std::move(handler)});
  return id;
}

void Poller::cancel(TimerId id) {
  std::erase_if(timers_, [id](const auto& entry) { return entry.second.id == id; });
}

bool Poller::run_once(std::optional<Clock::duration> limit) {
  polled_.clear();
  generations_.clear();
  for (const auto& [fd, watch] : watches_) {
    if (!watch.enabled) continue;
    polled_.push_back({fd, watch.events, 0});
    generations_.push_back(watch.generation);
  }
  std::optional<Clock::duration> wait = limit;
  if (!timers_.empty()) {
    const auto until = std::max(timers_.begin()->first - Clock::now(), Clock::duration::zero());
    wait = wait ? std::min(*wait, until) : until;
  }
  timespec time{};
  if (wait) {
    wait = std::max(*wait, Clock::duration::zero());  // ppoll(2): EINVAL for a negative time
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(*wait).count();
    time.tv_sec = static_cast<time_t>(ns / 1'000'000'000);
    time.tv_nsec = static_cast<long>(ns % 1'000'000'000);
  }
  const int n = ::ppoll(polled_.data(), polled_.size(), wait ? &time : nullptr, nullptr);
  if (n < 0) {
    if (errno == EINTR) return false;
    throw std::system_error{errno, std::generic_category(), "ppoll"};
  }
  for (std::size_t i = 0; n > 0 && i < polled_.size(); i++) {
    if (polled_[i].revents == 0) continue;
    // A handler may have removed or replaced this watch in the meantime.
    const auto it = watches_.find(polled_[i].fd);
    if (it == watches_.end() || it->second.generation != generations_[i] || !it->second.enabled) continue;
    // ... or have given up some of its events since: those are not reported.
    const auto revents = static_cast<short>(polled_[i].revents & (it->second.events | POLLERR | POLLHUP | POLLNVAL));
    if (revents == 0) continue;
    const auto handler = it->second.handler;  // kept alive: the handler may remove itself
    (*handler)(revents);
  }
  // Timers that handlers add now wait for the next round: one that renews itself in the past must not starve the descriptors.
  const auto now = Clock::now();
  const TimerId first_new = next_timer_;
  for (auto it = timers_.begin(); it != timers_.end() && it->first <= now;) {
    if (it->second.id >= first_new) {
      ++it;
      continue;
    }
    auto node = timers_.extract(it);
    node.mapped().handler();
    it = timers_.begin();  // the handler may have cancelled the next one
  }
  return true;
}

void Poller::run() {
  while (!stopped_) run_once();
}

}  // namespace postern
