#pragma once

#include "base/id.h"
#include "base/poller.h"
#include "base/unique_fd.h"

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace postern::recorder::wire {

/// What the relay must know of a recording that it does not take from the bytes.
struct RecordingOpen {
  Id recording;
  std::vector<std::string> recorders;  ///< "127.0.2.1:80", in the order of choice
  bool enforce = false;                ///< fail closed: durable means committed
  // Of the postern-session process, so that the relay can tell a dead session from one that lost its way: boot id (kernel
  // random/boot_id), pid, start time (field 22 of /proc/pid/stat, clock ticks).
  std::string boot_id;
  std::int32_t pid = 0;
  std::uint64_t start_time = 0;
};

/// What the relay says of the recorders of one recording.
enum class RecorderState : std::uint8_t {
  searching,  ///< no recorder yet; attempts go on
  recording,  ///< one takes the bytes
  none,       ///< all were tried and none can; attempts go on in the background
};

/// postern-session's end of one recording: a connection to the relay's session socket (unix stream), on a Poller.
///
/// append() takes encoded bytes and keeps them until the relay has written them; when the relay is away or restarts, the link
/// connects again by itself (backoff 50 ms .. 1 s), asks for the length that the relay has and sends again from there. Offsets are
/// cumulative byte counts of this recording, header included.
class RelayLink {
 public:
  struct Handlers {
    /// Bytes [0, offset) were taken by write(2) of the relay's journal: they may be shown. Never goes backwards.
    std::function<void(std::uint64_t offset)> written;
    std::function<void(std::uint64_t offset)> journaled;  ///< fdatasync on this host
    std::function<void(std::uint64_t offset)> committed;  ///< fdatasync on a recorder (never goes backwards, even on failover)
    std::function<void(RecorderState, const std::string& recorder)> state;
    /// false: the relay is away; true: it is there again and has been brought up to date.
    std::function<void(bool connected)> connection;
    /// The journal cannot take this recording any more (disk full, I/O error): what follows is a gap.
    std::function<void(const std::string& why)> journal_failed;
    /// The end was taken: all of it is journaled, and the relay brings it to a recorder without the session from here on. (How much
    /// is committed tells committed(), as always.)
    std::function<void()> ended;
  };

  /// Most bytes that may wait for `written`; more than that and the program must not be read.
  static constexpr std::size_t max_unwritten = 256 * 1024;

  RelayLink(Poller& poller, std::string socket_path, RecordingOpen open, Handlers handlers);
  ~RelayLink();
  RelayLink(const RelayLink&) = delete;
  RelayLink& operator=(const RelayLink&) = delete;

  /// Room before max_unwritten; 0 = stop reading the program until `written` moves.
  std::size_t room() const noexcept;
  void append(std::string_view encoded);
  /// No more bytes. Sends length and chain head (signature empty for now); `ended` follows.
  void end();

  std::uint64_t appended() const noexcept;
  std::uint64_t written() const noexcept;
  std::uint64_t journaled() const noexcept;
  std::uint64_t committed() const noexcept;
  bool connected() const noexcept;
  RecorderState state() const noexcept;
  /// When the relay was last lost; meaningful while !connected().
  Poller::Clock::time_point away_since() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace postern::recorder::wire
