#include "base/expected.h"

#include <cerrno>
#include <system_error>

namespace postern {

Error system_error(std::string doing) { return system_error(std::move(doing), errno); }

Error system_error(std::string doing, int code) {
  doing += ": ";
  doing += std::generic_category().message(code);
  return Error{.code = code, .doing = std::move(doing)};
}

}  // namespace postern
