#include "sshd/session/process.h"

#include "base/processes.h"
#include "base/process_title.h"
#include "pty/process_settings.h"
#include "sshd/session/close_elsewhere.h"
#include "sshd/session/logins.h"

#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <signal.h>
#include <spdlog/spdlog.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace postern::sshd::session {
namespace {

namespace ch = sshd::channel;
namespace ses = sshd::session;

/// Channels that the client closed and whose programs or recordings are not over; more, and no new channel is opened.
constexpr std::size_t lingering_factor = 4;
constexpr std::uint32_t largest_channel = 65535;
/// Requests of one channel that wait for the helper. A client that sends more (signals, say) while the user keeps the helper from answering
/// loses its connection.
constexpr std::size_t most_held = 1024;
constexpr std::size_t most_held_bytes = 4 * 1024 * 1024;  ///< of all channels
/// Forwardings that net was told to close for want of a recorder: it has so long to say so to its client.
constexpr std::chrono::milliseconds forward_end_wait{2'000};

UniqueFd open_pidfd(pid_t pid) { return UniqueFd{static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))}; }

std::vector<gid_t> current_groups() {
  const int n = ::getgroups(0, nullptr);
  std::vector<gid_t> groups(n > 0 ? static_cast<std::size_t>(n) : 0);
  if (n > 0 && ::getgroups(n, groups.data()) != n) groups.clear();
  return groups;
}

}  // namespace

SessionProcess::SessionProcess(UniqueFd broker, bool as_root)
    : as_root_{as_root}, broker_{poller_, true, [this] { read_broker(); }}, net_{poller_, false, [this] { read_net(); }, [this](UniqueFd fd, bool delivered) { let_go(std::move(fd), delivered); }} {
  sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, SIGCHLD);
  ::sigaddset(&set, SIGTERM);
  ::sigprocmask(SIG_SETMASK, &set, nullptr);
  signals_.reset(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  poller_.watch(signals_.get(), POLLIN, [this](short) {
    signalfd_siginfo info{};
    bool term = false;
    while (::read(signals_.get(), &info, sizeof info) == static_cast<ssize_t>(sizeof info)) term = term || info.ssi_signo == SIGTERM;
    reap();
    if (term) revoke("The server ends this session.");
  });
  broker_.open(std::move(broker));
}

SessionProcess::~SessionProcess() {
  channels_.clear();
  closing_.clear();
  forwarding_.reset();
  net_.close();
  static_cast<void>(parted_.release());
  bury(true);
}

/// What may block us in close(2) is closed by another process, at the end of this turn of the loop.
void SessionProcess::let_go(UniqueFd fd, bool delivered) {
  if (!may_block_in_close(fd.get())) return;
  int domain = 0;
  socklen_t length = sizeof domain;
  const linger none{};
  // The usual case, a TCP socket that is net's now: should net have died since, it does not wait.
  if (delivered && ::getsockopt(fd.get(), SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 && (domain == AF_INET || domain == AF_INET6) &&
      ::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &none, sizeof none) == 0)
    return;
  doomed_.push_back(std::move(fd));
}

void SessionProcess::bury(bool at_the_end) {
  if (close_elsewhere(doomed_)) return;
  if (!at_the_end) {
    poller_.after(bury_retry, [] {});  // the next turn comes then
    return;
  }
  for (auto& fd : doomed_) static_cast<void>(fd.release());  // a process that exits does not linger
  doomed_.clear();
}

int SessionProcess::run() {
  while (!poller_.stopped()) {
    poller_.run_once();
    bury(false);
    if (sweep_) sweep();
    if (phase_ == Phase::leaving && done()) break;
  }
  channels_.clear();
  closing_.clear();
  if (tree_) tree_->let_go();
  if (holder_) holder_->end();
  if (pam_) pam_->close();
  if (phase_ == Phase::leaving) event("connection_end", "");
  broker_.flush();
  return 0;
}

// --- the broker -----------------------------------------------------------------------------------------------------------------

void SessionProcess::read_broker() {
  for (int i = 0; i < 16 && broker_.is_open(); i++) {
    auto received = receive_message(broker_.fd());
    if (!received && received.error().code == EAGAIN) return;
    if (!received || !*received) {
      if (!received) spdlog::error("event=broker_message_bad reason=\"{}\"", received.error().doing);
      return lost_broker();
    }
    Message& m = **received;
    if (m.version < ses::oldest_version || m.version > ses::version || !on_broker_message(m)) {
      spdlog::error("event=broker_message_unknown type={} size={}", m.type, m.bytes.size());
      return lost_broker();
    }
  }
}

bool SessionProcess::on_broker_message(Message& m) {
  switch (static_cast<ses::Type>(m.type)) {
    case ses::Type::lookup: {
      const auto lookup = m.body<ses::Lookup>();
      if (!lookup || phase_ != Phase::new_born || !m.fds.empty()) return false;
      look_up(*lookup);
      return true;
    }
    case ses::Type::grant: return phase_ == Phase::looked_up && on_grant(m);
    case ses::Type::deny:
      if (phase_ != Phase::looked_up && phase_ != Phase::new_born) return false;
      poller_.stop();
      return true;
    case ses::Type::signature: {
      const auto s = m.body<net::Signature>();
      if (!s || !s->blob.valid() || sign_requests_.empty() || !sign_requests_.front().forwarded) return false;
      sign_requests_.pop_front();
      net_.send(ch::version, static_cast<std::uint16_t>(ch::Type::signature), *s);
      return true;
    }
    case ses::Type::revoke: {
      const auto r = m.body<ses::Revoke>();
      if (!r || (phase_ != Phase::granted && phase_ != Phase::leaving)) return false;
      revoke(r->text.get(), std::chrono::milliseconds{std::min<std::uint32_t>(r->clear_up_ms, 60'000)});
      return true;
    }
    case ses::Type::registered: {
      const auto r = m.body<ses::Registered>();
      if (!r || !registering_) return false;
      registering_ = false;
      if (r->ok == 0) {
        revoke("Access revoked.");
        return true;
      }
      spdlog::info("event=registered connection={}", facts_.id().text());
      register_delay_ = register_first_retry;
      if (orphan_timer_ != 0) poller_.cancel(orphan_timer_);
      orphan_timer_ = 0;
      told_channels_ = 0;
      tell_channels();
      forward_sign_requests();
      return true;
    }
    default: return false;
  }
}

void SessionProcess::look_up(const ses::Lookup& lookup) {
  ses::User answer;
  const std::string name{lookup.name.get()};
  std::vector<char> buffer(16 * 1024);
  passwd entry{};
  passwd* result = nullptr;
  int r;
  while ((r = ::getpwnam_r(name.c_str(), &entry, buffer.data(), buffer.size(), &result)) == ERANGE && buffer.size() < 1024 * 1024)
    buffer.resize(buffer.size() * 2);
  if (r != 0) spdlog::warn("event=lookup_failed reason=\"{}\"", std::strerror(r));
  // As an ordinary user nobody else can be become.
  if (result != nullptr && !name.empty() && name.find('\0') == std::string::npos && (as_root_ || entry.pw_uid == ::getuid()) &&
      entry.pw_uid != static_cast<uid_t>(-1) && answer.name.set(entry.pw_name)) {
    answer.found = 1;
    answer.uid = entry.pw_uid;
    answer.gid = entry.pw_gid;
    user_.name = entry.pw_name;
    user_.uid = entry.pw_uid;
    user_.gid = entry.pw_gid;
    user_.home = entry.pw_dir != nullptr ? entry.pw_dir : "";
    user_.shell = entry.pw_shell != nullptr ? entry.pw_shell : "";
    found_ = true;
  }
  phase_ = Phase::looked_up;
  broker_.send(ses::version, static_cast<std::uint16_t>(ses::Type::user), answer);
}

/// Apart from on_grant(), whose frame the PAM holder keeps: facts are 24 KiB.
[[gnu::noinline]] bool SessionProcess::take_facts(int memfd) {
  auto facts = read_facts(memfd);
  if (!facts) {
    spdlog::error("event=facts_bad reason=\"{}\"", facts.error().doing);
    return false;
  }
  facts_ = *facts;
  return true;
}

bool SessionProcess::on_grant(Message& m) {
  if (!m.body<ses::Grant>() || m.fds.size() != 3 || !found_ || !take_facts(m.fds[0].get())) return false;
  set_process_title("postern-session: " + std::string{facts_.local_user.get()});
  facts_fd_ = std::move(m.fds[0]);
  UniqueFd net = std::move(m.fds[1]);
  net_pidfd_ = std::move(m.fds[2]);

  ses::Ready ready;
  if (facts_.local_user.get() != user_.name || facts_.uid != user_.uid) {
    spdlog::error("event=facts_of_another_user connection={}", facts_.id().text());
    if (!ready.text.set("The account changed while you logged in.")) ready.text.length = 0;
  } else if (auto account = check_account(); !account) {
    spdlog::warn("event=account_refused connection={} reason=\"{}\"", facts_.id().text(), account.error().doing);
    // What a module said (pam_nologin: why) tells more than our sentence; one line of it.
    std::string said = pam_ ? pam_->take_texts() : std::string{};
    said = said.substr(0, said.find('\n'));
    while (!said.empty() && (said.back() == '\r' || said.back() == ' ')) said.pop_back();
    if (said.empty()) said = account.error().user_message;
    if (!ready.text.set(std::string_view{said}.substr(0, 512))) ready.text.length = 0;
  } else {
    ready.ok = 1;
  }
  broker_.send(ses::version, static_cast<std::uint16_t>(ses::Type::ready), ready);
  broker_.flush();
  if (ready.ok == 0) {
    phase_ = Phase::leaving;
    waited_ = true;
    return true;
  }
  phase_ = Phase::granted;
  poller_.after(settle_time, [] { release_unused_memory(); });  // not sooner: a short command is over before
  own_pidfd_ = open_pidfd(::getpid());
  tree_ = std::make_unique<ProcessTree>(facts_.id().text(), as_root_);
  // In parallel with the client's next round trip, and before any of its channels is looked at.
  const bool opened = open_pam_session();
  tree_->adopt_scope(holder_ ? holder_->pid() : ::getpid());
  const auto adopt_net = [this, &net] { net_.open(std::move(net)); };
  if (!opened) {
    adopt_net();
    revoke("The server cannot open a session for this account.");
    return true;
  }
  host_ = std::make_unique<ChannelHost>(ChannelHost{
      poller_, facts_, user_, pam_environment_, pam_texts_, *tree_,
      [this](pty::Launch& what, const std::string& login_path) -> Expected<pid_t> {
        if (holder_) return holder_->launch(what, login_path);
        what.settings = user_settings_;
        if (!login_path.empty()) what.before = [this, login_path] { record_login(facts_, user_.uid, login_path, ::getpid()); };
        return pty::launch(what);
      },
      [this](ch::Type type, std::span<const std::byte> body, std::vector<UniqueFd> fds) {
        net_.post(ch::version, static_cast<std::uint16_t>(type), body, std::move(fds));
      },
      [this](const std::string& name, const std::string& fields) { event(name, fields); }, [this] { recorder_lost(); },
      [this] { sweep_ = true; }, [this](std::uint32_t channel) { return forwarding_->display(channel); },
      [this] { return forwarding_->agent_socket(); }});
  begin_forwarding();
  adopt_net();
  begin_limits();
  return true;
}

void SessionProcess::begin_forwarding() {
  forwarding_ = std::make_unique<Forwarding>(Forwarding::Host{
      poller_, facts_,
      [this](helper::Settings settings) {
        const UniqueFd entrance = tree_->entrance();  // what ends the user's programs ends it
        settings.user = user_;
        settings.process = user_settings_;
        settings.cgroup = entrance.get();
        // What PAM's modules left is there, as for the user's programs.
        if (holder_) return holder_->start_helper(settings, facts_.forwarding.local_targets.get(), facts_.forwarding.remote_targets.get());
        return helper::start(settings);
      },
      [this](ch::Type type, std::span<const std::byte> body, std::vector<UniqueFd> fds) {
        net_.post(ch::version, static_cast<std::uint16_t>(type), body, std::move(fds));
      },
      [this](const std::string& name, const std::string& fields) { event(name, fields); }, [this](UniqueFd fd) { let_go(std::move(fd), false); }});
}

void SessionProcess::begin_limits() {
  const auto over = [this](const std::string& rule, const std::string& text) {
    if (phase_ != Phase::granted) return;  // it is ending already
    event("time_limit", "rule=" + rule);
    revoke(text);
  };
  limits_ = std::make_unique<TimeLimits>(poller_, facts_.rules, over);
  if (!limits_->watches_activity()) return;
  const ch::WatchActivity ask{static_cast<std::uint32_t>(limits_->report_interval().count())};
  net_.send(ch::version, static_cast<std::uint16_t>(ch::Type::watch_activity), ask);
}

Expected<Done> SessionProcess::check_account() {
  own_groups_ = current_groups();
  if (as_root_ && ::initgroups(user_.name.c_str(), user_.gid) != 0) {
    auto e = system_error("read the user's groups");
    e.user_message = "The server cannot read this account's groups.";
    return Unexpected{std::move(e)};
  }
  auto pam = auth::pam::PamSession::start({std::string{facts_.pam_service.get()}, std::string{facts_.pam_confdir.get()}, user_.name,
                                           std::string{facts_.peer_address.get()}, ssh_connection(facts_)});
  if (!pam) return Unexpected{pam.error()};
  pam_ = std::move(*pam);
  return pam_->account();
}

bool SessionProcess::open_pam_session() {
  PamResult result;
  bool known = false;
  const auto modules = auth::pam::modules_of(std::string{facts_.pam_service.get()}, std::string{facts_.pam_confdir.get()}, known);
  const bool limits = std::any_of(modules.begin(), modules.end(), [](const auto& m) { return m.ends_with("pam_limits.so"); });
  if (limits && !can_raise_limits()) {
    auto holder = PamHolder::start(
        *pam_, [this](const std::string& path) { record_login(facts_, user_.uid, path, ::getpid()); }, result);
    if (holder)
      holder_ = std::move(*holder);
    else
      result.reason = holder.error().doing;
  } else {
    const auto own = pty::ProcessSettings::of_this_process();
    sigset_t mask;
    ::sigprocmask(SIG_SETMASK, nullptr, &mask);
    result = open_pam(*pam_);
    user_settings_ = pty::ProcessSettings::of_this_process();
    if (!own.apply()) spdlog::warn("event=own_limits_not_restored connection={}", facts_.id().text());
    ::sigprocmask(SIG_SETMASK, &mask, nullptr);
  }
  user_.groups = std::move(result.groups);
  if (as_root_ && ::setgroups(own_groups_.size(), own_groups_.data()) != 0)
    spdlog::warn("event=own_groups_not_restored connection={}", facts_.id().text());
  if (!result.opened) {
    spdlog::warn("event=pam_session_failed connection={} reason=\"{}\"", facts_.id().text(), result.reason);
    event("pam_session_failed", "");
    // An ordinary user's PAM session lacks rights that modules take for granted; a module that changed the user is refused anyway.
    if (as_root_ || !result.same_user) return false;
  }
  pam_environment_ = std::move(result.environment);
  pam_texts_ = std::move(result.texts);
  return true;
}

void SessionProcess::lost_broker() {
  broker_.close();
  registering_ = false;
  for (auto& s : sign_requests_) s.forwarded = false;
  if (phase_ == Phase::new_born || phase_ == Phase::looked_up) {
    poller_.stop();
    return;
  }
  if (phase_ != Phase::granted) return;
  if (orphan_timer_ == 0) {
    spdlog::warn("event=broker_lost connection={}", facts_.id().text());
    orphan_timer_ = poller_.after(std::chrono::seconds{facts_.orphan_limit_seconds}, [this] {
      orphan_timer_ = 0;
      spdlog::warn("event=orphan_limit connection={}", facts_.id().text());
      revoke("The server cannot confirm this session any more.");
    });
  }
  schedule_register();
}

void SessionProcess::schedule_register() {
  if (register_timer_ != 0 || phase_ != Phase::granted) return;
  register_timer_ = poller_.after(register_delay_, [this] {
    register_timer_ = 0;
    try_register();
  });
  register_delay_ = std::min(register_delay_ * 2, register_last_retry);
}

void SessionProcess::try_register() {
  const std::string path{facts_.registration_socket.get()};
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  UniqueFd s{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  ucred peer{};
  socklen_t length = sizeof peer;
  if (!s || path.empty() || path.size() >= sizeof address.sun_path) return schedule_register();
  std::memcpy(address.sun_path, path.data(), path.size());
  if (::connect(s.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      ::getsockopt(s.get(), SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0)
    return schedule_register();
  if (peer.uid != 0 && peer.uid != ::geteuid()) {
    spdlog::error("event=registration_socket_of_stranger uid={}", peer.uid);
    return schedule_register();
  }
  // The numbers are for the log; what counts are the pidfds.
  ses::Register r;
  r.session_pid = ::getpid();
  r.net_pid = pid_of(net_pidfd_.get()).value_or(-1);
  const int fds[3] = {facts_fd_.get(), own_pidfd_.get(), net_pidfd_.get()};
  if (!send_body(s.get(), ses::version, static_cast<std::uint16_t>(ses::Type::register_session), r, {}, fds)) return schedule_register();
  registering_ = true;
  broker_.open(std::move(s));
}

void SessionProcess::event(const std::string& name, const std::string& fields) {
  ses::Event e;
  if (broker_.is_open() && !registering_ && e.name.set(name) && e.fields.set(std::string_view{fields}.substr(0, 900)))
    broker_.send(ses::version, static_cast<std::uint16_t>(ses::Type::event), e);
  else
    spdlog::info("event={} connection={} {}", name, facts_.id().text(), fields);
}

void SessionProcess::tell_channels() {
  // At most one message in a while: how often channels come and go is net's to say.
  if (channels_timer_ != 0) return;
  const auto tell = [this] {
    const auto open = static_cast<std::uint32_t>(channels_.size());
    if (open == told_channels_ || !broker_.is_open() || registering_) return;
    told_channels_ = open;
    broker_.send(ses::version, static_cast<std::uint16_t>(ses::Type::channels), ses::Channels{open});
  };
  tell();
  channels_timer_ = poller_.after(channels_interval, [this, tell] {
    channels_timer_ = 0;
    tell();
  });
}

// --- net ------------------------------------------------------------------------------------------------------------------------

void SessionProcess::read_net() {
  for (int i = 0; i < 32 && net_.is_open() && !net_.blocked(); i++) {
    std::vector<UniqueFd> refused;
    auto received = receive_message(net_.fd(), ch::max_message, &refused);
    if (received && *received)
      for (auto& fd : (*received)->fds) refused.push_back(std::move(fd));
    const bool brought = !refused.empty();
    for (auto& fd : refused) let_go(std::move(fd), false);
    if (!received && received.error().code == EAGAIN) return;
    if (!received) return violation(received.error().doing);
    if (!*received) return net_gone();
    const Message& m = **received;
    if (phase_ == Phase::leaving) continue;  // revoked: nothing is answered any more, only its end is waited for
    if (brought) return violation("it sent a descriptor");
    if (m.version != ch::version) return violation("another protocol version");
    if (!on_net_message(m)) return violation("message type " + std::to_string(m.type) + " of " + std::to_string(m.bytes.size()) + " bytes");
  }
}

SessionChannel* SessionProcess::find(std::uint32_t number) {
  const auto it = channels_.find(number);
  return it == channels_.end() ? nullptr : it->second.get();
}

/// Requests of one channel are answered in their order (RFC 4254 section 5.4), and its program wants to know the agent's socket: what comes
/// behind a question to the helper waits. False: too much.
bool SessionProcess::hold(const Message& m, bool& held) {
  held = false;
  const auto type = static_cast<ch::Type>(m.type);
  const bool of_channel = (type >= ch::Type::open && type <= ch::Type::closed) || (type >= ch::Type::agent && type <= ch::Type::ended);
  std::uint32_t number = 0;
  if (held_.empty() || !of_channel || m.bytes.size() < sizeof number) return true;
  std::memcpy(&number, m.bytes.data(), sizeof number);
  const auto it = held_.find(number);
  if (it == held_.end()) return true;
  held = true;
  if (it->second.size() >= most_held || held_bytes_ + m.bytes.size() > most_held_bytes) return false;
  held_bytes_ += m.bytes.size();
  it->second.push_back({m.version, m.type, m.bytes, {}});
  return true;
}

void SessionProcess::answer_held(std::uint32_t number, bool ok) {
  const auto it = held_.find(number);
  if (it == held_.end()) return;  // the client is gone
  const std::deque<Message> waiting = std::move(it->second);
  held_.erase(it);
  for (const Message& m : waiting) held_bytes_ -= m.bytes.size();
  net_.send(ch::version, static_cast<std::uint16_t>(ok ? ch::Type::answer_ok : ch::Type::answer_no), ch::Answer{number, 0});
  for (const Message& m : waiting)
    if (phase_ != Phase::leaving && !on_net_message(m)) return violation("message type " + std::to_string(m.type) + " of " + std::to_string(m.bytes.size()) + " bytes");
}

bool SessionProcess::on_net_message(const Message& m) {
  bool held = false;
  if (!hold(m, held)) return false;
  if (held) return true;
  const auto answer = [this](std::uint32_t number, bool ok) {
    net_.send(ch::version, static_cast<std::uint16_t>(ok ? ch::Type::answer_ok : ch::Type::answer_no), ch::Answer{number, 0});
  };
  switch (static_cast<ch::Type>(m.type)) {
    case ch::Type::open: {
      const auto r = m.body<ch::ChannelRef>();
      if (!r || r->channel > largest_channel || find(r->channel) != nullptr) return false;
      const std::size_t most = std::min(facts_.sessions_per_connection, facts_.rules.max_sessions);
      if (channels_.size() >= most || channels_.size() + closing_.size() >= most * lingering_factor) {
        answer(r->channel, false);
        return true;
      }
      channels_.emplace(r->channel, std::make_unique<SessionChannel>(*host_, r->channel));
      answer(r->channel, true);
      tell_channels();
      return true;
    }
    case ch::Type::pty: {
      const auto r = m.body<ch::Pty>();
      if (!r || !r->term.valid() || !r->modes.valid()) return false;
      SessionChannel* c = find(r->channel);
      if (c == nullptr) return false;
      answer(r->channel, c->pty(*r));
      return true;
    }
    case ch::Type::env: {
      const auto r = m.body_and_tail<ch::Env>();
      if (!r || r->first.name_length > r->second.size()) return false;
      SessionChannel* c = find(r->first.channel);
      if (c == nullptr) return false;
      answer(r->first.channel, c->env(r->second.substr(0, r->first.name_length), r->second.substr(r->first.name_length)));
      return true;
    }
    case ch::Type::start: {
      const auto r = m.body_and_tail<ch::Start>();
      if (!r || static_cast<std::uint32_t>(r->first.kind) > static_cast<std::uint32_t>(ch::StartKind::subsystem)) return false;
      if (r->first.kind == ch::StartKind::shell && !r->second.empty()) return false;
      SessionChannel* c = find(r->first.channel);
      if (c == nullptr) return false;
      c->start(r->first.kind, r->second);
      if (limits_) limits_->activity();
      return true;
    }
    case ch::Type::window_change: {
      const auto r = m.body<ch::WindowChange>();
      SessionChannel* c = r ? find(r->channel) : nullptr;
      if (c == nullptr) return false;
      c->window_change(*r);
      return true;
    }
    case ch::Type::signal:
    case ch::Type::ask_signal: {
      const auto r = m.body<ch::Signal>();
      SessionChannel* c = r && r->name.valid() ? find(r->channel) : nullptr;
      if (c == nullptr) return false;
      const bool sent = c->signal(r->name.get());
      if (static_cast<ch::Type>(m.type) == ch::Type::ask_signal) answer(r->channel, sent);
      return true;
    }
    case ch::Type::send_break: {
      const auto r = m.body<ch::ChannelRef>();
      SessionChannel* c = r ? find(r->channel) : nullptr;
      if (c == nullptr) return false;
      answer(r->channel, c->send_break());
      return true;
    }
    case ch::Type::closed:
    case ch::Type::closed_after_eof:
    case ch::Type::ended: {
      const auto r = m.body<ch::ChannelRef>();
      const auto it = r ? channels_.find(r->channel) : channels_.end();
      if (it == channels_.end()) return false;
      auto c = std::move(it->second);
      channels_.erase(it);
      const auto type = static_cast<ch::Type>(m.type);
      c->closed(type == ch::Type::ended ? Leaving::ended : type == ch::Type::closed ? Leaving::closed : Leaving::sent_all);
      forwarding_->channel_closed(r->channel);
      closing_.push_back(std::move(c));
      sweep_ = true;
      tell_channels();
      return true;
    }
    case ch::Type::activity: {
      if (!m.body<ch::Activity>() || !limits_ || !limits_->watches_activity()) return false;
      limits_->activity();
      return true;
    }
    case ch::Type::agent: {
      const auto r = m.body<ch::ChannelRef>();
      if (!r || find(r->channel) == nullptr) return false;
      held_.try_emplace(r->channel);
      forwarding_->ask_agent([this, number = r->channel](bool ok) { answer_held(number, ok); });
      return true;
    }
    case ch::Type::x11: {
      const auto r = m.body<ch::X11>();
      if (!r || !r->protocol.valid() || !r->cookie.valid() || find(r->channel) == nullptr) return false;
      held_.try_emplace(r->channel);
      forwarding_->ask_x11(*r, [this, number = r->channel](bool ok) { answer_held(number, ok); });
      return true;
    }
    case ch::Type::forward_connect: {
      const auto r = m.body<ch::ForwardTarget>();
      if (limits_) limits_->activity();
      return r && forwarding_->connect(*r);
    }
    case ch::Type::forward_listen: {
      const auto r = m.body<ch::ForwardTarget>();
      return r && forwarding_->listen(*r);
    }
    case ch::Type::forward_cancel: {
      const auto r = m.body<ch::ForwardTarget>();
      return r && forwarding_->cancel(*r);
    }
    case ch::Type::forward_closed: {
      const auto r = m.body<ch::ForwardClosed>();
      return r && forwarding_->closed(*r);
    }
    case ch::Type::ask_sign: {
      const auto ask = m.body<net::AskSign>();
      if (!ask || !ask->data.valid() || sign_requests_.size() >= sign_burst) return false;
      sign_requests_.push_back({*ask, false, Clock::now() + std::chrono::milliseconds{facts_.sign_ms}});
      forward_sign_requests();
      return true;
    }
    default: return false;
  }
}

void SessionProcess::violation(const std::string& what) {
  spdlog::error("event=net_violation connection={} what=\"{}\"", facts_.id().text(), what);
  event("net_violation", "");
  kill_net();
  net_gone();
}

bool SessionProcess::may_sign() {
  const auto now = Clock::now();
  const auto gained = (now - sign_refilled_) / sign_refill;
  if (gained > 0) {
    sign_tokens_ = static_cast<unsigned>(std::min<long long>(sign_burst, sign_tokens_ + gained));
    sign_refilled_ = now;
  }
  if (sign_tokens_ == 0) return false;
  sign_tokens_--;
  return true;
}

void SessionProcess::forward_sign_requests() {
  if (broker_.is_open() && !registering_) {
    for (auto& s : sign_requests_) {
      if (s.forwarded) continue;
      // Too fast is answered later, not refused: without a signature net would have to end a good connection. It asks for one at a time,
      // and its client waits with it; more than sign_burst at once are a violation (on_net_message).
      if (!may_sign()) {
        if (sign_later_ == 0)
          sign_later_ = poller_.after(sign_refill, [this] {
            sign_later_ = 0;
            forward_sign_requests();
          });
        break;
      }
      s.forwarded = true;
      broker_.send(ses::version, static_cast<std::uint16_t>(ses::Type::ask_sign), s.ask);
    }
  }
  if (sign_timer_ == 0 && !sign_requests_.empty()) {
    sign_timer_ = poller_.at(sign_requests_.front().deadline, [this] {
      sign_timer_ = 0;
      refuse_signature();
    });
  }
}

void SessionProcess::refuse_signature() {
  // Those without a broker for too long. A forwarded one that a living broker has not answered yet is its business.
  while (!sign_requests_.empty() && !sign_requests_.front().forwarded && sign_requests_.front().deadline <= Clock::now()) {
    sign_requests_.pop_front();
    net_.send(ch::version, static_cast<std::uint16_t>(ch::Type::signature), net::Signature{});
  }
  if (!sign_requests_.empty() && sign_timer_ == 0) {
    sign_timer_ = poller_.after(std::chrono::seconds{1}, [this] {
      sign_timer_ = 0;
      refuse_signature();
    });
  }
}

void SessionProcess::kill_net() {
  if (net_pidfd_) ::syscall(SYS_pidfd_send_signal, net_pidfd_.get(), SIGKILL, nullptr, 0);
}

// --- the end --------------------------------------------------------------------------------------------------------------------

void SessionProcess::net_gone() {
  if (net_.is_open()) parted_ = net_.take();
  const bool first = phase_ != Phase::leaving;
  phase_ = Phase::leaving;
  held_.clear();
  held_bytes_ = 0;
  if (forwarding_) forwarding_->end(false);
  for (auto& c : closing_) c->connection_gone();
  for (auto& [number, c] : channels_) {
    c->closed(revoked_ ? Leaving::revoked : Leaving::gone);
    closing_.push_back(std::move(c));
  }
  channels_.clear();
  tell_channels();
  sweep_ = true;
  if (first) {
    spdlog::info("event=client_gone connection={}", facts_.id().text());
    poller_.after(hang_up_delay + std::chrono::milliseconds{facts_.hang_up_ms}, [this] {
      if (ending_tree_ || revoked_) return;  // all is ended, in its own time
      waited_ = true;
      for (auto& c : closing_) c->abandon();
      sweep_ = true;
    });
    if (facts_.kill_on_disconnect != 0 && tree_ && !revoked_) end_tree();
  }
  if (revoked_ && !ending_tree_) end_tree();
}

/// Everything that the connection started, also what has left its session or ignores signals.
void SessionProcess::end_tree() {
  ending_tree_ = true;
  for (auto& c : closing_) c->leave_hang_up();
  sweep_ = true;
  tree_->signal_all(SIGHUP);
  tree_->signal_all(SIGCONT);
  tree_->signal_all(SIGTERM);
  poller_.after(std::chrono::milliseconds{facts_.kill_ms}, [this] {
    if (!killed_) tree_->kill_all();
    killed_ = true;
    waited_ = true;
    reap();
    // Killed but for those in an uninterruptible sleep: nobody waits for them.
    poller_.after(std::chrono::seconds{1}, [this] {
      for (auto& c : closing_) c->abandon();
      sweep_ = true;
    });
  });
  watch_tree();
}

void SessionProcess::revoke(std::string_view text, std::chrono::milliseconds clear_up) {
  if (revoked_) return;
  if (phase_ == Phase::new_born || phase_ == Phase::looked_up) {
    poller_.stop();
    return;
  }
  revoked_ = true;
  phase_ = Phase::leaving;
  spdlog::warn("event=revoked connection={}", facts_.id().text());
  ch::Disconnect d;
  if (!d.text.set(text)) d.text.length = 0;
  net_.send(ch::version, static_cast<std::uint16_t>(ch::Type::disconnect), d);
  const std::chrono::milliseconds farewell{facts_.farewell_ms};
  if (clear_up > std::chrono::milliseconds{0}) return hold_still(Clock::now() + farewell, Clock::now() + std::max(farewell, clear_up));
  poller_.after(farewell, [this] {
    kill_net();
    net_gone();
  });
}

/// Many are being cut off: nothing but what the client waits for is done until `until`, whatever the programs, the relay or the forwardings have
/// to say by then. Nobody sees or reaches anything of this connection any more, and the CPU is for those who are still to be told, and for those
/// who log in.
void SessionProcess::hold_still(Clock::time_point farewell, Clock::time_point until) {
  const auto left = [](Clock::time_point t) { return static_cast<int>(std::max<std::int64_t>(0, std::chrono::ceil<std::chrono::milliseconds>(t - Clock::now()).count())); };
  for (;;) {
    pollfd p{net_.fd(), static_cast<short>(net_.blocked() ? POLLOUT : 0), 0};
    if (!net_.is_open() || (::poll(&p, 1, left(farewell)) > 0 && (p.revents & (POLLHUP | POLLERR)) != 0)) break;
    if (left(farewell) == 0) {
      kill_net();
      break;
    }
    net_.flush();
  }
  while (left(until) > 0) ::poll(nullptr, 0, left(until));
  net_gone();
}

void SessionProcess::watch_tree() {
  if (killed_) return;
  if (tree_->empty()) {
    killed_ = true;
    waited_ = true;
    return;
  }
  poller_.after(std::chrono::milliseconds{50}, [this] { watch_tree(); });
}

void SessionProcess::recorder_lost() {
  if (revoked_) return;
  spdlog::warn("event=recorder_lost_for_good connection={}", facts_.id().text());
  event("recorder_lost", "action=end");
  if (forwarding_) {
    forwarding_->end(true);  // those that a rule names in spite of enforceRecorder end with the recording that they stand beside
    // A net that was taken over keeps them, and says what it likes.
    if (forwarding_->handed())
      poller_.after(forward_end_wait, [this] {
        if (phase_ == Phase::granted) revoke("Recording is required here, and no recorder can be reached.");
      });
  }
  for (auto& [number, c] : channels_)
    c->lose_recorder("\r\nRecording is required here, and no recorder can be reached: this session ends.\r\n");
  for (auto& c : closing_) c->lose_recorder({});
  tree_->kill_all();
}

void SessionProcess::reap() {
  int status = 0;
  for (pid_t p; (p = ::waitpid(-1, &status, WNOHANG)) > 0;) {
    if (forwarding_ && forwarding_->child_exited(p)) continue;
    for (auto& [number, c] : channels_)
      if (c->pid() == p) {
        c->child_exited(status);
        break;
      }
    for (auto& c : closing_)
      if (c->pid() == p) {
        c->child_exited(status);
        break;
      }
  }
  sweep_ = true;
}

void SessionProcess::sweep() {
  sweep_ = false;
  std::erase_if(closing_, [](const auto& c) { return c->finished(); });
}

bool SessionProcess::done() const {
  if (net_.is_open()) return false;
  if ((revoked_ || ending_tree_) && !waited_) return false;
  if (forwarding_ && !forwarding_->finished()) return false;
  return closing_.empty();
}

}  // namespace postern::sshd::session
