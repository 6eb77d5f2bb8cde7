#include "recorder/relay/settings.h"

#include "base/settings.h"

#include <unistd.h>

#include <array>
#include <cerrno>

namespace postern::recorder::relay {
namespace {
constexpr std::size_t largest_file = 1024 * 1024;
}

Expected<Settings> parse_settings(std::string_view text, const std::string& file) {
  Settings s;
  SettingsReader r{text, file};
  r.table("sessions", [&] {
    r.path("socket", s.session_socket, false, true);
    r.number("connections", s.sessions, 1, 1'000'000);
    r.duration("liveness_interval", s.liveness_interval);
  });
  r.table("control", [&] { r.path("socket", s.control_socket, false, true); });
  r.table("journal", [&] {
    std::string dir = s.journal.dir;
    r.path("dir", dir);
    s.journal.dir = dir;
    r.size("recording_quota", s.journal.recording_quota);
    r.size("total_quota", s.journal.total_quota);
    r.size("min_free", s.journal.min_free);
    r.duration("sync_interval", s.journal.sync_interval, Milliseconds{0});
    r.duration("gap_keep", s.gap_keep);
  });
  r.table("dial", [&] {
    r.address("source", s.source);
    r.text("name", s.name);
  });
  r.table("recorders", [&] {
    r.duration("connect_timeout", s.connect_timeout);
    r.duration("attempt_stagger", s.attempt_stagger);
    r.duration("lost_timeout", s.lost_timeout, Milliseconds{50});
    r.duration("commit_timeout", s.commit_timeout, Milliseconds{50});
    r.duration("first_commit_timeout", s.first_commit_timeout, Milliseconds{50});
    r.duration("backoff_shortest", s.backoff_shortest);
    r.duration("backoff_longest", s.backoff_longest);
    r.duration("penalty", s.penalty);
    r.duration("keep_warm", s.keep_warm);
    r.duration("moved_retry", s.moved_retry);
    r.number("replays", s.replays, 1, 4096);
  });
  r.table("log", [&] { r.one_of("level", s.log_level, {"trace", "debug", "info", "warning", "error"}); });
  if (const auto problems = r.finish(); !problems.empty()) return Unexpected{Error{EINVAL, text_of(problems)}};
  if (s.name.empty()) {
    std::array<char, 256> name{};
    if (::gethostname(name.data(), name.size() - 1) == 0) s.name = name.data();
  }
  return s;
}

Expected<Settings> load_settings(const std::string& file) {
  const auto text = read_whole_file(file, largest_file);
  if (!text) return Unexpected{text.error()};
  return parse_settings(*text, file);
}

}  // namespace postern::recorder::relay
