#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace postern::recorder::cast {

/// First line of a recording: asciicast v2 (docs.asciinema.org/manual/asciicast/v2) with Tailscale's extra members (tailscale
/// sessionrecording/header.go) and ours.
struct Header {
  std::uint32_t width = 80, height = 24;  ///< columns, rows; a session without a pty has 80x24 for players and "pty":false
  bool pty = false;
  std::int64_t timestamp = 0;             ///< Unix time, seconds
  std::string recording_id;               ///< 26 base32 characters
  std::string connection_id;
  std::string kind = "session";           ///< session | connection (forwards)
  std::string command;                    ///< raw text as typed; empty for a shell
  std::string original_command;           ///< as typed, where a rule forced `command` in its place
  std::string subsystem;
  std::string src_node, src_node_id, src_address;
  std::string src_user;                   ///< login; empty for tagged nodes
  std::vector<std::string> src_tags;
  std::string dst_node_id, dst_address;
  std::string ssh_user, local_user;
  std::string rule;
  std::string term;
};

/// One line, ending in "\n". Text that is not UTF-8 is shown as well as it can be (U+FFFD).
std::string encode_header(const Header& header);

/// Turns what a program writes into asciicast v2 event lines. Encoded once; from here on the bytes are opaque.
///
/// Exact bytes: text in "o" (stdout, pty) or "e" (stderr), and what was typed in "i". Where the bytes of a read are not plain UTF-8 text,
/// `[t,"b","<o|e|i> <base64>"]` stands just before and gives the exact bytes in place of the next event of that stream, which shows
/// them as well as it can. A character cut by a read: `b` + an empty event, then `b` + an event with the whole character; a read
/// with over 1/8 of invalid bytes shows one U+FFFD a run. No byte waits: every call appends at least one event for its bytes.
/// Times: seconds with 6 decimals since `start`, never backwards. Pure: the clock is an argument (CLOCK_BOOTTIME, nanoseconds).
class Encoder {
 public:
  explicit Encoder(std::uint64_t start_ns) noexcept : start_{start_ns}, last_{start_ns} {}

  /// Appends the events for one read of `stream` ('o' or 'e') to `out`. Reads over 64 KiB are split into several events.
  void output(char stream, std::span<const std::byte> bytes, std::uint64_t now_ns, std::string& out);
  /// What the user typed, when a rule says to record it ('i').
  void input(std::span<const std::byte> bytes, std::uint64_t now_ns, std::string& out);
  void resize(std::uint32_t cols, std::uint32_t rows, std::uint64_t now_ns, std::string& out);
  /// `[t,"x","7"]`, or for a signal `[t,"x","TERM"]`.
  void exit(std::string_view status_or_signal, std::uint64_t now_ns, std::string& out);

 private:
  void begin(std::uint64_t now_ns, char code, std::string& out);

  std::uint64_t start_;
  std::uint64_t last_;
  std::map<char, std::string> cut_;  // stream -> the bytes of a character that a read has cut
};

}  // namespace postern::recorder::cast
