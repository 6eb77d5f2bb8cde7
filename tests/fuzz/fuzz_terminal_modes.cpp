// libFuzzer target for the terminal modes that a client sends with pty-req (RFC 4254 section 8): any bytes are fine, only what is named
// changes, and the same again changes nothing.
//
//     cmake --preset fuzz && cmake --build --preset fuzz --target fuzz_terminal_modes
//     build/fuzz/bin/fuzz_terminal_modes -max_len=1024 -max_total_time=300 build/fuzz/terminal_modes tests/fuzz/corpus/terminal_modes
#include "pty/pty.h"

#include <termios.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}
bool same(const termios& a, const termios& b) {
  return a.c_iflag == b.c_iflag && a.c_oflag == b.c_oflag && a.c_cflag == b.c_cflag && a.c_lflag == b.c_lflag &&
         std::memcmp(a.c_cc, b.c_cc, sizeof a.c_cc) == 0 && ::cfgetispeed(&a) == ::cfgetispeed(&b) && ::cfgetospeed(&a) == ::cfgetospeed(&b);
}
termios usual() {
  termios t{};
  t.c_iflag = ICRNL | IXON;
  t.c_oflag = OPOST | ONLCR;
  t.c_cflag = CS8 | CREAD;
  t.c_lflag = ISIG | ICANON | ECHO;
  t.c_line = 3;
  ::cfsetispeed(&t, B38400);
  ::cfsetospeed(&t, B38400);
  return t;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string encoded(reinterpret_cast<const char*>(data), size);
  termios modes = usual();
  const bool whole = postern::pty::decode_modes(encoded, modes);
  require(modes.c_line == 3 && (modes.c_cflag & CREAD) != 0);  // no opcode names them
  if (encoded.empty() || data[0] == 0 || data[0] >= 160) require(whole && same(modes, usual()));
  termios again = modes;
  require(postern::pty::decode_modes(encoded, again) == whole && same(again, modes));
  // What stands after the end is not read.
  std::size_t end = 0;
  while (end < encoded.size() && data[end] != 0 && data[end] < 160 && encoded.size() - end >= 5) end += 5;
  termios cut = usual();
  postern::pty::decode_modes(std::string_view{encoded}.substr(0, end), cut);
  require(same(cut, modes));
  return 0;
}
