#include "pty/pty.h"

#include <fcntl.h>
#include <grp.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>

namespace postern::pty {
namespace {

/// Group of terminals. Looked up once: Debian has had 5 since 1994, but it is the group file that says so.
gid_t tty_group() {
  static const gid_t gid = [] {
    const group* g = ::getgrnam("tty");
    return g != nullptr ? g->gr_gid : static_cast<gid_t>(-1);
  }();
  return gid;
}

struct Char {
  unsigned opcode;
  unsigned index;
};
// VDSUSP (11), VFLUSH (15) and VSTATUS (17) are BSD's; Linux has no such characters.
constexpr std::array chars{Char{1, VINTR},   Char{2, VQUIT},  Char{3, VERASE},    Char{4, VKILL},    Char{5, VEOF},
                           Char{6, VEOL},    Char{7, VEOL2},  Char{8, VSTART},    Char{9, VSTOP},    Char{10, VSUSP},
                           Char{12, VREPRINT}, Char{13, VWERASE}, Char{14, VLNEXT}, Char{16, VSWTC}, Char{18, VDISCARD}};

enum class Field { input, output, control, local };
struct Flag {
  unsigned opcode;
  Field field;
  tcflag_t mask;
  tcflag_t value;
};
constexpr Flag bit(unsigned opcode, Field field, tcflag_t flag) { return {opcode, field, flag, flag}; }
constexpr std::array flags{
    bit(30, Field::input, IGNPAR),   bit(31, Field::input, PARMRK),  bit(32, Field::input, INPCK),   bit(33, Field::input, ISTRIP),
    bit(34, Field::input, INLCR),    bit(35, Field::input, IGNCR),   bit(36, Field::input, ICRNL),   bit(37, Field::input, IUCLC),
    bit(38, Field::input, IXON),     bit(39, Field::input, IXANY),   bit(40, Field::input, IXOFF),   bit(41, Field::input, IMAXBEL),
    bit(42, Field::input, IUTF8),    bit(50, Field::local, ISIG),    bit(51, Field::local, ICANON),  bit(52, Field::local, XCASE),
    bit(53, Field::local, ECHO),     bit(54, Field::local, ECHOE),   bit(55, Field::local, ECHOK),   bit(56, Field::local, ECHONL),
    bit(57, Field::local, NOFLSH),   bit(58, Field::local, TOSTOP),  bit(59, Field::local, IEXTEN),  bit(60, Field::local, ECHOCTL),
    bit(61, Field::local, ECHOKE),   bit(62, Field::local, PENDIN),  bit(70, Field::output, OPOST),  bit(71, Field::output, OLCUC),
    bit(72, Field::output, ONLCR),   bit(73, Field::output, OCRNL),  bit(74, Field::output, ONOCR),  bit(75, Field::output, ONLRET),
    Flag{90, Field::control, CSIZE, CS7}, Flag{91, Field::control, CSIZE, CS8},
    bit(92, Field::control, PARENB), bit(93, Field::control, PARODD)};

struct Speed {
  std::uint32_t baud;
  speed_t constant;
};
constexpr std::array speeds{
    Speed{0, B0},           Speed{50, B50},           Speed{75, B75},           Speed{110, B110},         Speed{134, B134},
    Speed{150, B150},       Speed{200, B200},         Speed{300, B300},         Speed{600, B600},         Speed{1200, B1200},
    Speed{1800, B1800},     Speed{2400, B2400},       Speed{4800, B4800},       Speed{9600, B9600},       Speed{19200, B19200},
    Speed{38400, B38400},   Speed{57600, B57600},     Speed{115200, B115200},   Speed{230400, B230400},   Speed{460800, B460800},
    Speed{500000, B500000}, Speed{576000, B576000},   Speed{921600, B921600},   Speed{1000000, B1000000}, Speed{1152000, B1152000},
    Speed{1500000, B1500000}, Speed{2000000, B2000000}, Speed{2500000, B2500000}, Speed{3000000, B3000000},
    Speed{3500000, B3500000}, Speed{4000000, B4000000}};

void set_mode(unsigned opcode, std::uint32_t value, termios& modes) {
  for (const auto& c : chars)
    if (c.opcode == opcode) modes.c_cc[c.index] = value == 255 ? _POSIX_VDISABLE : static_cast<cc_t>(value);  // RFC 4254: 255 = none
  for (const auto& f : flags) {
    if (f.opcode != opcode) continue;
    tcflag_t& word = f.field == Field::input     ? modes.c_iflag
                     : f.field == Field::output  ? modes.c_oflag
                     : f.field == Field::control ? modes.c_cflag
                                                 : modes.c_lflag;
    if (f.mask == CSIZE) {  // one of several sizes: a zero says only that it is not this one
      if (value != 0) word = (word & ~f.mask) | f.value;
    } else {
      word = value != 0 ? (word | f.value) : (word & ~f.mask);
    }
  }
  if (opcode == 128 || opcode == 129) {
    const auto s = std::find_if(speeds.begin(), speeds.end(), [value](const Speed& x) { return x.baud == value; });
    if (s == speeds.end()) return;
    if (opcode == 128)
      ::cfsetispeed(&modes, s->constant);
    else
      ::cfsetospeed(&modes, s->constant);
  }
}

}  // namespace

Expected<Terminal> open_terminal(uid_t owner) {
  Terminal t;
  t.leader.reset(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK));
  if (!t.leader) return Unexpected{system_error("open a pseudo-terminal")};
  if (::grantpt(t.leader.get()) != 0 || ::unlockpt(t.leader.get()) != 0) return Unexpected{system_error("unlock a pseudo-terminal")};
  char name[64];
  if (const int e = ::ptsname_r(t.leader.get(), name, sizeof name); e != 0)
    return Unexpected{system_error("name a pseudo-terminal", e)};
  t.path = name;
  // TIOCGPTPEER opens this leader's own follower, whatever is mounted at /dev/pts (ioctl_tty(2), Linux 4.13).
  t.follower.reset(::ioctl(t.leader.get(), TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC));
  if (!t.follower) t.follower.reset(::open(name, O_RDWR | O_NOCTTY | O_CLOEXEC | O_NOFOLLOW));
  if (!t.follower) return Unexpected{system_error("open the follower of a pseudo-terminal")};
  struct stat st {};
  if (::fstat(t.follower.get(), &st) != 0) return Unexpected{system_error("look at a pseudo-terminal")};
  const gid_t group = tty_group();
  if (st.st_uid != owner || (group != static_cast<gid_t>(-1) && st.st_gid != group)) {
    if (::fchown(t.follower.get(), owner, group) != 0 && ::geteuid() == 0)
      return Unexpected{system_error("give a pseudo-terminal to its user")};
  }
  const mode_t mode = group == static_cast<gid_t>(-1) ? 0600 : 0620;
  if ((st.st_mode & 07777) != mode && ::fchmod(t.follower.get(), mode) != 0 && ::geteuid() == 0)
    return Unexpected{system_error("set the mode of a pseudo-terminal")};
  return t;
}

Expected<Done> set_window(int terminal, const Window& window) {
  const auto cut = [](std::uint32_t n) { return static_cast<unsigned short>(std::min<std::uint32_t>(n, 65535)); };
  winsize size{};
  size.ws_col = cut(window.cols);
  size.ws_row = cut(window.rows);
  size.ws_xpixel = cut(window.xpixels);
  size.ws_ypixel = cut(window.ypixels);
  if (::ioctl(terminal, TIOCSWINSZ, &size) != 0) return Unexpected{system_error("set a terminal's size")};
  return Done{};
}

bool decode_modes(std::string_view encoded, termios& modes) {
  std::size_t i = 0;
  while (i < encoded.size()) {
    const unsigned opcode = static_cast<unsigned char>(encoded[i++]);
    if (opcode == 0 || opcode >= 160) return true;  // TTY_OP_END; from 160 on nobody knows how long an argument is: stop (section 8)
    if (encoded.size() - i < 4) return false;
    std::uint32_t value = 0;
    for (int k = 0; k < 4; k++) value = value << 8 | static_cast<unsigned char>(encoded[i++]);
    set_mode(opcode, value, modes);
  }
  return true;
}

Expected<Done> apply_modes(int terminal, std::string_view encoded) {
  if (encoded.empty()) return Done{};
  termios modes{};
  if (::tcgetattr(terminal, &modes) != 0) return Unexpected{system_error("read a terminal's modes")};
  const tcflag_t fixed = modes.c_cflag & (CSIZE | PARENB);
  decode_modes(encoded, modes);
  // A pseudo-terminal has 8 bits and no parity, whatever is asked for (the kernel's pty_set_termios); glibc's tcsetattr would report
  // the difference as EINVAL, with the rest set.
  modes.c_cflag = (modes.c_cflag & ~static_cast<tcflag_t>(CSIZE | PARENB)) | fixed;
  if (::tcsetattr(terminal, TCSANOW, &modes) != 0) return Unexpected{system_error("set a terminal's modes")};
  return Done{};
}

}  // namespace postern::pty
