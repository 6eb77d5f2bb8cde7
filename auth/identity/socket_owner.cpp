#include "auth/identity/socket_owner.h"

#include "base/unique_fd.h"

#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

namespace postern::auth::identity {
namespace {

constexpr std::uint32_t sequence = 1;
using Owner = std::optional<uid_t>;

Error failed(int code) { return system_error("ask the kernel for a socket's owner", code); }
Error wrong(const std::string& what) { return Error{EPROTO, "the kernel's answer about a socket's owner: " + what}; }

struct Question {
  nlmsghdr head;
  inet_diag_req_v2 body;
};
static_assert(sizeof(Question) == NLMSG_HDRLEN + sizeof(inet_diag_req_v2));

Question question(const Endpoint& local, const Endpoint& remote) {
  Question q{};
  q.head.nlmsg_len = sizeof q;
  q.head.nlmsg_type = SOCK_DIAG_BY_FAMILY;
  q.head.nlmsg_flags = NLM_F_REQUEST;  // no dump: one socket, by a look-up in the kernel's own table
  q.head.nlmsg_seq = sequence;
  // An IPv6 socket with IPv4-mapped addresses is in the table by its IPv4 ones: AF_INET finds both (inet_diag_find_one_icsk(); measured, Linux 6.18).
  q.body.sdiag_family = local.address.v4() ? AF_INET : AF_INET6;
  q.body.sdiag_protocol = IPPROTO_TCP;
  q.body.idiag_states = ~(1U << TCP_LISTEN);  // a look-up does not heed it: owner_in() does
  q.body.id.idiag_sport = htons(local.port);
  q.body.id.idiag_dport = htons(remote.port);
  std::memcpy(q.body.id.idiag_src, local.address.bytes().data(), sizeof q.body.id.idiag_src);
  std::memcpy(q.body.id.idiag_dst, remote.address.bytes().data(), sizeof q.body.id.idiag_dst);
  std::fill(std::begin(q.body.id.idiag_cookie), std::end(q.body.id.idiag_cookie), INET_DIAG_NOCOOKIE);
  return q;
}

/// One end of a socket as the kernel writes it: addresses in network order, IPv4 in the first word; IPv4-mapped ones become IPv4.
std::optional<Endpoint> endpoint(std::uint8_t family, const __be32 (&address)[4], __be16 port) {
  sockaddr_storage s{};
  s.ss_family = family;
  if (family == AF_INET) std::memcpy(&reinterpret_cast<sockaddr_in&>(s).sin_addr, address, sizeof(in_addr));
  else std::memcpy(&reinterpret_cast<sockaddr_in6&>(s).sin6_addr, address, sizeof(in6_addr));
  const auto parsed = Address::from(s);
  if (!parsed) return std::nullopt;
  return Endpoint{*parsed, ntohs(port)};
}

Expected<Owner> owner_in(std::span<const std::byte> datagram, const Endpoint& local, const Endpoint& remote) {
  nlmsghdr head{};
  if (datagram.size() < sizeof head) return Unexpected{wrong("too short")};
  std::memcpy(&head, datagram.data(), sizeof head);
  if (head.nlmsg_len < NLMSG_HDRLEN || head.nlmsg_len > datagram.size()) return Unexpected{wrong("a wrong length")};
  const auto body = datagram.subspan(NLMSG_HDRLEN, head.nlmsg_len - NLMSG_HDRLEN);
  if (head.nlmsg_type == NLMSG_ERROR) {
    std::int32_t code = 0;
    if (body.size() < sizeof code) return Unexpected{wrong("an error without a number")};
    std::memcpy(&code, body.data(), sizeof code);
    if (code == -ENOENT) return Owner{};
    if (code >= 0) return Unexpected{wrong("neither a socket nor an error")};
    return Unexpected{failed(-code)};
  }
  inet_diag_msg socket{};
  if (head.nlmsg_type != SOCK_DIAG_BY_FAMILY) return Unexpected{wrong("type " + std::to_string(head.nlmsg_type))};
  if (body.size() < sizeof socket) return Unexpected{wrong("too short")};
  std::memcpy(&socket, body.data(), sizeof socket);
  // Without such a connection the look-up goes on to who listens at `local` (__inet_lookup()), and that is somebody else.
  const auto& id = socket.id;
  if (endpoint(socket.idiag_family, id.idiag_src, id.idiag_sport) != local || endpoint(socket.idiag_family, id.idiag_dst, id.idiag_dport) != remote) return Owner{};
  switch (socket.idiag_state) {
    case TCP_ESTABLISHED:
    case TCP_CLOSE_WAIT:
    case TCP_FIN_WAIT1:
    case TCP_FIN_WAIT2: break;
    default: return Owner{};  // TCP_SYN_SENT above all: who waits for an answer is not who is connected
  }
  // No inode: no process holds it - closed, or not accepted yet. Its uid is then no owner's: 0 of what is left of a connection after close(2), which says
  // FIN_WAIT2 too (inet_twsk_diag_fill()), and before Linux 6.17 of every closed one (sock_i_uid()).
  if (socket.idiag_inode == 0) return Owner{};
  return Owner{socket.idiag_uid};
}

}  // namespace

Expected<std::optional<uid_t>> socket_owner(const Endpoint& local, const Endpoint& remote, std::chrono::milliseconds timeout) {
  if (local.address.v4() != remote.address.v4()) return Owner{};
  const auto end = std::chrono::steady_clock::now() + timeout;
  const UniqueFd fd{::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_SOCK_DIAG)};
  if (!fd) return Unexpected{failed(errno)};
  const auto q = question(local, remote);
  sockaddr_nl kernel{};
  kernel.nl_family = AF_NETLINK;
  if (::sendto(fd.get(), &q, sizeof q, 0, reinterpret_cast<const sockaddr*>(&kernel), sizeof kernel) != static_cast<ssize_t>(sizeof q)) return Unexpected{failed(errno)};
  for (;;) {
    alignas(nlmsghdr) std::array<std::byte, 4096> buffer;  // about 130 bytes are answered
    sockaddr_nl from{};
    iovec part{buffer.data(), buffer.size()};
    msghdr message{};
    message.msg_name = &from;
    message.msg_namelen = sizeof from;
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    const ssize_t n = ::recvmsg(fd.get(), &message, 0);
    if (n >= 0) {
      nlmsghdr head{};
      if (from.nl_pid == 0 && static_cast<std::size_t>(n) >= sizeof head) std::memcpy(&head, buffer.data(), sizeof head);
      if (from.nl_pid == 0 && head.nlmsg_seq == sequence) {
        if ((message.msg_flags & MSG_TRUNC) != 0) return Unexpected{wrong("too long")};
        return owner_in(std::span<const std::byte>{buffer}.first(static_cast<std::size_t>(n)), local, remote);
      }
    } else if (errno != EAGAIN && errno != EINTR) {
      return Unexpected{failed(errno)};
    }
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
    if (left.count() <= 0) return Unexpected{failed(ETIMEDOUT)};
    if (n >= 0) continue;
    pollfd ready{fd.get(), POLLIN, 0};
    if (::poll(&ready, 1, static_cast<int>(std::min<std::chrono::milliseconds::rep>(left.count(), 60'000))) < 0 && errno != EINTR) return Unexpected{failed(errno)};
  }
}

}  // namespace postern::auth::identity
