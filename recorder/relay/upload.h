#pragma once

#include "base/expected.h"
#include "recorder/cast/chain.h"
#include "recorder/journal/journal.h"
#include "recorder/wire/messages.h"

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace postern::recorder::relay {

/// One recording on its way to one recorder: the POST exchange of docs/PROTOCOL.recorder.md, from the open line to `whole`.
///
/// Knows no socket: bytes for the recorder go to a Stream, what it says comes in by on_status(), on_data(), on_over(). Reads the
/// recording's bytes from the journal, encodes nothing.
class Upload : public std::enable_shared_from_this<Upload> {
 public:
  using Clock = std::chrono::steady_clock;

  /// The request's body.
  class Stream {
   public:
    virtual ~Stream() = default;
    virtual void send(std::string bytes) = 0;
    virtual std::size_t unsent() const = 0;  ///< bytes that wait for the connection or a window; writable() follows when few do
    virtual void finish() = 0;               ///< END_STREAM after what was sent
    virtual void cancel() = 0;               ///< RST_STREAM(CANCEL); nothing more comes in
  };

  /// Why a recorder does not take it.
  struct Refused {
    std::string code;         ///< of the protocol's table; "" for one that it does not have
    int status = 0;
    std::uint64_t epoch = 0;  ///< with stale_epoch
    std::string message;
  };
  struct Handlers {
    std::function<void()> opened;                ///< the recorder has answered and its part fits ours
    std::function<void(std::uint64_t)> acked;    ///< committed there
    std::function<void()> caught_up;             ///< what there was at the open has been acked; once
    std::function<void(bool cut)> stored;        ///< it has the whole (or what there will ever be): nothing more is to be sent
    std::function<void(const Refused&)> refused; ///< the stream is over
  };
  /// head(n) of the journal's bytes, later.
  using HeadSource = std::function<void(std::uint64_t n, std::function<void(Expected<cast::Digest>)>)>;

  Upload(std::shared_ptr<journal::Entry> entry, std::uint64_t epoch, std::string relay_name, HeadSource heads, Handlers handlers);

  void start(std::unique_ptr<Stream> stream, Clock::time_point now);
  /// The journal has more bytes, or the end.
  void poke(Clock::time_point now);
  /// Ends it from our side; no handler is called any more.
  void cancel();

  void on_status(int status);
  void on_data(std::string_view bytes, Clock::time_point now);
  void writable();
  /// The stream is over. `refused_unseen`: the recorder did not look at it (REFUSED_STREAM).
  void on_over(const std::string& why, bool refused_unseen);

  /// Since when bytes (or the open, or the end) wait for the recorder without any answer; nothing when none do.
  std::optional<Clock::time_point> waiting_since() const;
  bool is_open() const noexcept { return phase_ == Phase::streaming || phase_ == Phase::ending; }
  std::uint64_t epoch() const noexcept { return epoch_; }
  const journal::Entry& entry() const noexcept { return *entry_; }

  static constexpr std::size_t piece = 128 * 1024;  ///< most bytes of one data frame
  static constexpr std::size_t ahead = 256 * 1024;  ///< most bytes that wait in the stream

 private:
  enum class Phase { idle, opening, comparing, streaming, ending, over };
  void reply(std::string_view text);
  void check_caught_up();
  void answer(std::string_view text);
  void compare(std::uint64_t n, const std::string& head, std::function<void(bool equal)> then);
  void go_on(std::uint64_t n);
  void conflict(std::uint64_t n);
  void pump();
  void fail(Refused refused);
  void progress();

  std::shared_ptr<journal::Entry> entry_;
  const std::uint64_t epoch_;
  const std::string relay_name_;
  const HeadSource heads_;
  Handlers handlers_;
  std::unique_ptr<Stream> stream_;
  Phase phase_ = Phase::idle;
  int status_ = 0;
  wire::LineReader lines_;
  std::string error_body_;
  std::uint64_t next_ = 0, acked_ = 0, target_ = 0;
  bool caught_up_ = false;
  std::optional<Clock::time_point> waiting_;
  Clock::time_point now_{};
};

}  // namespace postern::recorder::relay
