// hostile_net: takes postern-net's place under a real posternd, for tests/integration/hostile.
//
// As a zygote it is honest: it says that it is ready and forks workers. Each worker hands its socket to posternd (and through it
// everything that it will ever be given) to the test, which listens on the socket "control" next to this program, and then only
// lives and dies as the test orders. So every lie is written down in the test. It is not sandboxed: what counts is what it is given.
#include "base/seqpacket.h"
#include "sshd/protocol/channel.h"
#include "sshd/protocol/net.h"

#include <nlohmann/json.hpp>

#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>

using namespace postern;
using namespace postern::sshd;
using nlohmann::json;

extern char** environ;

namespace {

json sizes() {
  return {{"ask_sign", sizeof(net::AskSign)}, {"ask_login", sizeof(net::AskLogin)}, {"note", sizeof(net::Note)}, {"verdict", sizeof(net::Verdict)},
          {"signature", sizeof(net::Signature)}, {"serve", sizeof(net::Serve)}, {"zygote_hello", sizeof(net::ZygoteHello)},
          {"worker_died", sizeof(net::WorkerDied)}, {"forked", sizeof(net::Forked)}, {"pty", sizeof(channel::Pty)}, {"env", sizeof(channel::Env)},
          {"start", sizeof(channel::Start)}, {"window_change", sizeof(channel::WindowChange)}, {"signal", sizeof(channel::Signal)},
          {"started", sizeof(channel::Started)}, {"exited", sizeof(channel::Exited)}, {"disconnect", sizeof(channel::Disconnect)},
          {"forward", sizeof(channel::ForwardTarget)}, {"forward_closed", sizeof(channel::ForwardClosed)}, {"x11", sizeof(channel::X11)}};
}

/// What this program was started with: its descriptors (but for the one that reads the folder) and its environment.
json inheritance() {
  json fds = json::object(), env = json::array();
  DIR* folder = ::opendir("/proc/self/fd");
  while (const dirent* e = folder != nullptr ? ::readdir(folder) : nullptr) {
    char target[256] = {};
    if (e->d_name[0] == '.' || std::atoi(e->d_name) == ::dirfd(folder)) continue;
    if (::readlink((std::string{"/proc/self/fd/"} + e->d_name).c_str(), target, sizeof target - 1) > 0) fds[e->d_name] = target;
  }
  if (folder != nullptr) ::closedir(folder);
  for (char** v = environ; *v != nullptr; v++) env.push_back(*v);
  return {{"fds", fds}, {"env", env}};
}

[[noreturn]] void work(UniqueFd broker, const std::string& control, json about) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, control.c_str(), sizeof address.sun_path - 1);
  const UniqueFd test{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
  if (::connect(test.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) ::_exit(0);
  about["pid"] = ::getpid();
  const std::string text = about.dump();
  const int fd = broker.get();
  if (!send_message(test.get(), 1, 1, {}, text, {&fd, 1})) ::_exit(0);
  broker.reset();  // the test's alone now
  for (;;) {
    char order[64] = {};
    const ssize_t n = ::recv(test.get(), order, sizeof order - 1, 0);
    if (n <= 0) ::_exit(0);  // the test is over
    if (std::strncmp(order, "exit ", 5) == 0) ::_exit(std::atoi(order + 5));
    if (std::strncmp(order, "signal ", 7) == 0) {
      const int s = std::atoi(order + 7);
      ::signal(s, SIG_DFL);
      ::kill(::getpid(), s);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--sizes") == 0) {
    std::puts(sizes().dump().c_str());
    return 0;
  }
  const json about = inheritance();
  ::prctl(PR_SET_NAME, "postern-net", 0, 0, 0);
  ::setsid();
  const rlimit none{};
  ::setrlimit(RLIMIT_CORE, &none);
  const std::string control = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "control";
  const int broker = 3;
  const auto wait_for = [](int fd) {
    pollfd p{fd, POLLIN, 0};
    ::poll(&p, 1, -1);
  };
  wait_for(broker);
  auto hello = receive_message(broker);
  if (!hello || !*hello || !(*hello)->body<net::ZygoteHello>()) return 1;
  sigset_t child, before;
  ::sigemptyset(&child);
  ::sigaddset(&child, SIGCHLD);
  ::sigprocmask(SIG_BLOCK, &child, &before);
  const UniqueFd children{::signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK)};
  (void)send_body(broker, net::version, static_cast<std::uint16_t>(net::Type::zygote_ready), net::ZygoteReady{});
  std::map<pid_t, std::uint64_t> tokens;
  for (;;) {
    pollfd polled[2] = {{broker, POLLIN, 0}, {children.get(), POLLIN, 0}};
    ::poll(polled, 2, -1);
    if (polled[1].revents != 0) {
      signalfd_siginfo info;
      while (::read(children.get(), &info, sizeof info) > 0) {
      }
      int status = 0;
      for (pid_t pid; (pid = ::waitpid(-1, &status, WNOHANG)) > 0;) {
        const net::WorkerDied died{tokens[pid], pid, status};
        (void)send_body(broker, net::version, static_cast<std::uint16_t>(net::Type::worker_died), died);
        tokens.erase(pid);
      }
    }
    if (polled[0].revents == 0) continue;
    auto message = receive_message(broker);
    if (!message && message.error().code == EAGAIN) continue;
    if (!message || !*message) return 0;  // posternd is gone, or has another zygote
    const auto request = (*message)->body<net::ForkWorker>();
    if (!request || (*message)->fds.size() != 1) return 1;
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::sigprocmask(SIG_SETMASK, &before, nullptr);
      ::close(broker);
      work(std::move((*message)->fds[0]), control, about);
    }
    const UniqueFd pidfd{static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))};
    tokens[pid] = request->token;
    const int fd = pidfd.get();
    (void)send_body(broker, net::version, static_cast<std::uint16_t>(net::Type::forked), net::Forked{request->token, pid, 0}, {}, {&fd, 1});
  }
}
