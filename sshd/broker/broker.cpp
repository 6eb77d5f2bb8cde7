#include "sshd/broker/broker.h"

#include "auth/identity/socket_owner.h"
#include "auth/policy/network_file.h"
#include "base/log.h"
#include "sshd/broker/connection.h"
#include "sshd/broker/processes.h"
#include "sshd/protocol/net.h"
#include "sshd/protocol/session.h"

#include <boost/asio/buffer.hpp>
#include <boost/asio/post.hpp>
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

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <unordered_set>

namespace postern::sshd::broker {
namespace {

using namespace std::chrono_literals;
using boost::asio::posix::descriptor_base;
using error_code = boost::system::error_code;

/// Live connections that are looked at again before others get their turn: a login waits for no more of them.
constexpr std::size_t re_evaluated_at_once = 16;
/// Ends of connections after a change: so many at once, then so many a second. To cut off one client costs 1 ms of CPU time, to end its programs
/// and to clear up 2 to 4 ms: 1,000 of them shall be cut off within a second on two cores, and those who log in meanwhile shall hardly notice
/// (bench/revocation).
constexpr std::size_t revoked_at_once = 16;
constexpr double revoked_per_second = 1200;
constexpr std::chrono::milliseconds clear_up_after{1000}, clear_up_time{4};
constexpr auto revoke_pause = 5ms;
constexpr auto listen_again_after = 2s;
constexpr std::chrono::milliseconds socket_owner_time{100};
constexpr auto ask_again_after = 1s, read_again_after = 1s;
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
  Wanted wanted;
  Endpoint endpoint;
  boost::asio::posix::stream_descriptor socket;
  boost::asio::steady_timer pause;
};

Broker::Broker(boost::asio::io_context& io, Config config, std::string config_file, std::string own_dir)
    : io_{io}, config_{std::move(config)}, config_file_{std::move(config_file)}, own_dir_{std::move(own_dir)}, as_root_{::geteuid() == 0},
      rules_{config_}, audit_{config_.audit}, expiry_{io}, listen_again_{io}, read_again_{io}, again_{io}, revoke_pause_{io}, takeover_{config_.listen.nft, config_.listen.nft_timeout, std::filesystem::path{config_.control.socket}.replace_filename("takeover")}, registrations_pause_{io}, control_pause_{io}, child_signals_{io, SIGCHLD}, penalties_{config_.limits.penalties}, turned_away_{io.get_executor(), config_.limits.refusal_time} {}

Broker::~Broker() = default;

Expected<std::unique_ptr<auth::identity::Provider>, std::vector<Problem>> make_provider(boost::asio::io_context& io, const Config& config) {
  if (config.identity.provider == "tailscaled") return auth::identity::make_tailscaled_provider(io, config.tailscaled);
  if (config.identity.provider == "wireguard") return auth::identity::make_wireguard_provider(io, config.wireguard);
  return auth::identity::make_static_provider(config.identity.file);
}

void Broker::start(std::function<void(Expected<Done>)> ready) {
  auto provider = make_provider(io_, config_);
  if (!provider) return ready(Unexpected{Error{EINVAL, text_of(provider.error())}});
  provider_ = std::move(*provider);
  provider_->start(
      [this, ready](Expected<Done> known) {
        if (!known) return ready(std::move(known));
        set_up(ready);
      },
      [this] { network_changed(); });
}

void Broker::set_up(std::function<void(Expected<Done>)> ready) {
  if (auto opened = audit_.open(); !opened) return ready(std::move(opened));
  if (auto loaded = rules_.load(provider_->network(), true); !loaded) return ready(std::move(loaded));
  if (auto loaded = load_keys(); !loaded) return ready(std::move(loaded));
  const std::string dir = config_.programs.dir.empty() ? own_dir_ : config_.programs.dir;
  auto net_program = Program::open(dir, "postern-net");
  auto session_program = Program::open(dir, "postern-session");
  if (!net_program) return ready(Unexpected{net_program.error()});
  if (!session_program) return ready(Unexpected{session_program.error()});
  net_program_ = std::move(*net_program);
  session_program_ = std::move(*session_program);

  net::ZygoteHello& net_hello = net_hello_;
  net_hello.as_root = as_root_;
  const std::string& algorithms = config_.ssh.algorithms;
  net_hello.algorithms = algorithms == "strict" ? net::Algorithms::strict : algorithms == "legacy" ? net::Algorithms::legacy : net::Algorithms::compatible;
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
      if (config_.listen.takeover == "nft") {  // before it is set: no change is missed
        if (auto notices = RulesetWatch::notices()) ruleset_watch_ = std::make_unique<RulesetWatch>(io_, std::move(*notices), [this] { look_at_takeover(); });
        else spdlog::warn("event=takeover_not_watched why={}", safe_quoted(notices.error().doing, 1000));
      }
      if (auto opened = update_listeners(true); !opened) return ready(std::move(opened));
      serving_ = true;
      clock_watch_ = std::make_unique<ClockWatch>(io_, [this] { clock_changed(); });
      if (config_.policy.watch && config_.policy.has(PolicySource::file)) {
        policy_watch_ = std::make_unique<FileWatch>(io_, config_.policy.file, [this] { policy_file_changed(); });
        policy_file_changed();  // since it was read, before the zygotes started
      }
      wait_for_expiry();
      for (std::size_t i = 0; i < keys_->count(); i++) log_key(i);
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

Expected<Done> Broker::load_keys() {
  auto keys = config_.host_keys.files.empty() ? HostKeys::load_or_make(config_.host_keys.dir) : HostKeys::load(config_.host_keys.files);
  if (!keys) return Unexpected{keys.error()};
  keys_ = std::move(*keys);
  net_hello_.key_count = 0;
  for (std::size_t i = 0; i < keys_->count(); i++) {
    if (keys_->use(i) == HostKeys::Use::retired) continue;
    if (net_hello_.key_count == net::max_host_keys) return Unexpected{Error{E2BIG, "too many host keys"}};
    (void)net_hello_.keys[net_hello_.key_count++].blob.set(keys_->public_blob(i));
  }
  return Done{};
}

Expected<Done> Broker::rotate_keys(bool finish) {
  if (!config_.host_keys.files.empty())
    return Unexpected{Error{EINVAL, "host_keys.files names the keys: add the new one there, behind the old one, and let clients learn it; then take the old one away"}};
  auto done = finish ? HostKeys::finish_rotation(config_.host_keys.dir) : HostKeys::prepare_rotation(config_.host_keys.dir);
  if (!done) return done;
  if (auto loaded = load_keys(); !loaded) return loaded;
  for (std::size_t i = 0; i < keys_->count(); i++) log_key(i);
  net_zygote_->replace(bytes_of(net_hello_));
  pool_.clear();  // workers that know the keys of before; without a broker they end
  fill_pool();
  return Done{};
}

void Broker::log_key(std::size_t i) const {
  static constexpr const char* uses[] = {"offered", "announced", "retired"};
  spdlog::info("event=host_key fingerprint={} use={} line={}", keys_->fingerprint(i), uses[static_cast<std::size_t>(keys_->use(i))], safe_quoted(keys_->public_line(i), 2000));
}

std::vector<Broker::Wanted> Broker::wanted_listeners() const {
  std::vector<Endpoint> dialled = config_.listen.addresses;
  if (dialled.empty())
    for (const auto& address : provider_->own_addresses()) dialled.push_back({address, config_.listen.port});
  std::vector<Wanted> all;
  for (const auto& e : dialled) all.push_back({e, config_.listen.takeover == "nft" ? Endpoint{e.address, config_.listen.takeover_port} : e});
  return all;
}

Expected<Done> Broker::update_listeners(bool first) {
  const auto wanted = wanted_listeners();
  listen_again_.cancel();
  error_code ignored;
  std::erase_if(listeners_, [&](const auto& l) {
    if (std::find(wanted.begin(), wanted.end(), l->wanted) != wanted.end()) return false;
    spdlog::info("event=not_listening address={}", l->endpoint.text());
    l->socket.close(ignored);
    l->pause.cancel();
    return true;
  });
  bool again = false;
  for (const auto& w : wanted) {
    if (std::any_of(listeners_.begin(), listeners_.end(), [&](const auto& l) { return l->wanted == w; })) continue;
    auto opened = open_listener(w);
    if (!opened && first) return opened;
    if (!opened) spdlog::error("event=listen_failed why={}", safe_quoted(opened.error().doing, 1000));
    again = again || !opened;
  }
  if (wanted.empty()) spdlog::warn("event=not_listening why=\"the network has given this machine no address yet\"");
  const bool takes_over = config_.listen.takeover == "nft";
  std::vector<Takeover::Redirect> redirects;
  if (takes_over)
    for (const auto& l : listeners_) redirects.push_back({l->wanted.dialled, l->endpoint.port});
  if (auto set = takeover_.set(redirects); !set) {
    if (first && takes_over) return set;
    spdlog::error("event={} why={}", takes_over ? "takeover_failed" : "takeover_not_removed", safe_quoted(set.error().doing, 1000));
    again = true;
  }
  if (again) {
    listen_again_.expires_after(listen_again_after);
    listen_again_.async_wait([this](error_code ec) { if (!ec && !stopping_) (void)update_listeners(false); });
  }
  return Done{};
}

void Broker::look_at_takeover() {
  if (!serving_ || stopping_) return;
  const auto stands = takeover_.stands();
  if (!stands) return spdlog::warn("event=takeover_not_known why={}", safe_quoted(stands.error().doing, 1000));
  if (*stands) return;
  spdlog::warn("event=takeover_lost table={} why=\"another program removed or changed it; it is set again\"", Takeover::table);
  (void)update_listeners(false);
}

Expected<Done> Broker::open_listener(const Wanted& wanted) {
  const Endpoint& at = wanted.bound;
  UniqueFd fd{::socket(at.address.v4() ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  if (!fd) return Unexpected{system_error("listen on " + at.text())};
  const int one = 1;
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  // The address may come later (tailscaled starts after us): ip(7) IP_FREEBIND.
  if (at.address.v4()) ::setsockopt(fd.get(), IPPROTO_IP, IP_FREEBIND, &one, sizeof one);
  else {
    ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_FREEBIND, &one, sizeof one);
    ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
  }
  socklen_t length = 0;
  const sockaddr_storage s = to_sockaddr(at, length);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&s), length) != 0 || ::listen(fd.get(), listen_backlog) != 0) {
    auto error = system_error("listen on " + at.text());
    // A server on 0.0.0.0 has every address (ip(7)), SO_REUSEADDR or not.
    if (error.code == EADDRINUSE)
      error.doing += ". Another server has this port, often an sshd on all addresses. Ways out: give that one its own addresses (ListenAddress in sshd_config(5)); "
                     "or [listen] takeover = \"nft\", which redirects this address's port to us; or another port here (docs/SETTINGS.md, [listen])";
    return Unexpected{std::move(error)};
  }
  const Endpoint got = local_end(fd.get()).value_or(at);
  listeners_.push_back(std::shared_ptr<Listener>{new Listener{wanted, got, boost::asio::posix::stream_descriptor{io_, fd.release()}, boost::asio::steady_timer{io_}}});
  spdlog::info("event=listening address={}", got.text());
  accept_clients(listeners_.back());
  return Done{};
}

std::vector<Endpoint> Broker::listening() const {
  std::vector<Endpoint> out;
  for (const auto& l : listeners_) out.push_back(l->endpoint);
  return out;
}

void Broker::accept_clients(const std::shared_ptr<Listener>& listener) {
  listener->socket.async_wait(descriptor_base::wait_read, [this, listener](error_code ec) {
    if (ec || stopping_ || !listener->socket.is_open()) return;
    for (int i = 0; i < 32; i++) {
      const int fd = ::accept4(listener->socket.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
      if (fd >= 0) {
        accepted(fd, listener->wanted.dialled.port);
        continue;
      }
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        // Nobody can be let in now; do not spin.
        spdlog::error("event=accept_failed why={}", safe_quoted(std::strerror(errno)));
        listener->pause.expires_after(100ms);
        listener->pause.async_wait([this, listener](error_code e) { if (!e) accept_clients(listener); });
        return;
      }
      if (errno != EINTR && errno != ECONNABORTED) break;  // EAGAIN: all taken
    }
    accept_clients(listener);
  });
}

/// How long a network that is gone goes unnoticed (tcp(7)).
void Broker::set_patience(int fd) const {
  constexpr int probes = 4;
  const auto option = [fd](int level, int name, int value) { ::setsockopt(fd, level, name, &value, sizeof value); };
  const auto seconds = [](std::chrono::milliseconds t) { return static_cast<int>(std::max<std::int64_t>(1, (t.count() + 999) / 1000)); };
  if (const auto idle = config_.ssh.tcp_keepalive; idle.count() > 0) {
    option(SOL_SOCKET, SO_KEEPALIVE, 1);
    option(IPPROTO_TCP, TCP_KEEPIDLE, std::min(seconds(idle), 32767));
    option(IPPROTO_TCP, TCP_KEEPINTVL, std::min(seconds(idle / probes), 32767));
    option(IPPROTO_TCP, TCP_KEEPCNT, probes);  // the user time-out takes its place where there is one
  }
  if (const auto limit = config_.ssh.tcp_user_timeout; limit.count() > 0) option(IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(limit.count()));
}

void Broker::turn_away(UniqueFd client, std::string_view reason) { turned_away_.add(std::move(client), refusal(config_.ssh.version_string, reason)); }

void Broker::accepted(int raw, std::uint16_t dialled_port) {
  UniqueFd fd{raw};
  sockaddr_storage s{};
  socklen_t length = sizeof s;
  if (::getpeername(fd.get(), reinterpret_cast<sockaddr*>(&s), &length) != 0) return;  // gone already
  const auto peer = to_endpoint(s);
  auto local = local_end(fd.get());
  if (!peer || !local) return;
  const bool known_proxy = is_networks_own(fd.get(), *peer, *local);
  if (dialled_port != 0) local->port = dialled_port;  // behind a redirect clients know that one
  const auto now = std::chrono::steady_clock::now();
  const auto refuse = [&](const char* why, std::string_view text) {
    if (const auto left_out = refusals_logged_.pass(now)) spdlog::warn("event=connection_refused peer={} why={} left_out={}", peer->text(), why, *left_out), audit_.tell("refused", {{"verdict", "deny"}, {"peer", peer->text()}, {"server", local->text()}, {"why", why}, {"left_out", *left_out == 0 ? "" : std::to_string(*left_out)}});
    turn_away(std::move(fd), text);
  };
  const std::string source = source_of(self(peer->address), peer->address);
  if (!known_proxy) return refuse("not_the_networks_proxy", "this network does not know " + peer->address.text());
  if (penalties_.refused(source, now)) return refuse("penalty", "too many failed attempts from here; try again later");
  if (unauthenticated_in_all_ >= config_.limits.unauthenticated_connections) return refuse("unauthenticated_connections", "too many connections are logging in; try again later");
  if (const auto it = unauthenticated_.find(source);
      it != unauthenticated_.end() && it->second >= config_.limits.unauthenticated_connections_per_source)
    return refuse("unauthenticated_connections_per_source", "too many connections from here are logging in; try again later");
  if (connections_.size() >= config_.limits.connections) return refuse("connections", "too many connections; try again later");
  unauthenticated_[source]++;
  unauthenticated_in_all_++;
  const int one = 1;
  ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  ::setsockopt(fd.get(), IPPROTO_TCP, TCP_QUICKACK, &one, sizeof one);
  set_patience(fd.get());
  auto connection = std::make_shared<Connection>(*this, std::move(fd), *peer, *local, source);
  connections_.emplace(connection.get(), connection);
  connection->start();
}

void Broker::punish(const Address& peer, const std::string& source, Offence offence) {
  const auto& exempt = config_.limits.penalty_exempt;
  // From this machine itself: also a peer whom a proxy stands for (userspace networking) and of whom it is not known yet who it is.
  const auto own = provider_->own_addresses();
  if (std::find(own.begin(), own.end(), peer) != own.end() && source == source_of(self(peer), peer)) return;
  if (std::any_of(exempt.begin(), exempt.end(), [&](const Prefix& p) { return p.contains(peer); })) return;
  if (const auto refused = penalties_.add(source, offence, std::chrono::steady_clock::now()))
    spdlog::warn("event=penalty peer={} source={} why={} seconds={}", peer.text(), safe_quoted(source), name_of(offence), std::chrono::ceil<std::chrono::seconds>(*refused).count());
}

bool Broker::is_networks_own(int fd, const Endpoint& peer, const Endpoint& local) const {
  if (!provider_->behind_proxy()) return true;
  const auto own = provider_->own_addresses();
  if (std::find(own.begin(), own.end(), peer.address) == own.end()) return true;  // the provider says that it is a stranger
  const auto user = provider_->proxy_user();
  const auto owner = auth::identity::socket_owner(peer, local, socket_owner_time);
  if (!owner) spdlog::warn("event=peer_not_told why={}", safe_quoted(owner.error().doing, 400));
  // Last: as long as our end is connected nobody else can be at the other (one bound to an interface could have taken its place).
  tcp_info info{};
  socklen_t size = sizeof info;
  return user && owner && *owner && **owner == *user && ::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0 && info.tcpi_state == TCP_ESTABLISHED;
}

bool Broker::count_as(std::string& counted, const Node& node, const Address& peer) {
  const std::string source = source_of(&node, peer);
  if (source == counted) return true;
  const auto now = std::chrono::steady_clock::now();
  const auto it = unauthenticated_.find(source);
  const bool full = it != unauthenticated_.end() && it->second >= config_.limits.unauthenticated_connections_per_source;
  if (full || penalties_.refused(source, now)) return false;
  no_longer_unauthenticated(counted);
  counted = source;
  unauthenticated_[source]++;
  unauthenticated_in_all_++;
  return true;
}

void Broker::no_longer_unauthenticated(const std::string& source) {
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
      if (const auto connection = next_in_line()) {
        served_[worker.token] = connection->peer().address;
        connection->serve(std::move(worker));
        return fill_pool();  // more than 64 may wait: without this the rest waited until somebody else came
      }
      pool_.push_back(std::move(worker));
    });
  }
}

std::shared_ptr<Connection> Broker::next_in_line() {
  std::erase_if(want_worker_, [](const auto& c) { return c.expired(); });
  const auto held = [this](const std::weak_ptr<Connection>& c) {
    const auto connection = c.lock();
    const auto it = connection ? unauthenticated_.find(connection->counted_as()) : unauthenticated_.end();
    return it == unauthenticated_.end() ? 0 : it->second;
  };
  auto at = want_worker_.end();
  std::uint32_t least = 0;
  for (auto it = want_worker_.begin(); it != want_worker_.end(); ++it)
    if (const auto n = held(*it); at == want_worker_.end() || n < least) {
      at = it;
      least = n;
    }
  if (at == want_worker_.end()) return nullptr;
  const auto next = at->lock();
  want_worker_.erase(at);
  return next;
}

void Broker::give_worker(std::shared_ptr<Connection> connection) {
  if (!pool_.empty()) {
    Worker worker = std::move(pool_.front());
    pool_.pop_front();
    served_[worker.token] = connection->peer().address;
    connection->serve(std::move(worker));
  } else {
    want_worker_.push_back(connection);
  }
  fill_pool();
}

void Broker::worker_died(std::uint64_t token, int wait_status) {
  std::erase_if(pool_, [token](const Worker& w) { return w.token == token; });
  const auto it = served_.find(token);
  if (it == served_.end()) return fill_pool();
  const Address source = it->second;
  served_.erase(it);
  // SIGKILL is no parser's doing: it is how we and its session end it, an administrator, or the kernel out of memory. (That we killed it,
  // too, says nothing: its end is seen here last, after its socket and its pidfd.)
  if (WIFSIGNALED(wait_status) && WTERMSIG(wait_status) != SIGKILL) {
    // A parser that crashed, or a filter that killed it: fresh addresses for the next ones, at most once a minute; beyond that the
    // source waits instead.
    spdlog::error("event=net_crashed peer={} signal={}", source.text(), WTERMSIG(wait_status));
    if (!net_zygote_->replace_after_crash()) {
      penalties_.refuse(source_of(self(source), source), config_.limits.crash_penalty, std::chrono::steady_clock::now());
      spdlog::warn("event=penalty peer={} why=crash seconds={}", source.text(), std::chrono::duration_cast<std::chrono::seconds>(config_.limits.crash_penalty).count());
    } else {
      pool_.clear();  // warm ones of the old zygote share its layout; without a broker they end
      fill_pool();
    }
  }
}

void Broker::reload() {
  spdlog::info("event=reload");
  if (auto opened = audit_.open(); !opened) spdlog::error("event=audit_file_kept why={}", safe_quoted(opened.error().doing));
  if (auto nodes = provider_->reload(); !nodes)
    for (const auto& p : nodes.error()) spdlog::error("event=identity_problem kept=old problem={}", safe_quoted(p.text(), 1000));
  if (auto loaded = rules_.load(provider_->network(), false); !loaded)
    spdlog::error("event=policy_kept file={} why={}", safe_quoted(config_.policy.file), safe_quoted(loaded.error().doing, 2000));
  look_at_takeover();
  judge_again();
}

void Broker::policy_file_changed() {
  if (stopping_ || !rules_.file_changed()) return;  // a SIGHUP was faster
  spdlog::info("event=policy_file_changed file={}", safe_quoted(config_.policy.file));
  if (auto loaded = rules_.load(provider_->network(), false); !loaded) {
    // No mistake in the file but a lack of something that passes: nobody says when.
    if (const int code = loaded.error().code; code == EMFILE || code == ENFILE || code == ENOMEM || code == EIO) {
      read_again_.expires_after(read_again_after);
      read_again_.async_wait([this](error_code ec) { if (!ec) policy_file_changed(); });
    }
    return spdlog::error("event=policy_kept file={} why={}", safe_quoted(config_.policy.file), safe_quoted(loaded.error().doing, 2000));
  }
  judge_again();
}

void Broker::network_changed() {
  if (!serving_ || stopping_) return;
  spdlog::debug("event=network_changed");
  (void)update_listeners(false);
  judge_again();
}

void Broker::clock_changed() {
  if (stopping_) return;
  spdlog::info("event=clock_changed");
  provider_->clock_changed();
  judge_again();
}

void Broker::judge_again() {
  generation_++;
  wait_for_expiry();
  re_evaluate();
}

void Broker::wait_for_expiry() {
  expiry_.cancel();
  const auto when = rules_.next_expiry(*provider_);
  if (!when) return;
  // A timer of a steady clock; a step of the wall clock is met by clock_changed(), where it cannot be watched by the hourly look.
  const auto left = std::min<std::chrono::system_clock::duration>(*when - std::chrono::system_clock::now(), 1h);
  expiry_.expires_after(std::max<std::chrono::system_clock::duration>(left, 0ms) + 1ms);
  expiry_.async_wait([this](error_code ec) { if (!ec && !stopping_) judge_again(); });
}

void Broker::re_evaluate() {
  decltype(to_ask_again_) all;
  for (const auto& [key, c] : connections_) all.emplace(c.get(), c);
  re_evaluate(all);
}

void Broker::re_evaluate(const std::unordered_map<const Connection*, std::weak_ptr<Connection>>& some) {
  // Who waits keeps its place: changes that come faster than all can be looked at would else reach the first ones only.
  std::unordered_set<const Connection*> waiting;
  for (const auto& c : to_re_evaluate_) waiting.insert(c.lock().get());
  for (const auto& [key, c] : some)
    if (!waiting.contains(key)) to_re_evaluate_.push_back(c);
  if (std::exchange(re_evaluating_, true)) return;
  re_evaluate_some();
}

void Broker::re_evaluate_some() {
  for (std::size_t i = 0; i < re_evaluated_at_once && !to_re_evaluate_.empty(); i++) {
    const auto c = to_re_evaluate_.front().lock();
    to_re_evaluate_.pop_front();
    if (c) c->re_evaluate();
  }
  re_evaluating_ = !to_re_evaluate_.empty();
  if (re_evaluating_) boost::asio::post(io_, [this] { re_evaluate_some(); });
}

void Broker::ask_again(const std::shared_ptr<Connection>& connection) {
  to_ask_again_.emplace(connection.get(), connection);  // once, however often it could not be judged meanwhile
  if (to_ask_again_.size() > 1) return;
  again_.expires_after(ask_again_after);
  again_.async_wait([this](error_code ec) {
    const auto all = std::exchange(to_ask_again_, {});
    if (ec || stopping_) return;
    spdlog::debug("event=asking_again connections={}", all.size());
    re_evaluate(all);
  });
}

void Broker::cut_off(const std::shared_ptr<Connection>& connection, std::string why) {
  to_cut_off_.push_back({connection, std::move(why)});
  if (!std::exchange(cutting_off_, true)) cut_off_later();
}

void Broker::cut_off_later() {
  revoke_pause_.expires_after(revoke_pause);
  revoke_pause_.async_wait([this](error_code ec) { if (!ec) cut_off_some(); });
}

void Broker::cut_off_some() {
  const auto now = std::chrono::steady_clock::now();
  revoke_tokens_ = std::min<double>(revoked_at_once, revoke_tokens_ + std::chrono::duration<double>(now - revoke_refilled_).count() * revoked_per_second);
  revoke_refilled_ = now;
  while (revoke_tokens_ >= 1 && !to_cut_off_.empty()) {
    const auto next = std::move(to_cut_off_.front());
    to_cut_off_.pop_front();
    if (const auto c = next.connection.lock()) c->revoke("Access revoked.", next.why);
  }
  cutting_off_ = !to_cut_off_.empty();
  if (cutting_off_) cut_off_later();
}

std::chrono::milliseconds Broker::count_revocation() {
  revoke_tokens_ -= 1;
  const auto now = std::chrono::steady_clock::now();
  const bool many = to_cut_off_.size() >= revoked_at_once;
  cleared_up_ = std::max(cleared_up_, many ? now : now - clear_up_time * static_cast<int>(revoked_at_once)) + clear_up_time;
  if (!many && cleared_up_ <= now) return {};
  return clear_up_after + std::max(0ms, std::chrono::ceil<std::chrono::milliseconds>(cleared_up_ - now));
}

void Broker::stop() {
  stopping_ = true;
  error_code ignored;
  for (auto& l : listeners_) l->socket.close(ignored);
  policy_watch_.reset();
  expiry_.cancel();
  listen_again_.cancel();
  revoke_pause_.cancel();
  again_.cancel();
  read_again_.cancel();
  ruleset_watch_.reset();
  clock_watch_.reset();
  if (auto removed = takeover_.set({}); !removed) spdlog::error("event=takeover_not_removed why={}", safe_quoted(removed.error().doing, 1000));
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
    json listening_list = json::array(), dialled = json::array();
    for (const auto& e : listening()) listening_list.push_back(e.text());
    // What clients connect to: before a redirect, and one by one what "any address" stands for.
    for (const auto& l : listeners_) {
      const Endpoint at{l->wanted.dialled.address, l->wanted.dialled.port != 0 ? l->wanted.dialled.port : l->endpoint.port};
      if (!at.address.is_unspecified()) dialled.push_back(at.text());
      else
        for (const auto& address : provider_->own_addresses()) dialled.push_back(Endpoint{address, at.port}.text());
    }
    json keys = json::array();
    static constexpr const char* uses[] = {"offered", "announced", "retired"};
    for (std::size_t i = 0; i < keys_->count(); i++)
      keys.push_back({{"fingerprint", keys_->fingerprint(i)}, {"line", keys_->public_line(i)}, {"bits", keys_->bits(i)}, {"use", uses[static_cast<std::size_t>(keys_->use(i))]},
                      {"file", keys_->path(i)}});
    json names = json::array();  // ours in the network
    for (const auto& e : listening())
      if (const Node* const node = self(e.address); node != nullptr && std::find(names.begin(), names.end(), node->name) == names.end()) names.push_back(node->name);
    return json{{"version", POSTERN_VERSION}, {"pid", ::getpid()}, {"listening", listening_list}, {"dialled", dialled}, {"names", names}, {"policy_version", rules_.version()},
                {"connections", connections_.size()}, {"unauthenticated", unauthenticated_in_all_}, {"warm_workers", pool_.size()}, {"host_keys", keys}}
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
  if (command == "rotate-host-keys") {
    const auto done = rotate_keys(q.value("finish", json(false)) == json(true));
    return done ? json{{"done", true}}.dump() : refuse(done.error().doing);
  }
  return refuse("unknown command");
}

}  // namespace postern::sshd::broker
