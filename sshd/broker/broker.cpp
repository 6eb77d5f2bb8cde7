#include "sshd/broker/broker.h"

#include "auth/policy/network_file.h"
#include "auth/policy/hujson.h"
#include "base/log.h"
#include "sshd/broker/connection.h"
#include "sshd/broker/processes.h"
#include "sshd/protocol/net.h"
#include "sshd/protocol/session.h"

#include <boost/asio/buffer.hpp>
#include <boost/asio/read_until.hpp>
#include <boost/asio/streambuf.hpp>
#include <boost/asio/write.hpp>

#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pwd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>

namespace postern::sshd::broker {
namespace {

using namespace std::chrono_literals;
using boost::asio::posix::descriptor_base;
using error_code = boost::system::error_code;

/// Pairs of nodes for which a policy's own tests are tried at a load: about 0.2 s. Nobody is let in meanwhile.
constexpr std::size_t most_test_pairs = 100'000;
constexpr std::size_t largest_control_request = 4096;
constexpr int listen_backlog = 1024;

constexpr std::uint16_t number(net::Type t) { return static_cast<std::uint16_t>(t); }
constexpr std::uint16_t number(session::Type t) { return static_cast<std::uint16_t>(t); }

constexpr ZygoteProtocol net_protocol{net::version, number(net::Type::zygote_hello), number(net::Type::fork_worker), number(net::Type::zygote_ready),
                                      number(net::Type::forked), number(net::Type::worker_died)};
constexpr ZygoteProtocol session_protocol{session::version, number(session::Type::zygote_hello), number(session::Type::fork_session),
                                          number(session::Type::zygote_ready), number(session::Type::forked), number(session::Type::session_died)};

template <class Body>
std::vector<std::byte> bytes_of(const Body& body) {
  const auto span = std::as_bytes(std::span{&body, 1});
  return {span.begin(), span.end()};
}

sockaddr_storage to_sockaddr(const Endpoint& e, socklen_t& length) {
  sockaddr_storage s{};
  if (e.address.v4()) {
    auto& a = reinterpret_cast<sockaddr_in&>(s);
    a.sin_family = AF_INET;
    a.sin_port = htons(e.port);
    std::memcpy(&a.sin_addr, e.address.bytes().data(), 4);
    length = sizeof a;
  } else {
    auto& a = reinterpret_cast<sockaddr_in6&>(s);
    a.sin6_family = AF_INET6;
    a.sin6_port = htons(e.port);
    std::memcpy(&a.sin6_addr, e.address.bytes().data(), 16);
    length = sizeof a;
  }
  return s;
}

std::optional<Endpoint> to_endpoint(const sockaddr_storage& s) {
  const auto address = Address::from(s);
  if (!address) return std::nullopt;
  const auto port = s.ss_family == AF_INET ? reinterpret_cast<const sockaddr_in&>(s).sin_port : reinterpret_cast<const sockaddr_in6&>(s).sin6_port;
  return Endpoint{*address, ntohs(port)};
}

std::optional<Endpoint> local_end(int fd) {
  sockaddr_storage s{};
  socklen_t length = sizeof s;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&s), &length) != 0) return std::nullopt;
  return to_endpoint(s);
}

}  // namespace

struct Broker::Listener {
  Endpoint endpoint;
  boost::asio::posix::stream_descriptor socket;
  boost::asio::steady_timer pause;
};

Broker::Broker(boost::asio::io_context& io, Config config, std::string config_file, std::string own_dir)
    : io_{io}, config_{std::move(config)}, config_file_{std::move(config_file)}, own_dir_{std::move(own_dir)}, as_root_{::geteuid() == 0},
      registrations_pause_{io}, control_pause_{io}, child_signals_{io, SIGCHLD} {}

Broker::~Broker() = default;

Expected<Done> Broker::load_policy(bool first) {
  const auto text = read_whole_file(config_.policy.file, auth::policy::hujson::max_file_bytes);
  if (!text) return Unexpected{text.error()};
  auto loaded = auth::policy::Policy::load(*text, config_.policy.file, load_options(config_));
  if (!loaded) {
    for (const auto& p : loaded.error()) spdlog::error("event=policy_problem problem={}", safe_quoted(p.text(), 1000));
    return Unexpected{Error{EINVAL, text_of(loaded.error())}};
  }
  // The file's own assertions, on the nodes that are seen here. A new file of which one fails is not taken, as in the real service; at
  // the start the log says so: without a server nobody could come and mend it (Headscale does the same).
  const auto tests = loaded->run_tests(provider_->network(), false, most_test_pairs);
  for (const auto& p : tests.left_out) spdlog::info("event=policy_test_left_out problem={}", safe_quoted(p.text(), 1000));
  for (const auto& p : tests.failed) spdlog::error("event=policy_test_failed problem={}", safe_quoted(p.text(), 1000));
  if (!tests.failed.empty() && !first) return Unexpected{Error{EINVAL, text_of(tests.failed)}};
  policy_ = std::move(*loaded);
  policy_version_++;
  for (const auto& w : policy_->warnings()) spdlog::warn("event=policy_warning problem={}", safe_quoted(w.text(), 1000));
  spdlog::info("event=policy_loaded file={} version={} first={}", safe_quoted(config_.policy.file), policy_version_, first);
  return Done{};
}

void Broker::start(std::function<void(Expected<Done>)> ready) {
  auto provider = auth::identity::make_static_provider(config_.identity.file);
  if (!provider) {
    std::string all;
    for (const auto& p : provider.error()) all += (all.empty() ? "" : "\n") + p.text();
    return ready(Unexpected{Error{EINVAL, all}});
  }
  provider_ = std::move(*provider);
  if (auto loaded = load_policy(true); !loaded) return ready(std::move(loaded));
  auto keys = HostKeys::load_or_make(config_.host_keys.dir);
  if (!keys) return ready(Unexpected{keys.error()});
  keys_ = std::move(*keys);
  const std::string dir = config_.programs.dir.empty() ? own_dir_ : config_.programs.dir;
  auto net_program = Program::open(dir, "postern-net");
  auto session_program = Program::open(dir, "postern-session");
  if (!net_program) return ready(Unexpected{net_program.error()});
  if (!session_program) return ready(Unexpected{session_program.error()});
  net_program_ = std::move(*net_program);
  session_program_ = std::move(*session_program);

  net::ZygoteHello net_hello;
  net_hello.as_root = as_root_;
  if (as_root_) {
    const passwd* user = ::getpwnam(config_.sandbox.user.c_str());
    if (user == nullptr || user->pw_uid == 0)
      return ready(Unexpected{Error{ENOENT, "sandbox.user: there is no system user \"" + config_.sandbox.user + "\" (useradd --system --no-create-home " +
                                                config_.sandbox.user + ")"}});
    net_hello.uid = user->pw_uid;
    net_hello.gid = user->pw_gid;
  } else {
    net_hello.uid = ::getuid();
    net_hello.gid = ::getgid();
  }
  if (::mkdir(config_.sandbox.empty_root.c_str(), 0555) != 0 && errno != EEXIST)
    return ready(Unexpected{system_error("make the empty root " + config_.sandbox.empty_root)});
  // Nobody else may put something in there later.
  struct stat empty_root {};
  if (as_root_ && (::lstat(config_.sandbox.empty_root.c_str(), &empty_root) != 0 || !S_ISDIR(empty_root.st_mode) || empty_root.st_uid != 0))
    return ready(Unexpected{Error{EPERM, "sandbox.empty_root: " + config_.sandbox.empty_root + " is no folder of root's"}});
  if (as_root_ && ::chmod(config_.sandbox.empty_root.c_str(), 0555) != 0)
    return ready(Unexpected{system_error("make the empty root " + config_.sandbox.empty_root)});
  bool fits = net_hello.version_string.set(config_.ssh.version_string) && net_hello.empty_root.set(config_.sandbox.empty_root) &&
              net_hello.log_level.set(config_.log.level);
  net_hello.key_count = static_cast<std::uint32_t>(keys_->count());
  for (std::size_t i = 0; i < keys_->count(); i++) fits = fits && net_hello.keys[i].blob.set(keys_->public_blob(i));
  session::ZygoteHello session_hello;
  session_hello.as_root = as_root_;
  fits = fits && session_hello.pam_service.set(config_.pam.service) && session_hello.pam_confdir.set(config_.pam.confdir) &&
         session_hello.log_level.set(config_.log.level);
  if (!fits) return ready(Unexpected{Error{EINVAL, "a name or path in " + config_file_ + " is too long"}});

  const std::string pam_dir = config_.pam.confdir.empty() ? "/etc/pam.d" : config_.pam.confdir;
  net_zygote_ = std::make_unique<Zygote>(io_, *net_program_, net_protocol, bytes_of(net_hello), std::vector<std::string>{"/etc/ld.so.cache"},
                                         [this](std::uint64_t token, int status) { worker_died(token, status); });
  session_zygote_ = std::make_unique<Zygote>(
      io_, *session_program_, session_protocol, bytes_of(session_hello),
      std::vector<std::string>{"/etc/ld.so.cache", "/etc/nsswitch.conf", pam_dir, pam_dir + "/" + config_.pam.service, pam_dir + "/other",
                               "/usr/lib/x86_64-linux-gnu/security", "/usr/lib64/security"},
      [this](std::uint64_t, int status) {
        if (WIFSIGNALED(status) && WTERMSIG(status) != SIGKILL) {
          spdlog::error("event=session_crashed signal={}", WTERMSIG(status));
          (void)session_zygote_->replace_after_crash();
        }
      });
  reap();
  net_zygote_->start([this, ready](Expected<std::string> missing) {
    if (!missing) return ready(Unexpected{missing.error()});
    if (!missing->empty()) spdlog::warn("event=sandbox_incomplete missing={}", safe_quoted(*missing));
    session_zygote_->start([this, ready](Expected<std::string> warnings) {
      if (!warnings) return ready(Unexpected{warnings.error()});
      if (!warnings->empty()) spdlog::warn("event=session_warning text={}", safe_quoted(*warnings, 512));
      fill_pool();
      if (auto opened = open_control(); !opened) return ready(std::move(opened));
      // The zygotes stand before the first listener is open.
      if (auto opened = open_listeners(); !opened) return ready(std::move(opened));
      for (std::size_t i = 0; i < keys_->count(); i++) spdlog::info("event=host_key fingerprint={} line={}", keys_->fingerprint(i), safe_quoted(keys_->public_line(i), 2000));
      ready(Done{});
    });
  });
}

void Broker::reap() {
  child_signals_.async_wait([this](error_code ec, int) {
    if (ec) return;
    // Zygotes only: workers and sessions are the zygotes' children.
    for (pid_t pid; (pid = ::waitpid(-1, nullptr, WNOHANG)) > 0;) spdlog::debug("event=reaped pid={}", pid);
    reap();
  });
}

Expected<Done> Broker::open_listeners() {
  for (const Endpoint& wanted : config_.listen.addresses) {
    UniqueFd fd{::socket(wanted.address.v4() ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
    if (!fd) return Unexpected{system_error("listen on " + wanted.text())};
    const int one = 1;
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    // The address may come later (tailscaled starts after us): ip(7) IP_FREEBIND.
    if (wanted.address.v4()) ::setsockopt(fd.get(), IPPROTO_IP, IP_FREEBIND, &one, sizeof one);
    else {
      ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_FREEBIND, &one, sizeof one);
      ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
    }
    socklen_t length = 0;
    const sockaddr_storage s = to_sockaddr(wanted, length);
    if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&s), length) != 0 || ::listen(fd.get(), listen_backlog) != 0)
      return Unexpected{system_error("listen on " + wanted.text())};
    const Endpoint got = local_end(fd.get()).value_or(wanted);
    listeners_.push_back(std::unique_ptr<Listener>{
        new Listener{got, boost::asio::posix::stream_descriptor{io_, fd.release()}, boost::asio::steady_timer{io_}}});
    spdlog::info("event=listening address={}", got.text());
    accept_clients(*listeners_.back());
  }
  return Done{};
}

std::vector<Endpoint> Broker::listening() const {
  std::vector<Endpoint> out;
  for (const auto& l : listeners_) out.push_back(l->endpoint);
  return out;
}

void Broker::accept_clients(Listener& listener) {
  listener.socket.async_wait(descriptor_base::wait_read, [this, &listener](error_code ec) {
    if (ec || stopping_) return;
    for (int i = 0; i < 32; i++) {
      const int fd = ::accept4(listener.socket.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
      if (fd >= 0) {
        accepted(fd, listener.endpoint);
        continue;
      }
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        // Nobody can be let in now; do not spin.
        spdlog::error("event=accept_failed why={}", safe_quoted(std::strerror(errno)));
        listener.pause.expires_after(100ms);
        listener.pause.async_wait([this, &listener](error_code e) { if (!e) accept_clients(listener); });
        return;
      }
      if (errno != EINTR && errno != ECONNABORTED) break;  // EAGAIN: all taken
    }
    accept_clients(listener);
  });
}

void Broker::accepted(int raw, const Endpoint&) {
  UniqueFd fd{raw};
  sockaddr_storage s{};
  socklen_t length = sizeof s;
  if (::getpeername(fd.get(), reinterpret_cast<sockaddr*>(&s), &length) != 0) return;  // gone already
  const auto peer = to_endpoint(s);
  const auto local = local_end(fd.get());
  if (!peer || !local) return;
  const auto refuse = [&](const char* why) { spdlog::warn("event=connection_refused peer={} why={}", peer->text(), why); };
  if (const auto it = penalties_.find(peer->address); it != penalties_.end()) {
    if (it->second > std::chrono::steady_clock::now()) return refuse("penalty");
    penalties_.erase(it);
  }
  if (unauthenticated_in_all_ >= config_.limits.unauthenticated_connections) return refuse("unauthenticated_connections");
  if (const auto it = unauthenticated_.find(peer->address);
      it != unauthenticated_.end() && it->second >= config_.limits.unauthenticated_connections_per_source)
    return refuse("unauthenticated_connections_per_source");
  if (connections_.size() >= config_.limits.connections) return refuse("connections");
  unauthenticated_[peer->address]++;
  unauthenticated_in_all_++;
  const int one = 1;
  ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  ::setsockopt(fd.get(), IPPROTO_TCP, TCP_QUICKACK, &one, sizeof one);
  ::setsockopt(fd.get(), SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
  auto connection = std::make_shared<Connection>(*this, std::move(fd), *peer, *local);
  connections_.emplace(connection.get(), connection);
  connection->start();
}

void Broker::no_longer_unauthenticated(const Address& source) {
  const auto it = unauthenticated_.find(source);
  if (it == unauthenticated_.end()) return;
  unauthenticated_in_all_--;
  if (--it->second == 0) unauthenticated_.erase(it);
}

void Broker::remove(const Connection* connection) { connections_.erase(connection); }

void Broker::fill_pool() {
  // Enough for who waits, and the warm ones on top.
  const std::size_t wanted = std::min<std::size_t>(config_.limits.warm_workers + want_worker_.size(), config_.limits.warm_workers + 64);
  while (!stopping_ && pool_.size() + pool_asked_ < wanted) {
    auto pair = seqpacket_pair();
    if (!pair) return;
    pool_asked_++;
    auto end = std::make_shared<UniqueFd>(std::move(pair->first));
    auto token = std::make_shared<std::uint64_t>(0);
    *token = net_zygote_->fork(std::move(pair->second), [this, end, token](Expected<Child> child) {
      pool_asked_--;
      if (!child) {
        spdlog::error("event=fork_failed why={}", safe_quoted(child.error().doing));
        while (!want_worker_.empty()) {
          if (const auto c = want_worker_.front().lock()) c->abandon();
          want_worker_.pop_front();
        }
        return;
      }
      Worker worker{std::move(*child), std::make_unique<LocalSocket>(io_.get_executor(), std::move(*end), net::version, 16 * 1024), *token};
      while (!want_worker_.empty()) {
        const auto connection = want_worker_.front().lock();
        want_worker_.pop_front();
        if (!connection) continue;
        serving_[worker.token] = connection->peer().address;
        return connection->serve(std::move(worker));
      }
      pool_.push_back(std::move(worker));
    });
  }
}

void Broker::give_worker(std::shared_ptr<Connection> connection) {
  if (!pool_.empty()) {
    Worker worker = std::move(pool_.front());
    pool_.pop_front();
    serving_[worker.token] = connection->peer().address;
    connection->serve(std::move(worker));
  } else {
    want_worker_.push_back(connection);
  }
  fill_pool();
}

void Broker::worker_died(std::uint64_t token, int wait_status) {
  std::erase_if(pool_, [token](const Worker& w) { return w.token == token; });
  const auto it = serving_.find(token);
  if (it == serving_.end()) return fill_pool();
  const Address source = it->second;
  serving_.erase(it);
  // SIGKILL is no parser's doing: it is how we and its session end it, an administrator, or the kernel out of memory. (That we killed it,
  // too, says nothing: its end is seen here last, after its socket and its pidfd.)
  if (WIFSIGNALED(wait_status) && WTERMSIG(wait_status) != SIGKILL) {
    // A parser that crashed, or a filter that killed it: fresh addresses for the next ones, at most once a minute; beyond that the
    // source waits instead.
    spdlog::error("event=net_crashed peer={} signal={}", source.text(), WTERMSIG(wait_status));
    if (!net_zygote_->replace_after_crash()) {
      const auto now = std::chrono::steady_clock::now();
      std::erase_if(penalties_, [now](const auto& p) { return p.second <= now; });
      penalties_[source] = now + config_.limits.crash_penalty;
      spdlog::warn("event=penalty peer={} seconds={}", source.text(), std::chrono::duration_cast<std::chrono::seconds>(config_.limits.crash_penalty).count());
    } else {
      pool_.clear();  // warm ones of the old zygote share its layout; without a broker they end
      fill_pool();
    }
  }
}

void Broker::reload() {
  spdlog::info("event=reload");
  generation_++;
  if (auto nodes = provider_->reload(); !nodes)
    for (const auto& p : nodes.error()) spdlog::error("event=identity_problem kept=old problem={}", safe_quoted(p.text(), 1000));
  if (auto loaded = load_policy(false); !loaded) spdlog::error("event=policy_kept file={} why={}", safe_quoted(config_.policy.file), safe_quoted(loaded.error().doing, 2000));
  re_evaluate();
}

void Broker::re_evaluate() {
  std::vector<std::shared_ptr<Connection>> all;
  for (const auto& [_, c] : connections_) all.push_back(c);
  for (const auto& c : all) c->re_evaluate();
}

void Broker::stop() {
  stopping_ = true;
  error_code ignored;
  for (auto& l : listeners_) l->socket.close(ignored);
  if (control_) control_->close(ignored);
  if (registrations_) registrations_->close(ignored);
  for (const auto& path : sockets_to_remove_) ::unlink(path.c_str());
  std::vector<std::shared_ptr<Connection>> all;
  for (const auto& [_, c] : connections_) all.push_back(c);
  for (const auto& c : all) c->abandon();
  pool_.clear();
}

Expected<UniqueFd> Broker::local_listener(const std::string& path, int type) {
  UniqueFd fd{::socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  if (!fd) return Unexpected{system_error("listen on " + path)};
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return Unexpected{system_error("listen on " + path, ENAMETOOLONG)};
  std::memcpy(address.sun_path, path.data(), path.size());
  // A socket that nobody serves any more is left by a broker that was killed; one that is served is another broker's.
  // EAGAIN: somebody listens and is busy (connect(2)); a blocking one would wait for it.
  const UniqueFd probe{::socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  if (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 || errno == EAGAIN)
    return Unexpected{Error{EADDRINUSE, "listen on " + path + ": another posternd serves it"}};
  struct stat st {};
  if (::lstat(path.c_str(), &st) == 0 && S_ISSOCK(st.st_mode)) ::unlink(path.c_str());
  const mode_t before = ::umask(0177);
  const int bound = ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  const int error = errno;
  ::umask(before);
  if (bound != 0) return Unexpected{system_error("listen on " + path, error)};
  if (::listen(fd.get(), 128) != 0) return Unexpected{system_error("listen on " + path)};
  sockets_to_remove_.insert(path);
  return fd;
}

Expected<Done> Broker::open_control() {
  auto registration = local_listener(config_.control.registration_socket, SOCK_SEQPACKET);
  if (!registration) return Unexpected{registration.error()};
  registrations_ = std::make_unique<boost::asio::posix::stream_descriptor>(io_, registration->release());
  accept_registrations();
  auto control = local_listener(config_.control.socket, SOCK_STREAM);
  if (!control) return Unexpected{control.error()};
  control_ = std::make_unique<boost::asio::local::stream_protocol::acceptor>(io_);
  control_->assign(boost::asio::local::stream_protocol{}, control->release());
  accept_control();
  return Done{};
}

// Only root, or the user that runs this broker: unix(7) SO_PEERCRED.
static bool peer_is_us(int fd, pid_t* pid = nullptr) {
  ucred who{};
  socklen_t length = sizeof who;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &length) != 0) return false;
  if (pid != nullptr) *pid = who.pid;
  return who.uid == 0 || who.uid == ::geteuid();
}

void Broker::accept_registrations() {
  registrations_->async_wait(descriptor_base::wait_read, [this](error_code ec) {
    if (ec || stopping_) return;
    for (;;) {
      UniqueFd fd{::accept4(registrations_->native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)};
      if (fd) {
        registration(std::move(fd));
        continue;
      }
      if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) break;
      spdlog::error("event=accept_failed why={}", safe_quoted(std::strerror(errno)));
      registrations_pause_.expires_after(100ms);
      registrations_pause_.async_wait([this](error_code e) { if (!e && !stopping_) accept_registrations(); });
      return;
    }
    accept_registrations();
  });
}

void Broker::registration(UniqueFd fd) {
  pid_t pid = -1;
  if (!peer_is_us(fd.get(), &pid)) {
    spdlog::warn("event=registration_refused why=not_root pid={}", pid);
    return;
  }
  auto socket = std::make_shared<std::unique_ptr<LocalSocket>>(std::make_unique<LocalSocket>(io_.get_executor(), std::move(fd), session::version, 64 * 1024));
  // The handlers hold the socket until it has said who it is, or went.
  (*socket)->start(
      [this, socket, pid](Message message) {
        const auto refuse = [&](const std::string& why) {
          spdlog::warn("event=registration_refused why={} pid={}", why, pid);
          (*socket)->close();
        };
        const auto body = message.body<session::Register>();
        if (static_cast<session::Type>(message.type) != session::Type::register_session || !body || message.fds.size() != 3) return refuse("malformed");
        const auto facts = read_facts(message.fds[0].get());
        if (!facts) return refuse(safe_quoted(facts.error().doing));
        // Who speaks is who it says, by the kernel's word (SO_PEERCRED, the pidfd): it answers with its life for the connection.
        if (pid_of(message.fds[1].get()) != pid || body->session_pid != pid) return refuse("pidfd");
        if (!pid_of(message.fds[2].get())) return refuse("net_pidfd");
        for (const auto& [_, c] : connections_) {
          if (c->id() != facts->id().text()) continue;
          // The same process that lost only its socket to us comes back; nobody else may have that name.
          if (c->session_pid() != pid || !c->comes_back()) return refuse("known_already");
          (*socket)->send(number(session::Type::registered), session::Registered{1});
          return c->session_returns(std::move(*socket));
        }
        (*socket)->send(number(session::Type::registered), session::Registered{1});
        adopt(std::make_shared<Connection>(*this, *facts, std::move(*socket), std::move(message.fds[1]), std::move(message.fds[2])));
      },
      [socket](const std::string&) {});
}

void Broker::adopt(std::shared_ptr<Connection> connection) {
  connections_.emplace(connection.get(), connection);
  connection->start_registered();
  connection->re_evaluate();
}

struct Broker::ControlClient : std::enable_shared_from_this<ControlClient> {
  explicit ControlClient(Broker& b, boost::asio::local::stream_protocol::socket s) : broker{b}, socket{std::move(s)}, buffer{largest_control_request} {}
  Broker& broker;
  boost::asio::local::stream_protocol::socket socket;
  boost::asio::streambuf buffer;
  std::string answer;

  void read() {
    boost::asio::async_read_until(socket, buffer, '\n', [self = shared_from_this()](error_code ec, std::size_t n) {
      if (ec) return;
      std::string line(n, '\0');
      self->buffer.sgetn(line.data(), static_cast<std::streamsize>(n));
      self->answer = self->broker.answer_control(line) + "\n";
      boost::asio::async_write(self->socket, boost::asio::buffer(self->answer), [self](error_code e, std::size_t) {
        if (!e) self->read();
      });
    });
  }
};

void Broker::accept_control() {
  control_->async_accept([this](error_code ec, boost::asio::local::stream_protocol::socket socket) {
    if (ec == boost::asio::error::operation_aborted || stopping_) return;
    if (ec) {  // no descriptors left, most likely: the socket must serve again when there are
      spdlog::error("event=accept_failed why={}", safe_quoted(ec.message()));
      control_pause_.expires_after(100ms);
      control_pause_.async_wait([this](error_code e) { if (!e && !stopping_) accept_control(); });
      return;
    }
    if (peer_is_us(socket.native_handle())) std::make_shared<ControlClient>(*this, std::move(socket))->read();
    accept_control();
  });
}

std::string Broker::answer_control(const std::string& request) {
  using json = nlohmann::json;
  const json q = json::parse(request, nullptr, false);
  const auto refuse = [](const std::string& why) { return json{{"error", why}}.dump(); };
  if (!q.is_object() || !q.contains("command") || !q["command"].is_string()) return refuse("not a request");
  const std::string command = q["command"];
  const auto text = [](std::string_view s) { return std::string{s}; };
  if (command == "status") {
    json listening_list = json::array();
    for (const auto& e : listening()) listening_list.push_back(e.text());
    json keys = json::array();
    for (std::size_t i = 0; i < keys_->count(); i++) keys.push_back({{"fingerprint", keys_->fingerprint(i)}, {"line", keys_->public_line(i)}});
    return json{{"version", POSTERN_VERSION}, {"pid", ::getpid()}, {"listening", listening_list}, {"policy_version", policy_version_},
                {"connections", connections_.size()}, {"warm_workers", pool_.size()}, {"host_keys", keys}}
        .dump();
  }
  if (command == "ls") {
    json list = json::array();
    for (const auto& [_, c] : connections_) {
      if (!c->authenticated()) continue;
      const ConnectionFacts& f = c->facts();
      json recorders = json::array();
      for (std::uint32_t i = 0; i < f.recorder_count; i++) recorders.push_back(text(f.recorders[i].get()));
      list.push_back({{"connection", c->id()}, {"peer", c->peer().text()}, {"node", text(f.node_name.get())}, {"user", text(f.login.get())},
                      {"tags", text(f.tags.get())}, {"ssh_user", text(f.ssh_user.get())}, {"local_user", text(f.local_user.get())}, {"since", f.accepted_at},
                      {"rule", text(f.rule.get())}, {"channels", c->channels()}, {"recorded", f.record != 0}, {"enforced", f.enforce_recorder != 0},
                      {"recorders", recorders}, {"session_pid", c->session_pid()}, {"net_pid", c->net_pid()}});
    }
    return json{{"connections", list}}.dump(-1, ' ', false, json::error_handler_t::replace);
  }
  // For `postern policy --network live`: the line is a network file (auth/policy/network_file.h).
  if (command == "network") return auth::policy::network_text({provider_->network(), config_.policy.domains, config_.policy.session_capability, config_.policy.require_network_rule});
  if (command == "kill") {
    const bool all = q.value("all", json(false)) == json(true);
    const std::string id = q.contains("connection") && q["connection"].is_string() ? q["connection"].get<std::string>() : "";
    if (!all && id.empty()) return refuse("kill needs \"connection\" or \"all\"");
    std::vector<std::shared_ptr<Connection>> hit;
    for (const auto& [_, c] : connections_)
      if (c->authenticated() && (all || c->id() == id)) hit.push_back(c);
    for (const auto& c : hit) c->revoke("This session was ended by the administrator.", "sessions kill");
    return json{{"killed", hit.size()}}.dump();
  }
  return refuse("unknown command");
}

}  // namespace postern::sshd::broker
