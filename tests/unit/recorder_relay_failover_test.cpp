#include "catch.h"

#include "recorder/relay/failover.h"

#include <deque>

using namespace postern::recorder::relay;
using postern::recorder::wire::RecorderState;
using Kind = Failover::Action::Kind;

namespace {

constexpr Failover::Recorder a = 0, b = 1, c = 2;

// What a test reads: "try 0", "open 7@1", "tell 7 none".
std::vector<std::string> words(Failover& f) {
  std::vector<std::string> out;
  for (const auto& action : f.take()) {
    const auto r = std::to_string(action.recorder), n = std::to_string(action.recording);
    if (action.kind == Kind::attempt) out.push_back("try " + r);
    if (action.kind == Kind::open) out.push_back("open " + n + "@" + r);
    if (action.kind == Kind::tell)
      out.push_back("tell " + n + (action.state == RecorderState::none ? " none" : action.state == RecorderState::searching ? " searching" : " recording@" + r));
  }
  return out;
}
using Words = std::vector<std::string>;

}  // namespace

TEST_CASE("the first healthy answer wins while nothing is known", "[recorder][failover]") {
  Failover f;
  f.add(7, {a, b});
  CHECK(words(f) == Words{"try 0", "try 1", "tell 7 searching"});
  f.answering(b);
  CHECK(words(f) == Words{"open 7@1"});
  f.opened(7, b);
  CHECK(words(f) == Words{"tell 7 recording@1"});
  SECTION("it does not move when the first one answers later") {
    f.answering(a);
    CHECK(words(f).empty());
    SECTION("and the next recording goes to the first of its list") {
      f.add(8, {a, b});
      CHECK(words(f) == Words{"tell 8 searching", "open 8@0"});
    }
  }
}

TEST_CASE("all recordings of a lost recorder move to the next healthy one and none moves back", "[recorder][failover]") {
  Failover f;
  for (const auto r : {a, b, c}) f.answering(r);
  f.add(7, {a, b});
  f.add(8, {a, c, b});
  f.add(9, {b});
  words(f);
  for (const auto n : {7, 8}) f.opened(static_cast<Failover::Recording>(n), a);
  f.opened(9, b);
  words(f);
  f.lost(a);
  CHECK(words(f) == Words{"tell 7 searching", "open 7@1", "tell 8 searching", "open 8@2"});
  f.opened(7, b);
  f.opened(8, c);
  words(f);
  f.answering(a);
  CHECK(words(f).empty());
}

TEST_CASE("the session is told that there is none only after a fresh try of all", "[recorder][failover]") {
  Failover f;
  f.add(7, {a, b});
  words(f);
  f.lost(a);
  CHECK(words(f).empty());
  f.lost(b);
  CHECK(words(f) == Words{"tell 7 none"});
  SECTION("a new session has them tried again, whatever was known") {
    f.add(8, {a, b});
    CHECK(words(f) == Words{"try 0", "try 1", "tell 8 searching"});
    f.lost(b);
    f.lost(a);
    CHECK(words(f) == Words{"tell 8 none"});
  }
  SECTION("whichever comes back takes it") {
    f.answering(b);
    CHECK(words(f) == Words{"tell 7 searching", "open 7@1"});
  }
}

TEST_CASE("when the last recorder is lost the others are tried afresh first", "[recorder][failover]") {
  Failover f;
  f.answering(a);
  f.lost(b);
  f.add(7, {a, b});
  CHECK(words(f) == Words{"try 1", "tell 7 searching", "open 7@0"});
  f.lost(b);
  f.opened(7, a);
  words(f);
  f.lost(a);
  CHECK(words(f) == Words{"try 0", "try 1", "tell 7 searching"});
  f.lost(a);
  CHECK(words(f).empty());
  f.lost(b);
  CHECK(words(f) == Words{"tell 7 none"});
}

TEST_CASE("a recorder that takes no new recordings keeps what it has", "[recorder][failover]") {
  Failover f;
  f.answering(a);
  f.answering(b);
  f.add(7, {a, b});
  f.opened(7, a);
  words(f);
  f.not_accepting(a);
  CHECK(words(f).empty());
  f.add(8, {a, b});
  CHECK(words(f) == Words{"tell 8 searching", "open 8@1"});
  f.answering(a);
  CHECK(words(f).empty());
}

TEST_CASE("a refusal concerns that recording alone", "[recorder][failover]") {
  Failover f;
  f.answering(a);
  f.answering(b);
  f.add(7, {a, b});
  f.add(8, {a, b});
  words(f);
  f.opened(8, a);
  words(f);
  SECTION("for good") {
    f.refused(7, a, Failover::Refusal::for_good);
    CHECK(words(f) == Words{"open 7@1"});
    f.refused(7, b, Failover::Refusal::for_good);
    CHECK(words(f) == Words{"tell 7 none"});
    f.retry();
    f.answering(a);
    CHECK(words(f).empty());
  }
  SECTION("for now") {
    CHECK(f.has_another(7));
    f.refused(7, a, Failover::Refusal::for_now);
    CHECK_FALSE(f.has_another(7));
    f.refused(7, b, Failover::Refusal::for_now);
    CHECK(words(f) == Words{"open 7@1", "tell 7 none"});
    f.retry();
    CHECK(words(f) == Words{"tell 7 searching", "open 7@0"});
  }
  CHECK(*f.at(8) == a);
}

TEST_CASE("in every order of failures a recording is where it should be", "[recorder][failover]") {
  // Every sequence of `depth` events over two recorders and two recordings, from each start; what the machine must never break is
  // checked after each event.
  struct World {
    Failover f;
    bool up[2] = {}, known[2] = {};
    int outstanding[2] = {};
    int at[2] = {-1, -1};
    bool banned[2][2] = {}, refused[2][2] = {};
    RecorderState told[2] = {};
  };
  const std::vector<Failover::Recorder> lists[2] = {{a, b}, {b, a}};
  const auto drain = [&](World& w) {
    for (const auto& action : w.f.take()) {
      if (action.kind == Kind::attempt) {
        REQUIRE_FALSE(w.up[action.recorder]);
        w.outstanding[action.recorder]++;
        REQUIRE(w.outstanding[action.recorder] == 1);
      } else if (action.kind == Kind::open) {
        REQUIRE(w.up[action.recorder]);
        REQUIRE(w.at[action.recording] == -1);  // it never moves while it is somewhere
        REQUIRE_FALSE(w.banned[action.recording][action.recorder]);
        REQUIRE_FALSE(w.refused[action.recording][action.recorder]);
        for (const auto r : lists[action.recording]) {  // the first that can
          if (r == action.recorder) break;
          REQUIRE((!w.up[r] || w.banned[action.recording][r] || w.refused[action.recording][r]));
        }
        w.at[action.recording] = static_cast<int>(action.recorder);
      } else {
        w.told[action.recording] = action.state;
      }
    }
    for (const std::size_t n : {0U, 1U}) {
      const auto* at = w.f.at(n);
      REQUIRE((at ? static_cast<int>(*at) : -1) == w.at[n]);
      if (w.at[n] < 0) {
        bool waiting = false;
        for (const std::size_t r : {0U, 1U}) {
          REQUIRE((!w.up[r] || w.banned[n][r] || w.refused[n][r]));  // nobody waits beside a recorder that is free
          waiting |= w.outstanding[r] > 0;
        }
        if (!waiting) REQUIRE(w.told[n] == RecorderState::none);  // the session is not left hoping
      } else {
        REQUIRE(w.told[n] != RecorderState::none);
      }
    }
  };
  const auto apply = [&](World& w, int event) {
    const std::size_t x = event & 1;
    switch (event >> 1) {
      case 0:  // up
        w.up[x] = true;
        w.outstanding[x] = 0;
        for (const int n : {0, 1})
          if (w.at[n] < 0) w.refused[n][x] = false;
        w.f.answering(x);
        break;
      case 1:  // lost
        w.up[x] = false;
        w.outstanding[x] = 0;
        for (const int n : {0, 1})
          if (w.at[n] == static_cast<int>(x)) w.at[n] = -1;
        w.f.lost(x);
        break;
      case 2:  // opened where it is
        if (w.at[x] < 0) return false;
        w.refused[x][0] = w.refused[x][1] = false;
        w.f.opened(x, static_cast<std::size_t>(w.at[x]));
        break;
      case 3:  // refused for good
      case 4: {
        if (w.at[x] < 0) return false;
        const auto r = static_cast<std::size_t>(w.at[x]);
        (event >> 1 == 3 ? w.banned : w.refused)[x][r] = true;
        w.at[x] = -1;
        w.f.refused(x, r, event >> 1 == 3 ? Failover::Refusal::for_good : Failover::Refusal::for_now);
        break;
      }
      case 5:
        if (x == 1) return false;
        for (const int n : {0, 1})
          if (w.at[n] < 0) w.refused[n][0] = w.refused[n][1] = false;
        w.f.retry();
        break;
      default: return false;
    }
    drain(w);
    return true;
  };
  World start;
  start.f.add(0, lists[0]);
  start.f.add(1, lists[1]);
  drain(start);
  std::size_t sequences = 0;
  const auto explore = [&](auto&& self, const World& world, int depth) -> void {
    sequences++;
    if (depth == 0) return;
    for (int event = 0; event < 12; event++) {
      World next = world;
      if (apply(next, event)) self(self, next, depth - 1);
    }
  };
  explore(explore, start, 7);
  CHECK(sequences > 100'000);
}
