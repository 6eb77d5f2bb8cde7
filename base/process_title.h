#pragma once

#include <string_view>

namespace postern {

/// What ps(1) shows of a process that was forked and not exec'ed: workers say what they are ("postern-session: alice").
///
/// Room: argv[0] and the environment string behind it when that is `POSTERN_TITLE=...` (posternd passes it for this alone). The
/// kernel reads on into the environment when argv's last byte is not NUL (fs/proc/base.c, get_mm_cmdline). Call once, first in main().
void init_process_title(char** argv);
/// Cuts what does not fit; control characters become '?'. No system call: works behind any filter.
void set_process_title(std::string_view title);

}  // namespace postern
