#include "catch.h"

#include "recorder/relay/settings.h"

using namespace postern::recorder::relay;
using namespace std::chrono_literals;

TEST_CASE("an empty file gives the defaults", "[relay][settings]") {
  const auto s = parse_settings("", "relay.toml");
  REQUIRE(s);
  CHECK(s->lost_timeout == 2s);
  CHECK(s->commit_timeout == 10s);
  CHECK(s->attempt_stagger == 150ms);
  CHECK_FALSE(s->source);
  CHECK_FALSE(s->name.empty());
}

TEST_CASE("settings are read with their units", "[relay][settings]") {
  const auto s = parse_settings(R"(
[sessions]
socket = "/tmp/s"
[journal]
dir = "/tmp/j"
recording_quota = "3MiB"
min_free = "0B"
gap_keep = "2d"
[dial]
source = "127.0.0.2"
[recorders]
lost_timeout = "500ms"
replays = 3
)", "relay.toml");
  REQUIRE(s);
  CHECK(s->session_socket == "/tmp/s");
  CHECK(s->journal.dir == "/tmp/j");
  CHECK(s->journal.recording_quota == 3 << 20);
  CHECK(s->journal.min_free == 0);
  CHECK(s->gap_keep == 48h);
  CHECK(s->source->text() == "127.0.0.2");
  CHECK(s->lost_timeout == 500ms);
  CHECK(s->replays == 3);
}

TEST_CASE("what is wrong is told with its place, its field and what to write", "[relay][settings]") {
  const auto why = [](const char* text) {
    const auto s = parse_settings(text, "relay.toml");
    return s ? std::string{"no error"} : s.error().doing;
  };
  using Catch::Matchers::StartsWith;
  CHECK_THAT(why("[recorders]\nlost_timeout = 2\n"), StartsWith("relay.toml:2:16: recorders.lost_timeout: must be a duration ("));
  CHECK_THAT(why("[recorders]\n  lost_timeot = \"2s\"\n"), StartsWith("relay.toml:2:17: recorders.lost_timeot: is not a setting (settings of [recorders]:"));
  CHECK_THAT(why("[nonsense]\n"), StartsWith("relay.toml:1:1: nonsense: is not a setting"));
  CHECK_THAT(why("journal = 1\n"), StartsWith("relay.toml:1:11: journal: must be a table"));
  CHECK_THAT(why("[journal]\ndir = \n"), StartsWith("relay.toml:2:"));
  CHECK_THAT(why("[dial]\nsource = \"localhost\"\n"), StartsWith("relay.toml:2:10: dial.source: must be a numeric IP address"));
  CHECK_THAT(why("[recorders]\nlost_timeout = \"1ms\"\n"), StartsWith("relay.toml:2:16: recorders.lost_timeout: must be from 50ms to"));
  CHECK_THAT(why("[journal]\ntotal_quota = \"9999999999TiB\"\n"), StartsWith("relay.toml:2:15: journal.total_quota: must be a size"));
  CHECK_THAT(why("[log]\nlevel = \"loud\"\n"), StartsWith("relay.toml:2:9: log.level: is not a value that this setting has (one of"));
}
