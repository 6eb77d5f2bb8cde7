#include "catch.h"

#include "base/clock_watch.h"

#include <boost/asio/io_context.hpp>

#include <chrono>
#include <ctime>

using namespace postern;

TEST_CASE("a wall clock that is set is noticed at once, also the second time", "[base][clock]") {
  boost::asio::io_context io;
  int changes = 0;
  ClockWatch watch{io, [&] { changes++; }};
  io.poll();
  for (int n = 1; n <= 2; n++) {
    timespec now{};
    ::clock_gettime(CLOCK_REALTIME, &now);
    if (::clock_settime(CLOCK_REALTIME, &now) != 0) {  // to what it says; without CAP_SYS_TIME nobody sets it, and nothing is told
      io.run_for(std::chrono::milliseconds{20});
      CHECK(changes == 0);
      return;
    }
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds{5};
    while (changes < n && std::chrono::steady_clock::now() < end) io.run_one_for(std::chrono::milliseconds{20});
    CHECK(changes == n);
  }
}
