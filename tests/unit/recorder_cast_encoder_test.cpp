#include "catch.h"

#include "recorder/cast/decoder.h"
#include "recorder/cast/encoder.h"
#include "recorder/cast/text.h"

#include <nlohmann/json.hpp>

#include <chrono>
#include <random>

using namespace postern::recorder::cast;

namespace {

std::span<const std::byte> bytes_of(std::string_view s) { return std::as_bytes(std::span{s.data(), s.size()}); }

std::string encode(const std::vector<std::pair<char, std::string>>& reads) {
  Encoder encoder{0};
  std::string out;
  std::uint64_t now = 0;
  for (const auto& [stream, bytes] : reads) encoder.output(stream, bytes_of(bytes), now += 1'000'000, out);
  return out;
}

struct Decoded {
  std::map<std::string, std::string> raw, shown;
  std::vector<double> times;
  std::size_t events = 0;
};

Decoded decode(const std::string& events) {
  Decoded d;
  Decoder decoder{{nullptr,
                   [&](const Event& e) {
                     d.raw[e.code] += e.bytes;
                     d.shown[e.code] += e.text;
                     d.times.push_back(e.time);
                     d.events++;
                   },
                   [](std::uint64_t line, const std::string& what) { FAIL_CHECK("line " << line << ": " << what); }}};
  decoder.feed(encode_header({}));
  decoder.feed(events);
  CHECK(decoder.finish());
  return d;
}

// Every line is JSON and UTF-8 (nlohmann refuses anything else).
void check_lines(const std::string& events) {
  std::size_t at = 0;
  while (at < events.size()) {
    const auto end = events.find('\n', at);
    REQUIRE(end != std::string::npos);
    const auto json = nlohmann::json::parse(events.substr(at, end - at), nullptr, false);
    REQUIRE(json.is_array());
    REQUIRE(json.size() == 3);
    at = end + 1;
  }
}

const std::string mixed = "plain \"quoted\" \\ \x1b[31mred\x1b[0m\r\n\t\b\f\x01\x7f" + std::string(1, '\0') +
                          "\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80 \xe2\x80\xa8 \xef\xbb\xbf\xf4\x8f\xbf\xbf end\n";
const std::vector<std::string> awkward = {
    mixed,
    "\xe2\x82", "\xe2\x82\xac", "\xe2", "\xe2\x28\xa1", "\xf0\x9f\x98", "\xf0\x9f\x98\x80",
    "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xff\xfe", "\x80", "\xe0\x80\x80", "\xf0\x80\x80\x80",
    "abc\xe2", "abc\xffxyz", "\xe2\xe2\xe2\x82\xac", "a\xf0\x9f" "b",
};

}  // namespace

TEST_CASE("the lines of a recording are exactly these", "[cast][encoder]") {
  CHECK(encode({{'o', "hi\n"}}) == "[0.001000,\"o\",\"hi\\n\"]\n");
  CHECK(encode({{'e', "a\"\\\x1b\x7f/<>&"}}) == "[0.001000,\"e\",\"a\\\"\\\\\\u001b\x7f/<>&\"]\n");
  // A character cut by a read: b + an empty event, then b + the whole character; no byte waits.
  CHECK(encode({{'o', "x\xe2"}, {'o', "\x82\xacy"}}) ==
        "[0.001000,\"o\",\"x\"]\n[0.001000,\"b\",\"o 4g==\"]\n[0.001000,\"o\",\"\"]\n"
        "[0.002000,\"b\",\"o gqw=\"]\n[0.002000,\"o\",\"\xe2\x82\xac\"]\n[0.002000,\"o\",\"y\"]\n");
  // It never became one: shown as U+FFFD before what follows.
  CHECK(encode({{'o', "\xe2"}, {'o', "A"}}) ==
        "[0.001000,\"b\",\"o 4g==\"]\n[0.001000,\"o\",\"\"]\n[0.002000,\"b\",\"o \"]\n[0.002000,\"o\",\"\xef\xbf\xbd\"]\n"
        "[0.002000,\"o\",\"A\"]\n");
  CHECK(encode({{'o', "0123456789abcdef\xff" "end"}}) ==
        "[0.001000,\"b\",\"o MDEyMzQ1Njc4OWFiY2RlZv9lbmQ=\"]\n[0.001000,\"o\",\"0123456789abcdef\xef\xbf\xbd" "end\"]\n");
  // Over 1/8 that is no text: one U+FFFD a run.
  CHECK(encode({{'o', "a\xff\xff\xff" "b\xff\xff"}}) ==
        "[0.001000,\"b\",\"o Yf///2L//w==\"]\n[0.001000,\"o\",\"a\xef\xbf\xbd" "b\xef\xbf\xbd\"]\n");
}

TEST_CASE("a cut character of one stream is not mixed with the other stream", "[cast][encoder]") {
  const auto d = decode(encode({{'o', "\xe2\x82"}, {'e', "\xac"}, {'o', "\xac"}}));
  CHECK(d.raw.at("o") == "\xe2\x82\xac");
  CHECK(d.shown.at("o") == "\xe2\x82\xac");
  CHECK(d.raw.at("e") == "\xac");
}

TEST_CASE("a recording gives back exactly the bytes that were written, whatever they are and wherever reads cut them", "[cast][encoder]") {
  for (const auto& text : awkward)
    for (std::size_t a = 0; a <= text.size(); a++)
      for (std::size_t b = a; b <= text.size(); b++) {
        const auto events = encode({{'o', text.substr(0, a)}, {'o', text.substr(a, b - a)}, {'o', text.substr(b)}});
        check_lines(events);
        auto d = decode(events);
        REQUIRE(d.raw["o"] == text);
      }
  // Valid text is also shown whole, however it was cut.
  for (std::size_t a = 0; a <= mixed.size(); a++) {
    auto d = decode(encode({{'o', mixed.substr(0, a)}, {'o', mixed.substr(a)}}));
    REQUIRE(d.shown["o"] == mixed);
  }
}

TEST_CASE("random bytes in random reads come back", "[cast][encoder]") {
  const unsigned seed = std::random_device{}();
  CAPTURE(seed);
  std::mt19937 random{seed};
  const std::string alphabet[] = {"a", "\n", "\"", "\xc3\xa4", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\x80", "\xe2", "\xff", "\xf0\x9f",
                                  std::string(1, '\0'), "0123456789012345678901234567890123456789"};
  for (int round = 0; round < 300; round++) {
    std::map<std::string, std::string> expected;
    std::vector<std::pair<char, std::string>> reads;
    const bool binary = round % 3 == 0;
    for (unsigned r = random() % 8 + 1; r > 0; r--) {
      std::string read;
      const std::size_t size = round % 50 == 0 ? 200'000 : random() % 300;
      while (read.size() < size) read += binary ? std::string(1, static_cast<char>(random())) : alphabet[random() % std::size(alphabet)];
      read.resize(size);
      const char stream = random() % 4 == 0 ? 'e' : 'o';
      expected[std::string(1, stream)] += read;
      reads.emplace_back(stream, read);
    }
    const auto events = encode(reads);
    check_lines(events);
    auto d = decode(events);
    for (const auto& [stream, bytes] : expected) REQUIRE(d.raw[stream] == bytes);
    REQUIRE(std::is_sorted(d.times.begin(), d.times.end()));
  }
}

TEST_CASE("a large read becomes events of at most 64 KiB and no character is cut by that", "[cast][encoder]") {
  std::string text;
  while (text.size() < 400'000) text += "\xe2\x82\xac";
  const auto events = encode({{'o', text}});
  CHECK(events.find("\"b\"") == std::string::npos);
  auto d = decode(events);
  CHECK(d.raw["o"] == text);
  CHECK(d.events == 7);
}

TEST_CASE("times have 6 decimals and never go backwards", "[cast][encoder]") {
  Encoder encoder{5'000'000'000};
  std::string out;
  encoder.output('o', bytes_of("a"), 6'234'567'899, out);
  encoder.output('o', bytes_of("b"), 6'000'000'000, out);
  encoder.resize(132, 50, 4'000'000'000, out);
  encoder.exit("TERM", 105'000'000'999, out);
  CHECK(out == "[1.234567,\"o\",\"a\"]\n[1.234567,\"o\",\"b\"]\n[1.234567,\"r\",\"132x50\"]\n[100.000000,\"x\",\"TERM\"]\n");
}

TEST_CASE("input is a stream of its own: exact, and a character that it cuts is no output's business", "[cast][encoder]") {
  Encoder encoder{0};
  std::string out;
  const auto put = [&](char stream, const std::string& bytes) {
    if (stream == 'i') encoder.input(bytes_of(bytes), 1'000'000'000, out);
    else encoder.output(stream, bytes_of(bytes), 1'000'000'000, out);
  };
  put('i', "ls\r\xc3");
  put('o', "\xc3");
  put('i', "\xa9\xff\x01");
  put('o', "\xa9x");
  put('e', "\xa9");
  check_lines(out);
  const auto d = decode(out);
  CHECK(d.raw.at("i") == "ls\r\xc3\xa9\xff\x01");
  CHECK(d.raw.at("o") == "\xc3\xa9x");
  CHECK(d.raw.at("e") == "\xa9");
  CHECK(d.shown.at("i") == "ls\r\xc3\xa9\xef\xbf\xbd\x01");
  CHECK(d.shown.at("o") == "\xc3\xa9x");
}

TEST_CASE("a header comes back, and text in it that is not UTF-8 does no harm", "[cast][encoder]") {
  Header h;
  h.width = 132;
  h.height = 50;
  h.pty = true;
  h.timestamp = 1795227008;
  h.recording_id = "abcdefghijklmnopqrstuvwxyz";
  h.connection_id = "c";
  h.command = "printf '\"\\\n' \xff <a>";
  h.original_command = "id -u";
  h.src_tags = {"tag:a", "tag:b"};
  h.src_address = "127.0.0.1";
  h.ssh_user = "root";
  h.term = "xterm-256color";
  const auto line = encode_header(h);
  CHECK(line.back() == '\n');
  const auto json = nlohmann::json::parse(line, nullptr, false);
  REQUIRE(json.is_object());
  CHECK(json["version"] == 2);
  CHECK(json["env"]["TERM"] == "xterm-256color");
  const auto back = parse_header(line);
  REQUIRE(back);
  CHECK(back->width == 132);
  CHECK(back->pty);
  CHECK(back->timestamp == 1795227008);
  CHECK(back->recording_id == h.recording_id);
  CHECK(back->command == "printf '\"\\\n' \xef\xbf\xbd <a>");
  CHECK(back->original_command == "id -u");
  CHECK(back->src_tags == h.src_tags);
  CHECK(back->src_address == "127.0.0.1");
  CHECK(back->term == "xterm-256color");
}

TEST_CASE("base64 has one text for one value", "[cast][text]") {
  for (const std::string s : {"", "a", "ab", "abc", "abcd", "\xff\xfe\xfd"}) {
    std::string text;
    append_base64(s, text);
    CHECK(parse_base64(text) == s);
  }
  CHECK_FALSE(parse_base64("YQ"));
  CHECK_FALSE(parse_base64("YR=="));
  CHECK_FALSE(parse_base64("Y==="));
  CHECK_FALSE(parse_base64("Y=Q="));
  CHECK_FALSE(parse_base64("YQ=\n"));
}

TEST_CASE("encoding keeps up with a fast program", "[.speed][cast][encoder]") {
  std::string ascii, cjk, binary;
  while (ascii.size() < 64 * 1024) ascii += "1234567 some line of output that a program writes\n";
  while (cjk.size() < 60 * 1024) cjk += "\xe6\xbc\xa2\xe5\xad\x97";
  std::mt19937 random{1};
  while (binary.size() < 64 * 1024) binary += static_cast<char>(random());
  for (const auto& [name, text] : {std::pair{"ascii", &ascii}, {"cjk", &cjk}, {"binary", &binary}}) {
    std::string out;
    const auto start = std::chrono::steady_clock::now();
    std::size_t total = 0;
    Encoder encoder{0};
    while (total < 512UL * 1024 * 1024) {
      out.clear();
      encoder.output('o', bytes_of(*text), total, out);
      total += text->size();
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    WARN(name << ": " << static_cast<double>(total) / took.count() / (1 << 20) << " MiB/s");
  }
}
