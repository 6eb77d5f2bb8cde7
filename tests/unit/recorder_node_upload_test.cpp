#include "recorder_node_fixture.h"

#include <sys/mount.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <csignal>
#include <mutex>

using namespace recorder_node_test;

namespace {
const std::string first = "{\"version\":2,\"width\":80,\"height\":24,\"srcNode\":\"alice-laptop\",\"command\":\"id\"}\n";
const std::string event = "[0.100000,\"o\",\"uid=1000\\r\\n\"]\n";
}  // namespace

TEST_CASE("a recording that was sent and ended is on disk, whole and once", "[recorder_node]") {
  Recorder r;
  Relay relay{r, r.endpoint()};
  const Id id = Id::random();
  auto u = relay.opened(id, 1);
  CHECK(u->answer->have == 0);
  CHECK(u->answer->head == head_of(id, ""));
  CHECK(u->answer->state == "live");
  u->data(0, first);
  relay.ack(u, first.size());
  CHECK(contents(r.file(id, ".cast.part")) == first);
  CHECK(relay.copy(id)["state"] == "live");
  CHECK(relay.copy(id)["header"]["srcNode"] == "alice-laptop");
  u->data(first.size(), event);
  u->end(id, first + event);
  r.until([&] { return u->closed; });
  CHECK(u->whole == head_of(id, first + event));
  CHECK(contents(r.file(id, ".cast")) == first + event);
  CHECK(r.file(id, ".cast.part").empty());
  const auto copy = relay.copy(id);
  CHECK(copy["state"] == "whole");
  CHECK(copy["length"] == first.size() + event.size());
  CHECK(copy["source"] == "127.0.0.1");
  CHECK(copy["relay"] == "server");
  CHECK(contents(r.settings.store.dir / copy["path"].get<std::string>()) == first + event);
  const auto read = relay.ask("GET", "/postern/v1/recordings/" + id.text());
  CHECK(read.status == 200);
  CHECK(read.body == first + event);
}

TEST_CASE("a bulk recording arrives byte for byte, by back-pressure and many turns", "[recorder_node]") {
  Recorder r;
  Relay relay{r, r.endpoint()};
  const Id id = Id::random();
  auto u = relay.opened(id, 1);
  std::string all;
  for (unsigned i = 0; all.size() < 20'000'000; i++) all += std::to_string(i * 2654435761U) + "\n";
  for (std::size_t at = 0; at < all.size(); at += 200'000) u->data(at, std::string_view{all}.substr(at, 200'000));
  u->end(id, all);
  r.until([&] { return u->closed; }, 60000);
  CHECK(u->whole == head_of(id, all));
  CHECK(contents(r.file(id, ".cast")) == all);
  const auto read = relay.ask("GET", "/postern/v1/recordings/" + id.text());
  CHECK(read.body == all);
}

TEST_CASE("an open that is not newer is refused and tells the stored epoch, also after a restart", "[recorder_node]") {
  Recorder r;
  const Id id = Id::random();
  {
    Relay relay{r, r.endpoint()};
    relay.opened(id, 5);
    for (const std::uint64_t epoch : {1, 4, 5}) {
      auto u = relay.open(id, epoch);
      r.until([&] { return u->closed; });
      CHECK(u->status == 409);
      REQUIRE(u->error);
      CHECK(u->error->code == Code::stale_epoch);
      CHECK(u->error->epoch == 5);
    }
  }
  r.restart();
  Relay relay{r, r.endpoint()};
  auto u = relay.open(id, 5);
  r.until([&] { return u->closed; });
  CHECK(u->status == 409);
  relay.opened(id, 6);
}

TEST_CASE("a higher epoch closes the older stream, whose late bytes are not written", "[recorder_node]") {
  Recorder r;
  Relay stuck{r, r.endpoint()}, fresh{r, r.endpoint()};
  const Id id = Id::random();
  auto old = stuck.opened(id, 1);
  old->data(0, first);
  stuck.ack(old, first.size());
  auto u = fresh.opened(id, 2);
  CHECK(u->answer->have == first.size());
  CHECK(u->answer->head == head_of(id, first));
  r.until([&] { return old->closed; });
  REQUIRE(old->error);
  CHECK(old->error->code == Code::superseded);
  old->data(first.size(), "late");
  u->data(first.size(), event);
  fresh.ack(u, first.size() + event.size());
  CHECK(contents(r.file(id, ".cast.part")) == first + event);
}

TEST_CASE("opening again names what is there and never doubles it", "[recorder_node]") {
  Recorder r;
  const Id id = Id::random();
  for (std::uint64_t epoch = 1; epoch <= 4; epoch++) {
    Relay relay{r, r.endpoint()};
    auto u = relay.opened(id, epoch);
    CHECK(u->answer->have == (epoch == 1 ? 0 : first.size()));
    if (epoch == 1) {
      u->data(0, first);
      relay.ack(u, first.size());
    }
    if (epoch == 3) u->data(0, first);  // a relay that does not listen
    if (epoch == 3) r.until([&] { return u->error; });
    if (epoch == 3) CHECK(u->error->code == Code::bad_frame);
  }
  CHECK(contents(r.file(id, ".cast.part")) == first);
}

TEST_CASE("a part found after a restart is hashed, and goes on where it stopped", "[recorder_node]") {
  Recorder r;
  const Id id = Id::random();
  std::string all = first;
  while (all.size() < 3'000'000) all += event;
  const std::size_t some = 2'500'000;
  {
    Relay relay{r, r.endpoint()};
    auto u = relay.opened(id, 1);
    for (std::size_t at = 0; at < some; at += 250'000) u->data(at, std::string_view{all}.substr(at, 250'000));
    r.until([&] { return u->ack == some; });
  }
  r.restart();
  Relay relay{r, r.endpoint()};
  CHECK(relay.copy(id)["state"] == "cut");
  CHECK(relay.copy(id)["length"] == some);
  auto u = relay.opened(id, 2);
  CHECK(u->answer->have == some);
  CHECK(u->answer->head == head_of(id, std::string_view{all}.substr(0, some)));
  REQUIRE(u->answer->proven);
  const auto m = u->answer->proven->offset;
  CHECK(m % cast::Chain::block_size == 0);
  CHECK(m <= some - r.settings.store.turn_bytes);
  CHECK(u->answer->proven->head == head_of(id, std::string_view{all}.substr(0, m)));
  for (std::size_t at = some; at < all.size(); at += 250'000) u->data(at, std::string_view{all}.substr(at, 250'000));
  u->end(id, all);
  r.until([&] { return u->closed; });
  CHECK(u->whole == head_of(id, all));
  CHECK(contents(r.file(id, ".cast")) == all);
}

TEST_CASE("a tail torn by a power loss is replaced from the proven border", "[recorder_node]") {
  Recorder r;
  const Id id = Id::random();
  std::string all = first;
  while (all.size() < 3'000'000) all += event;
  {
    Relay relay{r, r.endpoint()};
    auto u = relay.opened(id, 1);
    for (std::size_t at = 0; at < 2'500'000; at += 250'000) u->data(at, std::string_view{all}.substr(at, 250'000));
    r.until([&] { return u->ack == 2'500'000; });
  }
  r.stop();
  {
    std::fstream file{r.file(id, ".cast.part"), std::ios::in | std::ios::out | std::ios::binary};
    file.seekp(2'400'000);
    file << std::string(100'000, '\0');
  }
  r.start();
  Relay relay{r, r.endpoint()};
  auto u = relay.opened(id, 2);
  CHECK(u->answer->head != head_of(id, std::string_view{all}.substr(0, 2'500'000)));
  REQUIRE(u->answer->proven);
  const auto m = u->answer->proven->offset;
  REQUIRE(u->answer->proven->head == head_of(id, std::string_view{all}.substr(0, m)));
  for (std::size_t at = m; at < all.size(); at += 250'000) u->data(at, std::string_view{all}.substr(at, 250'000));
  u->end(id, all);
  r.until([&] { return u->closed; });
  CHECK(u->whole == head_of(id, all));
  CHECK(contents(r.file(id, ".cast")) == all);
}

TEST_CASE("going back to any other place is refused", "[recorder_node]") {
  Recorder r;
  const Id id = Id::random();
  {
    Relay relay{r, r.endpoint()};
    auto u = relay.opened(id, 1);
    u->data(0, std::string(300'000, 'x'));
    relay.ack(u, 300'000);
  }
  r.restart();
  Relay relay{r, r.endpoint()};
  std::uint64_t epoch = 2;
  for (const std::uint64_t offset : {1, 65536, 299'999, 300'001}) {
    auto u = relay.opened(id, epoch++);
    u->data(offset, "y");
    r.until([&] { return u->closed; });
    REQUIRE(u->error);
    CHECK(u->error->code == Code::bad_frame);
  }
  CHECK(contents(r.file(id, ".cast.part")) == std::string(300'000, 'x'));
}

TEST_CASE("other bytes under the same id are a conflict that stays, and nothing is changed", "[recorder_node]") {
  Recorder r;
  const Id told = Id::random(), ended = Id::random(), whole = Id::random();
  {
    Relay relay{r, r.endpoint()};
    auto u = relay.opened(told, 1);
    u->data(0, first);
    relay.ack(u, first.size());
    u->stream->write(wire::conflict_frame({first.size(), head_of(told, "other")}));
    r.until([&] { return u->closed; });
    REQUIRE(u->error);
    CHECK(u->error->code == Code::conflict);

    u = relay.opened(ended, 1);
    u->data(0, first);
    u->stream->write(wire::end_frame({first.size(), head_of(ended, "other"), "", ""}));
    r.until([&] { return u->closed; });
    REQUIRE(u->error);
    CHECK(u->error->code == Code::conflict);

    u = relay.opened(whole, 1);
    u->data(0, first);
    u->end(whole, first);
    r.until([&] { return u->closed; });
    CHECK_FALSE(u->whole.empty());
    u = relay.opened(whole, 2);
    CHECK(u->answer->state == "whole");
    CHECK(u->answer->have == first.size());
    CHECK(u->answer->head == head_of(whole, first));
    u->stream->write(wire::conflict_frame({first.size(), head_of(whole, "other")}));
    r.until([&] { return u->closed; });
  }
  for (int life = 0; life < 2; life++) {
    Relay relay{r, r.endpoint()};
    for (const Id& id : {told, ended, whole}) {
      CHECK(relay.copy(id)["state"] == "conflict");
      auto u = relay.open(id, 10);
      r.until([&] { return u->closed; });
      CHECK(u->status == 409);
      REQUIRE(u->error);
      CHECK(u->error->code == Code::conflict);
      CHECK(relay.ask("GET", "/postern/v1/recordings/" + id.text()).body == first);
    }
    if (life == 0) r.restart();
  }
}

TEST_CASE("a whole recording is whole again after a restart, without another byte", "[recorder_node]") {
  Recorder r;
  const Id id = Id::random();
  {
    Relay relay{r, r.endpoint()};
    auto u = relay.opened(id, 1);
    u->data(0, first);
    u->end(id, first);
    r.until([&] { return u->closed; });
  }
  r.restart();
  Relay relay{r, r.endpoint()};
  CHECK(relay.copy(id)["state"] == "whole");
  CHECK(relay.copy(id)["head"] == head_of(id, first));
  auto u = relay.opened(id, 2);
  CHECK(u->answer->state == "whole");
  u->end(id, first);
  r.until([&] { return u->closed; });
  CHECK(u->whole == head_of(id, first));
}

TEST_CASE("a crash between an end on disk and its rename is finished at the start", "[recorder_node]") {
  Recorder r;
  const Id id = Id::random();
  {
    Relay relay{r, r.endpoint()};
    auto u = relay.opened(id, 1);
    u->data(0, first);
    u->end(id, first);
    r.until([&] { return u->closed; });
  }
  r.stop();
  const auto path = r.file(id, ".cast");
  fs::rename(path, path.string() + ".part");
  r.start();
  Relay relay{r, r.endpoint()};
  CHECK(relay.copy(id)["state"] == "whole");
  CHECK(contents(r.file(id, ".cast")) == first);
}

TEST_CASE("a recording that will get no end is kept as cut, with the reason", "[recorder_node]") {
  Recorder r;
  Relay relay{r, r.endpoint()};
  const Id id = Id::random();
  auto u = relay.opened(id, 1);
  u->data(0, first);
  u->stream->write(wire::cut_frame({first.size(), head_of(id, first), "session_died", ""}));
  u->stream->finish();
  r.until([&] { return u->closed; });
  CHECK(u->cut == head_of(id, first));
  CHECK(relay.copy(id)["state"] == "cut");
  CHECK(relay.copy(id)["reason"] == "session_died");
  // The relay was wrong: the session lives.
  u = relay.opened(id, 2);
  CHECK(u->answer->have == first.size());
  CHECK(relay.copy(id)["reason"] == "");
  u->end(id, first);
  r.until([&] { return u->closed; });
  CHECK(relay.copy(id)["state"] == "whole");
}

TEST_CASE("a stream that ends without an end leaves a cut copy", "[recorder_node]") {
  Recorder r;
  Relay other{r, r.endpoint()};
  const Id id = Id::random();
  {
    Relay relay{r, r.endpoint()};
    auto u = relay.opened(id, 1);
    u->data(0, first);
    relay.ack(u, first.size());
    CHECK(other.copy(id)["state"] == "live");
    u->stream->reset();
    r.until([&] { return other.copy(id)["state"] == "cut"; });
    u = relay.opened(id, 2);
    r.until([&] { return other.copy(id)["state"] == "live"; });
  }  // the whole connection is gone
  r.until([&] { return other.copy(id)["state"] == "cut"; });
  CHECK(other.copy(id)["length"] == first.size());
}

TEST_CASE("a moved notice marks the part, fences the old stream, and may be taken back by a newer open", "[recorder_node]") {
  Recorder r;
  Relay relay{r, r.endpoint()};
  const Id id = Id::random();
  const auto moved = [&](std::uint64_t epoch) {
    return relay.ask("POST", "/postern/v1/recordings/" + id.text() + "/moved", wire::format(wire::MovedNotice{"127.0.2.2:80", epoch, ""}));
  };
  CHECK(moved(1).status == 404);
  auto u = relay.opened(id, 1);
  u->data(0, first);
  relay.ack(u, first.size());
  CHECK(moved(1).status == 409);
  const auto reply = moved(2);
  CHECK(reply.status == 200);
  const auto answer = wire::parse_moved_answer(reply.body.substr(0, reply.body.size() - 1));
  REQUIRE(answer);
  CHECK(answer->state == "moved");
  CHECK(answer->length == first.size());
  CHECK(answer->head == head_of(id, first));
  r.until([&] { return u->closed; });
  REQUIRE(u->error);
  CHECK(u->error->code == Code::superseded);
  CHECK(relay.copy(id)["state"] == "moved");
  CHECK(relay.copy(id)["moved_to"] == "127.0.2.2:80");
  auto stale = relay.open(id, 2);
  r.until([&] { return stale->closed; });
  CHECK(stale->status == 409);
  u = relay.opened(id, 3);
  CHECK(relay.copy(id)["state"] == "live");
  u->end(id, first);
  r.until([&] { return u->closed; });
  const auto whole = moved(4);
  CHECK(whole.status == 200);
  CHECK(whole.body.find("\"state\":\"whole\"") != std::string::npos);
}

TEST_CASE("a moved notice is still known after a restart", "[recorder_node]") {
  Recorder r;
  const Id id = Id::random();
  {
    Relay relay{r, r.endpoint()};
    relay.opened(id, 1);
    CHECK(relay.ask("POST", "/postern/v1/recordings/" + id.text() + "/moved", wire::format(wire::MovedNotice{"b", 2, ""})).status == 200);
  }
  r.restart();
  Relay relay{r, r.endpoint()};
  CHECK(relay.copy(id)["state"] == "moved");
  CHECK(relay.copy(id)["epoch"] == 2);
}

TEST_CASE("only allowed addresses upload, only theirs, and only allowed addresses read", "[recorder_node]") {
  Recorder r{[](node::Settings& s) {
    s.ingest = {*Prefix::parse("127.0.0.2"), *Prefix::parse("127.0.0.3")};
    s.read = {*Prefix::parse("127.0.0.4")};
  }};
  Relay host{r, r.endpoint(), "127.0.0.2"}, other{r, r.endpoint(), "127.0.0.3"}, reader{r, r.endpoint(), "127.0.0.4"}, stranger{r, r.endpoint(), "127.0.0.5"};
  const Id id = Id::random();
  auto u = host.opened(id, 1);
  u->data(0, first);
  host.ack(u, first.size());
  for (Relay* bad : {&other, &reader, &stranger}) {
    auto no = bad->open(id, 9);
    r.until([&] { return no->closed; });
    CHECK(no->status == 403);
    REQUIRE(no->error);
    CHECK(no->error->code == (bad == &other ? Code::not_yours : Code::not_allowed));
    CHECK(bad->ask("POST", "/postern/v1/recordings/" + id.text() + "/moved", wire::format(wire::MovedNotice{"x", 9, ""})).status == 403);
  }
  CHECK_FALSE(u->closed);
  for (Relay* bad : {&host, &other, &stranger}) {
    CHECK(bad->ask("GET", "/postern/v1/recordings").status == 403);
    CHECK(bad->ask("GET", "/postern/v1/recordings/" + id.text()).status == 403);
  }
  CHECK(stranger.ask("GET", "/postern/v1/health").status == 403);
  CHECK(reader.copy(id)["epoch"] == 1);
  CHECK(reader.ask("GET", "/postern/v1/recordings/" + id.text()).body == first);
}

TEST_CASE("nothing but an id names a recording", "[recorder_node]") {
  Recorder r;
  Relay relay{r, r.endpoint()};
  std::ofstream{r.dir.path / "secret.cast"} << "secret";
  for (const std::string bad : {"..", "../secret", "%2e%2e%2fsecret", "../../secret.cast", "/etc/passwd", "aaaaaaaaaaaaaaaaaaaaaaaaab", "AAAAAAAAAAAAAAAAAAAAAAAAAA",
                                "aaaaaaaaaaaaaaaaaaaaaaaaaa.cast", "aaaaaaaaaaaaaaaaaaaaaaaaa/", ".lock", ""}) {
    INFO(bad);
    const auto got = relay.ask("GET", "/postern/v1/recordings/" + bad);
    CHECK(got.status == 404);
    CHECK(got.body.find("secret\n") == std::string::npos);
    CHECK(relay.ask("POST", "/postern/v1/recordings/" + bad + "?epoch=1", "{}\n").status == 404);
  }
  // The open line cannot name another file than the path.
  const Id a = Id::random(), b = Id::random();
  const auto r1 = relay.ask("POST", "/postern/v1/recordings/" + a.text() + "?epoch=1", wire::format(wire::OpenLine{b, 1, "x", 0, 0, ""}));
  CHECK(r1.status == 400);
  CHECK(relay.ask("POST", "/postern/v1/recordings/" + a.text() + "?epoch=0", wire::format(wire::OpenLine{a, 1, "x", 0, 0, ""})).status == 400);
  CHECK(relay.ask("POST", "/postern/v1/recordings/" + a.text(), wire::format(wire::OpenLine{a, 1, "x", 0, 0, ""})).status == 400);
  CHECK(relay.ask("GET", "/postern/v1/recordings").body.empty());
}

TEST_CASE("an upload that says nothing is closed at its deadline", "[recorder_node]") {
  Recorder r{[](node::Settings& s) { s.open_timeout = milliseconds{50}; }};
  Relay relay{r, r.endpoint()};
  const auto reply = std::make_shared<Relay::Reply>();
  auto stream = relay.connection->request("POST", "/postern/v1/recordings/" + Id::random().text() + "?epoch=1", {}, false,
                                          {.on_headers = [reply](int s, const wire::HeaderList&) { reply->status = s; }, .on_data = {}, .on_end = {}, .on_drain = {},
                                           .on_close = [reply](std::uint32_t, bool) { reply->closed = true; }});
  r.until([&] { return reply->closed; });
  CHECK(reply->status == 408);
}

TEST_CASE("over the limits uploads are refused: in number, and in length", "[recorder_node]") {
  Recorder r{[](node::Settings& s) {
    s.store.streams = 2;
    s.store.max_recording = 1'000'000;
  }};
  Relay relay{r, r.endpoint()};
  const Id id = Id::random();
  auto u = relay.opened(id, 1);
  relay.opened(Id::random(), 1);
  auto third = relay.open(Id::random(), 1);
  r.until([&] { return third->closed; });
  CHECK(third->status == 503);
  u->data(0, std::string(900'000, 'x'));
  relay.ack(u, 900'000);
  u->data(900'000, std::string(200'000, 'x'));
  r.until([&] { return u->closed; });
  REQUIRE(u->error);
  CHECK(u->error->code == Code::too_large);
  CHECK(fs::file_size(r.file(id, ".cast.part")) <= 1'000'000);
}

// ---- storage that fails

TEST_CASE("too little free space ends uploads at once, and health says so", "[recorder_node]") {
  Recorder r{[](node::Settings& s) { s.store.min_free = std::uint64_t{1} << 52; }};
  Relay relay{r, r.endpoint()};
  auto health = relay.start("GET", "/postern/v1/health");
  r.until([&] { return health->body.find('\n') != std::string::npos; });
  const auto line = wire::parse_health(health->body.substr(0, health->body.find('\n')));
  REQUIRE(line);
  CHECK_FALSE(line->accepting);
  CHECK(line->reason == "disk_full");
  auto u = relay.open(Id::random(), 1);
  r.until([&] { return u->closed; });
  CHECK(u->status == 507);
  REQUIRE(u->error);
  CHECK(u->error->code == Code::disk_full);
}

TEST_CASE("a file size limit ends that upload, what was acked stays, nothing half is kept", "[recorder_node]") {
  Recorder r;
  Relay relay{r, r.endpoint()};
  const Id id = Id::random(), other = Id::random();
  auto u = relay.opened(id, 1), v = relay.opened(other, 1);
  u->data(0, std::string(100'000, 'x'));
  relay.ack(u, 100'000);
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit old{};
  ::getrlimit(RLIMIT_FSIZE, &old);
  const rlimit small{150'000, old.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &small);
  u->data(100'000, std::string(100'000, 'y'));
  r.until([&] { return u->closed; });
  ::setrlimit(RLIMIT_FSIZE, &old);
  REQUIRE(u->error);
  CHECK(u->error->code == Code::disk_full);
  CHECK_FALSE(v->closed);
  // The last ack may have grown by what was written before the limit; the file is what was acked.
  r.until([&] { return relay.copy(id)["state"] == "cut"; });
  const auto length = relay.copy(id)["length"].get<std::uint64_t>();
  CHECK(length == u->ack);
  u = relay.opened(id, 2);
  CHECK(u->answer->have == length);
  const std::string all = std::string(100'000, 'x') + std::string(100'000, 'y');
  CHECK(u->answer->head == head_of(id, std::string_view{all}.substr(0, length)));
  CHECK(fs::file_size(r.file(id, ".cast.part")) == length);
  u->data(length, std::string_view{all}.substr(length));
  u->end(id, all);
  r.until([&] { return u->closed; });
  CHECK(contents(r.file(id, ".cast")) == all);
}

TEST_CASE("a full disk ends every upload at once and is left as soon as there is room", "[recorder_node][root]") {
  TempDir mount;
  if (::geteuid() != 0 || ::mount("tmpfs", mount.path.c_str(), "tmpfs", 0, "size=2m") != 0) {
    WARN("not run: mounting a tmpfs needs root");
    return;
  }
  struct Unmount {
    fs::path path;
    ~Unmount() { ::umount2(path.c_str(), MNT_DETACH); }
  } unmount{mount.path};
  {
    Recorder r{[&](node::Settings& s) { s.store.dir = mount.path / "store"; }};
    Relay relay{r, r.endpoint()};
    const Id id = Id::random();
    auto u = relay.opened(id, 1), idle = relay.opened(Id::random(), 1);
    std::string all(3'000'000, 'x');
    for (std::size_t at = 0; at < all.size(); at += 250'000) u->data(at, std::string_view{all}.substr(at, 250'000));
    r.until([&] { return u->closed && idle->closed; });
    REQUIRE(u->error);
    CHECK(u->error->code == Code::disk_full);
    REQUIRE(idle->error);
    CHECK(idle->error->code == Code::disk_full);
    auto refused = relay.open(Id::random(), 1);
    r.until([&] { return refused->closed; });
    CHECK(refused->status == 507);
    // What was acked is there, and only that.
    const std::string there = contents(r.file(id, ".cast.part"));
    CHECK(there.size() >= u->ack);
    CHECK(there == all.substr(0, there.size()));
  }
}

namespace {
/// fdatasync(2) that can be made to hang or to fail.
struct Disk {
  std::mutex mutex;
  std::condition_variable changed;
  bool stuck = false;
  std::atomic<int> error{0};
  std::function<int(int)> sync() {
    return [this](int fd) {
      std::unique_lock guard{mutex};
      changed.wait(guard, [&] { return !stuck; });
      if (error != 0) {
        errno = error;
        return -1;
      }
      return ::fdatasync(fd);
    };
  }
  void set_stuck(bool value) {
    {
      const std::lock_guard guard{mutex};
      stuck = value;
    }
    changed.notify_all();
  }
};
}  // namespace

TEST_CASE("health lines come while the disk works and stop while it hangs", "[recorder_node]") {
  Disk disk;
  Recorder r{[&](node::Settings& s) {
    s.store.sync = disk.sync();
    s.store.health_interval = milliseconds{20};
  }};
  Relay relay{r, r.endpoint()};
  auto health = relay.start("GET", "/postern/v1/health");
  const auto lines = [&] { return std::count(health->body.begin(), health->body.end(), '\n'); };
  r.until([&] { return lines() >= 5; });
  auto u = relay.opened(Id::random(), 1);
  const auto last = [&] {
    const auto end = health->body.rfind('\n');
    const auto begin = health->body.rfind('\n', end - 1);
    return *wire::parse_health(health->body.substr(begin + 1, end - begin - 1));
  };
  r.until([&] { return last().live == 1; });
  CHECK(last().accepting);
  CHECK(last().name == "recorder-a");
  CHECK(last().challenge.size() == 64);
  CHECK(last().last_commit_age_ms);

  disk.set_stuck(true);
  u->data(0, first);
  // The line of the moment may still come; then none does.
  r.run_for(200);
  const auto stopped_at = lines();
  r.run_for(300);
  CHECK(lines() == stopped_at);
  CHECK(u->ack == 0);
  disk.set_stuck(false);
  r.until([&] { return lines() > stopped_at; });
  relay.ack(u, first.size());
}

TEST_CASE("a failed fdatasync is final for that file, also after a restart, others go on", "[recorder_node]") {
  Disk disk;
  Recorder r{[&](node::Settings& s) { s.store.sync = disk.sync(); }};
  const Id id = Id::random(), other = Id::random();
  {
    Relay relay{r, r.endpoint()};
    auto u = relay.opened(id, 1);
    u->data(0, first);
    relay.ack(u, first.size());
    disk.error = EIO;
    u->data(first.size(), event);
    r.until([&] { return u->closed; });
    disk.error = 0;
    REQUIRE(u->error);
    CHECK(u->error->code == Code::io_error);
    CHECK(u->ack == first.size());
    auto v = relay.opened(other, 1);
    v->data(0, first);
    relay.ack(v, first.size());
  }
  for (int life = 0; life < 2; life++) {
    Relay relay{r, r.endpoint()};
    auto u = relay.open(id, 9);
    r.until([&] { return u->closed; });
    CHECK(u->status == 500);
    REQUIRE(u->error);
    CHECK(u->error->code == Code::io_error);
    CHECK(relay.copy(id)["error"] != "");
    if (life == 0) r.restart();
  }
}

TEST_CASE("an end that cannot be synced is not called whole", "[recorder_node]") {
  Disk disk;
  Recorder r{[&](node::Settings& s) { s.store.sync = disk.sync(); }};
  Relay relay{r, r.endpoint()};
  const Id id = Id::random();
  auto u = relay.opened(id, 1);
  disk.error = EIO;
  u->data(0, first);
  u->end(id, first);
  r.until([&] { return u->closed; });
  disk.error = 0;
  CHECK(u->whole.empty());
  REQUIRE(u->error);
  CHECK(u->error->code == Code::io_error);
  CHECK(r.file(id, ".cast").empty());
  // The page cache still has the bytes, so they would hash to the right head after a restart.
  r.restart();
  CHECK(r.file(id, ".cast").empty());
  Relay again{r, r.endpoint()};
  CHECK(again.copy(id)["state"] != "whole");
}

TEST_CASE("a recording that was made in the moment of a crash, with nothing in it, can be opened again", "[recorder_node]") {
  Recorder r;
  const Id id = Id::random(), other = Id::random();
  fs::path folder;
  {
    Relay relay{r, r.endpoint()};
    auto u = relay.opened(other, 1);  // so that today's folder is there
    folder = r.file(other, ".cast.part").parent_path();
  }
  REQUIRE_FALSE(folder.empty());
  std::ofstream{folder / (id.text() + ".cast.part")}.flush();
  std::ofstream{folder / (id.text() + ".meta")}.flush();
  r.restart();
  Relay relay{r, r.endpoint()};
  auto u = relay.opened(id, 1);
  CHECK_FALSE(u->error);
}

TEST_CASE("stopping commits what has arrived and tells the relays", "[recorder_node]") {
  Recorder r{[](node::Settings& s) { s.store.commit_interval = milliseconds{10'000}; }};
  const Id id = Id::random();
  Relay relay{r, r.endpoint()};
  auto u = relay.opened(id, 1);
  u->data(0, first);
  relay.ack(u, first.size());  // the first bytes of a stream are urgent
  u->data(first.size(), event);
  r.run_for(100);
  CHECK(u->ack == first.size());
  r.stop();
  r.until([&] { return u->closed; });
  CHECK(u->ack == first.size() + event.size());
  REQUIRE(u->error);
  CHECK(u->error->code == Code::not_accepting);
  CHECK(contents(r.file(id, ".cast.part")) == first + event);
  r.start();
}

TEST_CASE("two recorders cannot share a folder", "[recorder_node]") {
  Recorder r;
  node::Server second{r.io, r.settings};
  const auto started = second.start();
  REQUIRE_FALSE(started);
  CHECK(started.error().doing.find("another recorder") != std::string::npos);
}

TEST_CASE("a thousand recordings open and end side by side on one connection", "[recorder_node]") {
  Recorder r;
  Relay relay{r, r.endpoint()};
  std::vector<std::pair<Id, std::shared_ptr<Upload>>> all;
  for (int i = 0; i < 1000; i++) {
    const Id id = Id::random();
    all.emplace_back(id, relay.open(id, 1));
  }
  for (auto& [id, u] : all) {
    r.until([&, up = u] { return up->answer || up->error; }, 60000);
    REQUIRE(u->answer);
    u->data(0, first);
    u->end(id, first);
  }
  for (auto& [id, u] : all) {
    r.until([&, up = u] { return up->closed; }, 60000);
    CHECK(u->whole == head_of(id, first));
  }
  const auto list = relay.ask("GET", "/postern/v1/recordings").body;
  CHECK(std::count(list.begin(), list.end(), '\n') == 1000);
}
