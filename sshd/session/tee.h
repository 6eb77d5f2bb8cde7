#pragma once

#include "base/poller.h"
#include "base/unique_fd.h"
#include "recorder/cast/encoder.h"
#include "recorder/wire/relay_link.h"
#include "sshd/protocol/facts.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace postern::sshd::session {

// Recording window (DESIGN section 4): what the user has seen and no disk holds yet.
inline constexpr std::uint64_t recording_window_bytes = 16 * 1024 * 1024;
inline constexpr std::chrono::milliseconds recording_window_time{5'000};
/// Read from the program and not shown yet; more than that and it is not read.
inline constexpr std::size_t most_unreleased = 1024 * 1024;
/// One read (encoded text of it fits one frame of the relay link, 64 KiB), and the least room worth one.
inline constexpr std::size_t largest_read = 60 * 1024;
inline constexpr std::size_t least_room = 16 * 1024;
/// Encoded input that waits for the relay, beside the output that does (one read of input, 16 KiB, is up to 100 KiB encoded).
inline constexpr std::size_t most_input_waiting = 128 * 1024;
/// The relay took bytes and answers nothing: it counts as away. On this host write(2) takes microseconds.
inline constexpr std::chrono::milliseconds written_stall{2'000};
/// Bytes wait on a recorder (or on this host's disk) that does not commit: lost (DESIGN section 4 "Choice": 10 s; slow is not lost).
inline constexpr std::chrono::milliseconds durable_stall{10'000};
/// After the last byte: how long the session process waits until the relay has taken the end.
inline constexpr std::chrono::milliseconds recording_end_wait{30'000};

/// Copies what one program writes into a recording, and lets the user see it only then.
///
///     program -> put() -> Encoder -> RelayLink -> written(offset) -> the pipe to postern-net
///
/// Shown are bytes that the relay has written (DESIGN section 4 "Acks"), and no more of them than the recording window allows.
/// Fail closed (`enforce_recorder`): start() waits for a recorder's commit of the header; without any recorder for `recorder_grace`
/// lost() is called, once. Fail open: when no journal takes the bytes for that long, they are shown unrecorded; that is a gap, counted,
/// marked in the recording as soon as it goes on (`m` events), and told by event().
class Tee {
 public:
  struct Handlers {
    std::function<void()> started;   ///< the program may run now
    std::function<void()> lost;      ///< fail closed only; also instead of started
    std::function<void()> progress;  ///< something was shown, or there is room again
    std::function<void()> ended;     ///< the relay has the whole recording, or recording_end_wait is over
    std::function<void(const std::string& name, const std::string& fields)> event;
  };

  Tee(Poller& poller, const ConnectionFacts& facts, const recorder::cast::Header& header, const Id& recording, Handlers handlers);
  ~Tee();
  Tee(const Tee&) = delete;
  Tee& operator=(const Tee&) = delete;

  /// The pipe (write end, non-blocking) that carries stream 'o' or 'e' to net.
  void attach(char stream, UniqueFd to_net);
  /// False when net closed its end: the program's may be closed, too.
  bool outlet_open(char stream) const;
  /// How much to read of the program now; 0 = nothing until progress().
  std::size_t may_read(char stream) const;
  void put(char stream, std::span<const std::byte> bytes);
  void resize(std::uint32_t cols, std::uint32_t rows);
  /// May input be taken now, where it is recorded? Else not until progress(). It does not wait to be acknowledged (DESIGN section 4: input
  /// never waits), nor behind the output (a Ctrl-C gets past one that waits for the relay): only when too much of itself waits.
  bool may_take_input();
  /// What the user typed: goes into the recording before it goes to the program.
  void input(std::span<const std::byte> bytes);
  /// A marker event ("m").
  void mark(std::string_view text);
  /// Everything of that stream was shown (or nobody is there to see it).
  bool drained(char stream) const;
  /// No more of that stream: its pipe closes when it is drained.
  void finish(char stream);
  /// Drops what was not shown, tells the user one line on that stream that is not part of the recording, closes all pipes.
  void cut_off(char stream, std::string_view line);
  /// The program is gone; `exit_text` = "7" or "TERM". Closes what is drained; ended() follows.
  void end(std::string_view exit_text);

  const Id& id() const noexcept { return recording_; }
  bool is_ended() const noexcept { return ended_; }

 private:
  using Clock = Poller::Clock;
  struct Chunk {
    std::string bytes;
    std::size_t shown = 0;   // of bytes
    std::uint64_t end = 0;   // offset in the recording up to which `written` must be
  };
  struct Outlet {
    UniqueFd fd;
    std::deque<Chunk> waiting;
    std::size_t bytes = 0;
    bool finishing = false;
    bool full = false;  // the pipe is: waits for POLLOUT
  };
  /// Since when a count lags behind what it has to reach.
  struct Lag {
    std::uint64_t seen = 0;
    Clock::time_point since{};
    bool lagging = false;
    void update(std::uint64_t reached, std::uint64_t goal, Clock::time_point now);
  };

  Outlet& outlet(char stream) { return stream == 'e' ? error_ : output_; }
  const Outlet& outlet(char stream) const { return stream == 'e' ? error_ : output_; }
  std::uint64_t durable() const;
  bool window_open(std::uint64_t end, Clock::time_point now) const;
  void append(std::string_view encoded);
  void write_resize();
  void marker(std::string_view text);
  void release();
  void release(Outlet& o);
  void close_outlet(Outlet& o);
  void link_moved();
  void check();
  void arm_check();
  bool healthy(Clock::time_point now);
  void begin_gap(const std::string& why);
  void end_gap();
  void finish_end();

  Poller& poller_;
  const bool enforce_;
  const std::chrono::milliseconds grace_;
  const std::chrono::milliseconds start_wait_;
  Id recording_;
  Handlers handlers_;
  std::uint64_t start_ns_;
  recorder::cast::Encoder encoder_;
  std::string encoded_;
  std::uint64_t header_end_ = 0;
  Outlet output_, error_;
  std::uint64_t shown_ = 0;
  struct Mark {
    std::uint64_t offset;
    Clock::time_point time;
  };
  std::deque<Mark> marks_;  // shown and not durable yet
  std::deque<std::pair<std::uint64_t, std::size_t>> typed_;  // input that is not written: offset of its end, encoded bytes
  std::size_t typed_waiting_ = 0;
  Lag written_lag_, durable_lag_;
  std::optional<Clock::time_point> bad_since_;
  Clock::time_point state_since_;
  bool journal_failed_ = false;
  bool started_ = false, lost_ = false, ending_ = false, ended_ = false;
  bool gap_ = false;
  std::optional<std::pair<std::uint32_t, std::uint32_t>> resize_waits_;  // the last one, until the link has room
  bool unheld_ = false;  // fail open, after the end: what is left is shown without the relay
  std::uint64_t gap_bytes_ = 0, gap_total_ = 0, gap_mark_end_ = 0;
  std::uint64_t gap_begun_ns_ = 0;
  Poller::TimerId check_timer_ = 0, end_timer_ = 0;
  bool releasing_ = false;
  std::unique_ptr<recorder::wire::RelayLink> link_;  // last: its handlers use the rest
};

}  // namespace postern::sshd::session
