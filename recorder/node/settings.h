#pragma once

#include "base/address.h"
#include "base/expected.h"
#include "recorder/node/store.h"
#include "recorder/wire/http2.h"

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace postern::recorder::node {

/// recorder.toml (docs/SETTINGS.recorder.md).
struct Settings {
  std::vector<Endpoint> listen;  ///< default 0.0.0.0:80 and [::]:80
  std::vector<Prefix> ingest;    ///< who may upload; default nobody
  std::vector<Prefix> read;      ///< who may list and read; default nobody
  std::vector<std::string> names;  ///< what a browser may call this recorder
  StoreSettings store;
  wire::Http2Options http2;
  std::uint32_t connections = 1024;
  std::uint32_t connections_per_source = 128;
  std::chrono::milliseconds open_timeout{10000};     ///< for the open line, and for a whole HTTP/1.1 request
  std::chrono::milliseconds shutdown_timeout{2000};  ///< what was answered may still be on its way
  std::chrono::milliseconds stop_timeout{30000};     ///< for the last commit; then the process ends without it
  std::string log_level = "info";
};

/// The error's `doing` is "FILE:LINE:COLUMN: field: what (hint)".
Expected<Settings> parse_settings(std::string_view text, const std::string& file);
Expected<Settings> load_settings(const std::string& file);

}  // namespace postern::recorder::node
