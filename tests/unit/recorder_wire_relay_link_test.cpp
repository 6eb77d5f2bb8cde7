#include "catch.h"

#include "recorder/cast/chain.h"
#include "recorder/wire/local.h"
#include "recorder/wire/relay_link.h"
#include "temp_dir.h"

#include <sys/socket.h>
#include <sys/un.h>

#include <cstdlib>
#include <filesystem>

using namespace postern;
using namespace postern::recorder;
using namespace postern::recorder::wire;
using namespace std::chrono_literals;

namespace {

// A relay in the test's hand, on the same Poller as the link.
struct FakeRelay {
  FakeRelay(Poller& p, std::string path) : poller{p}, socket_path{std::move(path)} { listen(); }
  ~FakeRelay() { die(); }

  void listen() {
    ::unlink(socket_path.c_str());
    listener.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    socket_path.copy(address.sun_path, sizeof address.sun_path - 1);
    REQUIRE(::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    REQUIRE(::listen(listener.get(), 8) == 0);
    poller.watch(listener.get(), POLLIN, [this](short) {
      drop();
      peer.reset(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
      connections++;
      poller.watch(peer.get(), POLLIN, [this](short) { read(); });
    });
  }
  void drop() {
    if (!peer) return;
    poller.forget(peer.get());
    peer.reset();
    reader = {};
  }
  void die() {
    drop();
    if (listener) poller.forget(listener.get());
    listener.reset();
    ::unlink(socket_path.c_str());
  }
  void send(const std::string& frames) {
    REQUIRE(::send(peer.get(), frames.data(), frames.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(frames.size()));
  }
  void ack() {
    std::string out;
    local::append(local::Acks{bytes.size(), bytes.size(), 0}, out);
    send(out);
  }
  void read() {
    const auto space = reader.space();
    const ssize_t n = ::recv(peer.get(), space.data(), space.size(), 0);
    if (n <= 0) return drop();
    reader.filled(static_cast<std::size_t>(n));
    while (const auto frame = reader.next()) {
      if (frame->type == local::Type::open) {
        open = local::parse_open(frame->payload);
        std::string out;
        local::append(local::Opened{1, taken_end, {bytes.size(), 0, 0}, {RecorderState::searching, ""}}, out);
        if (answer) send(out);
      } else if (frame->type == local::Type::data) {
        const auto d = local::parse_data(frame->payload);
        REQUIRE(d);
        REQUIRE(d->offset == bytes.size());
        bytes += d->bytes;
        if (acking) ack();
      } else if (frame->type == local::Type::end) {
        end = local::parse_end(frame->payload);
      }
    }
  }

  Poller& poller;
  std::string socket_path;
  UniqueFd listener, peer;
  local::FrameReader reader;
  std::optional<local::Open> open;
  std::optional<local::End> end;
  std::string bytes;
  bool acking = true, answer = true, taken_end = false;
  int connections = 0;
};

struct Seen {
  std::uint64_t written = 0, committed = 0;
  std::vector<bool> connection;
  std::string failed;
  int ended = 0;
  std::vector<RecorderState> states;
  RelayLink::Handlers handlers() {
    return {[this](std::uint64_t n) {
              REQUIRE(n > written);
              written = n;
            },
            nullptr,
            [this](std::uint64_t n) {
              REQUIRE(n > committed);
              committed = n;
            },
            [this](RecorderState s, const std::string&) { states.push_back(s); },
            [this](bool c) { connection.push_back(c); },
            [this](const std::string& why) { failed = why; },
            [this] { ended++; }};
  }
};

template <class Condition>
bool until(Poller& poller, Condition condition, std::chrono::milliseconds limit = 5s) {
  const auto end = Poller::Clock::now() + limit;
  while (!condition()) {
    if (Poller::Clock::now() > end) return false;
    poller.run_once(20ms);
  }
  return true;
}

RecordingOpen some_open() { return {Id::random(), {"127.0.2.1:80"}, false, "boot", 1, 2}; }

std::string text(std::size_t n, char c = 'x') { return std::string(n, c); }

}  // namespace

TEST_CASE("what was appended before the relay was there arrives when it comes", "[wire][relay_link]") {
  TempDir dir;
  Poller poller;
  Seen seen;
  const auto open = some_open();
  RelayLink link{poller, dir.path / "s", open, seen.handlers()};
  link.append("header\n");
  until(poller, [] { return false; }, 120ms);
  CHECK_FALSE(link.connected());
  CHECK(link.room() == RelayLink::max_unwritten - 7);
  FakeRelay relay{poller, dir.path / "s"};
  REQUIRE(until(poller, [&] { return link.connected(); }));
  CHECK(relay.bytes == "header\n");
  CHECK(seen.written == 7);
  CHECK(link.room() == RelayLink::max_unwritten);
  REQUIRE(relay.open);
  CHECK(relay.open->recording.recording == open.recording);
  CHECK(seen.connection == std::vector{true});
}

TEST_CASE("after a restart of the relay the bytes go on from the length that it has, none twice, none missing", "[wire][relay_link]") {
  TempDir dir;
  Poller poller;
  Seen seen;
  RelayLink link{poller, dir.path / "s", some_open(), seen.handlers()};
  FakeRelay relay{poller, dir.path / "s"};
  std::string all;
  std::srand(1);
  for (int round = 0; round < 30; round++) {
    const auto piece = text(static_cast<std::size_t>(std::rand() % 50'000 + 1), static_cast<char>('a' + round % 26));
    all += piece;
    link.append(piece);
    if (round % 3 == 0) {
      relay.acking = false;  // it wrote bytes and was killed before it said so
      until(poller, [] { return false; }, std::chrono::milliseconds{std::rand() % 5});
      relay.die();
      until(poller, [] { return false; }, std::chrono::milliseconds{std::rand() % 5});
      relay.acking = true;
      relay.listen();
    }
    REQUIRE(until(poller, [&] { return link.written() == all.size(); }));
  }
  CHECK(relay.bytes == all);
  CHECK(relay.connections > 5);
  CHECK(link.connected());
}

TEST_CASE("a program that writes faster than the relay is told to wait", "[wire][relay_link]") {
  TempDir dir;
  Poller poller;
  Seen seen;
  RelayLink link{poller, dir.path / "s", some_open(), seen.handlers()};
  FakeRelay relay{poller, dir.path / "s"};
  relay.acking = false;
  link.append(text(RelayLink::max_unwritten + 1000));
  CHECK(link.room() == 0);
  REQUIRE(until(poller, [&] { return relay.bytes.size() == RelayLink::max_unwritten + 1000; }));
  CHECK(link.room() == 0);
  relay.ack();
  REQUIRE(until(poller, [&] { return link.room() == RelayLink::max_unwritten; }));
}

TEST_CASE("the end carries length and chain head, and is told again to a relay that died with it", "[wire][relay_link]") {
  TempDir dir;
  Poller poller;
  Seen seen;
  const auto open = some_open();
  RelayLink link{poller, dir.path / "s", open, seen.handlers()};
  FakeRelay relay{poller, dir.path / "s"};
  link.append(text(100'000));
  link.end();
  link.append("this comes too late");
  REQUIRE(until(poller, [&] { return relay.end.has_value(); }));
  cast::Chain chain{open.recording.bytes};
  const auto bytes = text(100'000);
  chain.update(std::as_bytes(std::span{bytes}));
  CHECK(relay.end->length == 100'000);
  CHECK(relay.end->head == chain.head());
  CHECK(relay.end->signature.empty());
  relay.end.reset();
  relay.drop();
  REQUIRE(until(poller, [&] { return relay.end.has_value(); }));
  CHECK(seen.ended == 0);
  SECTION("ended is told") {
    std::string out;
    local::append(local::Type::ended, "", out);
    relay.send(out);
    REQUIRE(until(poller, [&] { return seen.ended == 1; }));
  }
  SECTION("the relay came back and had taken it") {
    relay.drop();
    relay.taken_end = true;
    relay.bytes.clear();  // it is whole on a recorder and the journal is gone
    REQUIRE(until(poller, [&] { return seen.ended == 1; }));
    CHECK(link.written() == 100'000);
    CHECK(seen.failed.empty());
  }
}

TEST_CASE("a journal that lost what it had is a failure, not a silent hole", "[wire][relay_link]") {
  TempDir dir;
  Poller poller;
  Seen seen;
  RelayLink link{poller, dir.path / "s", some_open(), seen.handlers()};
  FakeRelay relay{poller, dir.path / "s"};
  link.append(text(5000));
  REQUIRE(until(poller, [&] { return link.written() == 5000; }));
  relay.bytes.resize(100);
  relay.drop();
  REQUIRE(until(poller, [&] { return !seen.failed.empty(); }));
  CHECK(link.room() == 0);
}

TEST_CASE("acks and states reach the session and never go backwards", "[wire][relay_link]") {
  TempDir dir;
  Poller poller;
  Seen seen;
  RelayLink link{poller, dir.path / "s", some_open(), seen.handlers()};
  FakeRelay relay{poller, dir.path / "s"};
  link.append(text(1000));
  REQUIRE(until(poller, [&] { return link.connected(); }));
  std::string out;
  local::append(local::Acks{1000, 1000, 800}, out);
  local::append(local::State{RecorderState::recording, "127.0.2.1:80"}, out);
  local::append(local::Acks{1000, 900, 300}, out);  // another recorder has less: seen.committed's REQUIRE would notice
  local::append(local::State{RecorderState::none, ""}, out);
  local::append(local::Acks{1000, 1000, 900}, out);
  relay.send(out);
  REQUIRE(until(poller, [&] { return seen.committed == 900; }));
  CHECK(link.journaled() == 1000);
  CHECK(link.state() == RecorderState::none);
  CHECK(seen.states == std::vector{RecorderState::recording, RecorderState::none});
}

TEST_CASE("a relay that talks nonsense is left and tried again", "[wire][relay_link]") {
  TempDir dir;
  Poller poller;
  Seen seen;
  RelayLink link{poller, dir.path / "s", some_open(), seen.handlers()};
  FakeRelay relay{poller, dir.path / "s"};
  std::string too_much, twice, ended;
  local::append(local::Acks{5000, 5000, 0}, too_much);
  local::append(local::Opened{}, twice);
  local::append(local::Type::ended, "", ended);
  for (const std::string& bad : {too_much, twice, ended, std::string{"\xff\xff\xff\xff\xff\xff\xff\xff"}, std::string(8, '\0')}) {
    REQUIRE(until(poller, [&] { return link.connected(); }));
    const int before = relay.connections;
    relay.send(bad);
    REQUIRE(until(poller, [&] { return relay.connections > before; }));
  }
  REQUIRE(until(poller, [&] { return link.connected(); }));
  CHECK(link.written() == 0);
}

TEST_CASE("a relay that takes the connection and says nothing is tried again", "[wire][relay_link]") {
  TempDir dir;
  Poller poller;
  Seen seen;
  RelayLink link{poller, dir.path / "s", some_open(), seen.handlers()};
  FakeRelay relay{poller, dir.path / "s"};
  relay.answer = false;
  REQUIRE(until(poller, [&] { return relay.connections >= 2; }, 10s));
  relay.answer = true;
  REQUIRE(until(poller, [&] { return link.connected(); }, 10s));
}
