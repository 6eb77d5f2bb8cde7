#include "sshd/session/logins.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <lastlog.h>
#include <paths.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utmp.h>
#include <utmpx.h>

#include <algorithm>
#include <cstring>
#include <ctime>
#include <string_view>

#include "base/unique_fd.h"

namespace postern::sshd::session {
namespace {

constexpr std::size_t most_motd = 64 * 1024;

template <std::size_t N>
void put(char (&field)[N], std::string_view text) {  // utmp fields need no terminator when full (utmp(5))
  std::memset(field, 0, N);
  std::memcpy(field, text.data(), std::min(N, text.size()));
}

std::string_view line_of(std::string_view path) {
  if (path.starts_with("/dev/")) path.remove_prefix(5);
  return path;
}

utmpx entry_for(const std::string& path, pid_t pid) {
  utmpx u{};
  const auto line = line_of(path);
  put(u.ut_line, line);
  // The last characters of the line, as sshd's line_abbrevname(): "pts/7" -> "ts/7".
  auto id = line.starts_with("tty") ? line.substr(3) : line;
  if (id.size() > sizeof u.ut_id) id.remove_prefix(id.size() - sizeof u.ut_id);
  put(u.ut_id, id);
  u.ut_pid = pid;
  timeval now{};
  ::gettimeofday(&now, nullptr);
  u.ut_tv.tv_sec = static_cast<decltype(u.ut_tv.tv_sec)>(now.tv_sec);
  u.ut_tv.tv_usec = static_cast<decltype(u.ut_tv.tv_usec)>(now.tv_usec);
  return u;
}

/// By a short-lived child: anybody may hold a lock on those files, for which libc waits 10 s each. It takes no time as a rule, and is waited for so long that
/// who looks afterwards finds the entry.
void write_entry(const utmpx& u) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::syscall(SYS_close_range, 0U, ~0U, 0U);
    ::setutxent();
    ::pututxline(&u);
    ::endutxent();
    ::updwtmpx(_PATH_WTMP, &u);
    ::_exit(0);
  }
  for (int i = 0; child > 0 && i < 200 && ::waitpid(child, nullptr, WNOHANG) == 0; i++) ::usleep(500);
}

/// One record of the lastlog file, locked: concurrent logins write the same place.
UniqueFd open_lastlog(uid_t uid, int flags, short lock_type, off_t& offset) {
  UniqueFd fd{::open(_PATH_LASTLOG, flags | O_CLOEXEC | O_NOFOLLOW)};
  struct stat st {};
  if (!fd || ::fstat(fd.get(), &st) != 0 || !S_ISREG(st.st_mode)) return {};
  offset = static_cast<off_t>(uid) * static_cast<off_t>(sizeof(lastlog));
  struct flock lock {};
  lock.l_type = lock_type;
  lock.l_whence = SEEK_SET;
  lock.l_start = offset;
  lock.l_len = sizeof(lastlog);
  // Not F_SETLKW: anybody who may read the file could hold a lock on it for ever, and with it every login.
  for (int i = 0; i < 20; i++) {
    if (::fcntl(fd.get(), F_SETLK, &lock) == 0) return fd;
    ::usleep(5'000);
  }
  return {};
}

std::string read_file(const char* path) {
  UniqueFd fd{::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  struct stat st {};
  if (!fd || ::fstat(fd.get(), &st) != 0 || !S_ISREG(st.st_mode)) return {};
  std::string text(most_motd, '\0');
  const ssize_t n = ::read(fd.get(), text.data(), text.size());
  text.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
  return text;
}

}  // namespace

std::optional<LastLogin> last_login(uid_t uid) {
  off_t offset = 0;
  const UniqueFd fd = open_lastlog(uid, O_RDONLY, F_RDLCK, offset);
  lastlog record{};
  if (!fd || ::pread(fd.get(), &record, sizeof record, offset) != static_cast<ssize_t>(sizeof record) || record.ll_time == 0) return {};
  return LastLogin{record.ll_time, std::string{record.ll_host, ::strnlen(record.ll_host, sizeof record.ll_host)}};
}

void record_login(const ConnectionFacts& facts, uid_t uid, const std::string& path, pid_t pid) {
  utmpx u = entry_for(path, pid);
  u.ut_type = USER_PROCESS;
  put(u.ut_user, facts.local_user.get());
  put(u.ut_host, facts.peer_address.get());
  u.ut_session = pid;
  const std::string address{facts.peer_address.get()};
  if (::inet_pton(AF_INET, address.c_str(), u.ut_addr_v6) != 1) ::inet_pton(AF_INET6, address.c_str(), u.ut_addr_v6);
  write_entry(u);

  off_t offset = 0;
  if (const UniqueFd fd = open_lastlog(uid, O_RDWR, F_WRLCK, offset)) {
    lastlog record{};
    record.ll_time = static_cast<decltype(record.ll_time)>(u.ut_tv.tv_sec);
    put(record.ll_line, line_of(path));
    put(record.ll_host, facts.peer_address.get());
    if (::pwrite(fd.get(), &record, sizeof record, offset) < 0) return;
  }
}

void record_logout(const std::string& path, pid_t pid) {
  utmpx u = entry_for(path, pid);
  u.ut_type = DEAD_PROCESS;
  write_entry(u);
}

std::string greeting(const std::optional<LastLogin>& last) {
  std::string text = read_file("/run/motd.dynamic") + read_file("/etc/motd");
  if (last) {
    const std::time_t time = last->time;
    char when[64] = {};
    std::tm parts{};
    if (::localtime_r(&time, &parts) != nullptr && std::strftime(when, sizeof when, "%a %b %e %H:%M:%S %Y", &parts) > 0) {
      text += std::string{"Last login: "} + when;
      if (!last->host.empty()) {
        text += " from ";
        for (const char c : last->host) text += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
      }
      text += "\r\n";
    }
  }
  return text;
}

}  // namespace postern::sshd::session
