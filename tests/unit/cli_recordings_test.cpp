#include "catch.h"

#include "cli/http.h"
#include "cli/recordings.h"

using namespace postern::cli;
using Json = nlohmann::json;

namespace {

Copy copy(const std::string& recorder, const std::string& id, const std::string& state, unsigned length, unsigned created = 5) {
  return {recorder, {{"id", id}, {"state", state}, {"length", length}, {"created_ms", created}, {"header", {{"command", "ls"}}}}};
}
Json at_relay(const std::string& id, const std::string& recorder_state, unsigned length) {
  return {{"id", id}, {"recorder_state", recorder_state}, {"recorder", recorder_state == "recording" ? "b" : ""}, {"length", length}, {"ending", ""},
          {"stored", false}, {"created_ms", 1U}, {"header", R"({"version":2,"command":"make"})"}};
}

}  // namespace

TEST_CASE("copies of one recording are one entry, with the state of the best", "[cli][recordings]") {
  const auto list = merge({copy("a", "x", "moved", 10), copy("b", "x", "whole", 30), copy("a", "y", "live", 5, 3)}, {});
  REQUIRE(list.size() == 2);
  CHECK(list[0]["id"] == "y");  // the oldest first
  CHECK(list[1]["state"] == "whole");
  CHECK(list[1]["where"] == Json{"b"});
  CHECK(list[1]["length"] == 30);
  CHECK(list[1]["copies"].size() == 2);
  CHECK(list[1]["header"]["command"] == "ls");
  CHECK_FALSE(list[1].contains("gap"));
}

TEST_CASE("a conflict is not hidden behind a whole copy", "[cli][recordings]") {
  const auto list = merge({copy("a", "x", "whole", 10), copy("b", "x", "conflict", 30)}, {});
  CHECK(list[0]["state"] == "conflict");
}

TEST_CASE("what only the journal has is not on a recorder yet, older parts or not", "[cli][recordings]") {
  auto list = merge({}, {at_relay("x", "none", 100)});
  REQUIRE(list.size() == 1);
  CHECK(list[0]["state"] == "not on a recorder yet");
  CHECK(list[0]["header"]["command"] == "make");
  CHECK_FALSE(list[0].contains("gap"));
  list = merge({copy("a", "x", "cut", 40)}, {at_relay("x", "none", 100)});
  CHECK(list[0]["state"] == "not on a recorder yet");
  CHECK(list[0]["length"] == 100);
  CHECK(list[0]["copies"][0]["state"] == "cut");
}

TEST_CASE("what a recorder takes right now is live or uploading", "[cli][recordings]") {
  auto r = at_relay("x", "recording", 100);
  CHECK(merge({}, {r})[0]["state"] == "live");
  r["ending"] = "ended";
  CHECK(merge({copy("b", "x", "live", 50)}, {r})[0]["state"] == "uploading");
  CHECK(merge({copy("b", "x", "whole", 100)}, {r})[0]["state"] == "whole");
}

TEST_CASE("a gap stays visible whatever became of the rest", "[cli][recordings]") {
  auto r = at_relay("x", "none", 0);
  r["gap"] = {{"from", 0}, {"reason", "disk full"}};
  CHECK(merge({}, {r})[0]["state"] == "gap");
  r["stored"] = true;
  r["length"] = 100U;
  r["gap"]["from"] = 100;
  const auto list = merge({copy("b", "x", "cut", 100)}, {r});
  CHECK(list[0]["state"] == "cut");
  CHECK(list[0]["gap"]["from"] == 100);
}

TEST_CASE("addresses of recorders are understood with and without http://", "[cli][http]") {
  CHECK(parse_url("127.0.2.1:81")->origin() == "127.0.2.1:81");
  CHECK(parse_url("http://127.0.2.1/x?y=1")->target == "/x?y=1");
  CHECK(parse_url("http://[::1]:8080/")->origin() == "[::1]:8080");
  CHECK_FALSE(parse_url("https://127.0.2.1/"));
  CHECK_FALSE(parse_url("http:///x"));
  CHECK_FALSE(parse_url("127.0.2.1:port"));
  CHECK_FALSE(parse_url("http://a/\r\nX: y"));
}
