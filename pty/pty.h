#pragma once

#include "base/expected.h"
#include "base/unique_fd.h"

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <string_view>

struct termios;

namespace postern::pty {

struct Window {
  std::uint32_t cols = 80, rows = 24, xpixels = 0, ypixels = 0;
};

/// A pseudo-terminal. `leader` stays on our side; `follower` is the program's.
struct Terminal {
  UniqueFd leader;    ///< close-on-exec, non-blocking
  UniqueFd follower;  ///< close-on-exec; close it once the program has it, else the leader never sees the end
  std::string path;   ///< "/dev/pts/7"
};

/// Opens one that belongs to `owner`, group tty, mode 0620 (mesg(1): the group may write, others may do nothing). As an ordinary
/// user the kernel has done that already.
Expected<Terminal> open_terminal(uid_t owner);

/// TIOCSWINSZ: the foreground group of the terminal gets SIGWINCH when the size is another. Values over 65535 are cut.
Expected<Done> set_window(int terminal, const Window& window);

/// Sets what `encoded` names (RFC 4254 section 8, RFC 8160) in `modes`: all opcodes that Linux knows; those that it lacks are passed
/// over. From strangers: any bytes are fine. False when the bytes end inside an argument; what stood before counts.
bool decode_modes(std::string_view encoded, termios& modes);

/// Reads the terminal's modes, decodes over them, sets them.
Expected<Done> apply_modes(int terminal, std::string_view encoded);

}  // namespace postern::pty
