#include "catch.h"

#include "recorder/relay/upload.h"
#include "temp_dir.h"

#include <cstdlib>
#include <deque>
#include <filesystem>

using namespace postern;
using namespace postern::recorder;
using namespace postern::recorder::relay;

namespace {

struct FakeStream : Upload::Stream {
  struct State {
    std::string sent;
    std::size_t unsent = 0;
    bool finished = false, cancelled = false;
  };
  explicit FakeStream(std::shared_ptr<State> s) : state{std::move(s)} {}
  void send(std::string bytes) override { state->sent += bytes; }
  std::size_t unsent() const override { return state->unsent; }
  void finish() override { state->finished = true; }
  void cancel() override { state->cancelled = true; }
  std::shared_ptr<State> state;
};

// A journal entry with `bytes`, an upload of it, and a recorder in the test's hand.
struct Scene {
  explicit Scene(const std::string& bytes) {
    journal.emplace(journal::Settings{dir.path}, [](std::function<void()>) {});
    REQUIRE(journal->load());
    journal::Meta meta;
    meta.recording = Id::random();
    entry = *journal->create(meta);
    if (!bytes.empty()) REQUIRE(entry->append(bytes));
    all = bytes;
  }
  ~Scene() {
    upload.reset();
    entry.reset();
    journal.reset();
  }
  std::string head(std::uint64_t n) const {
    cast::Chain chain{entry->meta().recording.bytes};
    chain.update(std::as_bytes(std::span{all.data(), static_cast<std::size_t>(n)}));
    return cast::hex(chain.head());
  }
  void end(journal::Meta::Ending ending) {
    (void)entry->update([&](journal::Meta& m) {
      m.ending = ending;
      m.length = all.size();
      m.head = head(all.size());
      m.reason = ending == journal::Meta::Ending::cut ? "session_died" : "";
    });
  }
  void start() {
    Upload::Handlers h{[this] { said.push_back("opened"); },
                       [this](std::uint64_t n) { said.push_back("acked " + std::to_string(n)); },
                       [this] { said.push_back("caught up"); },
                       [this](bool cut) { said.push_back(cut ? "stored cut" : "stored"); },
                       [this](const Upload::Refused& r) {
                         said.push_back("refused " + r.code);
                         refused = r;
                       }};
    upload = std::make_shared<Upload>(entry, 3, "host", [this](std::uint64_t n, std::function<void(Expected<cast::Digest>)> done) {
      cast::Chain chain{entry->meta().recording.bytes};
      chain.update(std::as_bytes(std::span{all.data(), static_cast<std::size_t>(n)}));
      done(chain.head());
    }, std::move(h));
    upload->start(std::make_unique<FakeStream>(stream), now);
  }
  void answer(std::uint64_t have, const std::string& have_head, const std::string& more = "") {
    upload->on_status(200);
    upload->on_data("{\"ranges\":[[0," + std::to_string(have) + "]],\"head\":\"" + have_head + "\",\"ack\":\"disk\"," +
                        (more.empty() ? "\"state\":\"live\"" : more) + "}\n", now);
  }
  std::string after_open() const { return stream->sent.substr(stream->sent.find('\n') + 1); }

  TempDir dir;
  std::optional<journal::Journal> journal;
  std::shared_ptr<journal::Entry> entry;
  std::string all;
  std::shared_ptr<FakeStream::State> stream = std::make_shared<FakeStream::State>();
  std::shared_ptr<Upload> upload;
  std::vector<std::string> said;
  Upload::Refused refused;
  Upload::Clock::time_point now{};
};

std::string frame(char type, std::uint64_t offset, const std::string& payload) {
  std::string out{type};
  for (int s = 16; s >= 0; s -= 8) out += static_cast<char>(payload.size() >> s);
  for (int s = 56; s >= 0; s -= 8) out += static_cast<char>(offset >> s);
  return out + payload;
}

using Words = std::vector<std::string>;

}  // namespace

TEST_CASE("a recorder that has nothing gets all, and whole ends it", "[relay][upload]") {
  Scene s{"hello recording\n"};
  s.start();
  CHECK(s.stream->sent.find("\"epoch\":3") != std::string::npos);
  CHECK(s.after_open().empty());  // nothing before the answer
  s.answer(0, s.head(0));
  CHECK(s.after_open() == frame('D', 0, "hello recording\n"));
  s.upload->on_data("{\"ack\":16}\n", s.now);
  s.all += "more";
  REQUIRE(s.entry->append("more"));
  s.upload->poke(s.now);
  s.end(journal::Meta::Ending::ended);
  s.upload->poke(s.now);
  CHECK(s.stream->finished);
  const auto sent = s.after_open();
  CHECK(sent.find(frame('D', 16, "more") + "E") != std::string::npos);
  CHECK(sent.find(s.head(20)) != std::string::npos);
  s.upload->on_data("{\"ack\":20}\n{\"whole\":\"" + s.head(20) + "\"}\n", s.now);
  CHECK(s.said == Words{"opened", "acked 16", "caught up", "acked 20", "stored"});
  s.upload->on_over("END_STREAM", false);
  CHECK(s.said.back() == "stored");
}

TEST_CASE("a recorder that has a beginning gets the rest only", "[relay][upload]") {
  Scene s{"0123456789"};
  s.start();
  s.answer(4, s.head(4));
  CHECK(s.after_open() == frame('D', 4, "456789"));
  CHECK(s.said == Words{"opened", "acked 4"});
}

TEST_CASE("a recorder with other bytes is a conflict and gets none of ours", "[relay][upload]") {
  Scene s{"ghijklmnop"};  // no digits: a head in the answer may hold any of them
  s.start();
  s.answer(4, s.head(5));
  CHECK(s.after_open()[0] == 'F');
  CHECK(s.after_open().find("klm") == std::string::npos);
  CHECK(s.said == Words{"refused conflict"});
}

TEST_CASE("a recorder that crashed goes back to what is proven", "[relay][upload]") {
  Scene s{"0123456789"};
  s.start();
  s.answer(6, s.head(3), "\"state\":\"live\",\"proven\":{\"offset\":2,\"head\":\"" + s.head(2) + "\"}");
  CHECK(s.after_open() == frame('D', 2, "23456789"));
}

TEST_CASE("a recorder that has the whole already is done at once", "[relay][upload]") {
  Scene s{"0123456789"};
  s.end(journal::Meta::Ending::ended);
  s.start();
  s.answer(10, s.head(10), "\"state\":\"whole\"");
  CHECK(s.said == Words{"opened", "acked 10", "stored"});
}

TEST_CASE("after this host lost its tail the recorder keeps its longer copy of a dead session", "[relay][upload]") {
  Scene s{"0123456789"};
  s.end(journal::Meta::Ending::cut);
  s.start();
  s.answer(15, std::string(64, '0'));
  CHECK(s.after_open()[0] == 'X');
  s.upload->on_data("{\"cut\":\"" + std::string(64, '0') + "\",\"length\":15}\n", s.now);
  CHECK(s.said.back() == "stored cut");
}

TEST_CASE("a recorder that acks what it was not sent, or ends what has no end, is refused", "[relay][upload]") {
  for (const std::string bad : {"{\"ack\":11}\n", "{\"whole\":\"00\"}\n", "nonsense\n", "{\"cut\":\"00\",\"length\":10}\n"}) {
    Scene s{"0123456789"};
    s.start();
    s.answer(0, s.head(0));
    s.upload->on_data(bad, s.now);
    CAPTURE(bad);
    CHECK(s.said.back().rfind("refused", 0) == 0);
    CHECK(s.stream->cancelled);
  }
}

TEST_CASE("an error before or after the answer gives its code", "[relay][upload]") {
  Scene s{"0123456789"};
  s.start();
  SECTION("before") {
    s.upload->on_status(409);
    s.upload->on_data("{\"error\":\"old\",\"code\":\"stale_epoch\",\"epoch\":12}\n", s.now);
    s.upload->on_over("END_STREAM", false);
    CHECK(s.refused.code == "stale_epoch");
    CHECK(s.refused.epoch == 12);
  }
  SECTION("after") {
    s.answer(0, s.head(0));
    s.upload->on_data("{\"error\":\"full\",\"code\":\"disk_full\"}\n", s.now);
    CHECK(s.refused.code == "disk_full");
  }
  SECTION("the stream is reset") {
    s.answer(0, s.head(0));
    s.upload->on_over("reset", false);
    CHECK(s.refused.code.empty());
  }
}

TEST_CASE("bytes that wait without an ack are noticed, an idle recording is not", "[relay][upload]") {
  Scene s{"0123456789"};
  const auto at = [](int seconds) { return Upload::Clock::time_point{} + std::chrono::seconds{seconds}; };
  s.now = at(1);
  s.start();
  CHECK(s.upload->waiting_since() == at(1));  // the answer
  s.now = at(2);
  s.answer(0, s.head(0));
  CHECK(s.upload->waiting_since() == at(2));
  s.upload->on_data("{\"ack\":5}\n", at(4));
  CHECK(s.upload->waiting_since() == at(4));
  s.upload->on_data("{\"ack\":10}\n", at(5));
  CHECK_FALSE(s.upload->waiting_since());
  REQUIRE(s.entry->append("x"));
  s.all += "x";
  s.upload->poke(at(9));
  CHECK(s.upload->waiting_since() == at(9));
}

TEST_CASE("a recorder that takes slowly is not given more than it can", "[relay][upload]") {
  Scene s{std::string(3 << 20, 'x')};
  s.start();
  s.stream->unsent = Upload::ahead;
  s.answer(0, s.head(0));
  CHECK(s.after_open().empty());
  s.stream->unsent = 0;
  s.upload->writable();
  CHECK(s.after_open().size() > (3 << 20));
}
