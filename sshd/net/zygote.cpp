#include "sshd/net/zygote.h"

#include "base/process_title.h"
#include "base/log.h"
#include "base/poller.h"
#include "base/seqpacket.h"
#include "sshd/net/connection.h"
#include "sshd/net/libssh_ext.h"
#include "sshd/net/link.h"
#include "sshd/net/sandbox.h"
#include "sshd/net/self_test.h"
#include "sshd/protocol/net.h"

#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <ctime>
#include <map>

namespace postern::sshd::net {
namespace {

constexpr std::size_t largest_from_broker = 12 * 1024;
static_assert(sizeof(ZygoteHello) <= largest_from_broker && sizeof(Verdict) <= largest_from_broker && sizeof(Signature) <= largest_from_broker);

/// One message, waiting for it. Nothing: the broker is gone, or broke the protocol.
std::optional<Message> wait_for_message(int socket) {
  for (;;) {
    auto message = receive_message(socket, largest_from_broker);
    if (message) {
      if (*message && (*message)->version == version) return std::move(**message);
      return std::nullopt;
    }
    if (message.error().code != EAGAIN) return std::nullopt;
    pollfd polled{socket, POLLIN, 0};
    ::poll(&polled, 1, -1);
  }
}

/// Sends, waiting for room: the zygote has nothing else to do.
template <class Body>
bool send_waiting(int socket, Type type, const Body& body, std::span<const int> fds = {}) {
  for (;;) {
    auto sent = send_body(socket, version, static_cast<std::uint16_t>(type), body, {}, fds);
    if (sent) return true;
    if (sent.error().code != EAGAIN) return false;
    pollfd polled{socket, POLLOUT, 0};
    ::poll(&polled, 1, -1);
  }
}

class Zygote {
 public:
  explicit Zygote(UniqueFd control) : control_{std::move(control)} {}
  int run();

 private:
  bool start();
  void on_control();
  void on_child();
  void fork_worker(const ForkWorker& request, UniqueFd socket);
  [[noreturn]] void become_worker(UniqueFd socket);

  UniqueFd control_, child_signals_, null_device_;
  sigset_t old_mask_{};
  Poller poller_;
  bool keep_standard_error_ = false;
  std::unique_ptr<ext::Server> server_;
  std::optional<SystemCallFilter> filter_;
  std::map<pid_t, std::uint64_t> workers_;
};

bool Zygote::start() {
  auto message = wait_for_message(control_.get());
  const auto hello = message && message->type == static_cast<std::uint16_t>(Type::zygote_hello) ? message->body<ZygoteHello>() : std::nullopt;
  if (!hello) return false;
  const std::string level{hello->log_level.get()};
  set_up_log("postern-net", level);
  keep_standard_error_ = level == "trace" || level == "debug";
  if (hello->key_count == 0 || hello->key_count > max_host_keys) {
    spdlog::error("event=net_start_failed reason=\"no host keys\"");
    return false;
  }

  ::close_range(control_.get() + 1, ~0u, 0);  // what posternd's own caller may have left open
  ::setsid();  // a Ctrl-C for posternd in a terminal is not one for live connections
  ::signal(SIGPIPE, SIG_IGN);
  ::tzset();  // reads /etc/localtime while there is one
  // Fixed: by default the first large free() moves it up to 32 MiB, and buffers of bulk transfers would stay with the process.
  ::mallopt(M_MMAP_THRESHOLD, 128 * 1024);
  null_device_ = UniqueFd{::open("/dev/null", O_RDWR | O_CLOEXEC)};

  // The self-test before the sandbox: libssh and OpenSSL read what they read once now.
  auto tested = self_test();
  if (!tested) {
    spdlog::error("event=net_start_failed reason={}", safe_quoted(tested.error().doing));
    return false;
  }
  std::vector<std::string> blobs;
  for (std::uint32_t i = 0; i < hello->key_count; i++) blobs.emplace_back(hello->keys[i].blob.get());
  auto server = ext::Server::make(blobs, std::string{hello->version_string.get()}, hello->algorithms);
  if (!server) {
    spdlog::error("event=net_start_failed reason={}", safe_quoted(server.error().doing));
    return false;
  }
  server_ = std::move(*server);
  auto filter = SystemCallFilter::compile();
  if (!filter) {
    spdlog::error("event=net_start_failed reason={}", safe_quoted(filter.error().doing));
    return false;
  }
  filter_.emplace(std::move(*filter));

  auto missing = enter_zygote_sandbox({hello->as_root != 0, hello->uid, hello->gid, std::string{hello->empty_root.get()}});
  if (!missing) {
    spdlog::error("event=net_start_failed reason={}", safe_quoted(missing.error().doing));
    return false;
  }

  sigset_t child;
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  ::sigprocmask(SIG_BLOCK, &child, &old_mask_);
  child_signals_ = UniqueFd{::signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK)};
  ::malloc_trim(0);

  ZygoteReady ready;
  static_cast<void>(ready.missing.set(std::string_view{*missing}.substr(0, sizeof ready.missing.text)));
  spdlog::debug("event=net_zygote_ready libssh={} missing={}", ext::library_version(), safe_quoted(*missing));
  return child_signals_ && send_waiting(control_.get(), Type::zygote_ready, ready);
}

int Zygote::run() {
  if (!control_ || !start()) return 1;
  poller_.watch(control_.get(), POLLIN, [this](short) { on_control(); });
  poller_.watch(child_signals_.get(), POLLIN, [this](short) { on_child(); });
  poller_.run();
  return 0;
}

void Zygote::on_control() {
  auto message = receive_message(control_.get(), largest_from_broker);
  if (!message && message.error().code == EAGAIN) return;
  const auto request = message && *message && (*message)->version == version &&
                               (*message)->type == static_cast<std::uint16_t>(Type::fork_worker) && (*message)->fds.size() == 1
                           ? (*message)->body<ForkWorker>()
                           : std::nullopt;
  if (!request) {  // end of file: the broker is gone
    poller_.stop();
    return;
  }
  fork_worker(*request, std::move((*message)->fds.front()));
}

void Zygote::fork_worker(const ForkWorker& request, UniqueFd socket) {
  Forked answer;
  answer.token = request.token;
  const pid_t pid = ::fork();
  if (pid == 0) {
    set_process_title("postern-net: warm");
    become_worker(std::move(socket));
  }
  UniqueFd pidfd;
  if (pid < 0) {
    answer.error = errno;
  } else {
    // Nobody has reaped it: this is that process and no other.
    pidfd = UniqueFd{static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))};
    if (!pidfd) answer.error = errno;
    answer.pid = pid;
    workers_[pid] = request.token;
  }
  const int fd = pidfd.get();
  const bool sent = send_waiting(control_.get(), Type::forked, answer, pidfd ? std::span<const int>{&fd, 1} : std::span<const int>{});
  if (!sent) poller_.stop();
}

void Zygote::on_child() {
  signalfd_siginfo info;
  while (::read(child_signals_.get(), &info, sizeof info) == static_cast<ssize_t>(sizeof info)) {
  }
  for (;;) {
    int status = 0;
    const pid_t pid = ::waitpid(-1, &status, WNOHANG);
    if (pid <= 0) return;
    const auto worker = workers_.find(pid);
    if (worker == workers_.end()) continue;
    WorkerDied died;
    died.token = worker->second;
    died.pid = pid;
    died.wait_status = status;
    workers_.erase(worker);
    if (!send_waiting(control_.get(), Type::worker_died, died)) poller_.stop();
  }
}

void Zygote::become_worker(UniqueFd socket) {
  control_.reset();
  child_signals_.reset();
  ::sigprocmask(SIG_SETMASK, &old_mask_, nullptr);
  // No way to a log or a terminal for a parser of strangers' bytes; what it has to tell goes to the broker as a Note.
  if (null_device_) {
    ::dup2(null_device_.get(), 0);
    ::dup2(null_device_.get(), 1);
#ifndef POSTERN_SANITIZED
    if (!keep_standard_error_) ::dup2(null_device_.get(), 2);
#endif
    null_device_.reset();
  }
  auto sandboxed = enter_worker_sandbox(*filter_);
  if (!sandboxed) {
    spdlog::error("event=net_worker_failed reason={}", safe_quoted(sandboxed.error().doing));
    ::_exit(1);
  }
  auto message = wait_for_message(socket.get());
  const auto serve = message && message->type == static_cast<std::uint16_t>(Type::serve) && message->fds.size() == 1 ? message->body<Serve>()
                                                                                                                      : std::nullopt;
  if (!serve) ::_exit(0);  // the broker is gone, or does not need this worker any more
  set_process_title("postern-net: " + std::string{serve->peer_address.get()});
  {
    Connection connection{*server_, std::move(message->fds.front()), Link{std::move(socket), version, largest_from_broker}, *serve};
    connection.run();
  }
  ::_exit(0);
}

}  // namespace

int run_zygote(UniqueFd control) { return Zygote{std::move(control)}.run(); }

}  // namespace postern::sshd::net
