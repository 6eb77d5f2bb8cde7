#include "catch.h"
#include "sshd/net/libssh_ext.h"
#include "sshd/net/link.h"
#include "sshd/net/self_test.h"

#include "libssh_text.h"

#include <sys/socket.h>

#include <chrono>
#include <thread>

using namespace postern;
using namespace postern::sshd::net;
using namespace std::chrono_literals;

namespace {

struct Number {
  int value = 0;
};
constexpr std::uint16_t protocol = 7;

struct Ends {
  UniqueFd other;
  Link link;
};
Ends make(std::size_t largest = 4096) {
  auto pair = seqpacket_pair();
  REQUIRE(pair);
  return {std::move(pair->first), Link{std::move(pair->second), protocol, largest}};
}
void tell(const UniqueFd& socket, std::uint16_t type, int value, std::uint16_t version = protocol) {
  REQUIRE(send_body(socket.get(), version, type, Number{value}));
}

}  // namespace

TEST_CASE("while one answer is awaited other messages keep their order", "[net][link]") {
  auto [other, link] = make();
  tell(other, 1, 10);
  tell(other, 1, 11);
  tell(other, 2, 99);
  tell(other, 1, 12);
  auto answer = link.wait_for(2, 10s);
  REQUIRE(answer);
  CHECK(answer->body<Number>()->value == 99);
  CHECK(link.has_queued_messages());
  for (const int expected : {10, 11, 12}) {
    auto message = link.next();
    REQUIRE(message);
    CHECK(message->body<Number>()->value == expected);
  }
  CHECK_FALSE(link.next());
  CHECK_FALSE(link.gone());
}

TEST_CASE("an answer that does not come ends the wait at its limit", "[net][link]") {
  auto [other, link] = make();
  tell(other, 1, 10);
  const auto start = std::chrono::steady_clock::now();
  CHECK_FALSE(link.wait_for(2, 50ms));
  CHECK(std::chrono::steady_clock::now() - start >= 50ms);
  CHECK_FALSE(link.gone());
  CHECK(link.next());
}

TEST_CASE("the end of the other side ends the wait at once", "[net][link]") {
  auto [other, link] = make();
  std::thread closer{[&socket = other] { socket.reset(); }};
  CHECK_FALSE(link.wait_for(2, 60s));
  closer.join();
  CHECK(link.gone());
}

TEST_CASE("a message of another version or size ends the link", "[net][link]") {
  {
    auto [other, link] = make();
    tell(other, 1, 10, protocol + 1);
    CHECK_FALSE(link.next());
    CHECK(link.gone());
  }
  auto [other, link] = make(16);
  const std::string large(64, 'x');
  REQUIRE(send_message(other.get(), protocol, 1, std::as_bytes(std::span{large})));
  CHECK_FALSE(link.next());
  CHECK(link.gone());
}

TEST_CASE("what does not fit the socket is kept and sent later, in order", "[net][link]") {
  auto [other, link] = make();
  const int sent = 5000;
  const std::string tail(600, 't');
  for (int i = 0; i < sent; i++) link.send(1, Number{i}, tail);
  CHECK(link.wants_to_write());
  int received = 0;
  while (received < sent) {
    auto message = receive_message(other.get());
    if (!message) {
      REQUIRE(message.error().code == EAGAIN);
      REQUIRE(link.wants_to_write());
      link.flush();
      continue;
    }
    REQUIRE(*message);
    auto body = (*message)->body_and_tail<Number>();
    REQUIRE(body);
    REQUIRE(body->first.value == received);
    REQUIRE(body->second == tail);
    received++;
  }
  CHECK_FALSE(link.wants_to_write());
}

TEST_CASE("a peer that lets too much lie is given up", "[net][link]") {
  auto [other, link] = make();
  const std::string tail(100 * 1024, 't');
  for (int i = 0; i < 100 && !link.gone(); i++) link.send(1, Number{i}, tail);
  CHECK(link.gone());
}

TEST_CASE("libssh's structs are those of the headers that we were compiled with", "[net][libssh]") {
  const auto fits = ext::check_layout();
  INFO((fits ? "" : fits.error().doing));
  CHECK(fits);
}

TEST_CASE("a packet that cannot be encrypted is not sent in the clear", "[net][libssh]") { CHECK(ext::failed_encryption_leaves_no_plaintext()); }

TEST_CASE("the version that is named is that of the libssh that is linked", "[net][libssh]") {
  const std::string text = POSTERN_LIBSSH_TEXT, version = ext::library_version();
  INFO(text << " / " << version);
  CHECK(text.starts_with("libssh " + version.substr(0, version.find('/'))));
}

TEST_CASE("libssh logs in to itself, signed from outside", "[net][libssh]") {
  auto done = self_test();
  INFO((done ? "" : done.error().doing));
  CHECK(done);
}

TEST_CASE("a signer that refuses lets no key exchange end", "[net][libssh]") {
  struct Refuser : ext::Signer {
    std::string sign(std::uint32_t, Digest, std::string_view hash) override {
      asked = hash.size();
      return {};
    }
    std::size_t asked = 0;
  } refuser;
  auto key = ext::LocalKey::generate();
  REQUIRE(key);
  auto server = ext::Server::make({key->public_blob()}, "test");
  REQUIRE(server);
  int pair[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
  auto served = (*server)->accept(pair[0]);
  REQUIRE(served);
  ext::set_signer(&refuser);
  ssh_session client = ssh_new();
  const bool no = false;
  ssh_options_set(client, SSH_OPTIONS_PROCESS_CONFIG, &no);
  ssh_options_set(client, SSH_OPTIONS_HOST, "test");
  ssh_options_set(client, SSH_OPTIONS_FD, &pair[1]);
  ssh_set_blocking(client, 0);
  int ours = SSH_AGAIN, theirs = SSH_AGAIN;
  const auto deadline = std::chrono::steady_clock::now() + 20s;
  while (ours == SSH_AGAIN && theirs != SSH_OK && std::chrono::steady_clock::now() < deadline) {
    ours = ssh_handle_key_exchange(*served);
    if (theirs == SSH_AGAIN) theirs = ssh_connect(client);
  }
  ext::set_signer(nullptr);
  CHECK(ours == SSH_ERROR);
  CHECK(theirs != SSH_OK);
  CHECK((refuser.asked == 32 || refuser.asked == 48 || refuser.asked == 64));
  ssh_free(client);
  ssh_free(*served);
}

TEST_CASE("a public key that is none is refused at the start", "[net][libssh]") {
  CHECK_FALSE(ext::Server::make({"nonsense"}, "test"));
  CHECK_FALSE(ext::Server::make({std::string(2000, '\xff')}, "test"));
}
