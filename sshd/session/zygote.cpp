#include "sshd/session/zygote.h"

#include "auth/pam/pam.h"
#include "base/process_title.h"
#include "base/log.h"
#include "base/poller.h"
#include "base/seqpacket.h"
#include "sshd/protocol/session.h"
#include "sshd/session/process.h"

#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <exception>
#include <map>

namespace postern::sshd::session {
namespace {

namespace ses = sshd::session;

/// Loads the name service modules that nsswitch.conf names, by asking what has no answer of its own.
void warm_up_names() {
  ::getpwnam("root");
  ::getpwuid(0);
  ::getgrnam("tty");
  gid_t groups[64];
  int n = 64;
  ::getgrouplist("root", 0, groups, &n);
}

class Zygote {
 public:
  explicit Zygote(UniqueFd control) : control_{std::move(control)} {}

  int run() {
    sigset_t set;
    ::sigemptyset(&set);
    ::sigaddset(&set, SIGCHLD);
    ::sigprocmask(SIG_BLOCK, &set, nullptr);
    signals_.reset(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
    ::fcntl(control_.get(), F_SETFL, ::fcntl(control_.get(), F_GETFL) | O_NONBLOCK);
    poller_.watch(control_.get(), POLLIN, [this](short) { read_control(); });
    poller_.watch(signals_.get(), POLLIN, [this](short) { reap(); });
    while (!poller_.stopped() && !born_) poller_.run_once();
    if (!born_) return status_;

    // A new session process. Everything of the zygote's that it must not hold is closed; the modules stay loaded.
    poller_.forget(control_.get());
    poller_.forget(signals_.get());
    control_.reset();
    signals_.reset();
    children_.clear();
    ::setsid();  // Ctrl-C in a foreground demo ends the daemons, not the sessions under them
    try {
      SessionProcess process{std::move(born_), as_root_};
      return process.run();
    } catch (const std::exception& e) {
      spdlog::critical("event=session_failed reason=\"{}\"", e.what());
      return 1;
    }
  }

 private:
  void read_control() {
    auto received = receive_message(control_.get());
    if (!received && received.error().code == EAGAIN) return;
    if (!received || !*received) return poller_.stop();  // the broker is gone
    Message& m = **received;
    if (m.version < ses::oldest_version || m.version > ses::version) return fail("another protocol version");
    switch (static_cast<ses::Type>(m.type)) {
      case ses::Type::zygote_hello: {
        const auto hello = m.body<ses::ZygoteHello>();
        if (!hello || ready_) return fail("a hello that makes no sense");
        return greet(*hello);
      }
      case ses::Type::fork_session: {
        const auto request = m.body<ses::ForkSession>();
        if (!request || !ready_ || m.fds.size() != 1) return fail("a fork request that makes no sense");
        return fork_session(request->token, std::move(m.fds[0]));
      }
      default: return fail("an unknown message");
    }
  }

  void greet(const ses::ZygoteHello& hello) {
    set_up_log("postern-session", std::string{hello.log_level.get()});
    as_root_ = hello.as_root != 0;
    warm_up_names();
    if (as_root_) ProcessTree::sweep();
    std::string text;
    for (const auto& w : auth::pam::warm_up(std::string{hello.pam_service.get()}, std::string{hello.pam_confdir.get()}))
      text += (text.empty() ? "" : ", ") + w;
    ses::ZygoteReady ready;
    if (!ready.warnings.set(std::string_view{text}.substr(0, 512))) ready.warnings.length = 0;
    ready_ = true;
    send(ses::Type::zygote_ready, ready);
  }

  void fork_session(std::uint64_t token, UniqueFd socket) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      set_process_title("postern-session: login");
      born_ = std::move(socket);
      return;
    }
    ses::Forked answer;
    answer.token = token;
    if (pid < 0) {
      answer.error = errno;
      send(ses::Type::forked, answer);
      return;
    }
    // Before anything is reaped: the number is this child's.
    const UniqueFd pidfd{static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))};
    children_.emplace(pid, token);
    answer.pid = pid;
    const int fd = pidfd.get();
    send(ses::Type::forked, answer, {&fd, pidfd ? 1U : 0U});
  }

  void reap() {
    signalfd_siginfo info{};
    while (::read(signals_.get(), &info, sizeof info) > 0) {
    }
    int status = 0;
    for (pid_t p; (p = ::waitpid(-1, &status, WNOHANG)) > 0;) {
      const auto it = children_.find(p);
      if (it == children_.end()) continue;
      ses::SessionDied died;
      died.token = it->second;
      died.pid = p;
      died.wait_status = status;
      children_.erase(it);
      send(ses::Type::session_died, died);
    }
  }

  template <class Body>
  void send(ses::Type type, const Body& body, std::span<const int> fds = {}) {
    for (;;) {
      const auto sent = send_body(control_.get(), ses::version, static_cast<std::uint16_t>(type), body, {}, fds);
      if (sent) return;
      if (sent.error().code != EAGAIN) return poller_.stop();
      pollfd p{control_.get(), POLLOUT, 0};  // the broker never blocks: it will read
      ::poll(&p, 1, 1'000);
    }
  }

  void fail(const char* what) {
    spdlog::critical("event=control_message_bad what=\"{}\"", what);
    status_ = 1;
    poller_.stop();
  }

  UniqueFd control_, signals_, born_;
  Poller poller_;
  std::map<pid_t, std::uint64_t> children_;
  bool as_root_ = false, ready_ = false;
  int status_ = 0;
};

}  // namespace

int run_zygote(int control) {
  set_up_log("postern-session");
  // 0, 1 and 2 must be taken: a pipe that lands there would become a program's stdin by accident.
  for (int fd; (fd = ::open("/dev/null", O_RDWR)) >= 0;) {
    if (fd <= STDERR_FILENO) continue;
    ::close(fd);
    break;
  }
  if (::fcntl(control, F_SETFD, FD_CLOEXEC) != 0) {
    spdlog::critical("event=no_control_socket descriptor={}", control);
    return 2;
  }
  ::signal(SIGPIPE, SIG_IGN);
  ::signal(SIGHUP, SIG_IGN);
  ::signal(SIGINT, SIG_IGN);
  if (::chdir("/") != 0) return 1;
  ::umask(::umask(077) | 022);  // as sshd: the user's umask starts from this (sshd.c), PAM may change it
  return Zygote{UniqueFd{control}}.run();
}

}  // namespace postern::sshd::session
