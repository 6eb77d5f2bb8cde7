#include "base/unique_fd.h"
#include "catch.h"
#include "sshd/net/sandbox.h"

#include <fcntl.h>
#include <linux/bpf.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <functional>
#include <sstream>

// A process enters the sandbox that postern-net's workers are in (the same code, linked), and then tries what it must not be able to do.
using namespace postern;
using namespace postern::sshd::net;

namespace {

struct EmptyRoot {
  char path[32] = "/tmp/postern-root.XXXXXX";
  EmptyRoot() {
    if (::mkdtemp(path) == nullptr || ::chmod(path, 0555) != 0) throw std::runtime_error{"mkdtemp"};
  }
  ~EmptyRoot() { ::rmdir(path); }
};

struct Outcome {
  bool entered = false;       ///< the sandbox stood before the attempt
  bool returned = false;      ///< the attempt came back
  long result = 0;
  int error = 0;
  int signal = 0;             ///< that ended the process
};

constexpr uid_t nobody = 65534;

/// Runs `attempt` inside; `outside` runs in the test while the process waits inside.
Outcome try_inside(const std::function<long()>& attempt, const std::function<void(pid_t)>& outside = {}) {
  EmptyRoot root;
  int report[2], go[2];
  if (::pipe2(report, O_CLOEXEC) != 0 || ::pipe2(go, O_CLOEXEC) != 0) throw std::runtime_error{"pipe"};
  const pid_t pid = ::fork();
  if (pid == 0) {
    const auto say = [&](const Outcome& outcome) { if (::write(report[1], &outcome, sizeof outcome) < 0) ::_exit(2); };
    Outcome outcome;
    auto filter = SystemCallFilter::compile();
    if (!filter || !enter_zygote_sandbox({::geteuid() == 0, nobody, nobody, root.path}) || !enter_worker_sandbox(*filter)) ::_exit(1);
    outcome.entered = true;
    say(outcome);
    char byte;
    if (::read(go[0], &byte, 1) < 0) ::_exit(2);
    errno = 0;
    outcome.result = attempt();
    outcome.error = errno;
    outcome.returned = true;
    say(outcome);
    ::_exit(0);
  }
  UniqueFd from{report[0]}, to{go[1]};
  ::close(report[1]);
  ::close(go[0]);
  Outcome outcome;
  if (::read(from.get(), &outcome, sizeof outcome) == sizeof outcome && outside) outside(pid);
  const bool told = ::write(to.get(), "g", 1) == 1;
  Outcome later;
  if (::read(from.get(), &later, sizeof later) == sizeof later) outcome = later;
  int status = 0;
  ::waitpid(pid, &status, 0);
  if (!told) throw std::runtime_error{"the process in the sandbox is gone"};
  if (WIFSIGNALED(status)) outcome.signal = WTERMSIG(status);
  return outcome;
}

/// A system call as such: glibc's wrappers may choose another one.
template <class... Arguments>
std::function<long()> call(long number, Arguments... arguments) {
  return [=] { return ::syscall(number, arguments...); };
}

std::string field(pid_t pid, const std::string& name) {
  std::ifstream file{"/proc/" + std::to_string(pid) + "/status"};
  for (std::string line; std::getline(file, line);)
    if (line.rfind(name + ":", 0) == 0) {
      const auto start = line.find_first_not_of("\t ", name.size() + 1);
      return start == std::string::npos ? "" : line.substr(start);
    }
  return "?";
}

bool is_thread_sanitizer() {
#ifdef __SANITIZE_THREAD__
  return true;
#else
  return false;
#endif
}

}  // namespace

TEST_CASE("inside the sandbox the process can still do its work", "[net][sandbox]") {
  const auto outcome = try_inside([] {
    int pair = 0;
    std::vector<char> memory(4 * 1024 * 1024, 'x');  // mmap
    char random[16];
    if (::syscall(SYS_getrandom, random, sizeof random, 0) != sizeof random) return 1L;
    timespec now{};
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    return memory[12345] == 'x' && now.tv_sec > 0 && pair == 0 ? 0L : 2L;
  });
  REQUIRE(outcome.entered);
  CHECK(outcome.signal == 0);
  CHECK(outcome.returned);
  CHECK(outcome.result == 0);
}

TEST_CASE("what the sandbox forbids ends the process by SIGSYS", "[net][sandbox]") {
  if (is_thread_sanitizer()) {
    WARN("no system call filter under ThreadSanitizer");
    return;
  }
  static sockaddr_un address{};
  address.sun_family = AF_UNIX;
  static const char* const arguments[] = {"/bin/true", nullptr};
  const pid_t test = ::getpid();
  static const int on = 1;
  const std::vector<std::pair<const char*, std::function<long()>>> attempts{
      {"socket", call(SYS_socket, AF_INET, SOCK_STREAM, 0)},
      {"socketpair", call(SYS_socketpair, AF_UNIX, SOCK_STREAM, 0, nullptr)},
      {"connect", call(SYS_connect, 0, &address, sizeof address)},
      {"bind", call(SYS_bind, 0, &address, sizeof address)},
      {"listen", call(SYS_listen, 0, 1)},
      {"accept", call(SYS_accept4, 0, nullptr, nullptr, 0)},
      {"ptrace", call(SYS_ptrace, PTRACE_TRACEME, 0, 0, 0)},
      {"ptrace of another process", call(SYS_ptrace, PTRACE_ATTACH, test, 0, 0)},
      {"process_vm_readv", call(SYS_process_vm_readv, test, nullptr, 0, nullptr, 0, 0)},
      {"kill", call(SYS_kill, test, 0)},
      {"kill itself", [] { return ::syscall(SYS_kill, ::getpid(), 0); }},
      {"tkill", call(SYS_tkill, test, 0)},
      {"tgkill", call(SYS_tgkill, test, test, 0)},
      {"pidfd_open", call(SYS_pidfd_open, test, 0)},
      {"pidfd_send_signal", call(SYS_pidfd_send_signal, 0, 0, nullptr, 0)},
      {"fork", call(SYS_fork)},
      {"vfork", call(SYS_vfork)},
      {"clone", call(SYS_clone, SIGCHLD, nullptr, nullptr, nullptr, 0)},
      {"clone3", call(SYS_clone3, nullptr, 0)},
      {"execve", call(SYS_execve, "/bin/true", arguments, nullptr)},
      {"execveat", call(SYS_execveat, 0, "", arguments, nullptr, 0)},
      {"setuid", call(SYS_setuid, 0)},
      {"setresuid", call(SYS_setresuid, 0, 0, 0)},
      {"setgid", call(SYS_setgid, 0)},
      {"capset", call(SYS_capset, nullptr, nullptr)},
      {"prctl", call(SYS_prctl, PR_SET_DUMPABLE, 1, 0, 0, 0)},
      {"unshare", call(SYS_unshare, CLONE_NEWUSER)},
      {"setns", call(SYS_setns, 0, 0)},
      {"mount", call(SYS_mount, "none", "/", "tmpfs", 0, nullptr)},
      {"chroot", call(SYS_chroot, "/")},
      {"chdir", call(SYS_chdir, "/")},
      {"unlink", call(SYS_unlink, "/x")},
      {"mkdir", call(SYS_mkdir, "/x", 0700)},
      {"openat2", call(SYS_openat2, AT_FDCWD, "/", nullptr, 0)},
      {"open_by_handle_at", call(SYS_open_by_handle_at, AT_FDCWD, nullptr, 0)},
      {"memfd_create", call(SYS_memfd_create, "x", 0)},
      {"dup", call(SYS_dup, 0)},
      {"ioctl", call(SYS_ioctl, 0, 0x5412 /* TIOCSTI */, "x")},
      {"fcntl F_SETOWN", call(SYS_fcntl, 0, F_SETOWN, test)},
      {"setsockopt of another level", call(SYS_setsockopt, 0, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on)},
      {"setsockopt of another option", call(SYS_setsockopt, 0, IPPROTO_TCP, TCP_REPAIR, &on, sizeof on)},
      {"executable memory", [] { return reinterpret_cast<long>(::mmap(nullptr, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)); }},
      {"memory made executable",
       [] {
         void* page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
         return static_cast<long>(::mprotect(page, 4096, PROT_READ | PROT_EXEC));
       }},
      {"bpf", call(SYS_bpf, BPF_PROG_LOAD, nullptr, 0)},
      {"perf_event_open", call(SYS_perf_event_open, nullptr, 0, 0, 0, 0)},
      {"io_uring_setup", call(SYS_io_uring_setup, 1, nullptr)},
      {"userfaultfd", call(SYS_userfaultfd, 0)},
      {"keyctl", call(SYS_keyctl, 0, 0, 0, 0, 0)},
      {"a second filter", call(SYS_seccomp, 0, 0, nullptr)},
      {"a call that no kernel has", call(9999)},
  };
  for (const auto& [name, attempt] : attempts) {
    INFO(name);
    const auto outcome = try_inside(attempt);
    CHECK(outcome.entered);
    CHECK_FALSE(outcome.returned);
    CHECK(outcome.signal == SIGSYS);
  }
}

TEST_CASE("files cannot be opened nor looked at, and the process lives on", "[net][sandbox]") {
  if (is_thread_sanitizer()) return;
  static struct stat about;
  static char buffer[64];
  const std::vector<std::pair<const char*, std::function<long()>>> attempts{
      {"open", call(SYS_open, "/", O_RDONLY)},
      {"openat", call(SYS_openat, AT_FDCWD, "/etc/passwd", O_RDONLY)},
      {"openat, writing", call(SYS_openat, AT_FDCWD, "/x", O_RDWR | O_CREAT, 0600)},
      {"stat", call(SYS_stat, "/", &about)},
      {"newfstatat", call(SYS_newfstatat, AT_FDCWD, "/", &about, 0)},
      {"access", call(SYS_access, "/", 0)},
      {"readlink", call(SYS_readlink, "/proc/self/exe", buffer, sizeof buffer)},
  };
  for (const auto& [name, attempt] : attempts) {
    INFO(name);
    const auto outcome = try_inside(attempt);
    CHECK(outcome.signal == 0);
    CHECK(outcome.result == -1);
    CHECK(outcome.error == EACCES);
  }
}

TEST_CASE("the sandbox has no capability, no new privileges and a filter", "[net][sandbox]") {
  const auto outcome = try_inside([] { return 0L; }, [](pid_t pid) {
    CHECK(field(pid, "CapEff") == "0000000000000000");
    CHECK(field(pid, "CapPrm") == "0000000000000000");
    CHECK(field(pid, "CapInh") == "0000000000000000");
    CHECK(field(pid, "CapAmb") == "0000000000000000");
    CHECK(field(pid, "NoNewPrivs") == "1");
    if (!is_thread_sanitizer()) CHECK(field(pid, "Seccomp") == "2");
  });
  CHECK(outcome.entered);
}

TEST_CASE("as root the sandbox has its own user, an empty root and namespaces of its own", "[net][sandbox][root]") {
  if (::geteuid() != 0) {
    WARN("not run: this test needs root (user, bounding set, empty root, namespaces)");
    return;
  }
  const auto outcome = try_inside([] { return 0L; }, [](pid_t pid) {
    CHECK(field(pid, "Uid") == "65534\t65534\t65534\t65534");
    CHECK(field(pid, "Gid") == "65534\t65534\t65534\t65534");
    CHECK(field(pid, "Groups").empty());
    CHECK(field(pid, "CapBnd") == "0000000000000000");
    const std::string folder = "/proc/" + std::to_string(pid);
    for (const char* kind : {"net", "mnt", "ipc", "uts"}) {
      char ours[64] = {}, theirs[64] = {};
      CHECK(::readlink((std::string{"/proc/self/ns/"} + kind).c_str(), ours, 63) > 0);
      CHECK(::readlink((folder + "/ns/" + kind).c_str(), theirs, 63) > 0);
      CHECK(std::string{ours} != theirs);
    }
    struct stat about {};
    CHECK(::stat((folder + "/root/etc").c_str(), &about) != 0);
    CHECK(::stat((folder + "/environ").c_str(), &about) == 0);
    CHECK(about.st_uid == 0);  // not dumpable
    std::ifstream interfaces{folder + "/net/dev"};
    std::stringstream all;
    all << interfaces.rdbuf();
    CHECK(all.str().find("lo:") != std::string::npos);
    CHECK(all.str().find("eth") == std::string::npos);
  });
  CHECK(outcome.entered);
}

TEST_CASE("the sandbox refuses to become root", "[net][sandbox][root]") {
  if (::geteuid() != 0) {
    WARN("not run: this test needs root");
    return;
  }
  EmptyRoot root;
  const pid_t pid = ::fork();
  if (pid == 0) ::_exit(enter_zygote_sandbox({true, 0, 0, root.path}) ? 1 : 0);
  int status = 0;
  ::waitpid(pid, &status, 0);
  CHECK(status == 0);
}

TEST_CASE("an ordinary user's sandbox says what it lacks", "[net][sandbox]") {
  EmptyRoot root;
  int report[2];
  REQUIRE(::pipe2(report, O_CLOEXEC) == 0);
  const pid_t pid = ::fork();
  if (pid == 0) {
    if (::geteuid() == 0 && (::setgid(nobody) != 0 || ::setuid(nobody) != 0)) ::_exit(1);
    auto missing = enter_zygote_sandbox({false, 0, 0, root.path});
    const std::string text = missing ? "missing: " + *missing : "error: " + missing.error().doing;
    ::_exit(::write(report[1], text.data(), text.size()) < 0 ? 1 : 0);
  }
  ::close(report[1]);
  char text[1024] = {};
  const auto size = ::read(report[0], text, sizeof text - 1);
  ::close(report[0]);
  ::waitpid(pid, nullptr, 0);
  REQUIRE(size > 0);
  INFO(text);
  CHECK(std::string{text}.rfind("missing: own user", 0) == 0);
}
