#pragma once

#include "base/expected.h"

#include <cstddef>
#include <string>

namespace postern {

/// A whole file of at most `largest` bytes. Errors: errno, EFBIG.
Expected<std::string> read_whole_file(const std::string& path, std::size_t largest);

/// What is left of an open file, a pipe or a terminal, under the same terms; `name` stands in errors.
Expected<std::string> read_to_end(int fd, const std::string& name, std::size_t largest);

}  // namespace postern
