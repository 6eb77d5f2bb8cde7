#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>

#include <functional>
#include <memory>

namespace postern {

/// Says when the wall clock was set, or went on after the machine had slept: timers that wait for a time of day are then wrong. By timerfd_create(2),
/// TFD_TIMER_CANCEL_ON_SET.
class ClockWatch {
 public:
  ClockWatch(boost::asio::io_context& io, std::function<void()> changed);
  ~ClockWatch() { *alive_ = false; }
  ClockWatch(const ClockWatch&) = delete;
  ClockWatch& operator=(const ClockWatch&) = delete;

 private:
  void wait();

  boost::asio::posix::stream_descriptor timer_;
  std::function<void()> changed_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace postern
