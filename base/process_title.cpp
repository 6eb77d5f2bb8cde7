#include "base/process_title.h"

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace postern {
namespace {
char* start = nullptr;
std::size_t room = 0;
}  // namespace

void init_process_title(char** argv) {
  if (argv == nullptr || argv[0] == nullptr || argv[1] != nullptr) return;
  start = argv[0];
  room = std::strlen(argv[0]);
  const char* next = argv[0] + room + 1;
  if (environ != nullptr && environ[0] == next && std::strncmp(next, "POSTERN_TITLE=", 14) == 0) {
    room += 1 + std::strlen(next);
    environ++;  // it is no variable any more
  }
}

void set_process_title(std::string_view title) {
  if (start == nullptr) return;
  const std::size_t n = std::min(title.size(), room);
  for (std::size_t i = 0; i < n; i++) {
    const auto c = static_cast<unsigned char>(title[i]);
    start[i] = c < 0x20 || c == 0x7f ? '?' : title[i];
  }
  std::memset(start + n, 0, room - n);
}

}  // namespace postern
