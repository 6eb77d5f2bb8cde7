#include "sshd/session/forwarding.h"

#include "base/log.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

namespace postern::sshd::session {
namespace {

namespace ch = sshd::channel;
using ch::ForwardKind;

constexpr std::uint32_t largest_number = 65535;  // of net's
constexpr std::uint32_t prohibited = 1, connect_failed = 2, resource_shortage = 4;  // RFC 4254 section 5.1
/// The user may stop (SIGSTOP) a process of the user's: so much longer than its own limit an answer is waited for.
constexpr std::chrono::milliseconds helper_slack{5'000};
constexpr std::chrono::milliseconds helper_end_wait{1'000};
/// One that is killed and does not go (an uninterruptible sleep: NFS) holds up nobody's end.
constexpr std::chrono::milliseconds helper_kill_wait{1'000};

const char* word(ForwardKind kind) {
  switch (kind) {
    case ForwardKind::tcp: return "tcp";
    case ForwardKind::unix_socket: return "unix";
    case ForwardKind::agent: return "agent";
    case ForwardKind::x11: return "x11";
  }
  return "?";
}

std::string name_of(ForwardKind kind, const std::string& target, std::uint16_t port) {
  return std::string{"kind="} + word(kind) + " target=" + safe_quoted(kind == ForwardKind::tcp ? target + ":" + std::to_string(port) : target);
}

bool acceptable(const ch::ForwardTarget& t) {
  return t.target.valid() && t.port <= 65535 && (t.kind == ForwardKind::tcp || (t.kind == ForwardKind::unix_socket && t.port == 0));
}

/// A name that ends where C's functions would not think, and nobody at all: of a listener the client may leave out address and port.
bool has_nul(const ch::ForwardTarget& t) { return t.target.get().find('\0') != std::string_view::npos; }
bool is_nobody(const ch::ForwardTarget& t) { return has_nul(t) || t.target.get().empty() || (t.kind == ForwardKind::tcp && t.port == 0); }

}  // namespace

Forwarding::Forwarding(Host host) : host_{std::move(host)}, helper_{host_.poller, true, [this] { read_helper(); }, [this](UniqueFd fd, bool) { host_.let_go(std::move(fd)); }} {
  const auto& f = host_.facts;
  const auto local = ForwardTargets::decode(f.forwarding.local_targets.get());
  const auto remote = ForwardTargets::decode(f.forwarding.remote_targets.get());
  const bool known = local && remote;
  local_allowed_ = known && f.forwarding.local != 0;
  remote_allowed_ = known && f.forwarding.remote != 0;
  agent_allowed_ = known && f.forwarding.agent != 0;
  x11_allowed_ = known && f.forwarding.x11 != 0 && !f.xauth.get().empty();
  if (local) local_ = *local;
  if (remote) remote_ = *remote;
}

Forwarding::~Forwarding() {
  end(false);
  if (pid_ != 0) ::kill(pid_, SIGKILL);
}

void Forwarding::log(const std::string& name, const std::string& fields) {
  const auto now = Clock::now();
  const auto gained = (now - log_refilled_) / forward_log_refill;
  if (gained > 0) {
    log_tokens_ = static_cast<unsigned>(std::min<long long>(forward_log_burst, log_tokens_ + gained));
    log_refilled_ = now;
  }
  if (log_tokens_ == 0) {  // a client must not fill the disk
    unlogged_++;
    return;
  }
  log_tokens_--;
  host_.event(name, fields + (unlogged_ != 0 ? " unlogged=" + std::to_string(unlogged_) : ""));
  unlogged_ = 0;
}

// --- the helper -----------------------------------------------------------------------------------------------------------------

bool Forwarding::start() {
  if (over_ || falling_) return false;
  if (helper_.is_open()) return true;
  if (pid_ != 0) return false;  // the one before has not ended yet
  const auto now = Clock::now();
  const auto gained = (now - start_refilled_) / helper_refill;
  if (gained > 0) {
    start_tokens_ = static_cast<unsigned>(std::min<long long>(helper_burst, start_tokens_ + gained));
    start_refilled_ = now;
  }
  if (start_tokens_ == 0) return false;
  start_tokens_--;
  helper::Settings settings;
  settings.local = local_;
  settings.remote = remote_;
  settings.gateway_ports = host_.facts.gateway_ports != 0;
  settings.unlink_sockets = host_.facts.unlink_sockets != 0;
  settings.xauth = host_.facts.xauth.get();
  settings.connect_limit = std::chrono::milliseconds{host_.facts.forward_connect_ms};
  // Descriptors pass through us: as many as there may be forwardings, if net is slow to take them. (The user's programs get PAM's limits.)
  rlimit files{};
  if (::getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &files);
  }
  auto started = host_.start_helper(std::move(settings));
  if (!started) {
    log("forward_helper_failed", "reason=" + safe_quoted(started.error().doing));
    return false;
  }
  pid_ = started->second;
  helper_.open(std::move(started->first));
  return true;
}

void Forwarding::read_helper() {
  // Also while it does not take what is asked of it: it may be waiting for us to take its answers. How many there can be is bounded (asked_).
  for (int i = 0; i < 32 && helper_.is_open(); i++) {
    std::vector<UniqueFd> refused;
    auto received = receive_message(helper_.fd(), 64 * 1024, &refused);
    if (!received && received.error().code == EAGAIN) return;
    const bool good = received && *received && (*received)->version == helper::version && on_helper_message(**received);
    if (received && *received)
      for (auto& fd : (*received)->fds) refused.push_back(std::move(fd));  // those that found no use
    for (auto& fd : refused)
      if (fd) host_.let_go(std::move(fd));
    if (good) continue;
    if (!received || *received) log("forward_helper_broke_protocol", "");
    return drop_helper();
  }
}

/// Bounded and checked like net's: it runs as the user, who may have got hold of it.
bool Forwarding::on_helper_message(Message& m) {
  using helper::Type;
  const auto type = static_cast<Type>(m.type);
  if (m.fds.size() != (type == Type::connected || type == Type::incoming ? 1u : 0u)) return false;
  switch (type) {
    case Type::connected: {
      const auto r = m.body<helper::Ref>();
      if (r) on_connected(r->id, m.fds.front());
      return r.has_value();
    }
    case Type::failed: {
      const auto f = m.body<helper::Failed>();
      if (!f || !f->text.valid() || f->reason < prohibited || f->reason > resource_shortage) return false;
      const std::string text{f->text.get()};
      if (const auto it = asked_.find(f->id); it != asked_.end()) {
        const Forward& forward = forwards_.at(it->second);
        log("forward_failed", name_of(forward.kind, forward.host, forward.port) + " reason=" + safe_quoted(text));
        fail(it->second, f->reason, text);
      } else {
        listen_failed(f->id, text);
      }
      return true;
    }
    case Type::listening: {
      const auto l = m.body<helper::Listening>();
      if (!l || !l->path.valid() || l->port > 65535) return false;
      const auto it = listeners_.find(l->id);
      if (it == listeners_.end() || !it->second.pending) return true;  // cancelled, or its time was over
      Listener& listener = it->second;
      listener.pending = false;
      if (listener.watchdog != 0) host_.poller.cancel(std::exchange(listener.watchdog, 0));
      listener.port = static_cast<std::uint16_t>(l->port);
      if (l->id == agent_listener_) agent_path_ = l->path.get();
      if (const auto done = std::exchange(listener.done, nullptr)) {
        done(true);
        return true;
      }
      log("forward_listen", name_of(listener.kind, listener.asked, listener.port));
      answer_listen(listener.request, true, listener.port);
      return true;
    }
    case Type::incoming: {
      const auto i = m.body<helper::Incoming>();
      if (!i || !i->origin.valid() || i->port > 65535) return false;
      on_incoming(*i, m.fds.front());
      return true;
    }
    default: return false;
  }
}

void Forwarding::helper_gone() {
  helper_.close();
  if (!over_) log("forward_helper_gone", "");
  // Who waits for an agent's or a display's listener goes on from in here, and asks for the next one: no helper starts until all are told,
  // and what they ask for is not among those that fell.
  const pid_t pid = pid_;
  const bool nested = std::exchange(falling_, true);
  while (!asked_.empty()) fail(asked_.begin()->second, connect_failed, "forwarding was interrupted");
  auto fallen = std::exchange(listeners_, {});
  for (auto& [id, listener] : fallen) listener_over(id, std::move(listener), "the helper is gone");
  agent_path_.clear();
  falling_ = nested;
  if (pid == 0) return;
  host_.poller.after(helper_end_wait, [this, pid] {
    if (pid_ != pid) return;
    ::kill(pid, SIGKILL);
    host_.poller.after(helper_kill_wait, [this, pid] { abandoned_ = abandoned_ || pid_ == pid; });
  });
}

void Forwarding::drop_helper() {
  if (pid_ != 0) ::kill(pid_, SIGKILL);
  helper_gone();
}

bool Forwarding::child_exited(pid_t pid) {
  if (pid_ == 0 || pid != pid_) return false;
  pid_ = 0;
  abandoned_ = false;
  if (helper_.is_open()) helper_gone();
  return true;
}

// --- connecting -----------------------------------------------------------------------------------------------------------------

void Forwarding::refuse(std::uint32_t number, std::uint32_t reason, const std::string& text) {
  ch::ForwardFailed f{number, reason, {}};
  static_cast<void>(f.text.set(std::string_view{text}.substr(0, 256)));
  tell(ch::Type::forward_failed, f);
}

void Forwarding::fail(std::uint32_t number, std::uint32_t reason, const std::string& text) {
  const auto it = forwards_.find(number);
  if (it == forwards_.end()) return;
  if (it->second.watchdog != 0) host_.poller.cancel(it->second.watchdog);
  asked_.erase(it->second.asked);
  forwards_.erase(it);
  refuse(number, reason, text);
}

bool Forwarding::connect(const ch::ForwardTarget& request) {
  if (!acceptable(request) || request.number > largest_number || forwards_.contains(request.number)) return false;
  if (is_nobody(request)) {
    refuse(request.number, connect_failed, "this is not a target");
    return true;
  }
  Forward f;
  f.kind = request.kind;
  f.host = request.target.get();
  f.port = static_cast<std::uint16_t>(request.port);
  const bool possible = local_allowed_ && !over_ && (f.kind == ForwardKind::tcp ? local_.may_allow(f.host, f.port) : local_.may_allow_sockets());
  if (!possible) {
    log("forward_refused", name_of(f.kind, f.host, f.port));
    refuse(request.number, prohibited, local_allowed_ && local_.limited() ? "forwarding to this target is not allowed" : "forwarding is not allowed here");
    return true;
  }
  if (forwards_.size() >= host_.facts.forwards_per_connection) {
    refuse(request.number, resource_shortage, "too many forwardings on this connection");
    return true;
  }
  if (!start()) {
    refuse(request.number, resource_shortage, "the server cannot forward now");
    return true;
  }
  f.asked = next_id_++;
  asked_.emplace(f.asked, request.number);
  const helper::Target ask{f.asked, f.kind, request.port, request.target};
  f.began = Clock::now();
  f.watchdog = host_.poller.after(std::chrono::milliseconds{host_.facts.forward_connect_ms} + helper_slack, [this, number = request.number] {
    if (const auto it = forwards_.find(number); it != forwards_.end()) it->second.watchdog = 0;
    fail(number, connect_failed, "Connection timed out");
    // It has a limit of its own, so it is stopped or stuck, and what it is asked for would pile up here.
    log("forward_helper_stuck", "");
    drop_helper();
  });
  forwards_.emplace(request.number, std::move(f));
  tell_helper(helper::Type::connect, ask);
  return true;
}

/// The kernel's word on what the helper gave us.
bool Forwarding::is_what_was_asked(const Forward& forward, int fd) const {
  int type = 0, domain = 0, protocol = 0;
  socklen_t length = sizeof type;
  if (::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) != 0 || type != SOCK_STREAM) return false;
  length = sizeof domain;
  if (::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) != 0) return false;
  if (forward.kind != ForwardKind::tcp && forward.kind != ForwardKind::x11) return domain == AF_UNIX;
  if (domain != AF_INET && domain != AF_INET6) return false;
  length = sizeof protocol;
  if (::getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &length) != 0 || protocol != IPPROTO_TCP) return false;
  if (forward.direction != Direction::local) return true;
  sockaddr_storage peer{};
  length = sizeof peer;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) != 0) return false;
  const auto address = Address::from(peer);
  const auto port = ntohs(peer.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(peer).sin6_port : reinterpret_cast<const sockaddr_in&>(peer).sin_port);
  return address && port == forward.port && local_.allows(forward.host, *address, port);
}

/// Takes `fd` or leaves it, as on_incoming(): what is left is let go where that cannot block.
void Forwarding::on_connected(std::uint32_t id, UniqueFd& fd) {
  const auto it = asked_.find(id);
  if (it == asked_.end()) return;  // its time was over
  const std::uint32_t number = it->second;
  Forward& f = forwards_.at(number);
  sockaddr_storage peer{};
  socklen_t length = sizeof peer;
  // Reset before we could ask who it was: nobody to forward to, whoever it was.
  if (f.kind == ForwardKind::tcp && ::getpeername(fd.get(), reinterpret_cast<sockaddr*>(&peer), &length) != 0 && errno == ENOTCONN)
    return fail(number, connect_failed, "Connection reset by peer");
  if (!is_what_was_asked(f, fd.get())) {
    log("forward_helper_lied", name_of(f.kind, f.host, f.port));
    return fail(number, prohibited, "forwarding to this target is not allowed");
  }
  asked_.erase(it);
  f.asked = 0;
  if (f.watchdog != 0) host_.poller.cancel(std::exchange(f.watchdog, 0));
  ::fcntl(fd.get(), F_SETFL, O_RDWR | O_NONBLOCK);
  std::vector<UniqueFd> fds;
  fds.push_back(std::move(fd));
  handed_ = true;
  tell(ch::Type::forward_ready, ch::ForwardReady{number}, std::move(fds));
}

std::string Forwarding::describe(const Forward& f) {
  const char* const direction = f.direction == Direction::local ? "local" : f.direction == Direction::remote ? "remote" : f.direction == Direction::agent ? "agent" : "x11";
  return std::string{"direction="} + direction + " " + name_of(f.kind, f.host, f.port);
}

bool Forwarding::closed(const ch::ForwardClosed& what) {
  const auto it = forwards_.find(what.number);
  if (it == forwards_.end()) return over_;  // we closed it ourselves meanwhile
  const Forward& f = it->second;
  if (f.asked != 0) return false;
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - f.began).count();
  log("forward", describe(f) + " from_client=" + std::to_string(what.from_client) + " to_client=" + std::to_string(what.to_client) + " ms=" + std::to_string(ms));
  forwards_.erase(it);
  return true;
}

// --- listening ------------------------------------------------------------------------------------------------------------------

void Forwarding::answer_listen(std::uint32_t request, bool ok, std::uint16_t port) {
  tell(ch::Type::forward_listening, ch::ForwardListening{request, ok ? 1u : 0u, port});
}

void Forwarding::listen_failed(std::uint32_t id, const std::string& why) {
  const auto it = listeners_.find(id);
  if (it == listeners_.end()) return;
  Listener l = std::move(it->second);
  listeners_.erase(it);
  listener_over(id, std::move(l), why);
}

void Forwarding::listener_over(std::uint32_t id, Listener l, const std::string& why) {
  if (l.watchdog != 0) host_.poller.cancel(l.watchdog);
  if (id == agent_listener_) {
    agent_listener_ = 0;
    agent_path_.clear();
  }
  if (l.done) l.done(false);
  if (over_ || l.kind == ForwardKind::agent || l.kind == ForwardKind::x11) return;
  log(l.pending ? "forward_listen_failed" : "forward_listen_over", name_of(l.kind, l.asked, l.asked_port) + " reason=" + safe_quoted(why));
  if (l.pending) answer_listen(l.request, false, 0);
}

bool Forwarding::listen(const ch::ForwardTarget& request) {
  if (!acceptable(request)) return false;
  if (has_nul(request)) {
    answer_listen(request.number, false, 0);
    return true;
  }
  Listener l;
  l.kind = request.kind;
  l.asked = request.target.get();
  l.asked_port = static_cast<std::uint16_t>(request.port);
  l.request = request.number;
  const bool same = std::any_of(listeners_.begin(), listeners_.end(), [&](const auto& other) {
    return other.second.kind == l.kind && other.second.asked == l.asked && l.asked_port != 0 && other.second.port == l.asked_port;
  });
  // The words for a loopback listener hold a name or an address, and the client may have left both out: what is bound decides, in the helper.
  const bool possible = remote_allowed_ && !over_ && (l.kind == ForwardKind::tcp || remote_.may_allow_sockets());
  if (!possible) log("forward_refused", "direction=remote " + name_of(l.kind, l.asked, l.asked_port));
  if (!possible || same || listeners_.size() >= max_forward_listeners || !start()) {
    answer_listen(request.number, false, 0);
    return true;
  }
  const std::uint32_t id = next_id_++;
  begin_listening(id, std::move(l));
  tell_helper(helper::Type::listen, helper::Target{id, request.kind, request.port, request.target});
  return true;
}

void Forwarding::begin_listening(std::uint32_t id, Listener listener) {
  listener.watchdog = host_.poller.after(std::chrono::milliseconds{host_.facts.forward_connect_ms} + helper_slack, [this, id] {
    if (const auto it = listeners_.find(id); it != listeners_.end()) it->second.watchdog = 0;
    tell_helper(helper::Type::cancel, helper::Ref{id});
    listen_failed(id, "no answer");
  });
  listeners_.emplace(id, std::move(listener));
}

bool Forwarding::cancel(const ch::ForwardTarget& request) {
  if (!acceptable(request)) return false;
  const std::string asked{request.target.get()};
  const auto it = std::find_if(listeners_.begin(), listeners_.end(), [&](const auto& l) {
    return !l.second.pending && l.second.kind == request.kind && l.second.asked == asked && l.second.port == request.port;
  });
  const bool found = it != listeners_.end();
  if (found) {
    tell_helper(helper::Type::cancel, helper::Ref{it->first});
    listeners_.erase(it);
  }
  answer_listen(request.number, found, 0);
  return true;
}

void Forwarding::ask_agent(std::function<void(bool)> done) {
  // Once a connection, as sshd (session.c auth_input_request_forwarding: "authentication forwarding requested twice").
  if (!agent_allowed_ || agent_listener_ != 0 || !start()) return done(false);
  agent_listener_ = next_id_++;
  Listener l;
  l.kind = ForwardKind::agent;
  l.done = std::move(done);
  begin_listening(agent_listener_, std::move(l));
  tell_helper(helper::Type::agent, helper::Ref{agent_listener_});
}

void Forwarding::ask_x11(const ch::X11& request, std::function<void(bool)> done) {
  // They become words of xauth's input (CVE-2016-3115 was a newline in one of them); as session.c xauth_valid_string().
  const auto is_word = [](std::string_view text) {
    return !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == ':' || c == '/' || c == '-' || c == '_';
    });
  };
  const bool again = std::any_of(listeners_.begin(), listeners_.end(), [&](const auto& l) { return l.second.kind == ForwardKind::x11 && l.second.channel == request.channel; });
  if (!x11_allowed_ || again || !is_word(request.protocol.get()) || !is_word(request.cookie.get()) || listeners_.size() >= max_forward_listeners || !start())
    return done(false);
  const std::uint32_t id = next_id_++;
  Listener l;
  l.kind = ForwardKind::x11;
  l.channel = request.channel;
  l.screen = request.screen;
  l.single = request.single != 0;
  l.done = std::move(done);
  begin_listening(id, std::move(l));
  tell_helper(helper::Type::x11, helper::X11{id, request.screen, request.protocol, request.cookie});
}

std::string Forwarding::display(std::uint32_t channel) const {
  for (const auto& [id, l] : listeners_)
    if (l.kind == ForwardKind::x11 && l.channel == channel && !l.pending && l.port >= 6000)
      return "localhost:" + std::to_string(l.port - 6000) + "." + std::to_string(l.screen);
  return {};
}

void Forwarding::channel_closed(std::uint32_t channel) {
  for (auto it = listeners_.begin(); it != listeners_.end();) {
    Listener& l = it->second;
    if (l.kind != ForwardKind::x11 || l.channel != channel || l.pending) {
      ++it;
      continue;
    }
    tell_helper(helper::Type::cancel, helper::Ref{it->first});
    it = listeners_.erase(it);
  }
}

void Forwarding::on_incoming(const helper::Incoming& said, UniqueFd& fd) {
  const auto it = listeners_.find(said.id);
  // Closing it is all that can be said to whom nobody asked for: a cancelled listener's last connection, or one too many.
  if (it == listeners_.end() || it->second.pending || over_ || forwards_.size() >= host_.facts.forwards_per_connection) return;
  const Listener& l = it->second;
  Forward f;
  f.direction = l.kind == ForwardKind::agent ? Direction::agent : l.kind == ForwardKind::x11 ? Direction::x11 : Direction::remote;
  f.kind = l.kind;
  f.host = l.asked;
  f.port = l.port;
  f.began = Clock::now();
  if (!is_what_was_asked(f, fd.get())) return;
  do next_incoming_ = (next_incoming_ + 1) | ch::first_incoming;
  while (forwards_.contains(next_incoming_));
  ch::ForwardIncoming to_net{next_incoming_, l.kind, l.port, said.port, {}, said.origin};
  if (!to_net.target.set(l.asked)) return;
  ::fcntl(fd.get(), F_SETFL, O_RDWR | O_NONBLOCK);
  forwards_.emplace(next_incoming_, std::move(f));
  std::vector<UniqueFd> fds;
  fds.push_back(std::move(fd));
  handed_ = true;
  tell(ch::Type::forward_incoming, to_net, std::move(fds));
  if (!l.single) return;
  tell_helper(helper::Type::cancel, helper::Ref{it->first});
  listeners_.erase(it);
}

// --- the end --------------------------------------------------------------------------------------------------------------------

void Forwarding::end(bool tell_net) {
  if (over_) return;
  over_ = true;
  if (tell_net && !forwards_.empty()) tell(ch::Type::forward_end, ch::ForwardEnd{});
  for (const auto& [number, f] : forwards_) {
    if (f.watchdog != 0) host_.poller.cancel(f.watchdog);
    // net's counts die with it.
    if (f.asked == 0)
      log("forward", describe(f) + " cut=1 ms=" + std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - f.began).count()));
  }
  for (const auto& [id, l] : listeners_)
    if (l.watchdog != 0) host_.poller.cancel(l.watchdog);
  helper_gone();
  forwards_.clear();
}

}  // namespace postern::sshd::session
