#include "sshd/broker/zygote.h"

#include "base/log.h"
#include "sshd/broker/processes.h"
#include "sshd/protocol/net.h"
#include "sshd/protocol/session.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

extern char** environ;

namespace postern::sshd::broker {

// The shapes that both protocols share; a difference would be read wrongly here.
static_assert(sizeof(net::Forked) == sizeof(session::Forked) && sizeof(net::ForkWorker) == sizeof(session::ForkSession) &&
              sizeof(net::WorkerDied) == sizeof(session::SessionDied) && sizeof(net::ZygoteReady) == sizeof(session::ZygoteReady));

std::optional<rlimit> Zygote::child_files_;

Expected<Program> Program::open(const std::string& dir, const std::string& name) {
  const std::string path = dir + "/" + name;
  UniqueFd fd{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (!fd) return Unexpected{system_error("open program " + path)};
  if (::faccessat(AT_FDCWD, path.c_str(), X_OK, AT_EACCESS) != 0) return Unexpected{system_error("run program " + path)};
  // Never descriptor 3: in the child that is the control socket by the time of exec.
  UniqueFd high{::fcntl(fd.get(), F_DUPFD_CLOEXEC, 10)};
  if (!high) return Unexpected{system_error("open program " + path)};
  return Program{name, std::move(high)};
}

Zygote::Zygote(boost::asio::io_context& io, const Program& program, ZygoteProtocol protocol, std::vector<std::byte> hello,
               std::vector<std::string> watched, OnDied on_died)
    : io_{io}, program_{program}, protocol_{protocol}, hello_{std::move(hello)}, watched_{std::move(watched)},
      on_died_{std::move(on_died)}, timer_{io} {}

Zygote::~Zygote() = default;

void Zygote::start(std::function<void(Expected<std::string>)> ready) {
  ready_ = std::move(ready);
  launch();
}

bool Zygote::files_changed() {
  std::vector<std::int64_t> now;
  for (const auto& path : watched_) {
    struct stat st {};
    now.push_back(::stat(path.c_str(), &st) == 0 ? st.st_mtim.tv_sec * 1'000'000'000 + st.st_mtim.tv_nsec : 0);
  }
  const bool changed = !seen_.empty() && now != seen_;
  seen_ = std::move(now);
  return changed;
}

void Zygote::launch() {
  stale_ = false;
  files_changed();
  // The old one still owes answers to forks, and news of its workers: without those a fork would wait for ever, and who crashed would
  // stay unknown. It ends when its socket closes.
  if (now_) replaced_.push_back(std::exchange(now_, nullptr));
  forget_idle();
  auto pair = seqpacket_pair();
  if (!pair) return restart_later(false, pair.error().doing);

  // Started by descriptor, everything else close-on-exec, its control socket as descriptor 3.
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawnattr_init(&attributes);
  ::posix_spawn_file_actions_adddup2(&actions, pair->second.get(), 3);
  sigset_t none, all;
  ::sigemptyset(&none);
  ::sigfillset(&all);
  ::posix_spawnattr_setsigmask(&attributes, &none);
  ::posix_spawnattr_setsigdefault(&attributes, &all);
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  const std::string path = "/proc/self/fd/" + std::to_string(program_.fd.get());
  std::string name = program_.name + ": zygote";
  char* argv[] = {name.data(), nullptr};
  // Nothing of our environment matters to them; a user's session must not see the broker's.
  std::string locale = "LC_ALL=C.UTF-8", search = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
  std::string title_room = "POSTERN_TITLE=" + std::string(64, '.');  // base/process_title.h; must come first
  std::vector<char*> environment{title_room.data(), locale.data(), search.data()};
  std::string sanitizer;
  if (const char* options = std::getenv("ASAN_OPTIONS")) {
    sanitizer = std::string{"ASAN_OPTIONS="} + options;
    environment.push_back(sanitizer.data());
  }
  environment.push_back(nullptr);
  pid_t pid = -1;
  // When the socket's own number is 3, adddup2 onto itself only clears close-on-exec (glibc >= 2.29), which is what we want.
  rlimit own_files{};
  const bool limited = child_files_ && ::getrlimit(RLIMIT_NOFILE, &own_files) == 0 && ::setrlimit(RLIMIT_NOFILE, &*child_files_) == 0;
  const int error = ::posix_spawn(&pid, path.c_str(), &actions, &attributes, argv, environment.data());
  if (limited) ::setrlimit(RLIMIT_NOFILE, &own_files);
  ::posix_spawn_file_actions_destroy(&actions);
  ::posix_spawnattr_destroy(&attributes);
  if (error != 0) return restart_later(false, system_error("start " + program_.name, error).doing);
  now_ = std::make_shared<Process>();
  now_->pid = pid;
  now_->socket = std::make_unique<LocalSocket>(io_.get_executor(), std::move(pair->first), protocol_.version, 64 * 1024);
  const std::weak_ptr<Process> weak = now_;
  now_->socket->start(
      [this, weak](Message m) {
        if (const auto process = weak.lock()) on_message(process, std::move(m));
      },
      [this, weak](const std::string& why) {
        if (const auto process = weak.lock()) lost(process, why);
      });
  now_->socket->send_bytes(protocol_.hello, hello_);
  timer_.expires_after(start_timeout);
  timer_.async_wait([this, weak](boost::system::error_code ec) {
    const auto process = weak.lock();
    if (ec || !process || process != now_ || process->ready) return;
    ::kill(process->pid, SIGKILL);
    lost(process, "it was not ready in time");
  });
}

void Zygote::forget_idle() {
  std::erase_if(replaced_, [](const auto& p) { return p->asked.empty() && p->workers.empty(); });
  while (replaced_.size() > most_replaced) lost(std::shared_ptr<Process>{replaced_.front()}, "too many were replaced since");
}

void Zygote::lost(const std::shared_ptr<Process>& process, const std::string& why) {
  const bool current = process == now_;
  const bool was_ready = process->ready;
  if (current) now_ = nullptr;
  std::erase(replaced_, process);
  process->socket.reset();
  // Those that it forked live on; nobody will tell when they end.
  for (auto& [token, forked] : std::exchange(process->asked, {})) forked(Unexpected{Error{EPIPE, program_.name + " zygote: " + why}});
  for (const auto token : std::exchange(process->workers, {})) on_died_(token, 0);
  if (current) restart_later(was_ready, why);
}

void Zygote::restart_later(bool was_ready, const std::string& why) {
  if (ready_) {  // it never came up: start-up fails
    const auto ready = std::exchange(ready_, nullptr);
    return ready(Unexpected{Error{EPIPE, program_.name + " zygote: " + why}});
  }
  spdlog::error("event=zygote_lost program={} why={}", program_.name, safe_quoted(why));
  timer_.expires_after(was_ready ? std::chrono::milliseconds{10} : std::chrono::milliseconds{500});
  timer_.async_wait([this](boost::system::error_code ec) {
    if (!ec && !now_) launch();
  });
}

void Zygote::on_message(const std::shared_ptr<Process>& process, Message message) {
  if (message.type == protocol_.ready && process == now_ && !process->ready) {
    const auto body = message.body<net::ZygoteReady>();
    if (!body || !body->missing.valid()) return lost(process, "it sent a malformed message");
    process->ready = true;
    timer_.cancel();
    if (const auto ready = std::exchange(ready_, nullptr)) ready(std::string{body->missing.get()});
    spdlog::info("event=zygote_ready program={} pid={}", program_.name, process->pid);
    return pump();
  }
  if (message.type == protocol_.forked && process->ready) {
    const auto body = message.body<net::Forked>();
    if (!body) return lost(process, "it sent a malformed message");
    const auto it = process->asked.find(body->token);
    if (it == process->asked.end()) return lost(process, "it answered what was not asked");
    const auto forked = std::move(it->second);
    process->asked.erase(it);
    if (body->error == 0) process->workers.insert(body->token);
    if (body->error != 0 || message.fds.size() != 1) {
      forked(Unexpected{system_error("fork " + program_.name, body->error != 0 ? body->error : EMFILE)});
    } else if (const auto pid = pid_of(message.fds[0].get()); !pid || (*pid != body->pid && *pid != -1)) {
      forked(Unexpected{Error{EBADMSG, "fork " + program_.name + ": not a pidfd of that process"}});
    } else {
      forked(Child{body->pid, std::move(message.fds[0])});
    }
    forget_idle();
    return pump();
  }
  if (message.type == protocol_.died && process->ready) {
    const auto body = message.body<net::WorkerDied>();
    if (!body) return lost(process, "it sent a malformed message");
    if (process->workers.erase(body->token) == 0) return;  // one that we were not given (no pidfd to be had)
    on_died_(body->token, body->wait_status);
    return forget_idle();
  }
  lost(process, "it sent a message out of order");
}

std::uint64_t Zygote::fork(UniqueFd socket, OnForked forked) {
  const std::uint64_t token = next_token_++;
  waiting_.push_back({token, std::move(socket), std::move(forked)});
  if (now_ && now_->ready && (stale_ || files_changed())) {
    spdlog::info("event=zygote_replaced program={} pid={}", program_.name, now_->pid);
    launch();
  }
  pump();
  return token;
}

bool Zygote::replace_after_crash() {
  const auto now = std::chrono::steady_clock::now();
  if (last_replacement_ != std::chrono::steady_clock::time_point{} && now - last_replacement_ < replace_interval) return false;
  last_replacement_ = now;
  stale_ = true;
  return true;
}

void Zygote::pump() {
  // The rest waits here and not in its socket: a burst would fill that, and look like a zygote that does not read.
  while (now_ && now_->ready && !waiting_.empty() && now_->asked.size() < most_asked) {
    Waiting w = std::move(waiting_.front());
    waiting_.pop_front();
    now_->asked.emplace(w.token, std::move(w.forked));
    std::vector<UniqueFd> fds;
    fds.push_back(std::move(w.socket));
    now_->socket->send(protocol_.fork, net::ForkWorker{w.token}, std::move(fds));
  }
}

}  // namespace postern::sshd::broker
