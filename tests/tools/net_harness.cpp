// net_harness: stands in for posternd and postern-session, so that real SSH clients can be tried against postern-net alone.
//
// Makes a host key, starts postern-net as its zygote, listens on 127.0.0.1, gives every connection to a worker, answers its
// signatures and logins, and runs /bin/sh -c for its channels as the calling user. For tests only: it lets everybody in.
// Ends when its standard input does, or at SIGTERM. Prints one JSON line when it serves, then one for each event.
//
// User names that mean something: denied, slow (verdict after 300 ms), banner, kick (disconnected when its command says so),
// full (no session is granted), silent (no verdict at all), broken (the session's socket closes).
#include "base/poller.h"
#include "base/seqpacket.h"
#include "sshd/net/libssh_ext.h"
#include "sshd/protocol/channel.h"
#include "sshd/protocol/net.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <pty.h>
#include <signal.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

using namespace postern;
namespace net = postern::sshd::net;
namespace chan = postern::sshd::channel;
using nlohmann::json;

namespace {

volatile sig_atomic_t told_to_end = 0;

[[noreturn]] void die(const std::string& what) {
  std::cerr << "net_harness: " << what << ": " << std::strerror(errno) << "\n";
  std::exit(1);
}
void tell(const json& event) { std::cout << event.dump(-1, ' ', false, json::error_handler_t::replace) << std::endl; }

template <class Type, class Body>
void send_to(int socket, std::uint16_t version, Type type, const Body& body, std::vector<int> fds = {}) {
  for (;;) {
    auto sent = send_body(socket, version, static_cast<std::uint16_t>(type), body, {}, fds);
    if (sent || sent.error().code != EAGAIN) return;
    pollfd polled{socket, POLLOUT, 0};
    ::poll(&polled, 1, 1000);
  }
}

struct Options {
  std::string program;
  std::uint32_t login_grace_ms = 10'000;
  std::uint32_t attempts = 6;
};

struct Channel {
  UniqueFd leader, follower, pidfd;
  pid_t pid = 0;
  bool pty = false;
  std::string term, modes;
  std::vector<std::string> env;
};

class Harness;

class Client {
 public:
  Client(Harness& harness, std::uint64_t token, UniqueFd broker) : harness_{harness}, token_{token}, broker_{std::move(broker)} {}
  ~Client();
  void forked(UniqueFd pidfd, pid_t pid) {
    pidfd_ = std::move(pidfd);
    pid_ = pid;
  }
  void serve(UniqueFd socket, const Options& options);
  void end();

 private:
  void on_broker();
  void on_session();
  void login(const net::AskLogin& ask);
  void verdict(bool accepted, const std::string& text);
  void on_channel(Message& message);
  void start(std::uint32_t number, chan::StartKind kind, std::string command);
  void child_ended(std::uint32_t number);
  net::Signature sign(const Message& message) const;

  Harness& harness_;
  std::uint64_t token_;
  UniqueFd broker_, session_, pidfd_;
  pid_t pid_ = 0;
  std::string user_;
  std::map<std::uint32_t, Channel> channels_;
};

class Harness {
 public:
  explicit Harness(Options given) : options{std::move(given)}, key{make_key()} {}
  void run();

  Options options;
  net::ext::LocalKey key;
  Poller poller;
  std::map<std::uint64_t, std::unique_ptr<Client>> clients;
  std::set<std::uint64_t> ended;

 private:
  static net::ext::LocalKey make_key() {
    auto made = net::ext::LocalKey::generate();
    if (!made) die(made.error().doing);
    return std::move(*made);
  }
  void start_net();
  void on_control();
  void on_accept();

  UniqueFd control_, listener_;
  std::uint64_t next_token_ = 1;
  std::map<std::uint64_t, UniqueFd> waiting_;  // accepted sockets, until their worker is forked
  pid_t zygote_ = 0;
  char root_[32] = "/tmp/net-harness.XXXXXX";
};

Client::~Client() {
  for (auto* fd : {&broker_, &session_})
    if (*fd) harness_.poller.forget(fd->get());
  for (auto& [number, channel] : channels_) {
    if (channel.pidfd) harness_.poller.forget(channel.pidfd.get());
    if (channel.pid > 0) {
      ::kill(-channel.pid, SIGHUP);
      ::kill(-channel.pid, SIGKILL);
      ::waitpid(channel.pid, nullptr, 0);
    }
  }
}

void Client::end() { harness_.ended.insert(token_); }

void Client::serve(UniqueFd socket, const Options& options) {
  net::Serve body;
  body.login_grace_ms = options.login_grace_ms;
  body.max_auth_attempts = options.attempts;
  static_cast<void>(body.peer_address.set("127.0.0.1"));
  send_to(broker_.get(), net::version, net::Type::serve, body, {socket.get()});
  harness_.poller.watch(broker_.get(), POLLIN, [this](short) { on_broker(); });
}

net::Signature Client::sign(const Message& message) const {
  net::Signature result;
  const auto ask = message.body<net::AskSign>();
  if (ask) static_cast<void>(result.blob.set(harness_.key.sign(ask->digest, ask->data.get())));
  tell({{"event", "sign"}, {"bytes", ask ? ask->data.get().size() : 0}});
  return result;
}

void Client::on_broker() {
  auto message = receive_message(broker_.get());
  if (!message && message.error().code == EAGAIN) return;
  if (!message || !*message) return end();
  switch (static_cast<net::Type>((*message)->type)) {
    case net::Type::ask_sign: return send_to(broker_.get(), net::version, net::Type::signature, sign(**message));
    case net::Type::ask_login:
      if (auto ask = (*message)->body<net::AskLogin>()) return login(*ask);
      return end();
    case net::Type::note:
      if (auto note = (*message)->body<net::Note>()) tell({{"event", "note"}, {"text", note->text.get()}});
      return;
    default: return end();
  }
}

void Client::login(const net::AskLogin& ask) {
  user_ = ask.ssh_user.get();
  tell({{"event", "login"}, {"user", user_}, {"method", static_cast<int>(ask.method)}, {"client", ask.client_version.get()}, {"worker", pid_}});
  if (user_ == "silent") return;
  if (user_ == "denied") return verdict(false, "harness: access denied: you may not log in here as \"denied\".");
  if (user_ == "slow") {
    harness_.poller.after(std::chrono::milliseconds{300}, [this] { verdict(true, ""); });
    return;
  }
  verdict(true, user_ == "banner" ? "harness: welcome" : "");
}

void Client::verdict(bool accepted, const std::string& text) {
  net::Verdict body;
  body.accepted = accepted ? 1 : 0;
  static_cast<void>(body.text.set(text));
  if (!accepted) {
    send_to(broker_.get(), net::version, net::Type::verdict, body);
    harness_.poller.forget(broker_.get());
    broker_.reset();
    return;
  }
  auto pair = seqpacket_pair(chan::max_message);
  if (!pair) die(pair.error().doing);
  send_to(broker_.get(), net::version, net::Type::verdict, body, {pair->second.get()});
  harness_.poller.forget(broker_.get());
  broker_.reset();
  session_ = std::move(pair->first);
  harness_.poller.watch(session_.get(), POLLIN, [this](short) { on_session(); });
}

void Client::on_session() {
  for (int i = 0; i < 16; i++) {
    auto message = receive_message(session_.get(), chan::max_message);
    if (!message && message.error().code == EAGAIN) return;
    if (!message || !*message) {
      tell({{"event", "gone"}, {"user", user_}});
      harness_.poller.forget(session_.get());
      return end();
    }
    on_channel(**message);
  }
}

void Client::on_channel(Message& message) {
  using chan::Type;
  const auto answer = [&](std::uint32_t number, bool yes) {
    chan::Answer body;
    body.channel = number;
    send_to(session_.get(), chan::version, yes ? Type::answer_ok : Type::answer_no, body);
  };
  switch (static_cast<Type>(message.type)) {
    case Type::open: {
      const auto number = message.body<chan::ChannelRef>()->channel;
      if (user_ == "broken") {
        harness_.poller.forget(session_.get());
        session_.reset();
        return;
      }
      if (user_ == "full") return answer(number, false);
      channels_[number];
      return answer(number, true);
    }
    case Type::pty: {
      const auto pty = message.body<chan::Pty>();
      Channel& channel = channels_.at(pty->channel);
      int leader, follower;
      winsize size{static_cast<unsigned short>(pty->rows), static_cast<unsigned short>(pty->cols), static_cast<unsigned short>(pty->xpixels),
                   static_cast<unsigned short>(pty->ypixels)};
      if (::openpty(&leader, &follower, nullptr, nullptr, &size) != 0) return answer(pty->channel, false);
      channel.leader = UniqueFd{leader};
      channel.follower = UniqueFd{follower};
      for (const int fd : {leader, follower}) ::fcntl(fd, F_SETFD, FD_CLOEXEC);
      channel.pty = true;
      channel.term = pty->term.get();
      channel.modes.clear();
      for (const char c : pty->modes.get()) {
        char hex[3];
        std::snprintf(hex, sizeof hex, "%02x", static_cast<unsigned char>(c));
        channel.modes += hex;
      }
      return answer(pty->channel, true);
    }
    case Type::env: {
      const auto [env, tail] = *message.body_and_tail<chan::Env>();
      const std::string name{tail.substr(0, env.name_length)};
      const bool yes = name.starts_with("LC_") || name.starts_with("TEST_");
      if (yes) channels_.at(env.channel).env.push_back(name + "=" + std::string{tail.substr(env.name_length)});
      return answer(env.channel, yes);
    }
    case Type::start: {
      const auto [body, tail] = *message.body_and_tail<chan::Start>();
      if (body.kind == chan::StartKind::subsystem && tail != "sftp") return answer(body.channel, false);
      return start(body.channel, body.kind, std::string{tail});
    }
    case Type::window_change: {
      const auto change = message.body<chan::WindowChange>();
      const auto it = channels_.find(change->channel);
      if (it == channels_.end()) return;
      winsize size{static_cast<unsigned short>(change->rows), static_cast<unsigned short>(change->cols), 0, 0};
      if (it->second.leader) ::ioctl(it->second.leader.get(), TIOCSWINSZ, &size);
      return;
    }
    case Type::signal:
    case Type::ask_signal: {
      const auto body = message.body<chan::Signal>();
      const auto it = channels_.find(body->channel);
      const auto name = body->name.get();
      tell({{"event", "signal"}, {"name", name}});
      if (it != channels_.end() && it->second.pid > 0) ::kill(-it->second.pid, name == "USR1" ? SIGUSR1 : name == "INT" ? SIGINT : SIGTERM);
      if (static_cast<Type>(message.type) == Type::ask_signal) answer(body->channel, it != channels_.end() && it->second.pid > 0);
      return;
    }
    case Type::send_break: {
      const auto number = message.body<chan::ChannelRef>()->channel;
      tell({{"event", "break"}});
      const auto it = channels_.find(number);
      if (it != channels_.end() && it->second.pid > 0) ::kill(-it->second.pid, SIGINT);
      return answer(number, true);
    }
    case Type::closed:
    case Type::closed_after_eof:
    case Type::ended: {
      const auto number = message.body<chan::ChannelRef>()->channel;
      tell({{"event", "closed"}, {"channel", number}});
      if (const auto it = channels_.find(number); it != channels_.end()) {
        if (it->second.pid > 0)
          ::kill(-it->second.pid, SIGHUP);
        else
          channels_.erase(it);
      }
      return;
    }
    case Type::forward_connect: {  // to user "echo" what is connected to echoes; to all others nothing is allowed
      const auto target = *message.body<chan::ForwardTarget>();
      tell({{"event", "connect"}, {"target", target.target.get()}, {"port", target.port}});
      int ends[2];
      if (user_ == "echo" && ::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0) {
        send_to(session_.get(), chan::version, Type::forward_ready, chan::ForwardReady{target.number}, {ends[0]});
        ::close(ends[0]);
        ::fcntl(ends[1], F_SETFL, O_RDWR);
        std::thread{[fd = ends[1]] {
          char buffer[65536];
          for (ssize_t n; (n = ::read(fd, buffer, sizeof buffer)) > 0;)
            for (ssize_t done = 0, part; done < n; done += part)
              if ((part = ::write(fd, buffer + done, static_cast<std::size_t>(n - done))) < 0) break;
          ::close(fd);
        }}.detach();
        return;
      }
      chan::ForwardFailed failed{target.number, 1, {}};
      static_cast<void>(failed.text.set("forwarding is not allowed here"));
      return send_to(session_.get(), chan::version, Type::forward_failed, failed);
    }
    case Type::forward_listen:
    case Type::forward_cancel: {
      const auto target = *message.body<chan::ForwardTarget>();
      return send_to(session_.get(), chan::version, Type::forward_listening, chan::ForwardListening{target.number, user_ == "echo" ? 1u : 0u, 4242});
    }
    case Type::forward_closed: {
      const auto closed = *message.body<chan::ForwardClosed>();
      return tell({{"event", "forward_closed"}, {"from_client", closed.from_client}, {"to_client", closed.to_client}});
    }
    case Type::agent: return answer(message.body<chan::ChannelRef>()->channel, false);
    case Type::x11: return answer(message.body<chan::X11>()->channel, false);
    case Type::ask_sign: return send_to(session_.get(), chan::version, Type::signature, sign(message));
    default: return end();
  }
}

void Client::start(std::uint32_t number, chan::StartKind kind, std::string command) {
  Channel& channel = channels_.at(number);
  int in[2], out[2], err[2];
  if (!channel.pty) {
    if (::pipe2(in, O_CLOEXEC) != 0 || ::pipe2(out, O_CLOEXEC) != 0 || ::pipe2(err, O_CLOEXEC) != 0) die("pipe");
    for (const int fd : {in[1], out[0], err[0]}) ::fcntl(fd, F_SETFL, O_NONBLOCK);
    for (const int fd : {in[1], out[0]}) ::fcntl(fd, F_SETPIPE_SZ, 1 << 20);
  }
  if (user_ == "kick") {
    chan::Disconnect body;
    static_cast<void>(body.text.set("Access revoked."));
    harness_.poller.after(std::chrono::milliseconds{300}, [this, body] { send_to(session_.get(), chan::version, chan::Type::disconnect, body); });
  }
  int begun[2];
  if (::pipe2(begun, O_CLOEXEC) != 0) die("pipe");
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::setsid();
    for (const int sig : {SIGPIPE, SIGINT, SIGTERM, SIGHUP}) ::signal(sig, SIG_DFL);
    if (channel.pty) {
      const int fd = channel.follower.get();
      ::ioctl(fd, TIOCSCTTY, 0);
      for (int i = 0; i < 3; i++) ::dup2(fd, i);
      ::setenv("TERM", channel.term.c_str(), 1);
      ::setenv("PTY_MODES", channel.modes.c_str(), 1);
    } else {
      ::dup2(in[0], 0);
      ::dup2(out[1], 1);
      ::dup2(err[1], 2);
    }
    for (const auto& entry : channel.env) ::putenv(const_cast<char*>(entry.c_str()));
    if (kind == chan::StartKind::subsystem) ::execl("/usr/lib/openssh/sftp-server", "sftp-server", nullptr);
    if (kind == chan::StartKind::exec) ::execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    if (kind == chan::StartKind::shell) ::execl("/bin/sh", "-sh", nullptr);
    ::_exit(127);
  }
  // Not before exec: who kills the group of a child that has none yet kills nobody, and ~Client waited for a "sleep 100".
  ::close(begun[1]);
  char none = 0;
  while (::read(begun[0], &none, 1) < 0 && errno == EINTR) {
  }
  ::close(begun[0]);
  channel.pid = pid;
  channel.pidfd = UniqueFd{static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))};
  harness_.poller.watch(channel.pidfd.get(), POLLIN, [this, number](short) { child_ended(number); });
  chan::Started body;
  body.channel = number;
  if (channel.pty) {
    channel.follower.reset();
    ::fcntl(channel.leader.get(), F_SETFL, O_NONBLOCK);
    body.combined = body.pty = 1;
    send_to(session_.get(), chan::version, chan::Type::started, body, {channel.leader.get()});
    return;
  }
  body.input = body.output = body.error = 1;
  send_to(session_.get(), chan::version, chan::Type::started, body, {in[1], out[0], err[0]});
  for (const int fd : {in[0], in[1], out[0], out[1], err[0], err[1]}) ::close(fd);
}

void Client::child_ended(std::uint32_t number) {
  auto& channel = channels_.at(number);
  int status = 0;
  if (::waitpid(channel.pid, &status, WNOHANG) != channel.pid) return;
  chan::Exited body;
  body.channel = number;
  if (WIFSIGNALED(status)) {
    body.by_signal = 1;
    const char* name = ::sigabbrev_np(WTERMSIG(status));
    static_cast<void>(body.name.set(name != nullptr ? name : "KILL"));
    body.core = WCOREDUMP(status) ? 1 : 0;
  } else {
    body.status = static_cast<std::uint32_t>(WEXITSTATUS(status));
  }
  body.close_now = channel.pty ? 1 : 0;
  harness_.poller.forget(channel.pidfd.get());
  channels_.erase(number);
  if (session_) send_to(session_.get(), chan::version, chan::Type::exited, body);
}

void Harness::start_net() {
  auto pair = seqpacket_pair();
  if (!pair) die(pair.error().doing);
  if (::mkdtemp(root_) == nullptr || ::chmod(root_, 0555) != 0) die("make the empty root");
  zygote_ = ::fork();
  if (zygote_ == 0) {
    ::dup2(pair->second.get(), 3);
    ::fcntl(3, F_SETFD, 0);
    ::execl(options.program.c_str(), "postern-net", nullptr);
    ::_exit(127);
  }
  control_ = std::move(pair->first);
  pair->second.reset();
  net::ZygoteHello hello;
  hello.as_root = ::geteuid() == 0 ? 1 : 0;
  hello.uid = hello.gid = 65534;
  hello.key_count = 1;
  static_cast<void>(hello.keys[0].blob.set(key.public_blob()));
  static_cast<void>(hello.version_string.set("Postern_test"));
  static_cast<void>(hello.empty_root.set(root_));
  static_cast<void>(hello.log_level.set("info"));
  send_to(control_.get(), net::version, net::Type::zygote_hello, hello);
  pollfd polled{control_.get(), POLLIN, 0};
  ::poll(&polled, 1, 30'000);
  auto message = receive_message(control_.get());
  const auto ready = message && *message && (*message)->type == static_cast<std::uint16_t>(net::Type::zygote_ready)
                         ? (*message)->body<net::ZygoteReady>()
                         : std::nullopt;
  if (!ready) die("postern-net does not start");

  listener_ = UniqueFd{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  if (::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), length) != 0 || ::listen(listener_.get(), 128) != 0 ||
      ::getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&address), &length) != 0)
    die("listen");
  tell({{"port", ntohs(address.sin_port)}, {"zygote", zygote_}, {"missing", ready->missing.get()}, {"root", root_}});
}

void Harness::on_accept() {
  UniqueFd socket{::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC)};
  if (!socket) return;
  auto pair = seqpacket_pair();
  if (!pair) die(pair.error().doing);
  const std::uint64_t token = next_token_++;
  net::ForkWorker body;
  body.token = token;
  send_to(control_.get(), net::version, net::Type::fork_worker, body, {pair->second.get()});
  clients.emplace(token, std::make_unique<Client>(*this, token, std::move(pair->first)));
  clients[token]->serve(std::move(socket), options);
}

void Harness::on_control() {
  for (;;) {
    auto message = receive_message(control_.get());
    if (!message && message.error().code == EAGAIN) return;
    if (!message || !*message) {
      tell({{"event", "zygote_gone"}});
      poller.stop();
      return;
    }
    if ((*message)->type == static_cast<std::uint16_t>(net::Type::forked)) {
      const auto forked = (*message)->body<net::Forked>();
      if (forked->error != 0) die("the zygote could not fork");
      tell({{"event", "forked"}, {"worker", forked->pid}});
      if (const auto it = clients.find(forked->token); it != clients.end() && (*message)->fds.size() == 1)
        it->second->forked(std::move((*message)->fds.front()), forked->pid);
    } else if ((*message)->type == static_cast<std::uint16_t>(net::Type::worker_died)) {
      const auto died = (*message)->body<net::WorkerDied>();
      tell({{"event", "died"}, {"worker", died->pid}, {"status", died->wait_status}});
    }
  }
}

void Harness::run() {
  start_net();
  poller.watch(control_.get(), POLLIN, [this](short) { on_control(); });
  poller.watch(listener_.get(), POLLIN, [this](short) { on_accept(); });
  poller.watch(0, POLLIN, [this](short) { poller.stop(); });
  while (!poller.stopped() && told_to_end == 0) {
    poller.run_once();
    for (const auto token : ended) clients.erase(token);
    ended.clear();
  }
  clients.clear();
  control_.reset();  // the zygote ends
  ::waitpid(zygote_, nullptr, 0);
  ::rmdir(root_);
}

}  // namespace

int main(int argc, char* argv[]) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--net") options.program = value;
    if (name == "--login-grace") options.login_grace_ms = static_cast<std::uint32_t>(std::stoul(value));
    if (name == "--attempts") options.attempts = static_cast<std::uint32_t>(std::stoul(value));
  }
  if (options.program.empty()) {
    std::cerr << "usage: net_harness --net PATH [--login-grace MS] [--attempts N]\n";
    return 2;
  }
  ::signal(SIGPIPE, SIG_IGN);
  struct sigaction action {};
  action.sa_handler = [](int) { told_to_end = 1; };  // without SA_RESTART: ppoll returns
  ::sigaction(SIGTERM, &action, nullptr);
  ::ssh_init();
  Harness{std::move(options)}.run();
  return 0;
}
