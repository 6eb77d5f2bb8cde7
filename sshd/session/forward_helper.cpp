#include "sshd/session/forward_helper.h"

#include "base/poller.h"
#include "base/process_title.h"
#include "base/processes.h"
#include "pty/oom_score.h"
#include "sshd/session/outbox.h"
#include "sshd/session/resolver.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <syslog.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace postern::sshd::session::helper {
namespace {

using channel::ForwardKind;
using std::chrono::milliseconds;

constexpr std::uint32_t prohibited = 1, connect_failed = 2, resource_shortage = 4;  // RFC 4254 section 5.1
constexpr int backlog = 128;                       // sshd's SSH_LISTEN_BACKLOG
constexpr milliseconds next_address_after{250};    // RFC 8305 section 8: the next address gets its chance
constexpr milliseconds socket_full_retry{20};      // connect(2) on a unix socket whose queue is full says EAGAIN and cannot be polled
constexpr milliseconds accept_retry{50};           // out of descriptors, or session is slow
constexpr unsigned first_display = 10, last_display = 1000;  // X11DisplayOffset's default; sshd's MAX_DISPLAYS
constexpr milliseconds xauth_limit{10'000};        // it waits for a lock file of another one
constexpr std::uint16_t first_free_port = 1024;    // as sshd's bind_permitted(): below is root's, whatever ip_unprivileged_port_start says

socklen_t length_of(const sockaddr_storage& a) { return a.ss_family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in); }
std::uint16_t port_of(const sockaddr_storage& a) {
  return ntohs(a.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(a).sin6_port : reinterpret_cast<const sockaddr_in&>(a).sin_port);
}
void set_port(sockaddr_storage& a, std::uint16_t port) {
  (a.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(a).sin6_port : reinterpret_cast<sockaddr_in&>(a).sin_port) = htons(port);
}
sockaddr_storage make_address(int family, const char* text) {
  sockaddr_storage a{};
  a.ss_family = static_cast<sa_family_t>(family);
  ::inet_pton(family, text, family == AF_INET6 ? static_cast<void*>(&reinterpret_cast<sockaddr_in6&>(a).sin6_addr) : &reinterpret_cast<sockaddr_in&>(a).sin_addr);
  return a;
}
void no_delay(int fd) {
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  // as sshd: keystrokes of a second ssh
}
bool make_unix_address(const std::string& path, sockaddr_un& a) {
  a = {};
  a.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof a.sun_path || path.find('\0') != std::string::npos) return false;
  std::memcpy(a.sun_path, path.data(), path.size());
  return true;
}

class Helper {
 public:
  Helper(UniqueFd socket, const Settings& settings) : settings_{settings}, session_{poller_, false, [this] { read_session(); }}, resolver_{poller_} {
    session_.open(std::move(socket));
  }
  ~Helper() {
    while (!listeners_.empty()) close_listener(listeners_.begin()->first);
  }
  void run() {
    while (!ended_) poller_.run_once();
  }

 private:
  struct Attempt {
    std::string host;
    std::uint16_t port = 0;
    std::vector<sockaddr_storage> addresses;  // not tried yet, in order
    std::vector<UniqueFd> trying;
    int last_error = 0;
    Poller::TimerId limit = 0, next = 0;
  };
  struct Listener {
    std::vector<UniqueFd> sockets;
    std::string path, folder;  // to be removed at the end
    UniqueFd place;            // of `path`, where that goes through it
    dev_t device = 0;
    ino_t inode = 0;
  };

  template <class Body>
  void say(Type type, const Body& body, std::vector<UniqueFd> fds = {}) {
    session_.send(version, static_cast<std::uint16_t>(type), body, std::move(fds));
  }
  void fail(std::uint32_t id, std::uint32_t reason, const std::string& text) {
    Failed f{id, reason, {}};
    static_cast<void>(f.text.set(std::string_view{text}.substr(0, 256)));
    say(Type::failed, f);
  }
  void fail_with(std::uint32_t id, int error) {
    fail(id, error == EMFILE || error == ENFILE || error == ENOMEM ? resource_shortage : connect_failed, std::strerror(error));
  }

  void read_session() {
    for (;;) {
      auto received = receive_message(session_.fd());
      if (!received && received.error().code == EAGAIN) return;
      if (!received || !*received || !on_message(**received)) {
        ended_ = true;
        return;
      }
      if (session_.blocked()) return;
    }
  }

  bool on_message(const Message& m) {
    if (m.version != version || !m.fds.empty()) return false;
    switch (static_cast<Type>(m.type)) {
      case Type::connect:
      case Type::listen: {
        const auto t = m.body<Target>();
        if (!t || !t->target.valid() || t->port > 65535) return false;
        const std::string target{t->target.get()};
        const auto port = static_cast<std::uint16_t>(t->port);
        const bool socket = t->kind == ForwardKind::unix_socket;
        if (static_cast<Type>(m.type) == Type::connect)
          socket ? connect_socket(t->id, target) : connect_host(t->id, target, port);
        else
          socket ? listen_socket(t->id, target) : listen_port(t->id, target, port);
        return true;
      }
      case Type::cancel: {
        const auto r = m.body<Ref>();
        if (r) {
          pending_.erase(r->id);
          close_listener(r->id);
        }
        return r.has_value();
      }
      case Type::x11: {
        const auto x = m.body<X11>();
        if (!x || !x->protocol.valid() || !x->cookie.valid()) return false;
        listen_x11(*x);
        return true;
      }
      case Type::agent: {
        const auto r = m.body<Ref>();
        if (r) listen_agent(r->id);
        return r.has_value();
      }
      default: return false;
    }
  }

  // --- connecting

  void connect_host(std::uint32_t id, const std::string& host, std::uint16_t port) {
    Attempt& a = attempts_[id];
    a.host = host;
    a.port = port;
    a.limit = poller_.after(settings_.connect_limit, [this, id] {
      if (const auto it = attempts_.find(id); it != attempts_.end()) it->second.limit = 0;
      give_up(id, ETIMEDOUT);
    });
    resolver_.look_up(host, port, [this, id](Resolver::Result result) {
      const auto it = attempts_.find(id);
      if (it == attempts_.end()) return;  // its time is over
      Attempt& attempt = it->second;
      if (result.addresses.empty()) {
        drop(id);
        return fail(id, connect_failed, result.error);
      }
      for (const auto& address : result.addresses)
        if (const auto numeric = Address::from(address); numeric && settings_.local.allows(attempt.host, *numeric, attempt.port))
          attempt.addresses.push_back(address);
      if (attempt.addresses.empty()) {
        drop(id);
        return fail(id, prohibited, "forwarding to this address is not allowed");
      }
      try_next(id);
    });
  }

  void try_next(std::uint32_t id) {
    Attempt& a = attempts_.at(id);
    if (a.next != 0) poller_.cancel(std::exchange(a.next, 0));
    while (!a.addresses.empty()) {
      const sockaddr_storage address = a.addresses.front();
      a.addresses.erase(a.addresses.begin());
      UniqueFd fd{::socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
      if (!fd) {
        a.last_error = errno;
        continue;
      }
      no_delay(fd.get());
      if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length_of(address)) == 0) return connected(id, std::move(fd));
      if (errno != EINPROGRESS) {
        a.last_error = errno;
        continue;
      }
      const int number = fd.get();
      a.trying.push_back(std::move(fd));
      poller_.watch(number, POLLOUT, [this, id, number](short) { on_answer(id, number); });
      if (!a.addresses.empty())
        a.next = poller_.after(next_address_after, [this, id] {
          attempts_.at(id).next = 0;
          try_next(id);
        });
      return;
    }
    if (a.trying.empty()) give_up(id, a.last_error);
  }

  void on_answer(std::uint32_t id, int number) {
    Attempt& a = attempts_.at(id);
    const auto it = std::find_if(a.trying.begin(), a.trying.end(), [number](const auto& fd) { return fd.get() == number; });
    int error = 0;
    socklen_t length = sizeof error;
    if (::getsockopt(number, SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
    poller_.forget(number);
    UniqueFd fd = std::move(*it);
    a.trying.erase(it);
    if (error == 0) return connected(id, std::move(fd));
    a.last_error = error;
    try_next(id);
  }

  void connected(std::uint32_t id, UniqueFd fd) {
    drop(id);
    std::vector<UniqueFd> fds;
    fds.push_back(std::move(fd));
    say(Type::connected, Ref{id}, std::move(fds));
  }
  void give_up(std::uint32_t id, int error) {
    drop(id);
    fail_with(id, error);
  }
  void drop(std::uint32_t id) {
    const auto it = attempts_.find(id);
    if (it == attempts_.end()) return;
    for (const auto& fd : it->second.trying) poller_.forget(fd.get());
    for (const auto timer : {it->second.limit, it->second.next})
      if (timer != 0) poller_.cancel(timer);
    attempts_.erase(it);
  }

  void connect_socket(std::uint32_t id, const std::string& path) {
    std::string where = path;
    UniqueFd held;
    if (settings_.local.limited()) {
      // The socket itself, not what its name may lead to a moment later: held, named by the kernel, and reached by the hold (proc(5)).
      held.reset(::open(path.c_str(), O_PATH | O_CLOEXEC));
      if (!held) return fail_with(id, errno);
      where = "/proc/self/fd/" + std::to_string(held.get());
      char real[PATH_MAX];
      const ssize_t n = ::readlink(where.c_str(), real, sizeof real);
      if (n <= 0 || n == sizeof real || !settings_.local.allows_socket(std::string{real, static_cast<std::size_t>(n)}))
        return fail(id, prohibited, "forwarding to this socket is not allowed");
    }
    attempts_[id].limit = poller_.after(settings_.connect_limit, [this, id] {
      if (const auto it = attempts_.find(id); it != attempts_.end()) it->second.limit = 0;
      give_up(id, ETIMEDOUT);
    });
    auto shared = std::make_shared<UniqueFd>(std::move(held));
    try_socket(id, where, shared);
  }

  void try_socket(std::uint32_t id, const std::string& where, const std::shared_ptr<UniqueFd>& held) {
    sockaddr_un address;
    if (!make_unix_address(where, address)) return give_up(id, ENAMETOOLONG);
    UniqueFd fd{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
    if (!fd) return give_up(id, errno);
    if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return connected(id, std::move(fd));
    if (errno != EAGAIN) return give_up(id, errno);
    attempts_.at(id).next = poller_.after(socket_full_retry, [this, id, where, held] {
      attempts_.at(id).next = 0;
      try_socket(id, where, held);
    });
  }

  // --- listening

  void listen_port(std::uint32_t id, const std::string& asked, std::uint16_t port) {
    if (port != 0 && port < first_free_port && ::geteuid() != 0) return fail(id, prohibited, "this port is for root alone");
    // As sshd 9.2, channels.c channel_fwd_bind_addr(). What the rules' names are compared with is what it becomes, not what was asked for: who gets
    // all addresses must not pass for "localhost".
    const bool wildcard = settings_.gateway_ports && (asked.empty() || asked == "*");
    const bool chosen = asked == "127.0.0.1" || asked == "::1" || (settings_.gateway_ports && !wildcard && asked != "localhost");
    if (wildcard) return bind_ports(id, "*", port, {make_address(AF_INET, "0.0.0.0"), make_address(AF_INET6, "::")});
    if (!chosen) return bind_ports(id, "localhost", port, {make_address(AF_INET, "127.0.0.1"), make_address(AF_INET6, "::1")});
    pending_.insert(id);
    resolver_.look_up(asked, port, [this, id, asked, port](Resolver::Result result) {
      if (pending_.erase(id) == 0) return;  // cancelled, or session has given up
      if (result.addresses.empty()) return fail(id, connect_failed, result.error);
      bind_ports(id, asked, port, std::move(result.addresses));
    });
  }

  void bind_ports(std::uint32_t id, const std::string& name, std::uint16_t port, std::vector<sockaddr_storage> addresses) {
    Listener listener;
    int error = 0;
    bool forbidden = false;
    for (auto& address : addresses) {
      set_port(address, port);
      const auto numeric = Address::from(address);
      if (!numeric || (port != 0 && !settings_.remote.allows(name, *numeric, port))) {
        forbidden = true;
        continue;
      }
      UniqueFd fd{::socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
      const int on = 1;
      if (fd && address.ss_family == AF_INET6) ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
      if (fd) ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
      if (!fd || ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), length_of(address)) != 0) {
        error = errno;
        continue;
      }
      if (port == 0) {  // the others get the port that the kernel chose for the first one
        sockaddr_storage own{};
        socklen_t length = sizeof own;
        if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&own), &length) != 0) continue;
        if (!settings_.remote.allows(name, *numeric, port_of(own))) {
          forbidden = true;
          continue;
        }
        port = port_of(own);
      }
      if (::listen(fd.get(), backlog) != 0) {
        error = errno;
        continue;
      }
      listener.sockets.push_back(std::move(fd));
    }
    if (listener.sockets.empty()) {
      if (forbidden) return fail(id, prohibited, "listening there is not allowed");
      return fail_with(id, error);
    }
    start(id, std::move(listener), port);
  }

  void listen_socket(std::uint32_t id, const std::string& path) {
    if (!path.starts_with('/')) return fail(id, connect_failed, "the path of a socket is absolute");
    const auto slash = path.rfind('/');
    const std::string name = path.substr(slash + 1);
    if (name.empty() || name == "." || name == "..") return fail(id, connect_failed, "this is not the name of a socket");
    Listener listener;
    std::string where = path;
    if (settings_.remote.limited()) {
      // The folder itself, as connect_socket(): what is allowed must not be another one by the time we bind.
      listener.place.reset(::open(slash == 0 ? "/" : path.substr(0, slash).c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
      if (!listener.place) return fail_with(id, errno);
      const std::string held = "/proc/self/fd/" + std::to_string(listener.place.get());
      char real[PATH_MAX];
      const ssize_t n = ::readlink(held.c_str(), real, sizeof real);
      if (n <= 0 || n == sizeof real) return fail(id, prohibited, "listening there is not allowed");
      const std::string folder{real, static_cast<std::size_t>(n)};
      if (!settings_.remote.allows_socket((folder == "/" ? "" : folder) + "/" + name)) return fail(id, prohibited, "listening there is not allowed");
      where = held + "/" + name;
    }
    if (settings_.unlink_sockets) {
      struct stat st {};
      if (::lstat(where.c_str(), &st) == 0 && S_ISSOCK(st.st_mode)) ::unlink(where.c_str());  // a file that is no socket stays
    }
    if (const int error = bind_socket(where, listener); error != 0) return fail_with(id, error);
    start(id, std::move(listener), 0);
  }

  /// 0 or errno.
  static int bind_socket(const std::string& path, Listener& listener) {
    sockaddr_un address;
    if (!make_unix_address(path, address)) return ENAMETOOLONG;
    UniqueFd fd{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
    if (!fd) return errno;
    const mode_t before = ::umask(0177);  // StreamLocalBindMask's default: the user alone
    const int rc = ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
    const int error = errno;
    ::umask(before);
    if (rc != 0) return error;
    struct stat st {};
    if (::lstat(path.c_str(), &st) == 0) {
      listener.path = path;
      listener.device = st.st_dev;
      listener.inode = st.st_ino;
    }
    if (::listen(fd.get(), backlog) != 0) {
      const int failed = errno;
      ::unlink(path.c_str());
      return failed;
    }
    listener.sockets.push_back(std::move(fd));
    return 0;
  }

  void listen_agent(std::uint32_t id) {
    char folder[] = "/tmp/ssh-XXXXXX";  // as sshd's (session.c auth_input_request_forwarding); mkdtemp(3): 0700
    if (::mkdtemp(folder) == nullptr) return fail_with(id, errno);
    Listener listener;
    listener.folder = folder;
    const std::string path = listener.folder + "/agent." + std::to_string(::getpid());
    if (const int error = bind_socket(path, listener); error != 0) {
      ::rmdir(folder);
      return fail_with(id, error);
    }
    start(id, std::move(listener), 0);
  }

  /// As sshd 9.2, channels.c x11_create_display_inet() with X11UseLocalhost and session.c do_rc_files().
  void listen_x11(const X11& asked) {
    for (unsigned display = first_display; display < last_display; display++) {
      const auto port = static_cast<std::uint16_t>(6000 + display);
      Listener listener;
      bool taken = false;
      int error = 0;
      for (auto address : {make_address(AF_INET, "127.0.0.1"), make_address(AF_INET6, "::1")}) {
        set_port(address, port);
        UniqueFd fd{::socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
        const int on = 1;
        if (fd && address.ss_family == AF_INET6) ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
        if (fd) ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (!fd || ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), length_of(address)) != 0 || ::listen(fd.get(), backlog) != 0) {
          error = errno;
          taken = taken || error == EADDRINUSE;
          continue;
        }
        listener.sockets.push_back(std::move(fd));
      }
      if (taken) continue;
      if (listener.sockets.empty()) return fail_with(asked.id, error);
      return run_xauth(asked, display, std::move(listener));
    }
    fail(asked.id, resource_shortage, "no display is free");
  }

  void run_xauth(const X11& asked, unsigned display, Listener listener) {
    const std::string name = "unix:" + std::to_string(display) + "." + std::to_string(asked.screen);
    const std::string input = "remove " + name + "\nadd " + name + " " + std::string{asked.protocol.get()} + " " + std::string{asked.cookie.get()} + "\n";
    // All that the child needs is made before the fork: a thread that looks a name up may hold malloc's lock at that moment.
    std::vector<std::string> environment{"HOME=" + settings_.user.home, "USER=" + settings_.user.name, "LOGNAME=" + settings_.user.name, "PATH=/usr/bin:/bin"};
    std::vector<char*> environ_pointers;
    for (auto& e : environment) environ_pointers.push_back(e.data());
    environ_pointers.push_back(nullptr);
    std::string path = settings_.xauth, quiet = "-q", dash = "-";
    char* const arguments[] = {path.data(), quiet.data(), dash.data(), nullptr};
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) return fail_with(asked.id, errno);
    UniqueFd read_end{ends[0]}, write_end{ends[1]};
    const pid_t pid = ::fork();
    if (pid == 0) {
      sigset_t none;
      ::sigemptyset(&none);
      ::sigprocmask(SIG_SETMASK, &none, nullptr);
      ::signal(SIGPIPE, SIG_DFL);
      if (::dup2(read_end.get(), 0) < 0 || ::syscall(SYS_close_range, 3U, ~0U, 0U) != 0) ::_exit(127);
      ::execve(path.c_str(), arguments, environ_pointers.data());
      ::_exit(127);
    }
    if (pid < 0) return fail_with(asked.id, errno);
    read_end.reset();
    // Less than a page: it fits an empty pipe.
    [[maybe_unused]] const auto n = ::write(write_end.get(), input.data(), input.size());
    write_end.reset();
    const int pidfd = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
    if (pidfd < 0) {
      ::kill(pid, SIGKILL);
      ::waitpid(pid, nullptr, 0);
      return fail(asked.id, resource_shortage, "xauth cannot be watched");
    }
    const auto limit = poller_.after(xauth_limit, [pid] { ::kill(pid, SIGKILL); });
    pending_.insert(asked.id);
    auto held = std::make_shared<std::pair<UniqueFd, Listener>>(UniqueFd{pidfd}, std::move(listener));
    poller_.watch(pidfd, POLLIN, [this, held, pid, limit, id = asked.id, display](short) {
      const auto keep = held;  // forget() destroys this handler
      int status = 0;
      if (::waitpid(pid, &status, WNOHANG) != pid) return;
      poller_.cancel(limit);
      poller_.forget(keep->first.get());
      if (pending_.erase(id) == 0) return;  // session has given up
      if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return fail(id, connect_failed, "xauth failed");
      start(id, std::move(keep->second), static_cast<std::uint16_t>(6000 + display));
    });
  }

  /// `listener` listens already.
  void start(std::uint32_t id, Listener listener, std::uint16_t port) {
    Listening said{id, port, {}};
    if (!listener.folder.empty() && !said.path.set(listener.path)) return fail_with(id, ENAMETOOLONG);
    for (const auto& fd : listener.sockets) poller_.watch(fd.get(), POLLIN, [this, id, number = fd.get()](short) { accept_from(id, number); });
    listeners_.insert_or_assign(id, std::move(listener));
    say(Type::listening, said);
  }

  void accept_from(std::uint32_t id, int number) {
    const auto rest = [&] {
      poller_.disable(number);
      poller_.after(accept_retry, [this, id, number] {
        const auto it = listeners_.find(id);  // another descriptor may have the number by then
        if (it != listeners_.end() && std::any_of(it->second.sockets.begin(), it->second.sockets.end(), [number](const auto& fd) { return fd.get() == number; }))
          poller_.set_events(number, POLLIN);
      });
    };
    for (int i = 0; i < 16; i++) {
      if (session_.blocked()) return rest();
      sockaddr_storage from{};
      socklen_t length = sizeof from;
      UniqueFd fd{::accept4(number, reinterpret_cast<sockaddr*>(&from), &length, SOCK_CLOEXEC | SOCK_NONBLOCK)};
      if (!fd) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) rest();
        return;
      }
      Incoming said{id, 0, {}};
      if (const auto address = Address::from(from)) {
        no_delay(fd.get());
        said.port = port_of(from);
        static_cast<void>(said.origin.set(address->text()));
      }
      std::vector<UniqueFd> fds;
      fds.push_back(std::move(fd));
      say(Type::incoming, said, std::move(fds));
    }
  }

  void close_listener(std::uint32_t id) {
    const auto it = listeners_.find(id);
    if (it == listeners_.end()) return;
    Listener& l = it->second;
    for (const auto& fd : l.sockets) poller_.forget(fd.get());
    struct stat st {};
    // Only what is still ours: sshd leaves the file lying about, and the next -R of the same path then fails.
    if (!l.path.empty() && ::lstat(l.path.c_str(), &st) == 0 && st.st_dev == l.device && st.st_ino == l.inode) ::unlink(l.path.c_str());
    if (!l.folder.empty()) ::rmdir(l.folder.c_str());
    listeners_.erase(it);
  }

  const Settings& settings_;
  Poller poller_;
  Outbox session_;
  Resolver resolver_;
  std::map<std::uint32_t, Attempt> attempts_;
  std::map<std::uint32_t, Listener> listeners_;
  std::set<std::uint32_t> pending_;  // listeners that wait for a name or for xauth
  bool ended_ = false;
};

}  // namespace

void serve(UniqueFd socket, const Settings& settings) {
  ::prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0);
  // Nothing of the connection's: its end is seen by descriptors that close, the PAM handle's and the recorder's among them.
  pty::reset_oom_score();
  const int null = ::open("/dev/null", O_RDWR);
  if (null < 0 || ::dup2(null, 0) < 0 || ::dup2(null, 1) < 0 || ::dup2(null, 2) < 0 || ::dup2(socket.get(), 3) < 0) ::_exit(1);
  if (socket.get() == 3) static_cast<void>(socket.release());
  ::fcntl(3, F_SETFD, FD_CLOEXEC);
  ::closelog();  // PAM's modules log, NSS's may: libc's number would be another descriptor of ours soon
  if (::syscall(SYS_close_range, 4U, ~0U, 0U) != 0)
    for (int fd = 4; fd < 65536; fd++) ::close(fd);
  static_cast<void>(socket.release());
  ::setsid();
  // HUP and TERM go to every program of a connection that ends; this one ends by its socket, after it has removed its files. KILL works.
  sigset_t blocked;
  ::sigemptyset(&blocked);
  ::sigaddset(&blocked, SIGHUP);
  ::sigaddset(&blocked, SIGTERM);
  ::sigprocmask(SIG_SETMASK, &blocked, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  if (settings.process) static_cast<void>(settings.process->apply());
  if (!pty::become_user(settings.user)) ::_exit(1);
  // The ids changed, so the kernel made it undumpable already (prctl(2)); as an ordinary user nothing changed.
  ::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
  ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);  // xauth(1) needs none
  rlimit files{};
  if (::getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &files);
  }
  if (::chdir("/") != 0) ::_exit(1);
  set_process_title("postern-session: forwards of " + settings.user.name);
  try {
    Helper{UniqueFd{3}, settings}.run();
  } catch (...) {
    ::_exit(1);
  }
  ::_exit(0);  // without what the fork inherited, and without waiting for a name that is being looked up
}

Expected<std::pair<UniqueFd, pid_t>> start(const Settings& settings) {
  auto pair = seqpacket_pair();
  if (!pair) return Unexpected{pair.error()};
  const auto child = fork_into(settings.cgroup);
  if (child.pid < 0) return Unexpected{system_error("fork the forward helper")};
  if (child.pid == 0) {
    if (child.cgroup_error != 0) ::_exit(1);
    pair->first.reset();
    serve(std::move(pair->second), settings);
  }
  return std::pair{std::move(pair->first), child.pid};
}

}  // namespace postern::sshd::session::helper
