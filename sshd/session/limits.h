#pragma once

#include "base/poller.h"
#include "sshd/protocol/facts.h"

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

namespace postern::sshd::session {

/// How long a connection may last (max_duration), and how long nothing may move on it (idle_timeout). From its login on: make it then.
class TimeLimits {
 public:
  /// `over` runs once, with the rule's name and a line for the user; the object may be destroyed by it.
  TimeLimits(Poller& poller, const ConnectionFacts::Rules& rules, std::function<void(const std::string& rule, const std::string& text)> over);
  ~TimeLimits();
  TimeLimits(const TimeLimits&) = delete;
  TimeLimits& operator=(const TimeLimits&) = delete;

  bool watches_activity() const noexcept { return idle_ > std::chrono::seconds{0}; }
  /// How often net is to report: so much later than its time an idle connection may end.
  std::chrono::milliseconds report_interval() const noexcept;
  /// Something moved just now.
  void activity() noexcept { last_ = Poller::Clock::now(); }

 private:
  void check_idle();

  Poller& poller_;
  std::function<void(const std::string&, const std::string&)> over_;
  std::chrono::seconds idle_{0};
  Poller::Clock::time_point last_ = Poller::Clock::now();
  Poller::TimerId total_timer_ = 0, idle_timer_ = 0;
};

}  // namespace postern::sshd::session
