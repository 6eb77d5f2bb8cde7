#include "sshd/session/holder.h"

#include "base/processes.h"
#include "base/seqpacket.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spdlog/spdlog.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>

namespace postern::sshd::session {
namespace {

constexpr std::uint16_t version = 1;  // both ends are one program: never another
enum class Type : std::uint16_t { opened = 1, launch = 2, launched = 3, helper = 4 };
struct Launched {
  std::int32_t pid = 0;
  std::int32_t error = 0;
};
struct LaunchFlags {
  std::uint8_t terminal = 0, has_command = 0, has_cgroup = 0, spare = 0;
};
/// Modules may ask directory servers: as long as a login may take at all.
constexpr int open_timeout_ms = 60'000;
constexpr int launch_timeout_ms = 10'000;

class Writer {
 public:
  void text(std::string_view s) {
    number(s.size());
    out += s;
  }
  void number(std::uint64_t n) { out.append(reinterpret_cast<const char*>(&n), sizeof n); }
  void list(const std::vector<std::string>& all) {
    number(all.size());
    for (const auto& s : all) text(s);
  }
  void groups(const std::vector<gid_t>& all) {
    number(all.size());
    for (const auto g : all) number(g);
  }
  void user(const pty::LocalUser& u) {
    text(u.name);
    number(u.uid);
    number(u.gid);
    text(u.home);
    text(u.shell);
    groups(u.groups);
  }
  std::string out;
};

/// Of our own bytes; still bounded.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_{bytes} {}
  std::uint64_t number() {
    std::uint64_t n = 0;
    if (rest_.size() < sizeof n) {
      good = false;
      return 0;
    }
    std::memcpy(&n, rest_.data(), sizeof n);
    rest_.remove_prefix(sizeof n);
    return n;
  }
  std::string text() {
    const auto n = number();
    if (n > rest_.size()) {
      good = false;
      return {};
    }
    std::string s{rest_.substr(0, n)};
    rest_.remove_prefix(n);
    return s;
  }
  std::vector<std::string> list() {
    std::vector<std::string> all;
    for (auto n = number(); n > 0 && good; n--) all.push_back(text());
    return all;
  }
  std::vector<gid_t> groups() {
    std::vector<gid_t> all;
    for (auto n = number(); n > 0 && good; n--) all.push_back(static_cast<gid_t>(number()));
    return all;
  }
  pty::LocalUser user() {
    pty::LocalUser u;
    u.name = text();
    u.uid = static_cast<uid_t>(number());
    u.gid = static_cast<gid_t>(number());
    u.home = text();
    u.shell = text();
    u.groups = groups();
    return u;
  }
  bool good = true;

 private:
  std::string_view rest_;
};

/// Payloads may be larger than a message (environments): they go through a memfd.
UniqueFd into_memfd(const std::string& bytes) {
  UniqueFd fd{::memfd_create("postern-launch", MFD_CLOEXEC)};
  std::size_t done = 0;
  while (fd && done < bytes.size()) {
    const ssize_t n = ::pwrite(fd.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
    if (n <= 0) return {};
    done += static_cast<std::size_t>(n);
  }
  return fd;
}
std::string from_memfd(int fd) {
  struct stat st {};
  if (::fstat(fd, &st) != 0) return {};
  std::string bytes(static_cast<std::size_t>(st.st_size), '\0');
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = ::pread(fd, bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
    if (n <= 0) return {};
    done += static_cast<std::size_t>(n);
  }
  return bytes;
}

std::optional<Message> receive_within(int fd, int ms) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds{ms};
  for (;;) {
    auto m = receive_message(fd);
    if (m) return std::move(*m);
    if (m.error().code != EAGAIN) return std::nullopt;
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - std::chrono::steady_clock::now()).count();
    if (ms >= 0 && left <= 0) return std::nullopt;
    pollfd p{fd, POLLIN, 0};
    if (::poll(&p, 1, ms < 0 ? -1 : static_cast<int>(left)) < 0 && errno != EINTR) return std::nullopt;
  }
}

Launched serve_launch(const Message& m, const std::function<void(const std::string&)>& log_in) {
  const auto flags = m.body<LaunchFlags>();
  if (!flags || m.fds.size() != 4U + flags->has_cgroup) return {0, EBADMSG};
  const std::string bytes = from_memfd(m.fds[0].get());
  Reader r{bytes};
  pty::Launch what;
  what.user = r.user();
  what.environment = r.list();
  const std::string command = r.text();
  if (flags->has_command != 0) what.command = command;
  what.greeting = r.text();
  const std::string login_path = r.text();
  if (!r.good) return {0, EBADMSG};
  what.input = m.fds[1].get();
  what.output = m.fds[2].get();
  what.error = m.fds[3].get();
  what.terminal = flags->terminal != 0;
  if (flags->has_cgroup != 0) what.cgroup = m.fds[4].get();
  if (!login_path.empty()) what.before = [&] { log_in(login_path); };
  // The limits are this process's own: nothing to apply. A sibling, not a child: whose exit it is belongs to postern-session
  // (clone(2): the exit signal is then that of the caller, SIGCHLD).
  const auto child = pty::launch(what, true);
  return child ? Launched{static_cast<std::int32_t>(*child), 0} : Launched{0, child.error().code};
}

/// The forward helper, as the user's programs: with the limits, the scope and the namespaces that the modules left.
Launched serve_helper(const Message& m) {
  const auto flags = m.body<LaunchFlags>();
  if (!flags || m.fds.size() != 2U + flags->has_cgroup) return {0, EBADMSG};
  const std::string bytes = from_memfd(m.fds[0].get());
  Reader r{bytes};
  helper::Settings settings;
  settings.user = r.user();
  const auto local = ForwardTargets::decode(r.text());
  const auto remote = ForwardTargets::decode(r.text());
  settings.gateway_ports = r.number() != 0;
  settings.unlink_sockets = r.number() != 0;
  settings.connect_limit = std::chrono::milliseconds{r.number()};
  settings.xauth = r.text();
  if (!r.good || !local || !remote) return {0, EBADMSG};
  settings.local = *local;
  settings.remote = *remote;
  if (flags->has_cgroup != 0) settings.cgroup = m.fds[2].get();
  UniqueFd socket{::fcntl(m.fds[1].get(), F_DUPFD_CLOEXEC, 4)};
  if (!socket) return {0, errno};
  const auto child = fork_into(settings.cgroup, true);
  if (child.pid == 0 && child.cgroup_error != 0) ::_exit(1);
  if (child.pid == 0) helper::serve(std::move(socket), settings);
  return {static_cast<std::int32_t>(child.pid > 0 ? child.pid : 0), child.pid > 0 ? 0 : errno};
}

[[noreturn]] void serve(UniqueFd socket, auth::pam::PamSession& pam, const std::function<void(const std::string&)>& log_in) {
  // Nothing of the connection's may stay open here: it would keep sockets alive that are to close with postern-session.
  const auto fd = static_cast<unsigned>(socket.get());
  if (fd > 3) ::syscall(SYS_close_range, 3U, fd - 1, 0U);
  ::syscall(SYS_close_range, fd + 1, ~0U, 0U);
  const PamResult result = open_pam(pam);
  Writer w;
  w.number(result.opened);
  w.number(result.same_user);
  w.text(result.reason);
  w.groups(result.groups);
  w.list(result.environment);
  w.text(result.texts);
  const UniqueFd payload = into_memfd(w.out);
  const int fds[1] = {payload.get()};
  (void)send_message(socket.get(), version, static_cast<std::uint16_t>(Type::opened), {}, {}, fds);
  // Not before it has been quiet for a moment: what it forks first is the user's program.
  pollfd quiet{socket.get(), POLLIN, 0};
  bool settled = false;
  const auto receive = [&] {
    if (!settled && ::poll(&quiet, 1, static_cast<int>(settle_time.count())) == 0) {
      settled = true;
      release_unused_memory();
    }
    return receive_within(socket.get(), -1);
  };
  while (const auto m = receive()) {
    const bool helps = m->type == static_cast<std::uint16_t>(Type::helper);
    if (!helps && m->type != static_cast<std::uint16_t>(Type::launch)) break;
    (void)send_body(socket.get(), version, static_cast<std::uint16_t>(Type::launched), helps ? serve_helper(*m) : serve_launch(*m, log_in));
  }
  pam.close();
  ::_exit(0);
}

}  // namespace

bool can_raise_limits() {
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  return ::syscall(SYS_capget, &header, data) == 0 && (data[CAP_TO_INDEX(CAP_SYS_RESOURCE)].effective & CAP_TO_MASK(CAP_SYS_RESOURCE)) != 0;
}

PamResult open_pam(auth::pam::PamSession& pam) {
  PamResult result;
  if (const auto r = pam.establish_credentials(); !r)  // no password was asked: sshd goes on, too (auth-pam.c do_pam_setcred)
    spdlog::info("event=pam_no_credentials reason=\"{}\"", r.error().doing);
  const auto opened = pam.open_session();
  result.opened = opened.has_value();
  if (!opened) result.reason = opened.error().doing;
  result.same_user = pam.same_user();
  const int n = ::getgroups(0, nullptr);
  result.groups.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
  if (n > 0 && ::getgroups(n, result.groups.data()) != n) result.groups.clear();
  result.environment = pam.environment();
  result.texts = pam.take_texts();
  return result;
}

Expected<std::unique_ptr<PamHolder>> PamHolder::start(auth::pam::PamSession& pam, std::function<void(const std::string& path)> log_in,
                                                      PamResult& result) {
  auto pair = seqpacket_pair();
  if (!pair) return Unexpected{pair.error()};
  std::unique_ptr<PamHolder> holder{new PamHolder};
  holder->pid_ = ::fork();
  if (holder->pid_ == 0) {
    pair->first.reset();
    serve(std::move(pair->second), pam, log_in);
  }
  if (holder->pid_ < 0) return Unexpected{system_error("fork the PAM holder")};
  holder->socket_ = std::move(pair->first);
  pair->second.reset();
  const auto m = receive_within(holder->socket_.get(), open_timeout_ms);
  if (!m || m->type != static_cast<std::uint16_t>(Type::opened) || m->fds.size() != 1) {
    result.reason = "the PAM holder did not answer";
    return holder;
  }
  const std::string bytes = from_memfd(m->fds[0].get());
  Reader r{bytes};
  result.opened = r.number() != 0;
  result.same_user = r.number() != 0;
  result.reason = r.text();
  result.groups = r.groups();
  result.environment = r.list();
  result.texts = r.text();
  if (!r.good) result.opened = false;
  return holder;
}

PamHolder::~PamHolder() { end(); }

void PamHolder::end() {
  if (pid_ <= 0) return;
  socket_.reset();
  // Modules' session end may take a moment; it is not waited for longer than a login may take.
  for (int i = 0; i < 1000; i++) {
    const pid_t p = ::waitpid(pid_, nullptr, WNOHANG);
    if (p == pid_ || (p < 0 && errno == ECHILD)) break;
    ::usleep(5'000);
  }
  pid_ = 0;
}

Expected<pid_t> PamHolder::launch(const pty::Launch& what, const std::string& login_path) {
  Writer w;
  w.user(what.user);
  w.list(what.environment);
  w.text(what.command.value_or(""));
  w.text(what.greeting);
  w.text(login_path);
  const UniqueFd payload = into_memfd(w.out);
  if (!payload) return Unexpected{system_error("prepare a program for the PAM holder")};
  LaunchFlags flags;
  flags.terminal = what.terminal;
  flags.has_command = what.command.has_value();
  flags.has_cgroup = what.cgroup >= 0;
  const int fds[5] = {payload.get(), what.input, what.output, what.error, what.cgroup};
  if (const auto sent = send_body(socket_.get(), version, static_cast<std::uint16_t>(Type::launch), flags, {},
                                  std::span{fds, 4U + flags.has_cgroup});
      !sent)
    return Unexpected{sent.error()};
  return launched();
}

Expected<std::pair<UniqueFd, pid_t>> PamHolder::start_helper(const helper::Settings& settings, std::string_view local, std::string_view remote) {
  auto pair = seqpacket_pair();
  if (!pair) return Unexpected{pair.error()};
  Writer w;
  w.user(settings.user);
  w.text(local);
  w.text(remote);
  w.number(settings.gateway_ports);
  w.number(settings.unlink_sockets);
  w.number(static_cast<std::uint64_t>(settings.connect_limit.count()));
  w.text(settings.xauth);
  const UniqueFd payload = into_memfd(w.out);
  if (!payload) return Unexpected{system_error("prepare the forward helper for the PAM holder")};
  LaunchFlags flags;
  flags.has_cgroup = settings.cgroup >= 0;
  const int fds[3] = {payload.get(), pair->second.get(), settings.cgroup};
  if (const auto sent = send_body(socket_.get(), version, static_cast<std::uint16_t>(Type::helper), flags, {}, std::span{fds, 2U + flags.has_cgroup}); !sent)
    return Unexpected{sent.error()};
  const auto pid = launched();
  if (!pid) return Unexpected{pid.error()};
  return std::pair{std::move(pair->first), *pid};
}

Expected<pid_t> PamHolder::launched() {
  const auto m = receive_within(socket_.get(), launch_timeout_ms);
  const auto answer = m ? m->body<Launched>() : std::nullopt;
  if (!answer || m->type != static_cast<std::uint16_t>(Type::launched)) {
    socket_.reset();  // an answer that is only late would be taken for the next program's
    return Unexpected{Error{EPIPE, "the PAM holder is gone"}};
  }
  if (answer->error != 0) return Unexpected{system_error("fork a program", answer->error)};
  return static_cast<pid_t>(answer->pid);
}

}  // namespace postern::sshd::session
