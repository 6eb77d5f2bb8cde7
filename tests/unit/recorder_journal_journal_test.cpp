#include "catch.h"

#include "recorder/journal/journal.h"
#include "temp_dir.h"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <deque>
#include <fstream>

using namespace postern;
using namespace postern::recorder::journal;

namespace {

// The owner's thread: runs what the journal posts.
struct Owner {
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<std::function<void()>> posted;
  std::function<void(std::function<void()>)> post() {
    return [this](std::function<void()> f) {
      const std::lock_guard lock{mutex};
      posted.push_back(std::move(f));
      wake.notify_one();
    };
  }
  template <class Condition>
  bool until(Condition condition) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds{10};
    while (!condition()) {
      std::unique_lock lock{mutex};
      if (!wake.wait_until(lock, end, [this] { return !posted.empty(); })) return false;
      auto f = std::move(posted.front());
      posted.pop_front();
      lock.unlock();
      f();
    }
    return true;
  }
};

Meta some_meta() {
  Meta m;
  m.recording = Id::random();
  m.recorders = {"127.0.2.1:80", "127.0.2.2:80"};
  m.enforce = true;
  m.boot_id = "boot";
  m.pid = 17;
  m.start_time = 18446744073709551615ULL;
  return m;
}

std::string slurp(const std::filesystem::path& path) {
  std::ifstream in{path, std::ios::binary};
  return {std::istreambuf_iterator<char>{in}, {}};
}

}  // namespace

TEST_CASE("what is known of a recording comes back, also when its last line was cut", "[journal]") {
  TempDir dir;
  const Meta meta = some_meta();
  {
    Owner owner;
    Journal journal{{dir.path}, owner.post()};
    REQUIRE(journal.load());
    auto entry = journal.create(meta);
    REQUIRE(entry);
    REQUIRE((*entry)->append("header\n"));
    REQUIRE((*entry)->update([](Meta& m) { m.epoch = 3; }));
    REQUIRE((*entry)->update([](Meta& m) { m.parts = {"127.0.2.1:80"}; }));
  }
  std::ofstream{dir.path / (meta.recording.text() + ".meta"), std::ios::app} << "{\"version\":1,\"id\":\"";
  for (int i = 0; i < 2; i++) {
    Owner owner;
    Journal journal{{dir.path}, owner.post()};
    auto entries = journal.load();
    REQUIRE(entries);
    REQUIRE(entries->size() == 1);
    Entry& e = *entries->front();
    CHECK(e.meta().recording == meta.recording);
    CHECK(e.meta().recorders == meta.recorders);
    CHECK(e.meta().enforce);
    CHECK(e.meta().start_time == meta.start_time);
    CHECK(e.meta().epoch == 3 + static_cast<std::uint64_t>(i));
    CHECK(e.meta().parts == std::vector<std::string>{"127.0.2.1:80"});
    CHECK(e.length() == 7);
    REQUIRE(owner.until([&] { return e.journaled() == 7; }));  // again by this process: the page cache may have been all
    REQUIRE(e.update([](Meta& m) { m.epoch++; }));
  }
}

TEST_CASE("bytes become durable in one turn for many recordings, and the callback says so", "[journal]") {
  TempDir dir;
  Owner owner;
  Journal journal{{dir.path}, owner.post()};
  REQUIRE(journal.load());
  std::vector<std::shared_ptr<Entry>> entries;
  int synced = 0;
  for (int i = 0; i < 20; i++) {
    auto entry = journal.create(some_meta());
    REQUIRE(entry);
    REQUIRE((*entry)->append(std::string(1000, 'x')));
    (*entry)->sync([&](Expected<Done> done) {
      CHECK(done);
      synced++;
    });
    entries.push_back(*entry);
  }
  REQUIRE(owner.until([&] { return synced == 20; }));
  for (const auto& e : entries) CHECK(e->journaled() == 1000);
  std::string back(2000, '\0');
  auto n = entries[0]->read(100, back);
  REQUIRE(n);
  CHECK(*n == 900);
}

TEST_CASE("bytes that are dropped while their last turn runs are given back once, and their file is closed", "[journal]") {
  TempDir dir;
  Owner owner;
  Journal journal{{dir.path}, owner.post()};
  REQUIRE(journal.load());
  auto entry = journal.create(some_meta());
  REQUIRE(entry);
  REQUIRE((*entry)->append(std::string(1000, 'x')));
  bool synced = false;
  (*entry)->sync([&](Expected<Done>) { synced = true; });  // and so it is queued
  (*entry)->drop_bytes();
  (*entry)->drop_bytes();
  CHECK(journal.total() == 0);  // below zero it would be a full quota for all
  REQUIRE(owner.until([&] { return synced; }));
  // The callback runs before the turn is put away; one more turn comes after it.
  bool again = false;
  REQUIRE((*entry)->update([](Meta& m) { m.epoch++; }));
  (*entry)->sync([&](Expected<Done>) { again = true; });
  REQUIRE(owner.until([&] { return again; }));
  CHECK_FALSE((*entry)->descriptor());  // an open file keeps its blocks
  (*entry)->remove();
  CHECK(journal.total() == 0);
  auto next = journal.create(some_meta());
  REQUIRE(next);
  CHECK((*next)->append("header\n"));
}

TEST_CASE("a full quota fails the recording that hits it and says so", "[journal]") {
  TempDir dir;
  Owner owner;
  Settings settings{dir.path};
  settings.recording_quota = 1000;
  settings.total_quota = 1500;
  Journal journal{settings, owner.post()};
  REQUIRE(journal.load());
  auto one = journal.create(some_meta()), two = journal.create(some_meta());
  REQUIRE((*one)->append(std::string(900, 'x')));
  CHECK_FALSE((*one)->append(std::string(101, 'x')));
  CHECK((*one)->length() == 900);
  CHECK_FALSE((*one)->failure().empty());
  CHECK_FALSE((*one)->append("x"));  // final
  REQUIRE((*two)->append(std::string(500, 'x')));
  CHECK_FALSE((*two)->append(std::string(200, 'x')));
  (*one)->drop_bytes();
  CHECK(journal.total() == 500);
}

TEST_CASE("a killed process loses nothing that write had taken, and its successor gets the folder", "[journal]") {
  TempDir dir;
  const Meta meta = some_meta();
  int ready[2];
  REQUIRE(::pipe(ready) == 0);
  const pid_t child = ::fork();
  if (child == 0) {
    Owner owner;
    Journal journal{{dir.path}, owner.post()};
    if (!journal.load()) ::_exit(1);
    auto entry = journal.create(meta);
    for (int i = 0; entry && i < 100; i++) (void)(*entry)->append(std::string(997, static_cast<char>('a' + i % 26)));
    (void)!::write(ready[1], "x", 1);
    ::pause();
    ::_exit(0);
  }
  char byte;
  REQUIRE(::read(ready[0], &byte, 1) == 1);
  {
    Owner owner;
    Journal second{{dir.path}, owner.post()};
    CHECK_FALSE(second.load());  // two relays never share a folder
  }
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  Owner owner;
  Journal journal{{dir.path}, owner.post()};
  auto entries = journal.load();
  REQUIRE(entries);
  REQUIRE(entries->size() == 1);
  CHECK(entries->front()->length() == 99'700);
  CHECK(slurp(dir.path / (meta.recording.text() + ".cast")).substr(99'600) == std::string(100, static_cast<char>('a' + 99 % 26)));
  entries->front()->remove();
  CHECK(std::filesystem::is_empty(dir.path));
}

TEST_CASE("a file that is not the journal's is left alone", "[journal]") {
  TempDir dir;
  std::ofstream{dir.path / "notes.meta"} << "hello\n";
  const Id id = Id::random();
  std::ofstream{dir.path / (id.text() + ".meta")} << "{}\n";
  Owner owner;
  Journal journal{{dir.path}, owner.post()};
  auto entries = journal.load();
  REQUIRE(entries);
  CHECK(entries->empty());
  CHECK(slurp(dir.path / "notes.meta") == "hello\n");
}
