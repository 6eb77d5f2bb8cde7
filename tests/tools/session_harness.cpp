#include "tests/tools/session_harness.h"

#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>

#ifndef POSTERN_BIN_DIR
#define POSTERN_BIN_DIR "build/dev/bin"
#endif

namespace postern::test {
namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void stop_test(const std::string& what) { throw std::runtime_error{what}; }

void keep_or_throw(bool ok, const char* what) {
  if (!ok) stop_test(std::string{what} + ": " + std::strerror(errno));
}

int run_program(const std::vector<std::string>& words) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    const int null = ::open("/dev/null", O_RDWR);
    ::dup2(null, 1);
    ::dup2(null, 2);
    std::vector<char*> argv;
    for (const auto& w : words) argv.push_back(const_cast<char*>(w.c_str()));
    argv.push_back(nullptr);
    ::execvp(argv[0], argv.data());
    ::_exit(127);
  }
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

bool wait_readable(int fd, Clock::time_point until) {
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
    if (left <= 0) return false;
    pollfd p{fd, POLLIN, 0};
    const int n = ::poll(&p, 1, static_cast<int>(left));
    if (n > 0) return true;
    if (n < 0 && errno != EINTR) return false;
  }
}

}  // namespace

bool eventually(const std::function<bool()>& what, std::chrono::milliseconds limit) {
  const auto until = Clock::now() + limit;
  while (!what()) {
    if (Clock::now() > until) return false;
    std::this_thread::sleep_for(10ms);
  }
  return true;
}

bool is_root() { return ::geteuid() == 0; }

bool is_gone(pid_t pid) {
  std::ifstream stat{"/proc/" + std::to_string(pid) + "/stat"};
  const std::string text{std::istreambuf_iterator<char>{stat}, {}};
  const auto close = text.rfind(')');
  return close == std::string::npos || close + 2 >= text.size() || text[close + 2] == 'Z' || text[close + 2] == 'X';
}

std::string read_whole(const std::string& path) {
  std::ifstream in{path};
  return {std::istreambuf_iterator<char>{in}, {}};
}

TemporaryFolder::TemporaryFolder() {
  char name[] = "/tmp/postern-test-XXXXXX";
  keep_or_throw(::mkdtemp(name) != nullptr, "mkdtemp");
  path = name;
  ::chmod(name, 0755);
}
TemporaryFolder::~TemporaryFolder() {
  ::nftw(
      path.c_str(), [](const char* p, const struct stat*, int, FTW*) { return ::remove(p); }, 16, FTW_DEPTH | FTW_PHYS);
}

TestUser::TestUser() {
  if (is_root()) {
    name = "pt" + Id::random().text().substr(0, 10);
    // Tests that run side by side wait for each other's lock of /etc/passwd.
    made_ = eventually([this] { return run_program({"useradd", "-m", "-s", "/bin/bash", "-G", "users", name}) == 0; }, 20s);
    if (!made_) stop_test("useradd failed");
  }
  const passwd* p = is_root() ? ::getpwnam(name.c_str()) : ::getpwuid(::getuid());
  if (p == nullptr) stop_test("the test's user has no account");
  name = p->pw_name;
  home = p->pw_dir;
  shell = p->pw_shell;
  uid = p->pw_uid;
  gid = p->pw_gid;
}
TestUser::~TestUser() {
  if (made_) eventually([this] { return run_program({"userdel", "-f", "-r", name}) != 10 && ::getpwnam(name.c_str()) == nullptr; }, 20s);
}

// --- relay ----------------------------------------------------------------------------------------------------------------------

StandInRelay::StandInRelay(std::string path) : path_{std::move(path)} { start(); }
StandInRelay::~StandInRelay() { stop(); }

void StandInRelay::start() {
  ::unlink(path_.c_str());
  listener_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un a{};
  a.sun_family = AF_UNIX;
  std::strncpy(a.sun_path, path_.c_str(), sizeof a.sun_path - 1);
  keep_or_throw(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&a), sizeof a) == 0 && ::listen(listener_.get(), 64) == 0, "relay");
  ::chmod(path_.c_str(), 0666);
  stop_ = false;
  thread_ = std::thread{[this] { serve(); }};
}

void StandInRelay::stop() {
  stop_ = true;
  if (thread_.joinable()) thread_.join();
  listener_.reset();
  ::unlink(path_.c_str());
}

std::string StandInRelay::bytes() const {
  const std::lock_guard lock{mutex_};
  return recordings_.empty() ? std::string{} : recordings_.back().bytes;
}
bool StandInRelay::ended() const {
  const std::lock_guard lock{mutex_};
  return !recordings_.empty() && recordings_.back().ended;
}
std::size_t StandInRelay::recordings() const {
  const std::lock_guard lock{mutex_};
  return recordings_.size();
}

void StandInRelay::serve() {
  namespace local = recorder::wire::local;
  using recorder::wire::RecorderState;
  struct Peer {
    UniqueFd fd;
    local::FrameReader reader;
    std::size_t recording = 0;
    bool opened = false;
    bool told_ended = false;
    local::Acks told;
    RecorderState state = RecorderState::searching;
  };
  std::vector<std::unique_ptr<Peer>> peers;
  const auto tell = [](Peer& p, const std::string& bytes) {
    std::string_view rest = bytes;
    while (!rest.empty()) {
      const ssize_t n = ::send(p.fd.get(), rest.data(), rest.size(), MSG_NOSIGNAL);
      if (n <= 0) return;
      rest.remove_prefix(static_cast<std::size_t>(n));
    }
  };
  while (!stop_) {
    std::vector<pollfd> polled{{listener_.get(), POLLIN, 0}};
    for (const auto& p : peers) polled.push_back({p->fd.get(), POLLIN, 0});
    ::poll(polled.data(), polled.size(), 5);
    for (;;) {
      UniqueFd fd{::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC)};
      if (!fd) break;
      auto p = std::make_unique<Peer>();
      p->fd = std::move(fd);
      peers.push_back(std::move(p));
    }
    std::erase_if(peers, [&](const std::unique_ptr<Peer>& pointer) {
      Peer& p = *pointer;
      for (;;) {
        const auto space = p.reader.space();
        const ssize_t n = ::recv(p.fd.get(), space.data(), space.size(), MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN) break;
        if (n <= 0) return true;
        p.reader.filled(static_cast<std::size_t>(n));
        while (const auto f = p.reader.next()) {
          const std::lock_guard lock{mutex_};
          if (f->type == local::Type::open) {
            const auto open = local::parse_open(f->payload);
            if (!open) return true;
            p.recording = recordings_.size();
            for (std::size_t i = 0; i < recordings_.size(); i++)
              if (recordings_[i].id == open->recording.recording) p.recording = i;
            if (p.recording == recordings_.size()) recordings_.push_back({open->recording.recording, {}, false});
            local::Opened o;
            const auto length = recordings_[p.recording].bytes.size();
            o.ended = recordings_[p.recording].ended;
            o.acks = {length, length, commits ? length : 0};
            o.state.state = p.state = commits ? RecorderState::recording : RecorderState::none;
            p.told = o.acks;
            p.opened = true;
            std::string answer;
            local::append(o, answer);
            tell(p, answer);
          } else if (f->type == local::Type::data) {
            const auto d = local::parse_data(f->payload);
            if (!d || d->offset != recordings_[p.recording].bytes.size()) return true;
            if (fails.exchange(false)) {
              std::string answer;
              local::append(local::Type::journal_failed, "no space left", answer);
              tell(p, answer);
              continue;
            }
            recordings_[p.recording].bytes += d->bytes;
          } else if (f->type == local::Type::end) {
            recordings_[p.recording].ended = true;
          }
        }
      }
      if (!p.opened) return false;
      const std::lock_guard lock{mutex_};
      const auto length = recordings_[p.recording].bytes.size();
      local::Acks now = p.told;
      if (writes) now.written = now.journaled = length;
      if (writes && commits) now.committed = length;
      std::string answer;
      const auto state = commits ? RecorderState::recording : RecorderState::none;
      if (state != p.state) {
        p.state = state;
        local::append(local::State{state, commits ? "127.0.2.1:80" : ""}, answer);
      }
      if (now != p.told) {
        p.told = now;
        local::append(now, answer);
      }
      if (writes && recordings_[p.recording].ended && !p.told_ended) {
        p.told_ended = true;
        local::append(local::Type::ended, {}, answer);
      }
      if (!answer.empty()) tell(p, answer);
      return false;
    });
  }
}

// --- harness --------------------------------------------------------------------------------------------------------------------

Harness::Harness() {
  facts.connection_id = Id::random().bytes;
  (void)facts.peer_address.set("192.0.2.1");
  facts.peer_port = 50000;
  (void)facts.server_address.set("192.0.2.2");
  facts.server_port = 2222;
  (void)facts.node_name.set("alice-laptop");
  (void)facts.login.set("alice@example.com");
  (void)facts.rule.set("policy.hujson:12:5");
  (void)facts.relay_socket.set(folder.path + "/relay.sock");
  (void)facts.registration_socket.set(folder.path + "/registration.sock");
  (void)facts.pam_service.set("postern");
  (void)facts.pam_confdir.set(folder.path + "/pam.d");
  (void)facts.sftp_server.set("/usr/lib/openssh/sftp-server");
}

Harness::~Harness() {
  if (session_pid > 0 && broker) revoke("the test is over");  // its programs are to go now, not when they would be hung up
  net.reset();
  broker.reset();
  if (session_pid > 0 && control) session_died(2s);
  if (session_pidfd) ::syscall(SYS_pidfd_send_signal, session_pidfd.get(), SIGKILL, nullptr, 0);
  control.reset();
  for (const pid_t p : {zygote_, net_stand_in}) {
    if (p <= 0) continue;
    ::kill(p, SIGKILL);
    ::waitpid(p, nullptr, 0);
  }
}

std::string Harness::start_zygote() {
  ::mkdir((folder.path + "/pam.d").c_str(), 0755);
  for (const char* service : {"postern", "other"}) std::ofstream{folder.path + "/pam.d/" + service} << pam_service;
  auto pair = seqpacket_pair();
  keep_or_throw(pair.has_value(), "socketpair");
  const char* folder_of_programs = std::getenv("POSTERN_BIN_DIR");
  const std::string program = std::string{folder_of_programs != nullptr ? folder_of_programs : POSTERN_BIN_DIR} + "/postern-session";
  zygote_ = ::fork();
  if (zygote_ == 0) {
    if (std::getenv("POSTERN_TEST_LOG") == nullptr) ::dup2(::open("/dev/null", O_RDWR), 2);
    ::dup2(pair->second.get(), 3);
    if (pair->second.get() == 3) ::fcntl(3, F_SETFD, 0);
    ::syscall(SYS_close_range, 4U, ~0U, 0U);
    ::execl(program.c_str(), "postern-session", nullptr);
    ::_exit(127);
  }
  control = std::move(pair->first);
  ses::ZygoteHello hello;
  hello.as_root = is_root() ? 1 : 0;
  (void)hello.pam_service.set("postern");
  (void)hello.pam_confdir.set(folder.path + "/pam.d");
  (void)hello.log_level.set("debug");
  (void)send_body(control.get(), ses::version, static_cast<std::uint16_t>(ses::Type::zygote_hello), hello);
  const auto m = receive(control.get(), 15s);
  const auto ready = m ? m->body<ses::ZygoteReady>() : std::nullopt;
  if (!ready || m->type != static_cast<std::uint16_t>(ses::Type::zygote_ready)) stop_test("the zygote did not get ready");
  return std::string{ready->warnings.get()};
}

std::optional<Message> Harness::receive(int fd, std::chrono::milliseconds limit) {
  const auto until = Clock::now() + limit;
  while (wait_readable(fd, until)) {
    auto m = receive_message(fd, ch::max_message);
    if (m && *m) return std::move(*m);
    if (m || m.error().code != EAGAIN) {
      std::fprintf(stderr, "harness: the peer of %d is gone: %s\n", fd, m ? "end of file" : m.error().doing.c_str());
      return std::nullopt;
    }
  }
  std::fprintf(stderr, "harness: nothing on %d within its time\n", fd);
  return std::nullopt;
}

ses::User Harness::look_up(const std::string& name) {
  auto pair = seqpacket_pair();
  keep_or_throw(pair.has_value(), "socketpair");
  const int theirs = pair->second.get();
  ses::ForkSession request{++token_};
  (void)send_body(control.get(), ses::version, static_cast<std::uint16_t>(ses::Type::fork_session), request, {}, {&theirs, 1});
  auto m = receive(control.get(), 15s);
  const auto forked = m ? m->body<ses::Forked>() : std::nullopt;
  if (!forked || m->type != static_cast<std::uint16_t>(ses::Type::forked) || m->fds.size() != 1 || forked->token != token_)
    stop_test("the zygote did not fork");
  session_pid = forked->pid;
  session_pidfd = std::move(m->fds[0]);
  broker = std::move(pair->first);
  ses::Lookup lookup;
  (void)lookup.name.set(name);
  (void)send_body(broker.get(), ses::version, static_cast<std::uint16_t>(ses::Type::lookup), lookup);
  const auto answer = broker_receive();
  const auto user = answer ? answer->body<ses::User>() : std::nullopt;
  if (!user) stop_test("no answer to the lookup");
  return *user;
}

ses::Ready Harness::grant() {
  if (net_stand_in == 0) {
    net_stand_in = ::fork();
    if (net_stand_in == 0) {
      ::syscall(SYS_close_range, 3U, ~0U, 0U);
      for (;;) ::pause();
    }
  }
  const UniqueFd net_pidfd{static_cast<int>(::syscall(SYS_pidfd_open, net_stand_in, 0))};
  auto pair = seqpacket_pair(ch::max_message);
  auto memfd = sshd::seal_facts(facts);
  keep_or_throw(pair.has_value() && memfd.has_value() && net_pidfd, "prepare the grant");
  net = std::move(pair->first);
  const int fds[3] = {memfd->get(), pair->second.get(), net_pidfd.get()};
  (void)send_body(broker.get(), ses::version, static_cast<std::uint16_t>(ses::Type::grant), ses::Grant{}, {}, fds);
  const auto answer = broker_receive();
  const auto ready = answer ? answer->body<ses::Ready>() : std::nullopt;
  if (!ready || answer->type != static_cast<std::uint16_t>(ses::Type::ready)) stop_test("no answer to the grant");
  return *ready;
}

void Harness::log_in(const TestUser& user) {
  if (zygote_ == 0) start_zygote();
  const auto found = look_up(user.name);
  if (found.found != 1 || found.uid != user.uid) stop_test("the account was not found");
  (void)facts.local_user.set(user.name);
  (void)facts.ssh_user.set(user.name);
  facts.uid = user.uid;
  const auto ready = grant();
  if (ready.ok != 1) stop_test("the account was refused: " + std::string{ready.text.get()});
}

std::optional<Message> Harness::net_receive(std::chrono::milliseconds limit) { return receive(net.get(), limit); }

bool Harness::open(std::uint32_t channel) {
  net_send(ch::Type::open, ch::ChannelRef{channel});
  const auto m = net_receive();
  return m && m->type == static_cast<std::uint16_t>(ch::Type::answer_ok);
}

bool Harness::pty(std::uint32_t channel, std::string_view modes, unsigned cols, unsigned rows) {
  ch::Pty p;
  p.channel = channel;
  p.cols = cols;
  p.rows = rows;
  (void)p.term.set("xterm-256color");
  (void)p.modes.set(modes);
  net_send(ch::Type::pty, p);
  const auto m = net_receive();
  return m && m->type == static_cast<std::uint16_t>(ch::Type::answer_ok);
}

bool Harness::env(std::uint32_t channel, std::string_view name, std::string_view value) {
  net_send(ch::Type::env, ch::Env{channel, static_cast<std::uint32_t>(name.size())}, std::string{name} + std::string{value});
  const auto m = net_receive();
  return m && m->type == static_cast<std::uint16_t>(ch::Type::answer_ok);
}

std::optional<Running> Harness::start(std::uint32_t channel, ch::StartKind kind, std::string_view text) {
  net_send(ch::Type::start, ch::Start{channel, kind}, text);
  auto m = net_receive();
  if (!m || m->type != static_cast<std::uint16_t>(ch::Type::started)) return std::nullopt;
  const auto body = m->body<ch::Started>();
  if (!body || body->channel != channel) return std::nullopt;
  Running r;
  r.started = *body;
  std::size_t i = 0;
  const auto take = [&](std::uint8_t flag, UniqueFd& to) {
    if (flag != 0 && i < m->fds.size()) to = std::move(m->fds[i++]);
  };
  take(body->combined, r.combined);
  take(body->input, r.input);
  take(body->output, r.output);
  take(body->error, r.error);
  if (i != m->fds.size()) stop_test("more descriptors than flags");
  return r;
}

void Harness::close_channel(std::uint32_t channel) { net_send(ch::Type::closed, ch::ChannelRef{channel}); }

std::optional<ch::Exited> Harness::exited(std::chrono::milliseconds limit) {
  const auto until = Clock::now() + limit;
  while (Clock::now() < until) {
    const auto m = net_receive(std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()));
    if (!m) return std::nullopt;
    if (m->type == static_cast<std::uint16_t>(ch::Type::exited)) return m->body<ch::Exited>();
  }
  return std::nullopt;
}

std::optional<Message> Harness::broker_receive(std::chrono::milliseconds limit) {
  const auto until = Clock::now() + limit;
  while (Clock::now() < until) {
    auto m = receive(broker.get(), std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()));
    if (!m) return std::nullopt;
    if (m->type == static_cast<std::uint16_t>(ses::Type::event)) {
      const auto e = m->body<ses::Event>();
      if (e) events.push_back(std::string{e->name.get()} + " " + std::string{e->fields.get()});
      continue;
    }
    if (m->type == static_cast<std::uint16_t>(ses::Type::channels)) continue;
    return m;
  }
  return std::nullopt;
}

void Harness::revoke(std::string_view text, std::chrono::milliseconds clear_up) {
  ses::Revoke r;
  r.clear_up_ms = static_cast<std::uint32_t>(clear_up.count());
  (void)r.text.set(text);
  (void)send_body(broker.get(), ses::version, static_cast<std::uint16_t>(ses::Type::revoke), r);
}

std::optional<int> Harness::session_died(std::chrono::milliseconds limit) {
  const auto m = receive(control.get(), limit);
  const auto died = m ? m->body<ses::SessionDied>() : std::nullopt;
  if (!died || m->type != static_cast<std::uint16_t>(ses::Type::session_died)) return std::nullopt;
  session_pid = 0;
  return died->wait_status;
}

std::string read_to_end(int fd, std::chrono::milliseconds limit) {
  std::string all;
  std::vector<char> buffer(256 * 1024);
  const auto until = Clock::now() + limit;
  while (wait_readable(fd, until)) {
    const ssize_t n = ::read(fd, buffer.data(), buffer.size());
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (n <= 0) break;
    all.append(buffer.data(), static_cast<std::size_t>(n));
  }
  return all;
}

std::string read_until(int fd, std::string_view text, std::chrono::milliseconds limit) {
  std::string all;
  char buffer[4096];
  const auto until = Clock::now() + limit;
  while (all.find(text) == std::string::npos && wait_readable(fd, until)) {
    const ssize_t n = ::read(fd, buffer, sizeof buffer);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (n <= 0) break;
    all.append(buffer, static_cast<std::size_t>(n));
  }
  return all;
}

void write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = ::write(fd, text.data(), text.size());
    if (n < 0 && errno == EAGAIN) {
      pollfd p{fd, POLLOUT, 0};
      ::poll(&p, 1, 1000);
      continue;
    }
    if (n <= 0) return;
    text.remove_prefix(static_cast<std::size_t>(n));
  }
}

Outcome run(Harness& h, std::uint32_t channel, std::string_view command, std::string_view input) {
  Outcome o;
  if (!h.open(channel)) stop_test("open was refused");
  auto r = h.start(channel, ch::StartKind::exec, command);
  if (!r) stop_test("start was refused");
  std::thread writer{[&] {
    write_all(r->input.get(), input);
    r->input.reset();
  }};
  std::thread errors{[&] { o.err = read_to_end(r->error.get()); }};
  o.out = read_to_end(r->output.get());
  writer.join();
  errors.join();
  const auto e = h.exited();
  if (!e) stop_test("no exit was told");
  o.exited = *e;
  h.close_channel(channel);
  return o;
}

}  // namespace postern::test
