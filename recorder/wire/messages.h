#pragma once

#include "base/expected.h"
#include "base/id.h"

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// What docs/PROTOCOL.recorder.md puts inside HTTP/2 bodies: JSON lines and the upload's binary frames. Pure: no sockets.
//
// Every parse_* takes bytes of a stranger: bounded, no exceptions, a wrong type or a missing member is an error.
namespace postern::recorder::wire {

inline constexpr std::size_t max_line = 16 * 1024;           ///< one JSON line, with its "\n"
inline constexpr std::size_t max_data_frame = 1024 * 1024;   ///< payload of a data frame
inline constexpr std::size_t frame_header_size = 12;
inline constexpr std::uint64_t max_number = 1ULL << 53;      ///< offsets, epochs: exact in every JSON reader

/// "code" of an error line, and the HTTP status that goes with it.
enum class Code : std::uint8_t {
  bad_request, not_allowed, not_yours, not_found, stale_epoch, conflict, too_large, io_error, not_accepting, disk_full,
  bad_frame, superseded, timeout,
};
std::string_view name(Code code);
std::optional<Code> parse_code(std::string_view text);
int http_status(Code code);

struct Proven {
  std::uint64_t offset = 0;
  std::string head;
};

struct OpenLine {
  Id id;
  std::uint64_t epoch = 0;
  std::string relay;
  std::uint64_t from = 0;
  std::uint64_t length = 0;
  std::string signature;
};

struct AnswerLine {
  std::uint64_t have = 0;  ///< the one range [0, have)
  std::string head;        ///< hex of head(have)
  std::string ack = "disk";
  std::string state = "live";  ///< live | whole
  std::optional<Proven> proven;
};

struct HealthLine {
  std::uint64_t free = 0, min_free = 0;
  bool accepting = false;
  std::string reason;
  std::optional<std::uint64_t> last_commit_age_ms;
  std::uint64_t live = 0;
  std::uint64_t time_ms = 0;
  std::string name;
  std::string challenge;
};

struct MovedNotice {
  std::string to;
  std::uint64_t epoch = 0;
  std::string signature;
};

struct MovedAnswer {
  std::string state;
  std::uint64_t length = 0;
  std::string head;
};

struct ErrorLine {
  std::string error;
  Code code = Code::bad_request;
  std::uint64_t epoch = 0;  ///< of stale_epoch: the stored one
};

/// Payload of an end frame and of a cut frame (`reason`).
struct EndFrame {
  std::uint64_t length = 0;
  std::string head;
  std::string reason;
  std::string signature;
};

/// Payload of a conflict frame.
struct ConflictFrame {
  std::uint64_t offset = 0;
  std::string head;
};

// Lines, each with its "\n".
std::string format(const OpenLine& line);
std::string format(const AnswerLine& line);
std::string format(const HealthLine& line);
std::string format(const MovedNotice& line);
std::string format(const MovedAnswer& line);
std::string format(const ErrorLine& line);
std::string format_ack(std::uint64_t committed);
std::string format_whole(const std::string& head);
std::string format_cut(const std::string& head, std::uint64_t length);

Expected<OpenLine> parse_open(std::string_view line);
Expected<AnswerLine> parse_answer(std::string_view line);
Expected<HealthLine> parse_health(std::string_view line);
Expected<MovedNotice> parse_moved_notice(std::string_view line);
Expected<MovedAnswer> parse_moved_answer(std::string_view line);

/// What a recorder says on an upload stream after the answer line (or instead of it: an error).
struct UploadReply {
  enum class Kind : std::uint8_t { ack, whole, cut, error } kind = Kind::ack;
  std::uint64_t offset = 0;  ///< ack: committed; cut: length
  std::string head;          ///< whole, cut
  ErrorLine error;
};
Expected<UploadReply> parse_upload_reply(std::string_view line);
/// The body of an answer whose status is not 200. What is not an error line becomes bad_request with the status in the text.
ErrorLine parse_error_body(std::string_view body, int status);

// Frames of the upload's body.
std::string data_frame_header(std::uint64_t offset, std::size_t length);  ///< 12 bytes; the payload follows
std::string end_frame(const EndFrame& end);                               ///< whole frame 'E'
std::string cut_frame(const EndFrame& cut);                               ///< whole frame 'X'
std::string conflict_frame(const ConflictFrame& conflict);                ///< whole frame 'F'

/// Cuts received bytes into lines, "\n" taken off. A line over `max_line` is an error.
class LineReader {
 public:
  /// The handler returns false to stop: the rest of `bytes` is dropped.
  Expected<Done> feed(std::string_view bytes, const std::function<bool(std::string_view line)>& handler);
  std::size_t pending() const noexcept { return line_.size(); }

 private:
  std::string line_;
};

/// Reads an upload's request body: the open line, then frames, however they are split. Data is handed on as it comes and not
/// kept; offsets are checked against what came before, the first one by the handler.
class UploadReader {
 public:
  struct Handlers {
    std::function<Expected<Done>(const OpenLine&)> open;
    /// `offset` of the first byte. Within one frame and from frame to frame offsets are gapless (checked here).
    std::function<Expected<Done>(std::uint64_t offset, std::span<const std::byte> bytes)> data;
    std::function<Expected<Done>(const EndFrame&)> end;
    std::function<Expected<Done>(const EndFrame&)> cut;
    std::function<Expected<Done>(const ConflictFrame&)> conflict;
  };
  explicit UploadReader(Handlers handlers) : handlers_{std::move(handlers)} {}

  /// An error is final: of the bytes, or what a handler returned.
  Expected<Done> feed(std::span<const std::byte> bytes);
  bool opened() const noexcept { return opened_; }
  /// True between the header of a frame and its last byte, and inside a header: the sender cannot end here.
  bool inside_frame() const noexcept { return left_ > 0 || !head_.empty(); }

 private:
  Expected<Done> header();
  Expected<Done> control();

  Handlers handlers_;
  bool opened_ = false;
  bool finished_ = false;  // E, X or F came
  std::string line_;
  std::string head_;       // bytes of a frame header so far
  std::uint8_t type_ = 0;
  std::uint64_t offset_ = 0;
  std::size_t left_ = 0;   // of the current payload
  std::string payload_;    // of a control frame
  std::optional<std::uint64_t> next_;
};

}  // namespace postern::recorder::wire
