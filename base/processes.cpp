#include "base/processes.h"

#include "base/file.h"
#include "base/unique_fd.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <malloc.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

namespace postern {

std::optional<pid_t> pid_of(int fd) {
  const UniqueFd info{::open(("/proc/self/fdinfo/" + std::to_string(fd)).c_str(), O_RDONLY | O_CLOEXEC)};
  if (!info) return std::nullopt;
  char text[512];
  const ssize_t n = ::read(info.get(), text, sizeof text - 1);
  if (n <= 0) return std::nullopt;
  text[n] = '\0';
  const char* line = std::strstr(text, "\nPid:");
  if (line == nullptr) return std::nullopt;
  return static_cast<pid_t>(std::strtol(line + 5, nullptr, 10));
}

std::string cgroup_of(pid_t pid) {
  std::ifstream mounts{"/proc/self/mountinfo"};
  std::string line, mount, root;
  while (std::getline(mounts, line)) {
    const auto dash = line.find(" - ");
    if (dash == std::string::npos || !std::string_view{line}.substr(dash + 3).starts_with("cgroup2 ")) continue;
    std::istringstream words{line};
    std::string id, parent, device;
    words >> id >> parent >> device >> root >> mount;
    break;
  }
  if (mount.empty()) return {};
  std::ifstream own{"/proc/" + std::to_string(pid) + "/cgroup"};
  while (std::getline(own, line)) {
    if (!line.starts_with("0::")) continue;
    std::string path = line.substr(3);
    if (root.size() > 1) {  // a part of the hierarchy is mounted
      if (!path.starts_with(root)) return {};
      path.erase(0, root.size());
    }
    if (path.find("/..") != std::string::npos) return {};  // outside of what our cgroup namespace shows
    while (!path.empty() && path.back() == '/') path.pop_back();
    return mount + path;
  }
  return {};
}

std::vector<pid_t> members_of_cgroup(const std::string& cgroup) {
  std::ifstream in{cgroup + "/cgroup.procs"};
  std::vector<pid_t> pids;
  for (pid_t p; in >> p;)
    if (p > 0) pids.push_back(p);  // 0 stands for one of another pid namespace; kill(0) would be our own group
  return pids;
}

std::optional<ProcessStat> stat_of(pid_t pid) {
  // Not by a stream: the process may end between open(2) and read(2), and std::filebuf throws at ESRCH.
  const UniqueFd file{::open(("/proc/" + std::to_string(pid) + "/stat").c_str(), O_RDONLY | O_CLOEXEC)};
  char text[2048];
  const ssize_t n = file ? ::read(file.get(), text, sizeof text) : -1;
  if (n <= 0) return std::nullopt;
  std::string_view rest{text, static_cast<std::size_t>(n)};
  const auto close = rest.rfind(')');  // the command may hold anything, blanks and brackets too
  if (close == std::string_view::npos) return std::nullopt;
  rest.remove_prefix(close + 1);
  ProcessStat stat;
  const auto number = [](std::string_view word, auto& out) { return std::from_chars(word.data(), word.data() + word.size(), out).ec == std::errc{}; };
  for (int field = 3; field <= 22; field++) {
    rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
    const auto word = rest.substr(0, rest.find(' '));
    if (word.empty()) return std::nullopt;
    if (field == 3) stat.state = word.front();
    if ((field == 4 && !number(word, stat.parent)) || (field == 22 && !number(word, stat.start_time))) return std::nullopt;
    rest.remove_prefix(word.size());
  }
  return stat;
}

std::string boot_id() {
  const auto text = read_whole_file("/proc/sys/kernel/random/boot_id", 64);
  return text ? text->substr(0, text->find('\n')) : std::string{};
}

std::vector<pid_t> descendants_of(pid_t root) {
  std::map<pid_t, std::vector<pid_t>> children;
  DIR* proc = ::opendir("/proc");
  if (proc == nullptr) return {};
  while (const dirent* e = ::readdir(proc)) {
    pid_t pid = 0;
    const std::string_view name{e->d_name};
    if (std::from_chars(name.data(), name.data() + name.size(), pid).ptr != name.data() + name.size() || pid <= 0) continue;
    if (const auto stat = stat_of(pid); stat && stat->living()) children[stat->parent].push_back(pid);
  }
  ::closedir(proc);
  std::vector<pid_t> found, todo{root};
  while (!todo.empty()) {
    const pid_t p = todo.back();
    todo.pop_back();
    for (const pid_t c : children[p]) {
      found.push_back(c);
      todo.push_back(c);
    }
  }
  return found;
}

bool write_to(const std::string& path, std::string_view text) {
  const UniqueFd fd{::open(path.c_str(), O_WRONLY | O_CLOEXEC)};
  return fd && ::write(fd.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size());
}

Forked fork_into(int cgroup, bool sibling) {
  clone_args how{};
  how.flags = sibling ? CLONE_PARENT : 0;
  how.exit_signal = sibling ? 0 : SIGCHLD;  // a sibling's is ours
  if (cgroup >= 0) {
    how.flags |= CLONE_INTO_CGROUP;
    how.cgroup = static_cast<std::uint64_t>(cgroup);
    const auto pid = static_cast<pid_t>(::syscall(SYS_clone3, &how, sizeof how));
    if (pid >= 0 || (errno != ENOSYS && errno != EINVAL && errno != E2BIG && errno != EPERM && errno != EOPNOTSUPP)) return {pid, 0};
  }
  const unsigned long flags = (sibling ? CLONE_PARENT : 0UL) | SIGCHLD;
  const auto pid = static_cast<pid_t>(::syscall(SYS_clone, flags, nullptr, nullptr, nullptr, nullptr));
  if (pid != 0 || cgroup < 0) return {pid, 0};
  const UniqueFd members{::openat(cgroup, "cgroup.procs", O_WRONLY | O_CLOEXEC)};
  return {0, members && ::write(members.get(), "0", 1) == 1 ? 0 : errno};
}

[[gnu::noinline]] void release_unused_memory() {
  ::malloc_trim(0);
#ifndef POSTERN_SANITIZED
  constexpr std::size_t page = 4096, depth = 512 * 1024;
  const auto here = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
  const std::uintptr_t end = (here & ~(page - 1)) - 2 * page;  // below this frame and madvise's own
  // From the highest page down: the call stops with ENOMEM at the first hole, so one page at a time.
  for (std::uintptr_t at = end; at > end - depth; at -= page)
    if (::madvise(reinterpret_cast<void*>(at - page), page, MADV_DONTNEED) != 0) break;
#endif
}

}  // namespace postern
