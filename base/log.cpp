#include "base/log.h"

#include <spdlog/sinks/stdout_sinks.h>

namespace postern {

void set_up_log(const std::string& program, const std::string& level) {
  auto logger = std::make_shared<spdlog::logger>(program, std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_pattern("%Y-%m-%dT%H:%M:%S.%f%z %l %n[%P]: %v");
  logger->set_level(spdlog::level::from_str(level) == spdlog::level::off && level != "off" ? spdlog::level::info
                                                                                          : spdlog::level::from_str(level));
  logger->flush_on(spdlog::level::trace);
  spdlog::set_default_logger(std::move(logger));
}

std::string safe_quoted(std::string_view text, std::size_t most) {
  static constexpr char hex[] = "0123456789abcdef";
  std::string out = "\"";
  const bool cut = text.size() > most;
  for (const char c : text.substr(0, most)) {
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (u >= 0x20 && u < 0x7f) {
      out += c;
    } else {
      out += "\\x";
      out += hex[u >> 4];
      out += hex[u & 15];
    }
  }
  out += cut ? "\"..." : "\"";
  return out;
}

}  // namespace postern
