#include "sshd/session/limits.h"

#include <algorithm>

namespace postern::sshd::session {

using Rules = ConnectionFacts::Rules;

std::string duration_text(std::uint32_t seconds) {
  const auto h = seconds / 3600, m = seconds / 60 % 60, s = seconds % 60;
  std::string out;
  if (h > 0) out += std::to_string(h) + "h";
  if (h > 0 || m > 0) out += std::to_string(m) + "m";
  return out + std::to_string(s) + "s";
}

TimeLimits::TimeLimits(Poller& poller, const Rules& rules, std::function<void(const std::string&, const std::string&)> over)
    : poller_{poller}, over_{std::move(over)} {
  if (rules.max_duration_seconds != Rules::no_limit) {
    total_timer_ = poller_.after(std::chrono::seconds{rules.max_duration_seconds}, [this, seconds = rules.max_duration_seconds] {
      total_timer_ = 0;
      over_("max_duration", "Session timeout of " + duration_text(seconds) + " elapsed.");
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
  if (Poller::Clock::now() >= due) return over_("idle_timeout", "Idle timeout of " + duration_text(static_cast<std::uint32_t>(idle_.count())) + " elapsed.");
  idle_timer_ = poller_.at(due, [this] {
    idle_timer_ = 0;
    check_idle();
  });
}

}  // namespace postern::sshd::session
