#pragma once

#include "recorder/wire/relay_link.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <vector>

namespace postern::recorder::relay {

/// Decides which recorder takes which recording, and what is told to the session.
///
/// Pure state machine: no sockets, no clock. relay.cpp performs the actions and feeds the results back, so every order of failures
/// can be written down as a unit test.
///
/// Rules: the first recorder of the recording's list that is known to be up takes it. While none is known to be up, all of the list
/// are tried afresh (`searching`); when all of those attempts have failed, `none`. A recording leaves its recorder only when that is
/// lost or refuses it; none moves back.
class Failover {
 public:
  using Recorder = std::size_t;
  using Recording = std::uint64_t;

  struct Action {
    enum class Kind : std::uint8_t {
      attempt,  ///< find out now whether `recorder` is up: answering(), not_accepting() or lost() must follow
      open,     ///< open `recording` at `recorder`: opened(), refused() or lost() must follow
      tell,     ///< tell the session `state` (of `recorder`, when it is `recording`)
    };
    Kind kind;
    Recorder recorder = 0;
    Recording recording = 0;
    wire::RecorderState state = wire::RecorderState::searching;
    bool operator==(const Action&) const = default;
  };

  enum class Refusal : std::uint8_t {
    for_now,   ///< retry() gives it another chance, and so does the recorder's next coming back
    for_good,  ///< conflict, damaged storage, not ours: never again for this recording
  };

  // What happened.
  void add(Recording recording, std::vector<Recorder> list);
  void remove(Recording recording);
  void answering(Recorder recorder);      ///< healthy, takes new recordings
  void not_accepting(Recorder recorder);  ///< healthy, what runs there goes on, but takes no new ones
  void lost(Recorder recorder);           ///< an attempt failed, the connection is gone, it hangs, or its disk is full
  void opened(Recording recording, Recorder recorder);
  void refused(Recording recording, Recorder recorder, Refusal refusal);
  /// Time has passed: recordings without a recorder forget the refusals `for_now`.
  void retry();

  /// What is to be done, in order; empty afterwards.
  std::vector<Action> take();

  // What is.
  bool up(Recorder recorder) const;
  /// Where the recording is, or is being opened.
  const Recorder* at(Recording recording) const;
  bool wants_recorder(Recording recording) const;
  /// Is a recorder up where it could go from where it is?
  bool has_another(Recording recording) const;

 private:
  enum class Health : std::uint8_t { unknown, trying, up, closed, down };
  struct Item {
    std::vector<Recorder> list;
    std::set<Recorder> untried;           // attempts of this round without an answer yet
    std::set<Recorder> refused, banned;
    bool placed = false, open = false;
    Recorder where = 0;
    bool told = false;
    wire::RecorderState state = wire::RecorderState::searching;
  };
  bool can_take(const Item& item, Recorder recorder) const;
  void start_round(Item& item);
  void place(Recording recording, Item& item);
  void tell(Recording recording, Item& item, wire::RecorderState state);
  Health health(Recorder recorder) const;

  std::map<Recorder, Health> health_;
  std::map<Recording, Item> items_;
  std::vector<Action> actions_;
};

}  // namespace postern::recorder::relay
