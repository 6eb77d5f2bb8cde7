#include "base/seqpacket.h"
#include "catch.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>

using namespace postern;

namespace {

std::size_t open_descriptors() {
  const std::filesystem::directory_iterator all{"/proc/self/fd"};
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

std::pair<UniqueFd, UniqueFd> pair_of(std::size_t largest = 64 * 1024) {
  auto pair = seqpacket_pair(largest);
  REQUIRE(pair);
  return std::move(*pair);
}

struct Body {
  std::uint32_t a;
  std::uint32_t b;
};

/// One raw datagram with `count` copies of a descriptor, past send_message()'s own checks.
ssize_t send_raw(int socket, const std::string& bytes, std::size_t count = 0) {
  iovec part{const_cast<char*>(bytes.data()), bytes.size()};
  std::vector<char> control(CMSG_SPACE(sizeof(int) * std::max<std::size_t>(count, 1)));
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (count > 0) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
    cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int) * count);
    const std::vector<int> fds(count, STDIN_FILENO);
    std::memcpy(CMSG_DATA(c), fds.data(), sizeof(int) * count);
  }
  return ::sendmsg(socket, &message, MSG_NOSIGNAL);
}

std::string header(std::uint32_t size) {
  const MessageHeader h{1, 2, size};
  return {reinterpret_cast<const char*>(&h), sizeof h};
}

int error_of(int socket, std::size_t largest = 64 * 1024) {
  const auto received = receive_message(socket, largest);
  return received ? 0 : received.error().code;
}

}  // namespace

TEST_CASE("a message arrives with its body, tail and descriptors", "[base][seqpacket]") {
  const auto [left, right] = pair_of();
  int pipe_ends[2];
  REQUIRE(::pipe2(pipe_ends, O_CLOEXEC) == 0);
  const UniqueFd reading{pipe_ends[0]}, writing{pipe_ends[1]};
  REQUIRE(send_body(left.get(), 3, 7, Body{1, 2}, "tail", std::array{writing.get()}));
  auto received = receive_message(right.get());
  REQUIRE(received);
  REQUIRE(*received);
  const Message& m = **received;
  CHECK(m.version == 3);
  CHECK(m.type == 7);
  CHECK_FALSE(m.body<Body>());  // there is a tail
  const auto whole = m.body_and_tail<Body>();
  REQUIRE(whole);
  CHECK(whole->first.b == 2);
  CHECK(whole->second == "tail");
  REQUIRE(m.fds.size() == 1);
  CHECK((::fcntl(m.fds[0].get(), F_GETFD) & FD_CLOEXEC) != 0);
  REQUIRE(::write(m.fds[0].get(), "x", 1) == 1);
  char c = 0;
  CHECK(::read(reading.get(), &c, 1) == 1);
  CHECK(c == 'x');
}

TEST_CASE("a body of another size is not handed out", "[base][seqpacket]") {
  const auto [left, right] = pair_of();
  REQUIRE(send_message(left.get(), 1, 1, {}, "1234567"));
  REQUIRE(send_message(left.get(), 1, 1, {}, ""));
  auto received = receive_message(right.get());
  REQUIRE((received && *received));
  CHECK_FALSE((**received).body<Body>());
  CHECK_FALSE((**received).body_and_tail<Body>());
  received = receive_message(right.get());
  REQUIRE((received && *received));
  CHECK((**received).bytes.empty());
}

TEST_CASE("what was cut, or whose header does not fit it, is EBADMSG and costs no descriptor", "[base][seqpacket]") {
  const auto [left, right] = pair_of();
  const auto before = open_descriptors();
  SECTION("a message longer than the receiver takes") {
    REQUIRE(send_message(left.get(), 1, 1, {}, std::string(101, 'x'), std::array{STDIN_FILENO}));
    CHECK(error_of(right.get(), 100) == EBADMSG);
  }
  SECTION("more descriptors than a message may carry") {
    REQUIRE(send_raw(left.get(), header(0), max_message_fds + 1) > 0);
    CHECK(error_of(right.get()) == EBADMSG);
  }
  SECTION("a hundred descriptors") {
    REQUIRE(send_raw(left.get(), header(0), 100) > 0);
    CHECK(error_of(right.get()) == EBADMSG);
  }
  SECTION("a header that promises more") {
    REQUIRE(send_raw(left.get(), header(4) + "abc", 2) > 0);
    CHECK(error_of(right.get()) == EBADMSG);
  }
  SECTION("a header that promises less") {
    REQUIRE(send_raw(left.get(), header(2) + "abc", 2) > 0);
    CHECK(error_of(right.get()) == EBADMSG);
  }
  SECTION("a header that promises 4 GiB") {
    REQUIRE(send_raw(left.get(), header(0xffffffff) + "abc", 2) > 0);
    CHECK(error_of(right.get()) == EBADMSG);
  }
  SECTION("less than a header") {
    REQUIRE(send_raw(left.get(), "1234567", 2) > 0);
    CHECK(error_of(right.get()) == EBADMSG);
  }
  SECTION("no byte at all, but a descriptor") {
    // Linux carries the descriptor: it must neither leak nor pass for the end.
    if (send_raw(left.get(), "", 1) >= 0) CHECK(error_of(right.get()) == EBADMSG);
  }
  CHECK(open_descriptors() == before);
  // The socket itself goes on: whether the connection does is the caller's business.
  REQUIRE(send_message(left.get(), 1, 5, {}, "fine"));
  auto received = receive_message(right.get());
  REQUIRE((received && *received));
  CHECK((**received).type == 5);
}

TEST_CASE("a message that nobody takes costs no descriptor when it is dropped", "[base][seqpacket]") {
  const auto [left, right] = pair_of();
  const auto before = open_descriptors();
  REQUIRE(send_raw(left.get(), header(0), max_message_fds) > 0);
  {
    auto received = receive_message(right.get());
    REQUIRE((received && *received));
    CHECK((**received).fds.size() == max_message_fds);
    CHECK(open_descriptors() == before + max_message_fds);
  }
  CHECK(open_descriptors() == before);
  const std::vector<int> too_many(max_message_fds + 1, STDIN_FILENO);
  CHECK(send_message(left.get(), 1, 1, {}, {}, too_many).error().code == EINVAL);
}

TEST_CASE("an empty socket is EAGAIN, a full one too, a closed one the end", "[base][seqpacket]") {
  auto [left, right] = pair_of();
  CHECK(error_of(right.get()) == EAGAIN);
  const std::string kilobyte(1024, 'x');
  int code = 0;
  for (int i = 0; i < 100'000 && code == 0; i++)
    if (const auto sent = send_message(left.get(), 1, 1, {}, kilobyte); !sent) code = sent.error().code;
  CHECK(code == EAGAIN);
  left.reset();
  std::size_t messages = 0;
  for (;; messages++) {
    auto received = receive_message(right.get());
    REQUIRE(received);
    if (!*received) break;
  }
  CHECK(messages > 10);
  CHECK(send_message(right.get(), 1, 1, {}).error().code == EPIPE);
}

TEST_CASE("the last words of a peer that died with our messages unread are heard", "[base][seqpacket]") {
  auto [left, right] = pair_of();
  REQUIRE(send_message(right.get(), 1, 1, {}, "never read"));
  REQUIRE(send_message(left.get(), 1, 42, {}, "last words"));
  left.reset();  // the kernel now reports ECONNRESET to `right` before what is queued
  auto received = receive_message(right.get());
  REQUIRE(received);
  REQUIRE(*received);
  CHECK((**received).type == 42);
  received = receive_message(right.get());
  REQUIRE(received);
  CHECK_FALSE(*received);
}

TEST_CASE("sending to a peer that died with our messages unread is EPIPE", "[base][seqpacket]") {
  auto [left, right] = pair_of();
  REQUIRE(send_message(right.get(), 1, 1, {}, "never read"));
  left.reset();
  CHECK(send_message(right.get(), 1, 1, {}).error().code == EPIPE);
  CHECK(send_message(right.get(), 1, 1, {}).error().code == EPIPE);
}

TEST_CASE("a pair takes a message as large as it was made for", "[base][seqpacket]") {
  const std::size_t largest = 512 * 1024;
  const auto [left, right] = pair_of(largest);
  const auto sent = send_message(left.get(), 1, 1, {}, std::string(largest, 'x'));
  if (!sent && ::geteuid() != 0) return;  // without CAP_NET_ADMIN net.core.wmem_max is the limit
  REQUIRE(sent);
  auto received = receive_message(right.get(), largest);
  REQUIRE((received && *received));
  CHECK((**received).bytes.size() == largest);
}

TEST_CASE("a fixed text never reads past its bounds", "[base][seqpacket]") {
  FixedText<4> t;
  CHECK(t.set("abcd"));
  CHECK(t.get() == "abcd");
  CHECK_FALSE(t.set("abcde"));
  CHECK(t.get().empty());
  t.length = 0xffffffff;
  CHECK_FALSE(t.valid());
  CHECK(t.get().empty());
}
