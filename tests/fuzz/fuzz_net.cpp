// libFuzzer target for postern-net from accept on: one whole Connection, with the broker and the session stubbed in the same thread.
//
//     cmake --preset fuzz && cmake --build --preset fuzz --target fuzz_net
//     build/fuzz/bin/fuzz_net -dict=tests/fuzz/net.dict -max_len=8192 -max_total_time=300 build/fuzz/net tests/fuzz/corpus/net
//
// The first byte says how (enum below); the rest is what the client sends: raw bytes from the version line on, or packets, each two bytes of
// length and the payload. Packets would have to be encrypted with keys that no fuzzer can guess, so for them the first key exchange is
// left out: libssh's session is put where it is after NEWKEYS, with no cipher. A second key exchange is the real one.
// Nothing here waits: poll and ppoll are wrapped (-Wl,--wrap), and whoever polls lets the stubs have their turn instead.
#include "base/seqpacket.h"
#include "sshd/net/connection.h"
#include "sshd/net/libssh_ext.h"
#include "sshd/protocol/channel.h"
#include "sshd/protocol/net.h"

#include "config.h"
extern "C" {
#include "libssh/priv.h"
#include "libssh/session.h"
#include "libssh/crypto.h"
#include "libssh/packet.h"
}

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

using namespace postern;
namespace net = postern::sshd::net;
namespace chan = postern::sshd::channel;

extern "C" int __real_poll(pollfd*, nfds_t, int);
extern "C" int __wrap_poll(pollfd*, nfds_t, int);
extern "C" int __real_ppoll(pollfd*, nfds_t, const timespec*, const sigset_t*);
extern "C" int __wrap_ppoll(pollfd*, nfds_t, const timespec*, const sigset_t*);
extern "C" int __real_ssh_handle_key_exchange(ssh_session);
extern "C" int __wrap_ssh_handle_key_exchange(ssh_session);

namespace {

enum How : std::uint8_t {
  where = 0x03,        ///< 0: raw bytes; 1: packets; 2, 3: packets after a login
  at_once = 0x04,      ///< all packets in one piece, else each when the one before is dealt with
  denied = 0x08,       ///< the verdict
  refusing = 0x10,     ///< the session says no to what it can refuse
  ends_early = 0x20,   ///< programs' and forwardings' descriptors are closed at once, else kept open and never read
  incoming = 0x40,     ///< after a yes to a listener somebody connects to it
  disconnects = 0x80,  ///< the session ends the connection after some messages
};

std::uint32_t own_key = 0;  // key_id()

void require_(bool holds, const char* what, int line) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_net.cpp:%d: does not hold: %s\n", line, what);
  std::abort();
}
#define require(condition) require_(condition, #condition, __LINE__)

std::string u32(std::uint32_t value) {
  return {static_cast<char>(value >> 24), static_cast<char>(value >> 16), static_cast<char>(value >> 8), static_cast<char>(value)};
}
std::string text(std::string_view s) { return u32(static_cast<std::uint32_t>(s.size())) + std::string{s}; }
/// RFC 4253 section 6, without cipher and MAC.
std::string packet(std::string_view payload) {
  std::size_t padding = 8 - (5 + payload.size()) % 8;
  if (padding < 4) padding += 8;
  return u32(static_cast<std::uint32_t>(1 + payload.size() + padding)) + static_cast<char>(padding) + std::string{payload} + std::string(padding, '\0');
}

std::pair<UniqueFd, UniqueFd> pair_of(int type) {
  int pair[2];
  require(::socketpair(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) == 0);
  return {UniqueFd{pair[0]}, UniqueFd{pair[1]}};
}

/// All but the Connection: its client, its broker, its session.
class World {
 public:
  World(std::uint8_t how, std::string_view input) : how_{how} {
    if ((how & where) == 0) {
      to_client_.emplace_back(input);
      return;
    }
    plain = true;
    if ((how & where) >= 2) {
      to_client_.push_back(packet('\x05' + text("ssh-userauth")) + packet('\x32' + text("alice") + text("ssh-connection") + text("none")));
      to_client_.emplace_back();  // what follows is said when the login is through
    }
    while (input.size() >= 2) {
      const std::size_t size = static_cast<unsigned char>(input[0]) << 8 | static_cast<unsigned char>(input[1]);
      send(packet(input.substr(2, size)));
      input.remove_prefix(std::min(input.size(), 2 + size));
    }
  }

  /// What the others do while the Connection waits.
  void turn() {
    if (!awake) return;
    require(++turns_ < 100'000);
    bool busy = false;
    if (client) {
      char thrown_away[16384];
      while (::read(client.get(), thrown_away, sizeof thrown_away) > 0) busy = true;
    }
    while (auto message = from(broker)) {
      busy = true;
      on_broker(*message);
    }
    while (auto message = from(session)) {
      busy = true;
      on_session(*message);
    }
    idle_ = busy ? 0 : idle_ + 1;
    if (!client) return;
    if (to_client_.empty()) {
      if (idle_ >= 2 * quiet) client.reset();
      return;
    }
    if (idle_ < quiet) return;  // each when nothing moves any more: the client knows the answer to the one before
    std::string& next = to_client_.front();
    const ssize_t n = ::send(client.get(), next.data(), next.size(), MSG_NOSIGNAL);
    if (n > 0) next.erase(0, static_cast<std::size_t>(n));
    if (next.empty()) to_client_.pop_front();
    if ((n < 0 && errno != EAGAIN) || idle_ > 100) client.reset();  // gone, or it reads no more
  }

  UniqueFd client, broker, session;
  bool plain = false;
  bool awake = false;  ///< false: poll does what it does

 private:
  void send(std::string bytes) {
    if ((how_ & at_once) != 0 && !to_client_.empty())
      to_client_.back() += bytes;
    else
      to_client_.push_back(std::move(bytes));
  }

  std::optional<Message> from(UniqueFd& socket) {
    char first = 0;
    const ssize_t n = socket ? ::recv(socket.get(), &first, 1, MSG_PEEK | MSG_TRUNC) : -1;  // its size: room for the largest takes time
    if (n == 0) socket.reset();
    if (n <= 0) return std::nullopt;
    auto message = receive_message(socket.get(), static_cast<std::size_t>(n));
    require(message && *message && (*message)->bytes.size() <= chan::max_message);
    require((*message)->fds.empty());  // never from net
    return std::move(**message);
  }

  template <class Type, class Body>
  void tell(const UniqueFd& socket, std::uint16_t version, Type type, const Body& body, std::span<const int> fds = {}) {
    static_cast<void>(send_body(socket.get(), version, static_cast<std::uint16_t>(type), body, {}, fds));
  }

  void sign(const UniqueFd& socket, std::uint16_t version, std::uint16_t type, const Message& message) {
    const auto ask = message.body<net::AskSign>();
    require(ask && ask->key == own_key && ask->data.valid());
    if (ask->purpose == net::Purpose::possession)
      require(ask->data.length == 0);
    else
      require(ask->purpose == net::Purpose::exchange_hash && (ask->data.length == 32 || ask->data.length == 48 || ask->data.length == 64));
    net::Signature signature;
    require(signature.blob.set(text("ssh-ed25519") + text(std::string(64, 's'))));  // nobody verifies it
    tell(socket, version, type, signature);
  }

  void on_broker(const Message& message) {
    switch (static_cast<net::Type>(message.type)) {
      case net::Type::note: require(message.body<net::Note>() && message.body<net::Note>()->text.valid()); return;
      case net::Type::ask_sign: return sign(broker, net::version, static_cast<std::uint16_t>(net::Type::signature), message);
      case net::Type::ask_login: break;
      default: require(false);
    }
    const auto ask = message.body<net::AskLogin>();
    require(ask && !std::exchange(asked_, true));  // one question
    require(ask->ssh_user.valid() && ask->client_version.valid() && !ask->ssh_user.get().empty());
    net::Verdict verdict;
    verdict.accepted = (how_ & denied) != 0 ? 0 : 1;
    static_cast<void>(verdict.text.set("a line to show"));
    if (verdict.accepted == 0) return tell(broker, net::version, net::Type::verdict, verdict);
    auto pair = seqpacket_pair();
    require(static_cast<bool>(pair));
    session = std::move(pair->first);
    const int fd = pair->second.get();
    tell(broker, net::version, net::Type::verdict, verdict, std::span{&fd, 1});
  }

  /// As strict as postern-session is: known types, exact sizes, bounded text.
  void on_session(const Message& message) {
    using chan::Type;
    const auto answer = [&](std::uint32_t channel) {
      tell(session, chan::version, (how_ & refusing) != 0 ? Type::answer_no : Type::answer_ok, chan::Answer{channel, 0});
    };
    if ((how_ & disconnects) != 0 && ++messages_ == 4) {
      chan::Disconnect body;
      static_cast<void>(body.text.set("Access revoked."));
      tell(session, chan::version, Type::disconnect, body);
    }
    switch (static_cast<Type>(message.type)) {
      case Type::open: {
        const auto body = message.body<chan::ChannelRef>();
        require(body && body->channel <= 65535);
        if ((how_ & refusing) != 0 && body->channel % 2 == 0) return answer(body->channel);
        return tell(session, chan::version, Type::answer_ok, chan::Answer{body->channel, 0});
      }
      case Type::pty: {
        const auto body = message.body<chan::Pty>();
        require(body && body->term.valid() && body->modes.valid());
        return answer(body->channel);
      }
      case Type::env: {
        const auto body = message.body_and_tail<chan::Env>();
        require(body && body->first.name_length > 0 && body->first.name_length <= chan::max_env_name && body->first.name_length <= body->second.size());
        require(body->second.size() - body->first.name_length <= chan::max_env_value);
        return answer(body->first.channel);
      }
      case Type::start: {
        const auto body = message.body_and_tail<chan::Start>();
        require(body && body->second.size() <= chan::max_command);
        if ((how_ & refusing) != 0) return answer(body->first.channel);
        return start(body->first);
      }
      case Type::window_change: require(message.body<chan::WindowChange>().has_value()); return;
      case Type::signal:
      case Type::ask_signal: {
        const auto body = message.body<chan::Signal>();
        require(body && body->name.valid());
        return static_cast<Type>(message.type) == Type::ask_signal ? answer(body->channel) : void();
      }
      case Type::send_break:
      case Type::agent: {
        require(message.body<chan::ChannelRef>().has_value());
        return answer(message.body<chan::ChannelRef>()->channel);
      }
      case Type::x11: {
        const auto body = message.body<chan::X11>();
        require(body && body->protocol.valid() && body->cookie.valid());
        return answer(body->channel);
      }
      case Type::closed:
      case Type::closed_after_eof:
      case Type::ended: require(message.body<chan::ChannelRef>().has_value()); return;
      case Type::ask_sign: return sign(session, chan::version, static_cast<std::uint16_t>(Type::signature), message);
      case Type::activity: require(message.body<chan::Activity>().has_value()); return;
      case Type::forward_connect: {
        const auto body = message.body<chan::ForwardTarget>();
        require(body && body->target.valid() && body->port <= 65535);
        if ((how_ & refusing) != 0) {
          chan::ForwardFailed failed{body->number, 2, {}};
          static_cast<void>(failed.text.set("Connection refused"));
          return tell(session, chan::version, Type::forward_failed, failed);
        }
        const UniqueFd socket = other_end("from the target");
        const int fd = socket.get();
        return tell(session, chan::version, Type::forward_ready, chan::ForwardReady{body->number}, std::span{&fd, 1});
      }
      case Type::forward_listen: {
        const auto body = message.body<chan::ForwardTarget>();
        require(body && body->target.valid() && body->port <= 65535);
        const bool yes = (how_ & refusing) == 0;
        tell(session, chan::version, Type::forward_listening, chan::ForwardListening{body->number, yes ? 1U : 0U, body->port != 0 ? body->port : 4711});
        if (!yes || (how_ & incoming) == 0) return;
        chan::ForwardIncoming comes;
        comes.number = next_incoming_++;
        comes.kind = body->kind;
        comes.port = body->port;
        comes.target = body->target;
        static_cast<void>(comes.origin.set("192.0.2.7"));
        const UniqueFd socket = other_end("from outside");
        const int fd = socket.get();
        return tell(session, chan::version, Type::forward_incoming, comes, std::span{&fd, 1});
      }
      case Type::forward_cancel: {
        const auto body = message.body<chan::ForwardTarget>();
        require(body && body->target.valid());
        return tell(session, chan::version, Type::forward_listening, chan::ForwardListening{body->number, (how_ & refusing) == 0 ? 1U : 0U, 0});
      }
      case Type::forward_closed: require(message.body<chan::ForwardClosed>().has_value()); return;
      default: require(false);
    }
  }

  /// What the Connection gets; the other end has something for it.
  UniqueFd other_end(std::string_view says) {
    auto [ours, theirs] = pair_of(SOCK_STREAM);
    require(::write(ours.get(), says.data(), says.size()) == static_cast<ssize_t>(says.size()));
    if ((how_ & ends_early) == 0 && held_.size() < 64) held_.push_back(std::move(ours));
    return std::move(theirs);
  }

  void start(const chan::Start& asked) {
    chan::Started started;
    started.channel = asked.channel;
    std::vector<UniqueFd> fds;
    if (asked.kind == chan::StartKind::shell) {
      started.combined = started.pty = 1;
      fds.push_back(other_end("$ "));
    } else {
      started.input = started.output = started.error = 1;
      for (const char* says : {"", "output", "error"}) fds.push_back(other_end(says));
    }
    std::vector<int> numbers;
    for (const auto& fd : fds) numbers.push_back(fd.get());
    tell(session, chan::version, chan::Type::started, started, numbers);
    if ((how_ & ends_early) == 0) return;
    chan::Exited exited;
    exited.channel = asked.channel;
    exited.by_signal = asked.kind == chan::StartKind::subsystem ? 1 : 0;
    static_cast<void>(exited.name.set("TERM"));
    exited.close_now = 1;
    tell(session, chan::version, chan::Type::exited, exited);
  }

  static constexpr unsigned quiet = 4;  ///< times that somebody polls while nothing comes here: one round of the Connection's loop has fewer
  const std::uint8_t how_;
  std::deque<std::string> to_client_;
  std::vector<UniqueFd> held_;
  bool asked_ = false;
  unsigned turns_ = 0, idle_ = 0, messages_ = 0;
  std::uint32_t next_incoming_ = chan::first_incoming;
};

World* the_world = nullptr;

/// The lowest free descriptor: the same before and after, else one leaked.
int lowest_free() {
  const int fd = ::fcntl(0, F_DUPFD, 0);
  ::close(fd);
  return fd;
}

net::ext::Server& server() {
  static const auto made = [] {
    ::signal(SIGPIPE, SIG_IGN);
    require(ssh_init() == SSH_OK);
    auto key = net::ext::LocalKey::generate();
    require(static_cast<bool>(key));
    own_key = net::key_id(key->public_blob());
    auto result = net::ext::Server::make({key->public_blob()}, "Postern_fuzz");
    require(static_cast<bool>(result));
    return std::move(*result);
  }();
  return *made;
}

}  // namespace

extern "C" int __wrap_poll(pollfd* fds, nfds_t count, int timeout) {
  if (the_world != nullptr) the_world->turn();
  return __real_poll(fds, count, the_world != nullptr ? 0 : timeout);
}
extern "C" int __wrap_ppoll(pollfd* fds, nfds_t count, const timespec* timeout, const sigset_t* mask) {
  const timespec now{};
  if (the_world != nullptr) the_world->turn();
  return __real_ppoll(fds, count, the_world != nullptr ? &now : timeout, mask);
}

extern "C" int __wrap_ssh_handle_key_exchange(ssh_session session) {
  const int rc = __real_ssh_handle_key_exchange(session);
  if (the_world == nullptr || the_world->awake) return rc;
  the_world->awake = true;
  if (!the_world->plain) return rc;
  require(rc == SSH_AGAIN);
  // Where ssh_server_connection_callback() (server.c) leaves a session after the client's NEWKEYS.
  session->clientbanner = ::strdup("SSH-2.0-fuzz");
  ssh_packet_register_socket_callback(session, session->socket);
  ssh_packet_set_default_callbacks(session);
  session->current_crypto = static_cast<ssh_crypto_struct*>(std::calloc(1, sizeof(ssh_crypto_struct)));
  session->current_crypto->session_id = static_cast<unsigned char*>(std::calloc(1, 32));
  session->current_crypto->session_id_len = 32;
  session->dh_handshake_state = DH_STATE_FINISHED;
  session->flags &= ~SSH_SESSION_FLAG_KEXINIT_SENT;
  session->connected = 1;
  session->session_state = SSH_SESSION_STATE_AUTHENTICATING;
  return SSH_OK;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  net::ext::Server& made = server();
  const int before = lowest_free();
  {
    World world{data[0], {reinterpret_cast<const char*>(data) + 1, size - 1}};
    auto [client, socket] = pair_of(SOCK_STREAM);
    auto broker = seqpacket_pair();
    require(static_cast<bool>(broker));
    world.client = std::move(client);
    world.broker = std::move(broker->first);
    the_world = &world;
    net::Serve settings;
    settings.login_grace_ms = 3'600'000;
    {
      net::Connection connection{made, std::move(socket), net::Link{std::move(broker->second), net::version, 4096}, settings};
      connection.run();
    }
    the_world = nullptr;
  }
  require(lowest_free() == before);
  return 0;
}
