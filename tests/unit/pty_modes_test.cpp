#include "pty/pty.h"

#include "catch.h"

#include <sys/ioctl.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include <random>
#include <string>

using namespace postern;

namespace {
void add(std::string& modes, unsigned opcode, std::uint32_t value) {
  modes += static_cast<char>(opcode);
  for (int shift = 24; shift >= 0; shift -= 8) modes += static_cast<char>(value >> shift & 0xff);
}
}  // namespace

TEST_CASE("terminal modes that a client sends are the terminal's modes", "[pty]") {
  auto terminal = pty::open_terminal(::geteuid());
  REQUIRE(terminal);
  std::string modes;
  add(modes, 1, 7);      // VINTR
  add(modes, 3, 8);      // VERASE
  add(modes, 10, 255);   // VSUSP: none
  add(modes, 38, 0);     // IXON off
  add(modes, 42, 1);     // IUTF8
  add(modes, 53, 0);     // ECHO off
  add(modes, 72, 0);     // ONLCR off
  add(modes, 35, 1);     // IGNCR
  add(modes, 90, 1);     // CS7
  add(modes, 92, 1);     // PARENB
  add(modes, 128, 19200);
  add(modes, 129, 57600);
  modes += '\0';
  add(modes, 53, 1);  // after the end: not read
  REQUIRE(pty::apply_modes(terminal->follower.get(), modes));
  termios t{};
  REQUIRE(::tcgetattr(terminal->follower.get(), &t) == 0);
  CHECK(t.c_cc[VINTR] == 7);
  CHECK(t.c_cc[VERASE] == 8);
  CHECK(t.c_cc[VSUSP] == _POSIX_VDISABLE);
  CHECK((t.c_iflag & IXON) == 0);
  CHECK((t.c_iflag & IUTF8) != 0);
  CHECK((t.c_iflag & IGNCR) != 0);
  CHECK((t.c_lflag & ECHO) == 0);
  CHECK((t.c_oflag & ONLCR) == 0);
  // A pseudo-terminal has 8 bits and no parity whatever is asked for (pty_set_termios in the kernel's pty.c), as under sshd.
  CHECK((t.c_cflag & CSIZE) == CS8);
  CHECK(::cfgetospeed(&t) == B57600);
}

TEST_CASE("every known opcode sets its own bit, and only that", "[pty]") {
  struct Case {
    unsigned opcode;
    tcflag_t termios::*word;
    tcflag_t bit;
  };
  const Case cases[] = {
      {30, &termios::c_iflag, IGNPAR},  {31, &termios::c_iflag, PARMRK}, {32, &termios::c_iflag, INPCK},  {33, &termios::c_iflag, ISTRIP},
      {34, &termios::c_iflag, INLCR},   {35, &termios::c_iflag, IGNCR},  {36, &termios::c_iflag, ICRNL},  {37, &termios::c_iflag, IUCLC},
      {38, &termios::c_iflag, IXON},    {39, &termios::c_iflag, IXANY},  {40, &termios::c_iflag, IXOFF},  {41, &termios::c_iflag, IMAXBEL},
      {42, &termios::c_iflag, IUTF8},   {50, &termios::c_lflag, ISIG},   {51, &termios::c_lflag, ICANON}, {52, &termios::c_lflag, XCASE},
      {53, &termios::c_lflag, ECHO},    {54, &termios::c_lflag, ECHOE},  {55, &termios::c_lflag, ECHOK},  {56, &termios::c_lflag, ECHONL},
      {57, &termios::c_lflag, NOFLSH},  {58, &termios::c_lflag, TOSTOP}, {59, &termios::c_lflag, IEXTEN}, {60, &termios::c_lflag, ECHOCTL},
      {61, &termios::c_lflag, ECHOKE},  {62, &termios::c_lflag, PENDIN}, {70, &termios::c_oflag, OPOST},  {71, &termios::c_oflag, OLCUC},
      {72, &termios::c_oflag, ONLCR},   {73, &termios::c_oflag, OCRNL},  {74, &termios::c_oflag, ONOCR},  {75, &termios::c_oflag, ONLRET},
      {92, &termios::c_cflag, PARENB},  {93, &termios::c_cflag, PARODD}};
  for (const auto& c : cases) {
    INFO("opcode " << c.opcode);
    std::string on, off;
    add(on, c.opcode, 1);
    add(off, c.opcode, 0);
    termios t{};
    REQUIRE(pty::decode_modes(on, t));
    CHECK(t.*c.word == c.bit);
    CHECK((t.c_iflag | t.c_oflag | t.c_lflag | t.c_cflag) == c.bit);
    REQUIRE(pty::decode_modes(off, t));
    CHECK((t.c_iflag | t.c_oflag | t.c_lflag | t.c_cflag) == 0);
  }
}

TEST_CASE("terminal modes cut short or made of noise do no harm", "[pty]") {
  termios t{};
  std::string modes;
  add(modes, 53, 1);
  CHECK_FALSE(pty::decode_modes(modes + "\x01\x02", t));
  CHECK((t.c_lflag & ECHO) != 0);  // what stood before counts
  CHECK(pty::decode_modes(std::string("\xff\x35", 2), t));
  std::random_device device;
  const unsigned seed = device();
  INFO("seed " << seed);
  std::mt19937 random{seed};
  auto terminal = pty::open_terminal(::geteuid());
  REQUIRE(terminal);
  for (int i = 0; i < 2000; i++) {
    std::string noise(random() % 1024, '\0');
    for (auto& c : noise) c = static_cast<char>(random());
    const auto applied = pty::apply_modes(terminal->follower.get(), noise);
    INFO((applied ? "" : applied.error().doing));
    CHECK(applied.has_value());
  }
}

TEST_CASE("a terminal belongs to its user and others cannot read it", "[pty]") {
  const uid_t owner = ::geteuid() == 0 ? 65534 : ::geteuid();
  auto terminal = pty::open_terminal(owner);
  REQUIRE(terminal);
  struct stat st {};
  REQUIRE(::stat(terminal->path.c_str(), &st) == 0);
  CHECK(st.st_uid == owner);
  CHECK((st.st_mode & 0777) == 0620);
}

TEST_CASE("a terminal takes the window's size, however large", "[pty]") {
  auto terminal = pty::open_terminal(::geteuid());
  REQUIRE(terminal);
  REQUIRE(pty::set_window(terminal->leader.get(), {132, 43, 1, 2}));
  winsize w{};
  REQUIRE(::ioctl(terminal->follower.get(), TIOCGWINSZ, &w) == 0);
  CHECK(w.ws_col == 132);
  CHECK(w.ws_row == 43);
  REQUIRE(pty::set_window(terminal->leader.get(), {4'000'000'000U, 70'000, 0, 0}));
  REQUIRE(::ioctl(terminal->follower.get(), TIOCGWINSZ, &w) == 0);
  CHECK(w.ws_col == 65535);
  CHECK(w.ws_row == 65535);
}
