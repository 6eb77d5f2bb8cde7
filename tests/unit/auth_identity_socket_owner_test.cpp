#include "auth/identity/socket_owner.h"

#include "base/unique_fd.h"
#include "catch.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

using namespace postern;
using namespace postern::auth::identity;
using namespace std::chrono_literals;

namespace {

constexpr uid_t alice = 65534, bob = 65533;
constexpr auto limit = 5000ms;

struct Name {
  sockaddr_storage storage{};
  socklen_t size = sizeof storage;
  sockaddr* raw() { return reinterpret_cast<sockaddr*>(&storage); }
};

Endpoint endpoint(Name& name) {
  const auto port = name.storage.ss_family == AF_INET ? reinterpret_cast<sockaddr_in&>(name.storage).sin_port : reinterpret_cast<sockaddr_in6&>(name.storage).sin6_port;
  return {*Address::from(name.storage), ntohs(port)};
}
Endpoint local_of(int fd) {
  Name name;
  REQUIRE(::getsockname(fd, name.raw(), &name.size) == 0);
  return endpoint(name);
}
/// `family` AF_INET6 and an IPv4 endpoint: the IPv4-mapped address.
Name name_of(const Endpoint& e, int family) {
  Name name;
  name.storage.ss_family = static_cast<sa_family_t>(family);
  if (family == AF_INET) {
    auto& in = reinterpret_cast<sockaddr_in&>(name.storage);
    in.sin_port = htons(e.port);
    std::memcpy(&in.sin_addr, e.address.bytes().data(), 4);
    name.size = sizeof in;
    return name;
  }
  auto& in = reinterpret_cast<sockaddr_in6&>(name.storage);
  in.sin6_port = htons(e.port);
  if (e.address.v4()) {
    in.sin6_addr.s6_addr[10] = in.sin6_addr.s6_addr[11] = 0xff;
    std::memcpy(in.sin6_addr.s6_addr + 12, e.address.bytes().data(), 4);
  } else {
    std::memcpy(&in.sin6_addr, e.address.bytes().data(), 16);
  }
  name.size = sizeof in;
  return name;
}
int family_of(const Endpoint& e) { return e.address.v4() ? AF_INET : AF_INET6; }

/// A server of this test's, on a port that the kernel chooses.
struct Server {
  explicit Server(const char* address = "127.0.0.1") {
    const Endpoint wanted{*Address::parse(address), 0};
    fd.reset(::socket(family_of(wanted), SOCK_STREAM | SOCK_CLOEXEC, 0));
    REQUIRE(fd);
    auto name = name_of(wanted, family_of(wanted));
    REQUIRE(::bind(fd.get(), name.raw(), name.size) == 0);
    REQUIRE(::listen(fd.get(), 8) == 0);
    at = local_of(fd.get());
  }
  struct Accepted {
    UniqueFd fd;
    Endpoint peer;
  };
  Accepted accept() const {
    pollfd ready{fd.get(), POLLIN, 0};
    REQUIRE(::poll(&ready, 1, 10'000) == 1);
    Accepted one;
    Name name;
    one.fd.reset(::accept4(fd.get(), name.raw(), &name.size, SOCK_CLOEXEC));
    REQUIRE(one.fd);
    one.peer = endpoint(name);
    return one;
  }
  UniqueFd fd;
  Endpoint at;
};

/// Safe in a forked child. Not a socket: it failed.
UniqueFd connected(const Endpoint& to, int family, const Endpoint* from = nullptr) {
  UniqueFd fd{::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  const int on = 1;
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (from != nullptr) {
    auto name = name_of(*from, family);
    if (::bind(fd.get(), name.raw(), name.size) != 0) return {};
  }
  auto name = name_of(to, family);
  if (::connect(fd.get(), name.raw(), name.size) != 0) return {};
  return fd;
}

/// A process of `user` that runs `what`, says in one byte whether it was right, and holds its sockets until the end of the test.
struct Other {
  template <class What>
  Other(uid_t user, const What& what) {
    std::array<int, 2> out{}, in{};
    REQUIRE(::pipe2(out.data(), O_CLOEXEC) == 0);
    REQUIRE(::pipe2(in.data(), O_CLOEXEC) == 0);
    pid = ::fork();
    REQUIRE(pid >= 0);
    if (pid == 0) {
      ::close(in[1]);
      bool good = ::setresgid(user, user, user) == 0 && ::setresuid(user, user, user) == 0 && ::prctl(PR_SET_DUMPABLE, 1) == 0;
      UniqueFd held;
      if (good) held = what(good);
      const char said = good && held ? 'y' : 'n';
      if (::write(out[1], &said, 1) != 1) ::_exit(1);
      for (char c = 0; ::read(in[0], &c, 1) < 0;) {
      }
      ::_exit(0);
    }
    ::close(out[1]);
    ::close(in[0]);
    hold.reset(in[1]);
    const UniqueFd answer{out[0]};
    char said = 'n';
    right = ::read(answer.get(), &said, 1) == 1 && said == 'y';
  }
  ~Other() {
    hold.reset();
    ::waitpid(pid, nullptr, 0);
  }
  Other(const Other&) = delete;
  Other& operator=(const Other&) = delete;
  pid_t pid = -1;
  UniqueFd hold;
  bool right = false;
};

bool no_root() {
  if (::geteuid() == 0) return false;
  WARN("needs root: connect as another user");
  return true;
}

std::string owner(const Endpoint& local, const Endpoint& remote) {
  const auto asked = socket_owner(local, remote, limit);
  if (!asked) return asked.error().doing;
  return *asked ? std::to_string(**asked) : "nobody";
}

/// The same once the kernel has taken in what was just done: closing is not over with close(2).
std::string owner_settles_at(const std::string& wanted, const Endpoint& local, const Endpoint& remote) {
  for (int i = 0; i < 500 && owner(local, remote) != wanted; i++) std::this_thread::sleep_for(2ms);
  return owner(local, remote);
}

}  // namespace

TEST_CASE("the owner of one's own connection is oneself, from both ends, by IPv4 and IPv6", "[auth_identity][socket_owner]") {
  const auto* const address = GENERATE("127.0.0.1", "127.0.0.9", "::1");
  const Server server{address};
  const auto client = connected(server.at, family_of(server.at));
  REQUIRE(client);
  const auto accepted = server.accept();
  CHECK(accepted.peer == local_of(client.get()));
  CHECK(owner(accepted.peer, server.at) == std::to_string(::geteuid()));
  CHECK(owner(server.at, accepted.peer) == std::to_string(::geteuid()));
}

TEST_CASE("a pair of endpoints that nobody has is nobody's, also where somebody listens", "[auth_identity][socket_owner]") {
  const auto* const address = GENERATE("127.0.0.1", "::1");
  const Server server{address};
  const auto client = connected(server.at, family_of(server.at));
  REQUIRE(client);
  const auto accepted = server.accept();
  Endpoint beside = server.at;
  beside.port = 1;
  CHECK(owner(accepted.peer, beside) == "nobody");
  CHECK(owner(server.at, beside) == "nobody");  // the kernel answers with the listening socket
  CHECK(owner(beside, server.at) == "nobody");
  CHECK(owner(server.at, {server.at.address, 0}) == "nobody");
  if (server.at.address.v4()) {
    CHECK(owner({*Address::parse("127.0.0.2"), accepted.peer.port}, server.at) == "nobody");
    CHECK(owner(accepted.peer, {*Address::parse("127.0.0.2"), server.at.port}) == "nobody");
    CHECK(owner(accepted.peer, {*Address::parse("::1"), server.at.port}) == "nobody");
  }
}

TEST_CASE("a connection that is not accepted yet is its client's, and at the other end nobody's", "[auth_identity][socket_owner]") {
  const Server server;
  const auto client = connected(server.at, AF_INET);
  REQUIRE(client);
  CHECK(owner(local_of(client.get()), server.at) == std::to_string(::geteuid()));
  CHECK(owner(server.at, local_of(client.get())) == "nobody");
}

TEST_CASE("a half-closed connection keeps its owner, a closed one has none", "[auth_identity][socket_owner]") {
  const auto* const address = GENERATE("127.0.0.1", "::1");
  const auto me = std::to_string(::geteuid());
  const Server server{address};
  auto client = connected(server.at, family_of(server.at));
  REQUIRE(client);
  auto accepted = server.accept();
  SECTION("the client ends its half, then closes") {
    REQUIRE(::shutdown(client.get(), SHUT_WR) == 0);
    CHECK(owner(accepted.peer, server.at) == me);  // FIN_WAIT2
    CHECK(owner(server.at, accepted.peer) == me);  // CLOSE_WAIT
    client.reset();
    CHECK(owner_settles_at("nobody", accepted.peer, server.at) == "nobody");  // FIN_WAIT2 still, and uid 0
    accepted.fd.reset();
    CHECK(owner_settles_at("nobody", accepted.peer, server.at) == "nobody");  // TIME_WAIT, and uid 0
    CHECK(owner(server.at, accepted.peer) == "nobody");
  }
  SECTION("the server ends its half, then closes") {
    REQUIRE(::shutdown(accepted.fd.get(), SHUT_WR) == 0);
    CHECK(owner(accepted.peer, server.at) == me);  // CLOSE_WAIT
    client.reset();
    CHECK(owner_settles_at("nobody", accepted.peer, server.at) == "nobody");
  }
  SECTION("the client closes, with bytes on the way that nobody reads") {
    const std::vector<char> bytes(1 << 20);
    while (::send(client.get(), bytes.data(), bytes.size(), MSG_DONTWAIT) > 0) {
    }
    client.reset();
    CHECK(owner_settles_at("nobody", accepted.peer, server.at) == "nobody");  // FIN_WAIT1, whose uid is kept since Linux 6.17
  }
}

TEST_CASE("an IPv6 socket with an IPv4-mapped address is found by its IPv4 endpoints", "[auth_identity][socket_owner]") {
  const Server server;
  const auto client = connected(server.at, AF_INET6);
  REQUIRE(client);
  const auto accepted = server.accept();
  REQUIRE(accepted.peer.address.v4());
  CHECK(owner(accepted.peer, server.at) == std::to_string(::geteuid()));
}

TEST_CASE("a client bound to an interface is not found, and so is nobody's", "[auth_identity][socket_owner]") {
  const Server server;
  const UniqueFd client{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  if (::setsockopt(client.get(), SOL_SOCKET, SO_BINDTODEVICE, "lo", 3) != 0) return;  // before Linux 5.7 it needs CAP_NET_RAW
  auto name = name_of(server.at, AF_INET);
  REQUIRE(::connect(client.get(), name.raw(), name.size) == 0);
  CHECK(owner(local_of(client.get()), server.at) == "nobody");
}

TEST_CASE("who still waits to be connected owns nothing", "[auth_identity][socket_owner]") {
  const Server server;
  REQUIRE(::listen(server.fd.get(), 0) == 0);
  const auto first = connected(server.at, AF_INET);  // there is room for no other
  REQUIRE(first);
  std::array<UniqueFd, 3> waiting;
  for (auto& one : waiting) {
    one.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    auto name = name_of(server.at, AF_INET);
    REQUIRE(::connect(one.get(), name.raw(), name.size) != 0);
    REQUIRE(errno == EINPROGRESS);
  }
  CHECK(owner(local_of(waiting.back().get()), server.at) == "nobody");
  CHECK(owner(local_of(first.get()), server.at) == std::to_string(::geteuid()));
}

TEST_CASE("another user's connection is told as theirs", "[auth_identity][socket_owner]") {
  if (no_root()) return;
  const auto* const address = GENERATE("127.0.0.1", "::1");
  const Server server{address};
  const Other other{alice, [&](bool&) { return connected(server.at, family_of(server.at)); }};
  REQUIRE(other.right);
  const auto accepted = server.accept();
  CHECK(owner(accepted.peer, server.at) == std::to_string(alice));
  CHECK(owner(server.at, accepted.peer) == "0");
}

TEST_CASE("two users with the same source port to different destinations are told apart", "[auth_identity][socket_owner]") {
  if (no_root()) return;
  const auto* const address = GENERATE("127.0.0.1", "::1");
  const Server first{address}, second{address};
  const int family = family_of(first.at);
  const Endpoint any{first.at.address, 0};
  const Other a{alice, [&](bool&) { return connected(first.at, family, &any); }};
  REQUIRE(a.right);
  const auto to_first = first.accept();
  const Other b{bob, [&](bool&) { return connected(second.at, family, &to_first.peer); }};
  REQUIRE(b.right);
  const auto to_second = second.accept();
  REQUIRE(to_first.peer == to_second.peer);
  CHECK(owner(to_first.peer, first.at) == std::to_string(alice));
  CHECK(owner(to_second.peer, second.at) == std::to_string(bob));
}

TEST_CASE("a user cannot give a socket to another user, nor in a user namespace where they are root", "[auth_identity][socket_owner]") {
  if (no_root()) return;
  const Server server;
  const bool in_namespace = GENERATE(false, true);
  const Other other{alice, [&](bool& right) {
                      auto before = connected(server.at, AF_INET);
                      if (in_namespace && ::unshare(CLONE_NEWUSER) == 0) {  // where that is not allowed the rest is asked without
                        const UniqueFd map{::open("/proc/self/uid_map", O_WRONLY | O_CLOEXEC)};
                        const std::string line = "0 " + std::to_string(alice) + " 1";
                        right = ::write(map.get(), line.data(), line.size()) == static_cast<ssize_t>(line.size()) && ::geteuid() == 0 && ::fchown(before.get(), 0, -1) == 0;
                      } else {
                        right = ::fchown(before.get(), 0, static_cast<gid_t>(-1)) != 0;
                      }
                      for (const uid_t user : {uid_t{1}, bob}) right = right && ::fchown(before.get(), user, static_cast<gid_t>(-1)) != 0;
                      return before;
                    }};
  REQUIRE(other.right);
  CHECK(owner(server.accept().peer, server.at) == std::to_string(alice));
}

TEST_CASE("a socket that is passed on stays its creator's", "[auth_identity][socket_owner]") {
  if (no_root()) return;
  const Server server;
  const auto mine = connected(server.at, AF_INET);
  REQUIRE(mine);
  const auto local = local_of(mine.get());
  const Other other{alice, [&](bool&) { return UniqueFd{::dup(mine.get())}; }};
  REQUIRE(other.right);
  CHECK(owner(local, server.at) == "0");
  REQUIRE(::fchown(mine.get(), bob, static_cast<gid_t>(-1)) == 0);  // root may
  CHECK(owner(local, server.at) == std::to_string(bob));
}

TEST_CASE("a user without rights may ask whose socket it is", "[auth_identity][socket_owner]") {
  if (no_root()) return;
  const Server server;
  const auto mine = connected(server.at, AF_INET);
  REQUIRE(mine);
  const auto local = local_of(mine.get());
  const Other other{alice, [&](bool& right) {
                      const auto asked = socket_owner(local, server.at, limit);
                      right = asked && *asked && **asked == 0;
                      return UniqueFd{::dup(0)};
                    }};
  CHECK(other.right);
}

TEST_CASE("the kernel's answer is there at once, so a time limit of nothing suffices", "[auth_identity][socket_owner]") {
  const Server server;
  const auto client = connected(server.at, AF_INET);
  REQUIRE(client);
  const auto local = local_of(client.get());
  REQUIRE(owner(local, server.at) == std::to_string(::geteuid()));  // the module, if it is one, is loaded
  const auto asked = socket_owner(local, server.at, 0ms);
  REQUIRE(asked);
  CHECK(*asked == ::geteuid());
}
