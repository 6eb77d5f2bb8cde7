#include "base/clock_watch.h"

#include "base/expected.h"

#include <spdlog/spdlog.h>

#include <sys/timerfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <ctime>
#include <limits>

namespace postern {

ClockWatch::ClockWatch(boost::asio::io_context& io, std::function<void()> changed) : timer_{io}, changed_{std::move(changed)} {
  const int fd = ::timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK | TFD_CLOEXEC);
  if (fd < 0) {
    spdlog::warn("event=clock_not_watched why=\"{}\"", system_error("make a timer").doing);
    return;
  }
  timer_.assign(fd);
  wait();
}

void ClockWatch::wait() {
  itimerspec never{};
  never.it_value.tv_sec = std::numeric_limits<std::int32_t>::max();
  never.it_value.tv_sec *= 4;  // the year 2242: its end is of no interest
  if (::timerfd_settime(timer_.native_handle(), TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, &never, nullptr) != 0 && errno != ECANCELED) {
    spdlog::warn("event=clock_not_watched why=\"{}\"", system_error("set a timer").doing);
    return;
  }
  timer_.async_wait(boost::asio::posix::descriptor_base::wait_read, [this, alive = alive_](boost::system::error_code ec) {
    if (ec || !*alive) return;
    std::uint64_t times = 0;
    const bool set = ::read(timer_.native_handle(), &times, sizeof times) < 0 && errno == ECANCELED;
    wait();
    if (set) changed_();
  });
}

}  // namespace postern
