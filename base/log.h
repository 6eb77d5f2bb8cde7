#pragma once

#include <spdlog/spdlog.h>

#include <string>

namespace postern {

/// Sets up the default spdlog logger of this process: one line a message on stderr (systemd's journald, or the demo's log
/// file, takes it from there), "time level program[pid]: fields". Fields, not prose: `connection=… user=… event=…`; never a
/// command line, environment value or any byte of a session. `level`: trace debug info warning error; unknown = info.
void set_up_log(const std::string& program, const std::string& level = "info");

/// A stranger's text made safe for one log field: printable ASCII kept, the rest as \xNN, cut at `most` bytes, in quotes.
/// (Not named quoted: std::quoted would win by argument-dependent look-up.)
std::string safe_quoted(std::string_view text, std::size_t most = 256);

}  // namespace postern
