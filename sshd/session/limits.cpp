#include "sshd/session/limits.h"

#include "base/go_duration.h"

#include <algorithm>

namespace postern::sshd::session {

using Rules = ConnectionFacts::Rules;

TimeLimits::TimeLimits(Poller& poller, const Rules& rules, std::function<void(const std::string&, const std::string&)> over)
    : poller_{poller}, over_{std::move(over)} {
  if (rules.max_duration_seconds != Rules::no_limit) {
    total_timer_ = poller_.after(std::chrono::seconds{rules.max_duration_seconds}, [this, seconds = rules.max_duration_seconds] {
      total_timer_ = 0;
      over_("max_duration", "Session timeout of " + go_duration_text(std::chrono::seconds{seconds}) + " elapsed.");
    });
  }
  if (rules.idle_timeout_seconds != Rules::no_limit) {
    idle_ = std::chrono::seconds{rules.idle_timeout_seconds};
    check_idle();
  }
}

TimeLimits::~TimeLimits() {
  if (total_timer_ != 0) poller_.cancel(total_timer_);
  if (idle_timer_ != 0) poller_.cancel(idle_timer_);
}

std::chrono::milliseconds TimeLimits::report_interval() const noexcept {
  using std::chrono::milliseconds;
  return std::clamp(milliseconds{idle_} / 20, milliseconds{50}, milliseconds{5'000});
}

void TimeLimits::check_idle() {
  // One timer, set again when it fires: activity itself costs nothing but a look at the clock.
  const auto due = last_ + idle_;
  if (Poller::Clock::now() >= due) return over_("idle_timeout", "Idle timeout of " + go_duration_text(idle_) + " elapsed.");
  idle_timer_ = poller_.at(due, [this] {
    idle_timer_ = 0;
    check_idle();
  });
}

}  // namespace postern::sshd::session
