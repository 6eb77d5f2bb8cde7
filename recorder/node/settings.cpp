#include "recorder/node/settings.h"

#include "base/settings.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

namespace postern::recorder::node {
namespace {
constexpr std::size_t largest_file = 1024 * 1024;
}

Expected<Settings> parse_settings(std::string_view text, const std::string& file) {
  using Milliseconds = std::chrono::milliseconds;
  Settings s;
  s.listen = {*Endpoint::parse("0.0.0.0", 80), *Endpoint::parse("[::]", 80)};
  const auto endpoint = [](const std::string& t) { return Endpoint::parse(t, 80); };
  const auto prefix = [](const std::string& t) { return Prefix::parse(t); };
  const auto host = [](const std::string& t) { return t.empty() || t.size() > 255 ? std::nullopt : std::optional{t}; };
  SettingsReader r{text, file};
  r.table("listen", [&] {
    r.list("addresses", s.listen, endpoint, "a numeric address with or without a port", "\"127.0.2.1:80\" or \"[::1]:80\"");
    if (s.listen.empty()) r.refuse("addresses", "must be a list that is not empty", "leave it out for all addresses");
    r.text("name", s.store.name);
  });
  r.table("ingest", [&] { r.list("allow", s.ingest, prefix, "an address or a prefix", "\"127.0.0.2\" or \"100.64.0.0/10\""); });
  r.table("read", [&] {
    r.list("allow", s.read, prefix, "an address or a prefix", "\"127.0.0.1\" or \"100.64.0.0/10\"");
    r.list("names", s.names, host, "a host name", "\"recorder-a\"");
  });
  r.table("store", [&] {
    std::string dir = s.store.dir;
    r.path("dir", dir);
    s.store.dir = dir;
    r.size("min_free", s.store.min_free);
    r.size("turn_bytes", s.store.turn_bytes, 128 << 10, 64 << 20);
    r.duration("commit_interval", s.store.commit_interval, Milliseconds{0});
    r.duration("health_interval", s.store.health_interval, Milliseconds{10});
  });
  r.table("limits", [&] {
    r.number("streams", s.store.streams, 1, 1'000'000);
    r.number("connections", s.connections, 1, 1'000'000);
    r.number("connections_per_source", s.connections_per_source, 1, 1'000'000);
    r.size("max_recording", s.store.max_recording, 1 << 20);
    r.duration("open_timeout", s.open_timeout);
    r.duration("ping_interval", s.http2.ping_interval);
    r.duration("stall_timeout", s.http2.stall_timeout);
    r.duration("peer_timeout", s.http2.peer_timeout);
    r.duration("shutdown_timeout", s.shutdown_timeout);
    r.duration("stop_timeout", s.stop_timeout);
    r.size("stream_window", s.http2.stream_window, 64 << 10, 1 << 30);
    r.size("connection_window", s.http2.connection_window, 64 << 10, 1 << 30);
    r.size("header_list", s.http2.max_header_list, 1 << 10, 1 << 20);
    r.number("reset_burst", s.http2.reset_burst, 1, 1'000'000);
    r.number("reset_rate", s.http2.reset_rate, 1, 1'000'000);
  });
  r.table("log", [&] { r.one_of("level", s.log_level, {"trace", "debug", "info", "warning", "error"}); });
  if (const auto problems = r.finish(); !problems.empty()) return Unexpected{Error{EINVAL, text_of(problems)}};
  // Lists, reads and health streams come on top of the uploads.
  s.http2.max_concurrent_streams = std::max(4096U, s.store.streams + 256);
  if (s.store.name.empty()) {
    std::array<char, 256> name{};
    if (::gethostname(name.data(), name.size() - 1) == 0) s.store.name = name.data();
  }
  return s;
}

Expected<Settings> load_settings(const std::string& file) {
  const auto text = read_whole_file(file, largest_file);
  if (!text) return Unexpected{text.error()};
  return parse_settings(*text, file);
}

}  // namespace postern::recorder::node
