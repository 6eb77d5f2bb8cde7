#include "base/seqpacket.h"

#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <memory>

namespace postern {

Expected<std::pair<UniqueFd, UniqueFd>> seqpacket_pair(std::size_t largest) {
  int fds[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) != 0)
    return Unexpected{system_error("make a local socket pair")};
  std::pair<UniqueFd, UniqueFd> pair{UniqueFd{fds[0]}, UniqueFd{fds[1]}};
  const int size = static_cast<int>(largest * 2 + 4096);  // the kernel counts its own overhead in
  for (const int fd : fds) {
    int now = 0;
    socklen_t length = sizeof now;
    if (::getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &now, &length) == 0 && now >= size) continue;
    if (::setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) != 0)
      ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
  }
  return pair;
}

Expected<Done> send_message(int socket, std::uint16_t version, std::uint16_t type, std::span<const std::byte> body,
                            std::string_view tail, std::span<const int> fds) {
  if (fds.size() > max_message_fds) return Unexpected{Error{EINVAL, "send a local message: too many descriptors"}};
  MessageHeader header{version, type, static_cast<std::uint32_t>(body.size() + tail.size())};
  std::array<iovec, 3> parts{iovec{&header, sizeof header}, iovec{const_cast<std::byte*>(body.data()), body.size()},
                             iovec{const_cast<char*>(tail.data()), tail.size()}};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * max_message_fds)] = {};
  msghdr message{};
  message.msg_iov = parts.data();
  message.msg_iovlen = parts.size();
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
    cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(c), fds.data(), sizeof(int) * fds.size());
  }
  for (;;) {
    if (::sendmsg(socket, &message, MSG_NOSIGNAL) >= 0) return Done{};
    // ECONNRESET is the first word of a peer that died with messages of ours unread; the next send would say EPIPE.
    if (errno == ECONNRESET) return Unexpected{system_error("send a local message", EPIPE)};
    if (errno != EINTR) return Unexpected{system_error("send a local message")};
  }
}

namespace {

/// Never zeroed, so that only as many of its pages exist as the longest message needed: zeroing 64 KiB a message took 16 page faults, and
/// 64 KiB of private memory in each session.
std::byte* receive_buffer(std::size_t size) {
  static thread_local std::unique_ptr<std::byte[]> buffer;
  static thread_local std::size_t have = 0;
  if (size > have) {
    buffer.reset(new std::byte[size]);
    have = size;
  }
  return buffer.get();
}

}  // namespace

Expected<std::optional<Message>> receive_message(int socket, std::size_t largest, std::vector<UniqueFd>* refused) {
  Message result;
  MessageHeader header;
  std::byte* const room = receive_buffer(largest);
  std::array<iovec, 2> parts{iovec{&header, sizeof header}, iovec{room, largest}};
  // Room for the kernel's most (SCM_MAX_FD): what finds none is closed by it, in our name.
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 253)] = {};
  msghdr message{};
  message.msg_iov = parts.data();
  message.msg_iovlen = parts.size();
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t n;
  do {
    n = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    // ECONNRESET: the peer died with messages of ours unread. It is told once, before what the peer still said (recv(2) takes the
    // socket's error first); its last words and then the end follow.
  } while (n < 0 && (errno == EINTR || errno == ECONNRESET));
  if (n < 0) return Unexpected{system_error("receive a local message")};
  // Descriptors first, so that none leaks whatever is wrong with the rest.
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; i++) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof fd);
      result.fds.emplace_back(fd);
    }
  }
  if (n == 0 && result.fds.empty()) return std::optional<Message>{};
  const auto refuse = [&](const char* why) {
    if (refused != nullptr)
      for (auto& fd : result.fds) refused->push_back(std::move(fd));
    return Unexpected{Error{EBADMSG, why}};
  };
  if ((message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) return refuse("receive a local message: it was truncated");
  if (result.fds.size() > max_message_fds) return refuse("receive a local message: too many descriptors");
  if (static_cast<std::size_t>(n) < sizeof header || header.size != static_cast<std::size_t>(n) - sizeof header)
    return refuse("receive a local message: its header does not fit it");
  result.version = header.version;
  result.type = header.type;
  result.bytes.assign(room, room + header.size);
  return std::optional<Message>{std::move(result)};
}

}  // namespace postern
