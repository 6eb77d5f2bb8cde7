#include "auth/identity/wireguard.h"

#include "base/unique_fd.h"

#include <boost/asio/buffer.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/write.hpp>

#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <linux/wireguard.h>
#include <netinet/in.h>
#include <sodium.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <tuple>

namespace postern::auth::identity {

namespace asio = boost::asio;
using boost::system::error_code;

namespace {

constexpr std::string_view key_lines[] = {"private_key=", "preshared_key="};

Error wrong(const std::string& what) { return Error{EAGAIN, "WireGuard's answer: " + what}; }

std::optional<PublicKey> hex_key(std::string_view text) {
  PublicKey key;
  std::size_t size = 0;
  if (text.size() != 2 * key.size() || sodium_hex2bin(key.data(), key.size(), text.data(), text.size(), nullptr, &size, nullptr) != 0 || size != key.size()) return std::nullopt;
  return key;
}

// ---- netlink

/// Attributes one after the other (netlink(7), "Message format"); stops at what does not fit, which makes `broken` true.
template <class Each>
void attributes(std::span<const std::byte> bytes, bool& broken, const Each& each) {
  while (!bytes.empty() && !broken) {
    nlattr head{};
    if (bytes.size() < sizeof head) return void(broken = true);
    std::memcpy(&head, bytes.data(), sizeof head);
    if (head.nla_len < sizeof head || head.nla_len > bytes.size()) return void(broken = true);
    each(static_cast<std::uint16_t>(head.nla_type & NLA_TYPE_MASK), bytes.subspan(sizeof head, head.nla_len - sizeof head));
    bytes = bytes.subspan(std::min<std::size_t>(NLA_ALIGN(head.nla_len), bytes.size()));
  }
}

template <class T>
bool take(std::span<const std::byte> bytes, T& out) {
  if (bytes.size() != sizeof out) return false;
  std::memcpy(&out, bytes.data(), sizeof out);
  return true;
}

std::optional<Prefix> allowed_ip(std::span<const std::byte> bytes, bool& broken) {
  std::uint16_t family = 0;
  std::uint8_t length = 0;
  std::span<const std::byte> address;
  bool has_length = false;
  attributes(bytes, broken, [&](std::uint16_t type, std::span<const std::byte> value) {
    if (type == WGALLOWEDIP_A_FAMILY && !take(value, family)) broken = true;
    if (type == WGALLOWEDIP_A_CIDR_MASK) has_length = take(value, length);
    if (type == WGALLOWEDIP_A_IPADDR) address = value;
  });
  const bool four = family == AF_INET && address.size() == sizeof(in_addr) && length <= 32;
  const bool six = family == AF_INET6 && address.size() == sizeof(in6_addr) && length <= 128;
  if (broken || !has_length || (!four && !six)) {
    broken = true;
    return std::nullopt;
  }
  sockaddr_storage s{};
  s.ss_family = family;
  if (four) std::memcpy(&reinterpret_cast<sockaddr_in&>(s).sin_addr, address.data(), address.size());
  else std::memcpy(&reinterpret_cast<sockaddr_in6&>(s).sin6_addr, address.data(), address.size());
  const auto parsed = Address::from(s);
  // An IPv4-mapped one would be taken for IPv4, with a length that is none of it.
  if (!parsed || parsed->v4() != four) return std::nullopt;
  return Prefix{*parsed, length};
}

void read_peer(std::span<const std::byte> bytes, PeerTable& table, std::optional<PublicKey>& last, bool& broken) {
  std::vector<Prefix> allowed;
  std::optional<PublicKey> key;
  attributes(bytes, broken, [&](std::uint16_t type, std::span<const std::byte> value) {
    if (type == WGPEER_A_PUBLIC_KEY) {
      key.emplace();
      if (!take(value, *key)) broken = true;
    } else if (type == WGPEER_A_ALLOWEDIPS) {
      attributes(value, broken, [&](std::uint16_t, std::span<const std::byte> one) {
        if (const auto prefix = allowed_ip(one, broken)) allowed.push_back(*prefix);
      });
    }
  });
  if (broken || (!key && !last)) return void(broken = true);
  if (key) last = key;
  table.add(*last);
  for (const auto& prefix : allowed) table.allow(prefix, *last);
}

Expected<Done> send_netlink(int fd, std::uint16_t type, std::uint16_t flags, std::uint8_t command, std::uint8_t version, std::uint16_t attribute, const std::string& text) {
  std::array<std::byte, 512> out{};
  if (text.size() > 200) return Unexpected{Error{EINVAL, "a name that is too long"}};
  nlmsghdr head{};
  genlmsghdr generic{command, version, 0};
  nlattr name{static_cast<std::uint16_t>(sizeof name + text.size() + 1), attribute};
  const std::size_t size = NLMSG_HDRLEN + GENL_HDRLEN + NLA_ALIGN(name.nla_len);
  head.nlmsg_len = static_cast<std::uint32_t>(size);
  head.nlmsg_type = type;
  head.nlmsg_flags = flags;
  std::memcpy(out.data(), &head, sizeof head);
  std::memcpy(out.data() + NLMSG_HDRLEN, &generic, sizeof generic);
  std::memcpy(out.data() + NLMSG_HDRLEN + GENL_HDRLEN, &name, sizeof name);
  std::memcpy(out.data() + NLMSG_HDRLEN + GENL_HDRLEN + NLA_HDRLEN, text.data(), text.size());
  if (::send(fd, out.data(), size, 0) != static_cast<ssize_t>(size)) return Unexpected{system_error("ask the kernel for WireGuard")};
  return Done{};
}

/// What the kernel wrote into it may hold the private key.
struct Wiped {
  std::vector<std::byte> bytes = std::vector<std::byte>(256 * 1024);
  ~Wiped() { sodium_memzero(bytes.data(), bytes.size()); }
};

Expected<std::span<const std::byte>> receive_netlink(int fd, Wiped& buffer) {
  sockaddr_nl from{};
  iovec part{buffer.bytes.data(), buffer.bytes.size()};
  msghdr message{};
  message.msg_name = &from;
  message.msg_namelen = sizeof from;
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  for (;;) {
    const ssize_t n = ::recvmsg(fd, &message, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Unexpected{Error{EAGAIN, std::string{"asking the kernel for WireGuard: "} + std::strerror(errno)}};
    if (from.nl_pid != 0) continue;  // not the kernel
    if ((message.msg_flags & MSG_TRUNC) != 0) return Unexpected{wrong("too long a message")};
    return std::span<const std::byte>{buffer.bytes}.first(static_cast<std::size_t>(n));
  }
}

/// The messages of a datagram; `each` says whether to go on.
template <class Each>
Expected<Done> messages(std::span<const std::byte> bytes, const Each& each) {
  while (!bytes.empty()) {
    nlmsghdr head{};
    if (bytes.size() < sizeof head) return Unexpected{wrong("half a message")};
    std::memcpy(&head, bytes.data(), sizeof head);
    if (head.nlmsg_len < sizeof head || head.nlmsg_len > bytes.size()) return Unexpected{wrong("a message of a wrong length")};
    if (!each(head, bytes.subspan(sizeof head, head.nlmsg_len - sizeof head))) return Done{};
    bytes = bytes.subspan(std::min<std::size_t>(NLMSG_ALIGN(head.nlmsg_len), bytes.size()));
  }
  return Done{};
}

int error_in(std::span<const std::byte> body) {
  std::int32_t code = 0;
  if (body.size() < sizeof code) return EPROTO;
  std::memcpy(&code, body.data(), sizeof code);
  return -code;
}

Error kernel_error(int code) {
  if (code == ENODEV || code == ENOENT || code == EOPNOTSUPP) return Error{ENODEV, code == ENODEV ? "there is no such WireGuard interface" : "this kernel has no WireGuard"};
  return Error{EAGAIN, std::string{"asking the kernel for WireGuard: "} + std::strerror(code)};
}

Expected<std::uint16_t> wireguard_family(int fd, Wiped& buffer) {
  if (auto sent = send_netlink(fd, GENL_ID_CTRL, NLM_F_REQUEST, CTRL_CMD_GETFAMILY, 1, CTRL_ATTR_FAMILY_NAME, WG_GENL_NAME); !sent) return Unexpected{sent.error()};
  const auto datagram = receive_netlink(fd, buffer);
  if (!datagram) return Unexpected{datagram.error()};
  std::uint16_t family = 0;
  int error = 0;
  bool broken = false;
  const auto read = messages(*datagram, [&](const nlmsghdr& head, std::span<const std::byte> body) {
    if (head.nlmsg_type == NLMSG_ERROR) error = error_in(body);
    else if (head.nlmsg_type == GENL_ID_CTRL && body.size() >= GENL_HDRLEN)
      attributes(body.subspan(GENL_HDRLEN), broken, [&](std::uint16_t type, std::span<const std::byte> value) {
        if (type == CTRL_ATTR_FAMILY_ID && !take(value, family)) broken = true;
      });
    return true;
  });
  if (!read) return Unexpected{read.error()};
  if (error != 0) return Unexpected{kernel_error(error)};
  if (broken || family == 0) return Unexpected{wrong("no family id")};
  return family;
}

}  // namespace

// ---- the table

Address PeerTable::network_of(const Prefix& prefix) {
  auto bytes = prefix.address.bytes();
  const std::size_t size = prefix.address.v4() ? 4 : 16;
  for (std::size_t i = 0; i < size; i++) {
    const unsigned kept = prefix.length > 8 * i ? std::min<unsigned>(8, prefix.length - static_cast<unsigned>(8 * i)) : 0;
    bytes[i] = static_cast<std::uint8_t>(bytes[i] & (0xff00U >> kept));
  }
  sockaddr_storage s{};
  if (prefix.address.v4()) {
    s.ss_family = AF_INET;
    std::memcpy(&reinterpret_cast<sockaddr_in&>(s).sin_addr, bytes.data(), 4);
  } else {
    s.ss_family = AF_INET6;
    std::memcpy(&reinterpret_cast<sockaddr_in6&>(s).sin6_addr, bytes.data(), 16);
  }
  return Address::from(s).value_or(Address{});
}

std::optional<PeerTable::Match> PeerTable::find(const Address& address) const {
  for (unsigned length = address.v4() ? 32 : 128;; length--) {
    const Prefix prefix{address, length};
    if (const auto it = peers_.find({address.v4(), length, network_of(prefix)}); it != peers_.end()) return Match{it->second, Prefix{network_of(prefix), length}};
    if (length == 0) return std::nullopt;
  }
}

std::map<PublicKey, std::vector<Address>> PeerTable::hosts() const {
  std::map<PublicKey, std::vector<Address>> hosts;
  for (const auto& [prefix, owner] : peers_)
    if (std::get<1>(prefix) == (std::get<0>(prefix) ? 32U : 128U)) hosts[owner].push_back(std::get<2>(prefix));
  return hosts;
}

// ---- the userspace API

UapiReader::~UapiReader() { sodium_memzero(line_.data(), line_.capacity()); }

Expected<bool> UapiReader::put(std::span<char> bytes) {
  struct Wipe {
    std::span<char> bytes;
    ~Wipe() { sodium_memzero(bytes.data(), bytes.size()); }
  } const wipe{bytes};
  taken_ += bytes.size();
  if (failed_ || taken_ > max_wireguard_bytes) return Unexpected{wrong("too long")};
  for (const char c : bytes) {
    if (c != '\n') {
      if (line_.size() == max_wireguard_line_bytes) {
        failed_ = true;
        return Unexpected{wrong("too long a line")};
      }
      line_ += c;
      continue;
    }
    const auto read = line(line_);
    sodium_memzero(line_.data(), line_.size());
    line_.clear();
    if (!read) failed_ = true;
    if (!read || *read) return read;
  }
  return false;
}

Expected<bool> UapiReader::line(std::string_view text) {
  for (const auto secret : key_lines)
    if (text.starts_with(secret)) return false;
  if (text.empty()) return Unexpected{wrong("it ends without errno")};
  const auto equals = text.find('=');
  if (equals == std::string_view::npos) return Unexpected{wrong("a line without =")};
  const auto name = text.substr(0, equals), value = text.substr(equals + 1);
  if (name == "public_key") {
    peer_ = hex_key(value);
    if (!peer_) return Unexpected{wrong("public_key is no key")};
    table_.add(*peer_);
  } else if (name == "allowed_ip") {
    const auto prefix = value.find('/') == std::string_view::npos ? std::nullopt : Prefix::parse(value);
    if (!peer_ || !prefix) return Unexpected{wrong("allowed_ip is no network of a peer")};
    table_.allow(*prefix, *peer_);
  } else if (name == "errno") {
    if (value != "0") return Unexpected{wrong("errno=" + std::string{value.substr(0, 12)})};
    return true;  // the empty line that follows ends it
  }
  return false;
}

class UapiQuestion::State : public std::enable_shared_from_this<UapiQuestion::State> {
 public:
  State(asio::io_context& io, std::function<void(Expected<PeerTable>)> answer) : socket_{io}, timer_{io}, answer_{std::move(answer)} {}

  void start(asio::io_context& io, const std::string& path, std::chrono::milliseconds timeout) {
    timer_.expires_after(timeout);
    timer_.async_wait([self = shared_from_this(), timeout](error_code ec) {
      if (!ec) self->end(Unexpected{Error{EAGAIN, "WireGuard: no answer within " + std::to_string(timeout.count()) + " ms"}});
    });
    if (path.size() >= sizeof(sockaddr_un::sun_path)) return asio::post(io, [self = shared_from_this()] { self->fail("its path is too long for a socket's"); });
    socket_.async_connect(asio::local::stream_protocol::endpoint{path}, [self = shared_from_this()](error_code ec) {
      if (self->over_) return;
      if (ec) return self->fail(ec.message());
      asio::async_write(self->socket_, asio::buffer(question_), [self](error_code failed, std::size_t) {
        if (failed) self->fail(failed.message());
      });
      self->read();
    });
  }
  void leave() {
    over_ = true;
    error_code ignored;
    socket_.close(ignored);
    timer_.cancel();
  }

 private:
  void read() {
    socket_.async_read_some(asio::buffer(buffer_), [self = shared_from_this()](error_code ec, std::size_t n) {
      if (ec) return self->over_ ? void() : self->fail(ec == asio::error::eof ? "it closed the connection" : ec.message());
      auto read = self->reader_.put({self->buffer_.data(), n});
      if (self->over_) return;
      if (!read) return self->end(Unexpected{std::move(read.error())});
      if (*read) return self->end(self->reader_.take());
      self->read();
    });
  }
  void fail(const std::string& why) { end(Unexpected{Error{EAGAIN, "WireGuard: " + why}}); }
  void end(Expected<PeerTable> result) {
    if (over_) return;
    leave();
    const auto call = std::move(answer_);
    call(std::move(result));
  }

  static constexpr std::string_view question_ = "get=1\n\n";
  asio::local::stream_protocol::socket socket_;
  asio::steady_timer timer_;
  std::function<void(Expected<PeerTable>)> answer_;
  std::array<char, 64 * 1024> buffer_;
  UapiReader reader_;
  bool over_ = false;
};

UapiQuestion::UapiQuestion(asio::io_context& io, const std::string& socket, std::chrono::milliseconds timeout, std::function<void(Expected<PeerTable>)> answer)
    : state_{std::make_shared<State>(io, std::move(answer))} {
  state_->start(io, socket, timeout);
}

UapiQuestion::~UapiQuestion() { state_->leave(); }

// ---- the kernel

Expected<bool> read_wireguard_netlink(std::span<const std::byte> datagram, PeerTable& table, std::optional<PublicKey>& last) {
  bool over = false, broken = false, interrupted = false;
  int error = 0;
  const auto read = messages(datagram, [&](const nlmsghdr& head, std::span<const std::byte> body) {
    interrupted = interrupted || (head.nlmsg_flags & NLM_F_DUMP_INTR) != 0;
    if (head.nlmsg_type == NLMSG_ERROR || head.nlmsg_type == NLMSG_DONE) {
      error = body.size() < sizeof(std::int32_t) && head.nlmsg_type == NLMSG_DONE ? 0 : error_in(body);
      over = true;
      return false;
    }
    if (head.nlmsg_type < NLMSG_MIN_TYPE) return true;
    if (body.size() < GENL_HDRLEN) return !(broken = true);
    attributes(body.subspan(GENL_HDRLEN), broken, [&](std::uint16_t type, std::span<const std::byte> value) {
      if (type != WGDEVICE_A_PEERS) return;  // the private key, too, is left where it is
      attributes(value, broken, [&](std::uint16_t, std::span<const std::byte> peer) { read_peer(peer, table, last, broken); });
    });
    return !broken;
  });
  if (!read) return Unexpected{read.error()};
  if (broken) return Unexpected{wrong("an attribute of a wrong length")};
  if (error != 0) return Unexpected{kernel_error(error)};
  if (interrupted) return Unexpected{Error{EINTR, "asking the kernel for WireGuard: its peers changed meanwhile"}};
  return over;
}

namespace {
Expected<PeerTable> ask_kernel_once(const std::string& interface, std::chrono::milliseconds timeout) {
  const UniqueFd fd{::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC)};
  if (!fd) return Unexpected{Error{EAGAIN, std::string{"asking the kernel for WireGuard: "} + std::strerror(errno)}};
  const timeval limit{timeout.count() / 1000, timeout.count() % 1000 * 1000};
  ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  Wiped buffer;
  const auto family = wireguard_family(fd.get(), buffer);
  if (!family) return Unexpected{family.error()};
  if (auto sent = send_netlink(fd.get(), *family, NLM_F_REQUEST | NLM_F_DUMP, WG_CMD_GET_DEVICE, WG_GENL_VERSION, WGDEVICE_A_IFNAME, interface); !sent)
    return Unexpected{sent.error()};
  PeerTable table;
  std::optional<PublicKey> last;
  for (std::size_t total = 0;;) {
    const auto datagram = receive_netlink(fd.get(), buffer);
    if (!datagram) return Unexpected{datagram.error()};
    total += datagram->size();
    if (total > max_wireguard_bytes) return Unexpected{wrong("too long")};
    const auto over = read_wireguard_netlink(*datagram, table, last);
    if (!over) return Unexpected{over.error()};
    if (*over) return table;
  }
}
}  // namespace

Expected<PeerTable> ask_kernel(const std::string& interface, std::chrono::milliseconds timeout) {
  // The kernel ends a dump early when its peers change, and marks it; it is to be asked again (wireguard/netlink.c, wg_get_device_dump).
  auto answer = ask_kernel_once(interface, timeout);
  for (int again = 0; again < 3 && !answer && answer.error().code == EINTR; again++) answer = ask_kernel_once(interface, timeout);
  if (!answer && answer.error().code == EINTR) answer.error().code = EAGAIN;
  return answer;
}

}  // namespace postern::auth::identity
