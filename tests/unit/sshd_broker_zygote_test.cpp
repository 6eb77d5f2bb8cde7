#include "catch.h"

#include "base/seqpacket.h"
#include "sshd/broker/local_socket.h"
#include "sshd/broker/processes.h"
#include "sshd/broker/zygote.h"
#include "sshd/protocol/net.h"

#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

using namespace postern;
using namespace postern::sshd;
using namespace postern::sshd::broker;

namespace {

constexpr std::uint16_t number(net::Type t) { return static_cast<std::uint16_t>(t); }
constexpr ZygoteProtocol protocol{net::version, number(net::Type::zygote_hello), number(net::Type::fork_worker), number(net::Type::zygote_ready),
                                  number(net::Type::forked), number(net::Type::worker_died)};

// This test's own binary, started by Zygote under the name "stand-in": a zygote that answers a fork only when its worker's socket has
// got a byte, so that a test decides what is in flight. Its workers end when their socket closes.
void stand_in() {
  const auto wait = [](int fd) {
    pollfd p{fd, POLLIN, 0};
    ::poll(&p, 1, -1);
  };
  wait(3);
  if (auto hello = receive_message(3); !hello || !*hello) ::_exit(1);
  (void)send_body(3, net::version, protocol.ready, net::ZygoteReady{});
  std::vector<std::pair<pid_t, std::uint64_t>> workers;
  for (;;) {
    pollfd p{3, POLLIN, 0};
    ::poll(&p, 1, 20);
    int status = 0;
    for (pid_t dead; (dead = ::waitpid(-1, &status, WNOHANG)) > 0;)
      for (const auto& [pid, token] : workers)
        if (pid == dead) (void)send_body(3, net::version, protocol.died, net::WorkerDied{token, pid, status});
    if (p.revents == 0) continue;
    auto m = receive_message(3);
    if (!m || !*m) ::_exit(0);
    const auto token = (*m)->body<net::ForkWorker>()->token;
    const int socket = (*m)->fds[0].get();
    wait(socket);
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::close(3);
      char byte;
      while (::recv(socket, &byte, 1, 0) > 0) {
      }
      pollfd end{socket, POLLIN, 0};
      while (::poll(&end, 1, -1) > 0 && ::recv(socket, &byte, 1, 0) > 0) {
      }
      ::_exit(7);
    }
    workers.emplace_back(pid, token);
    const UniqueFd pidfd{static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))};
    const int fd = pidfd.get();
    (void)send_body(3, net::version, protocol.forked, net::Forked{token, pid, 0}, {}, {&fd, 1});
  }
}

__attribute__((constructor)) void perhaps_stand_in(int, char** argv, char**) {
  if (argv != nullptr && argv[0] != nullptr && std::strcmp(argv[0], "stand-in: zygote") == 0) stand_in();
}

struct Scene {
  boost::asio::io_context io;
  Program program{"stand-in", {}};
  std::vector<std::pair<std::uint64_t, int>> died;
  std::unique_ptr<Zygote> zygote;

  Scene() {
    auto opened = Program::open("/proc/self", "exe");
    REQUIRE(opened);
    program.fd = std::move(opened->fd);
    const net::ZygoteHello hello;
    const auto bytes = std::as_bytes(std::span{&hello, 1});
    zygote = std::make_unique<Zygote>(io, program, protocol, std::vector<std::byte>{bytes.begin(), bytes.end()}, std::vector<std::string>{},
                                      [this](std::uint64_t token, int status) { died.emplace_back(token, status); });
    bool answered = false;
    Expected<std::string> ready{Unexpected{Error{0, "not answered"}}};
    zygote->start([&](Expected<std::string> r) {
      answered = true;
      ready = std::move(r);
    });
    REQUIRE(until([&] { return answered; }));
    INFO((ready ? "ready" : ready.error().doing));
    REQUIRE(ready);
  }
  ~Scene() {
    zygote.reset();
    // Those whose sockets the test has closed end by themselves; nobody is waited for in vain.
    while (::waitpid(-1, nullptr, WNOHANG) > 0) {
    }
  }
  template <class Condition>
  bool until(Condition condition) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds{20};
    while (!condition()) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      io.run_one_for(std::chrono::milliseconds{20});
      io.restart();
    }
    return true;
  }
  struct Fork {
    UniqueFd end;
    std::uint64_t token = 0;
    int answers = 0;
    Expected<Child> child{Unexpected{Error{0, "not answered"}}};
    void let_go() { REQUIRE(::send(end.get(), "x", 1, MSG_NOSIGNAL) == 1); }
  };
  std::unique_ptr<Fork> fork() {
    auto pair = seqpacket_pair();
    auto f = std::make_unique<Fork>();
    f->end = std::move(pair->first);
    f->token = zygote->fork(std::move(pair->second), [f = f.get()](Expected<Child> child) {
      f->answers++;
      f->child = std::move(child);
    });
    return f;
  }
};

}  // namespace

TEST_CASE("a fork in flight is answered though its zygote is replaced meanwhile", "[broker][zygote]") {
  Scene s;
  const pid_t first = s.zygote->pid();
  const auto in_flight = s.fork();
  REQUIRE(s.zygote->replace_after_crash());
  const auto next = s.fork();
  next->let_go();
  REQUIRE(s.until([&] { return next->answers == 1; }));
  CHECK(s.zygote->pid() != first);
  CHECK(in_flight->answers == 0);
  in_flight->let_go();
  REQUIRE(s.until([&] { return in_flight->answers == 1; }));
  REQUIRE(in_flight->child);
  CHECK(pid_of(in_flight->child->pidfd.get()) == in_flight->child->pid);

  // And the replaced one still tells how its worker ended.
  in_flight->end.reset();
  REQUIRE(s.until([&] { return !s.died.empty(); }));
  CHECK(s.died.front().first == in_flight->token);
  CHECK(WEXITSTATUS(s.died.front().second) == 7);
}

TEST_CASE("crashes replace a zygote at most once a minute", "[broker][zygote]") {
  Scene s;
  CHECK(s.zygote->replace_after_crash());
  CHECK_FALSE(s.zygote->replace_after_crash());
}

TEST_CASE("when a zygote dies its forks fail, its workers are given up, and another one serves", "[broker][zygote]") {
  Scene s;
  const auto worker = s.fork();
  worker->let_go();
  REQUIRE(s.until([&] { return worker->answers == 1; }));
  const auto in_flight = s.fork();
  const pid_t first = s.zygote->pid();
  REQUIRE(::kill(first, SIGKILL) == 0);
  REQUIRE(s.until([&] { return in_flight->answers == 1; }));
  CHECK_FALSE(in_flight->child);
  REQUIRE(s.until([&] { return s.died.size() == 1; }));
  CHECK(s.died.front() == std::pair{worker->token, 0});
  const auto after = s.fork();
  after->let_go();
  REQUIRE(s.until([&] { return after->answers == 1; }));
  CHECK(after->child);
  CHECK(s.zygote->pid() != first);
}

TEST_CASE("a socket that changes its owner hands the next message to the new one", "[broker][socket]") {
  boost::asio::io_context io;
  auto pair = seqpacket_pair();
  REQUIRE(pair);
  auto socket = std::make_unique<LocalSocket>(io.get_executor(), std::move(pair->first), 1, 1024);
  std::vector<int> first, second;
  bool closed = false;
  socket->start(
      [&](Message m) {
        first.push_back(m.type);
        socket->start([&](Message n) { second.push_back(n.type); }, [&](const std::string&) { closed = true; });
      },
      [](const std::string&) { FAIL("the first owner is told of the end"); });
  for (std::uint16_t type = 1; type <= 3; type++) REQUIRE(send_message(pair->second.get(), 1, type, {}));
  pair->second.reset();
  io.run_for(std::chrono::seconds{5});
  CHECK(first == std::vector<int>{1});
  CHECK(second == std::vector<int>{2, 3});
  CHECK(closed);
}

TEST_CASE("only a pidfd has a pid", "[broker][processes]") {
  const UniqueFd pidfd{static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0))};
  CHECK(pid_of(pidfd.get()) == ::getpid());
  CHECK_FALSE(pid_of(0));
  CHECK_FALSE(pid_of(-1));
}
