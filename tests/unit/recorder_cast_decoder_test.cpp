#include "catch.h"

#include "recorder/cast/decoder.h"

#include <filesystem>
#include <fstream>
#include <sstream>

using namespace postern::recorder::cast;

namespace {

std::string slurp(const std::filesystem::path& path) {
  std::ifstream in{path, std::ios::binary};
  REQUIRE(in);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

struct Reader {
  std::optional<Header> header;
  std::vector<Event> events;
  std::vector<std::pair<std::uint64_t, std::string>> problems;
  Decoder decoder{{[this](const Header& h) { header = h; }, [this](const Event& e) { events.push_back(e); },
                   [this](std::uint64_t line, const std::string& what) { problems.emplace_back(line, what); }}};
  std::string raw(const std::string& code) const {
    std::string out;
    for (const auto& e : events)
      if (e.code == code) out += e.bytes;
    return out;
  }
};

const std::string head = "{\"version\":2,\"width\":80,\"height\":24}\n";

}  // namespace

TEST_CASE("recordings made by Tailscale decode to what their users saw", "[cast][decoder]") {
  // The two that lost bytes before the cast was written (README of the corpus): U+FFFD, a recorder that was killed.
  for (const std::string name : {"exec-json-escapes", "exec-utf8", "exec-silent", "exec-tagged-source", "pty-resize"}) {
    CAPTURE(name);
    const std::filesystem::path dir = POSTERN_TEST_DATA "/casts";
    const auto cast = slurp(dir / (name + ".cast"));
    for (const std::size_t step : {std::size_t{1}, std::size_t{7}, cast.size()}) {
      Reader r;
      for (std::size_t at = 0; at < cast.size(); at += step) r.decoder.feed(std::string_view{cast}.substr(at, step));
      CHECK(r.decoder.finish());
      CHECK(r.problems.empty());
      REQUIRE(r.header);
      CHECK(r.header->local_user == "root");
      CHECK(r.raw("o") == slurp(dir / (name + ".out")));
    }
  }
  Reader tagged;
  tagged.decoder.feed(slurp(POSTERN_TEST_DATA "/casts/exec-tagged-source.cast"));
  REQUIRE(tagged.header);
  CHECK(tagged.header->src_tags.size() == 1);
  CHECK(tagged.header->src_user.empty());
}

TEST_CASE("a cut last line is told and the rest still plays", "[cast][decoder]") {
  Reader r;
  r.decoder.feed(head + "[0.1,\"o\",\"a\"]\n[0.2,\"o\",\"b");
  CHECK_FALSE(r.decoder.finish());
  CHECK(r.raw("o") == "a");
  REQUIRE(r.problems.size() == 1);
  CHECK(r.problems[0].first == 3);
}

TEST_CASE("a line that is not understood is told with its number and left out", "[cast][decoder]") {
  for (const std::string bad : {"nonsense", "[1]", "[\"1\",\"o\",\"x\"]", "{\"a\":1}", "[1,\"o\",\"\xff\"]", "[1,\"b\",\"o !!!!\"]",
                                "[1,\"b\",\"q YQ==\"]", "[1,\"o\",2]", "[[[[[[[[[[[["}) {
    CAPTURE(bad);
    Reader r;
    r.decoder.feed(head + "[0.1,\"o\",\"a\"]\n" + bad + "\n[0.2,\"o\",\"b\"]\n");
    CHECK(r.decoder.finish());
    CHECK(r.raw("o") == "ab");
    REQUIRE(r.problems.size() == 1);
    CHECK(r.problems[0].first == 3);
  }
}

TEST_CASE("events of others are handed on as they are", "[cast][decoder]") {
  Reader r;
  r.decoder.feed(head + "[0.1,\"m\",\"chapter\"]\n[0.2,\"zz\",\"?\",4]\n[0.3,\"i\",\"ls\"]\n");
  CHECK(r.decoder.finish());
  CHECK(r.problems.empty());
  REQUIRE(r.events.size() == 3);
  CHECK(r.events[1].code == "zz");
  CHECK(r.events[2].bytes == "ls");
}

TEST_CASE("exact bytes stand for the next event of their own stream only", "[cast][decoder]") {
  Reader r;
  r.decoder.feed(head + "[0.1,\"b\",\"o /w==\"]\n[0.1,\"e\",\"err\"]\n[0.1,\"o\",\"?\"]\n[0.1,\"o\",\"!\"]\n");
  CHECK(r.raw("o") == "\xff!");
  CHECK(r.raw("e") == "err");
  CHECK(r.events[1].text == "?");
}

TEST_CASE("an endless line does not fill the memory", "[cast][decoder]") {
  Reader r;
  r.decoder.feed(head);
  const std::string part(1 << 20, 'x');
  for (int i = 0; i < 10; i++) r.decoder.feed(part);
  r.decoder.feed("\n[0.2,\"o\",\"b\"]\n");
  CHECK(r.decoder.finish());
  CHECK(r.raw("o") == "b");
  REQUIRE(r.problems.size() == 1);
  CHECK(r.problems[0].second == "the line is too long");
}

TEST_CASE("what is no recording is told", "[cast][decoder]") {
  for (const std::string bad : {"", "\n", "{\"version\":3}\n", "[]\n", "{\"version\":\"2\"}\n"}) {
    Reader r;
    r.decoder.feed(bad);
    r.decoder.finish();
    CHECK_FALSE(r.header);
    CHECK(r.problems.size() == 1);
  }
}
