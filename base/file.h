#pragma once

#include "base/expected.h"

#include <cstddef>
#include <string>

namespace postern {

/// A whole regular file of at most `largest` bytes. Anything else in its place (a FIFO, a device, a folder) is refused at once: a daemon
/// that opened a FIFO would wait for somebody to write. Errors: errno, EFBIG, EINVAL.
Expected<std::string> read_whole_file(const std::string& path, std::size_t largest);

/// What is left of an open file, a pipe or a terminal, under the same terms; `name` stands in errors.
Expected<std::string> read_to_end(int fd, const std::string& name, std::size_t largest);

}  // namespace postern
