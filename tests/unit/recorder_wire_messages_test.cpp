#include "catch.h"
#include "recorder/wire/messages.h"

#include <string>
#include <vector>

using namespace postern;
using namespace postern::recorder::wire;

namespace {

const std::string head(64, 'a');

/// What a reader made of a body, as text; the same for every way to split it.
struct Heard {
  std::string log, bytes;
  std::string error;
};

Heard read(const std::string& body, std::size_t first, std::size_t step) {
  Heard heard;
  UploadReader reader{{
      .open =
          [&](const OpenLine& o) -> Expected<Done> {
            heard.log += "open " + o.id.text() + " " + std::to_string(o.epoch) + " " + o.relay + "\n";
            return Done{};
          },
      .data =
          [&](std::uint64_t offset, std::span<const std::byte> b) -> Expected<Done> {
            CHECK(offset == 5 + heard.bytes.size());
            heard.bytes.append(reinterpret_cast<const char*>(b.data()), b.size());
            return Done{};
          },
      .end =
          [&](const EndFrame& e) -> Expected<Done> {
            heard.log += "end " + std::to_string(e.length) + " " + e.head + "\n";
            return Done{};
          },
      .cut =
          [&](const EndFrame& e) -> Expected<Done> {
            heard.log += "cut " + std::to_string(e.length) + " " + e.reason + "\n";
            return Done{};
          },
      .conflict =
          [&](const ConflictFrame& c) -> Expected<Done> {
            heard.log += "conflict " + std::to_string(c.offset) + "\n";
            return Done{};
          },
  }};
  for (std::size_t at = 0, n = first; at < body.size(); at += n, n = step) {
    if (n == 0) n = step;
    const auto piece = body.substr(at, n);
    n = piece.size();
    if (const auto done = reader.feed(std::as_bytes(std::span{piece.data(), piece.size()})); !done) {
      heard.error = done.error().doing;
      break;
    }
  }
  return heard;
}

const Id id = *Id::parse("abcdefghijklmnopqrstuvwxye");
std::string open_line() { return format(OpenLine{id, 3, "server", 0, 7, ""}); }
std::string data(std::uint64_t offset, const std::string& bytes) { return data_frame_header(offset, bytes.size()) + bytes; }

}  // namespace

TEST_CASE("an upload's body means the same wherever it is split", "[recorder_wire]") {
  std::string unknown{"\x80", 1};
  unknown += std::string("\0\0\3", 3) + std::string(8, '\0') + "xyz";
  const std::string body = open_line() + data(5, "hello") + unknown + data(10, " world") + end_frame({16, head, "", ""});
  const Heard whole = read(body, body.size(), body.size());
  CHECK(whole.error.empty());
  CHECK(whole.bytes == "hello world");
  CHECK(whole.log == "open abcdefghijklmnopqrstuvwxye 3 server\nend 16 " + head + "\n");
  for (std::size_t first = 1; first < body.size(); first++) {
    const Heard two = read(body, first, body.size());
    REQUIRE(two.log == whole.log);
    REQUIRE(two.bytes == whole.bytes);
    REQUIRE(two.error.empty());
  }
  for (const std::size_t step : {1, 2, 3, 7, 13}) {
    const Heard many = read(body, step, step);
    REQUIRE(many.log == whole.log);
    REQUIRE(many.bytes == whole.bytes);
  }
}

TEST_CASE("the example in the protocol's page is what is sent", "[recorder_wire]") {
  const std::string expected("D\0\0\2\0\0\0\0\0\0\0\5hi", 14);
  CHECK(data(5, "hi") == expected);
}

TEST_CASE("cut and conflict frames arrive as they were sent", "[recorder_wire]") {
  CHECK(read(open_line() + cut_frame({7, head, "session_died", ""}), 1, 1).log.ends_with("cut 7 session_died\n"));
  CHECK(read(open_line() + conflict_frame({9, head}), 1, 1).log.ends_with("conflict 9\n"));
}

TEST_CASE("a body that breaks the rules is refused", "[recorder_wire]") {
  const std::string open = open_line();
  const auto refused = [&](const std::string& body) {
    const auto heard = read(body, 1, 1);
    INFO(body.substr(0, 200));
    CHECK_FALSE(heard.error.empty());
  };
  refused("not json\n");
  refused("{}\n");
  refused("[1,2]\n");
  refused(std::string(20000, 'x'));
  std::string wrong = open;
  refused(wrong.replace(wrong.find("\"epoch\":3"), 9, "\"epoch\":0"));
  wrong = open;
  refused(wrong.replace(wrong.find("\"epoch\":3"), 9, "\"epoch\":-1"));
  wrong = open;
  refused(wrong.replace(wrong.find("\"chain\":1"), 9, "\"chain\":2"));
  wrong = open;
  refused(wrong.replace(wrong.find("abcdef"), 6, "../../"));
  refused(open + data(5, "hello") + data(11, "gap"));                                    // a byte missing
  refused(open + data(5, "hello") + data(9, "again"));                                   // a byte twice
  refused(open + std::string("D\0\0\0\0\0\0\0\0\0\0\5", 12));                            // empty
  refused(open + std::string("D\x10\0\1\0\0\0\0\0\0\0\5", 12));                          // over 1 MiB
  refused(open + std::string("D\0\0\1\xff\0\0\0\0\0\0\5", 12));                          // offset over 2^53
  refused(open + std::string("Z\0\0\1\0\0\0\0\0\0\0\5", 12));                            // unknown, must be understood
  refused(open + std::string("E\0\0\0\0\0\0\0\0\0\0\5", 12));
  refused(open + std::string("E\0\0\2\0\0\0\0\0\0\0\5{}", 14));
  refused(open + data(5, "hello") + end_frame({9, head, "", ""}));                       // not what was sent
  refused(open + end_frame({5, "short", "", ""}));
  refused(open + end_frame({5, head, "", ""}) + "D");                                    // after the end
}

TEST_CASE("each line is read back as it was written", "[recorder_wire]") {
  AnswerLine answer;
  answer.have = 70000;
  answer.head = head;
  answer.proven = Proven{65536, std::string(64, 'b')};
  const auto a = parse_answer(format(answer));
  REQUIRE(a);
  CHECK(a->have == 70000);
  CHECK(a->head == head);
  REQUIRE(a->proven);
  CHECK(a->proven->offset == 65536);

  HealthLine health;
  health.free = 1ULL << 40;
  health.accepting = true;
  health.challenge = head;
  auto h = parse_health(format(health));
  REQUIRE(h);
  CHECK(h->free == 1ULL << 40);
  CHECK(h->accepting);
  CHECK_FALSE(h->last_commit_age_ms);
  health.last_commit_age_ms = 12;
  h = parse_health(format(health));
  REQUIRE(h);
  CHECK(h->last_commit_age_ms == 12U);

  const auto ack = parse_upload_reply(format_ack(123));
  REQUIRE(ack);
  CHECK(ack->kind == UploadReply::Kind::ack);
  CHECK(ack->offset == 123);
  CHECK(parse_upload_reply(format_whole(head))->kind == UploadReply::Kind::whole);
  const auto cut = parse_upload_reply(format_cut(head, 9));
  REQUIRE(cut);
  CHECK(cut->kind == UploadReply::Kind::cut);
  CHECK(cut->offset == 9);
  const auto error = parse_upload_reply(format(ErrorLine{"old", Code::stale_epoch, 8}));
  REQUIRE(error);
  CHECK(error->kind == UploadReply::Kind::error);
  CHECK(error->error.code == Code::stale_epoch);
  CHECK(error->error.epoch == 8);
  const auto notice = parse_moved_notice(format(MovedNotice{"127.0.2.2:80", 4, ""}));
  REQUIRE(notice);
  CHECK(notice->to == "127.0.2.2:80");
  CHECK(parse_error_body("<html>", 502).code == Code::bad_request);
  CHECK(parse_error_body(format(ErrorLine{"full", Code::disk_full, 0}), 507).code == Code::disk_full);
}

TEST_CASE("answers that say something impossible are refused", "[recorder_wire]") {
  const std::string h = "\"head\":\"" + head + "\",\"ack\":\"disk\",\"state\":\"live\"";
  CHECK(parse_answer("{\"ranges\":[[0,5]]," + h + "}"));
  for (const std::string ranges : {"[]", "[[0]]", "[[1,5]]", "[[0,-5]]", "[[0,5],[9,10]]", "5", "[[0,9007199254740993]]", "[[0,\"5\"]]"})
    CHECK_FALSE(parse_answer("{\"ranges\":" + ranges + "," + h + "}"));
  CHECK_FALSE(parse_answer("{\"ranges\":[[0,5]]," + h + ",\"proven\":{\"offset\":5,\"head\":\"" + head + "\"}}"));
  CHECK_FALSE(parse_answer("{\"ranges\":[[0,5]]," + h + ",\"proven\":7}"));
}

TEST_CASE("every error code has a name and a status", "[recorder_wire]") {
  for (int i = 0; i <= static_cast<int>(Code::timeout); i++) {
    const auto code = static_cast<Code>(i);
    CHECK(parse_code(name(code)) == code);
    CHECK(http_status(code) >= 400);
  }
}
