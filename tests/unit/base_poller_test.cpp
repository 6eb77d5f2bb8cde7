#include "base/poller.h"
#include "base/unique_fd.h"
#include "catch.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>

using namespace postern;
using namespace std::chrono_literals;

namespace {

struct Pipe {
  Pipe() {
    int ends[2];
    REQUIRE(::pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0);
    read = UniqueFd{ends[0]};
    write = UniqueFd{ends[1]};
  }
  void put() const { REQUIRE(::write(write.get(), "x", 1) == 1); }
  UniqueFd read, write;
};

}  // namespace

TEST_CASE("a handler hears of its descriptor and of no other", "[base][poller]") {
  Poller poller;
  const Pipe a, b;
  int heard_a = 0, heard_b = 0;
  poller.watch(a.read.get(), POLLIN, [&](short revents) {
    CHECK((revents & POLLIN) != 0);
    heard_a++;
  });
  poller.watch(b.read.get(), POLLIN, [&](short) { heard_b++; });
  a.put();
  REQUIRE(poller.run_once(1s));
  CHECK(heard_a == 1);
  CHECK(heard_b == 0);
  CHECK(poller.run_once(0s));
  CHECK(heard_a == 2);  // level-triggered: the byte is still there
}

TEST_CASE("a handler may remove itself and go on", "[base][poller]") {
  Poller poller;
  const Pipe a;
  int heard = 0;
  const std::string kept(100, 'k');
  poller.watch(a.read.get(), POLLIN, [&poller, &heard, fd = a.read.get(), kept](short) {
    poller.forget(fd);
    heard += kept == std::string(100, 'k') ? 1 : 1000;  // what it captured is still alive
  });
  a.put();
  poller.run_once(1s);
  poller.run_once(0s);
  CHECK(heard == 1);
  CHECK_FALSE(poller.watches(a.read.get()));
}

TEST_CASE("a handler that was removed in the same round hears nothing", "[base][poller]") {
  Poller poller;
  const Pipe a, b;
  int heard = 0;
  const auto once = [&](int other) {
    return [&, other](short) {
      heard++;
      poller.forget(other);
    };
  };
  poller.watch(a.read.get(), POLLIN, once(b.read.get()));
  poller.watch(b.read.get(), POLLIN, once(a.read.get()));
  a.put();
  b.put();
  poller.run_once(1s);
  CHECK(heard == 1);
}

TEST_CASE("a descriptor number that is used again in the same round does not hear old events", "[base][poller]") {
  Poller poller;
  const Pipe a;
  Pipe b;
  const int number = b.read.get();
  int old_handler = 0, new_handler = 0;
  Pipe c;
  poller.watch(a.read.get(), POLLIN, [&](short) {
    poller.forget(number);
    REQUIRE(::dup2(c.read.get(), number) == number);  // another, silent pipe under the same number
    poller.watch(number, POLLIN, [&](short) { new_handler++; });
  });
  poller.watch(number, POLLIN, [&](short) { old_handler++; });
  REQUIRE(a.read.get() < number);
  a.put();
  b.put();
  poller.run_once(1s);
  CHECK(old_handler == 0);
  CHECK(new_handler == 0);
}

TEST_CASE("an event that was given up in the same round is not reported", "[base][poller]") {
  Poller poller;
  const Pipe a;
  int ends[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  const UniqueFd left{ends[0]}, right{ends[1]};
  std::vector<short> heard;
  poller.watch(a.read.get(), POLLIN, [&](short) { poller.set_events(left.get(), POLLIN); });
  poller.watch(left.get(), POLLIN | POLLOUT, [&](short revents) { heard.push_back(revents); });
  REQUIRE(a.read.get() < left.get());
  a.put();
  poller.run_once(1s);
  CHECK(heard.empty());  // only POLLOUT was there, and nobody wants it any more
}

TEST_CASE("a disabled descriptor hears nothing, not even hang-up, until it is enabled again", "[base][poller]") {
  Poller poller;
  Pipe a;
  int heard = 0;
  poller.watch(a.read.get(), POLLIN, [&](short revents) { heard += (revents & POLLHUP) != 0 ? 1 : 1000; });
  poller.disable(a.read.get());
  a.write.reset();
  poller.run_once(0s);
  CHECK(heard == 0);
  poller.set_events(a.read.get(), 0);
  poller.run_once(1s);
  CHECK(heard == 1);
  poller.set_events(12345, POLLIN);  // not watched: no effect
  CHECK_FALSE(poller.watches(12345));
}

TEST_CASE("timers run in the order of their times, once, and not after they are cancelled", "[base][poller]") {
  Poller poller;
  std::string order;
  const auto now = Poller::Clock::now();
  poller.at(now + 2ms, [&] { order += "b"; });
  poller.at(now + 1ms, [&] { order += "a"; });
  const auto never = poller.at(now + 3ms, [&] { order += "!"; });
  CHECK(never != 0);
  poller.at(now + 4ms, [&] {
    order += "d";
    poller.stop();
  });
  poller.cancel(never);
  poller.cancel(0);
  poller.cancel(987654);
  poller.run();
  CHECK(order == "abd");
}

TEST_CASE("a timer may cancel others, and one that renews itself in the past does not hold the loop up", "[base][poller]") {
  Poller poller;
  int renewed = 0, cancelled = 0, heard = 0;
  const Pipe a;
  const auto past = Poller::Clock::now() - 1s;
  Poller::TimerId victim = 0;
  std::function<void()> again = [&] {
    renewed++;
    poller.cancel(victim);
    if (renewed < 1'000'000) poller.at(past, again);
  };
  poller.at(past, again);
  victim = poller.at(past, [&] { cancelled++; });
  poller.watch(a.read.get(), POLLIN, [&](short) { heard++; });
  a.put();
  poller.run_once(1s);
  poller.run_once(1s);
  CHECK(cancelled == 0);
  CHECK(renewed == 2);  // one a round
  CHECK(heard == 2);
}

TEST_CASE("a round waits no longer than its limit, and a limit in the past is none", "[base][poller]") {
  Poller poller;
  CHECK(poller.run_once(0s));
  CHECK(poller.run_once(-5s));
  const auto start = Poller::Clock::now();
  CHECK(poller.run_once(5ms));
  CHECK(Poller::Clock::now() - start >= 5ms);
}
