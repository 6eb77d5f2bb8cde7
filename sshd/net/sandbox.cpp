#include "sshd/net/sandbox.h"

#include "base/unique_fd.h"

#include <dirent.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <seccomp.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#if defined(__SANITIZE_THREAD__)
#define POSTERN_TSAN 1
#endif
#if defined(__SANITIZE_ADDRESS__)
#define POSTERN_ASAN 1
#endif

namespace postern::sshd::net {
namespace {

Unexpected<Error> failed(const std::string& what) { return Unexpected{system_error("sandbox: " + what)}; }
Unexpected<Error> unproven(const std::string& what) { return Unexpected{Error{0, "sandbox: " + what}}; }

std::string namespace_name(const char* kind) {
  char name[64] = {};
  return ::readlink((std::string{"/proc/self/ns/"} + kind).c_str(), name, sizeof name - 1) > 0 ? name : "";
}

bool write_file(const char* path, const std::string& text) {
  const UniqueFd fd{::open(path, O_WRONLY | O_CLOEXEC)};
  return fd && ::write(fd.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size());
}

/// The empty folder becomes the root of our own mount namespace, read-only; everything else is unmounted from it.
bool pivot_into(const std::string& folder) {
  if (::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return false;
  if (::mount(folder.c_str(), folder.c_str(), nullptr, MS_BIND, nullptr) != 0 || ::chdir(folder.c_str()) != 0) return false;
  if (::syscall(SYS_pivot_root, ".", ".") != 0) return false;
  if (::umount2(".", MNT_DETACH) != 0 || ::chdir("/") != 0) return false;  // the old root lay on top (pivot_root(2), NOTES)
  return ::mount("none", "/", nullptr, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, nullptr) == 0;
}

bool root_is_empty() {
  DIR* folder = ::opendir("/");
  if (folder == nullptr) return errno == EACCES;
  bool empty = true;
  while (const dirent* entry = ::readdir(folder))
    if (std::strcmp(entry->d_name, ".") != 0 && std::strcmp(entry->d_name, "..") != 0) empty = false;
  ::closedir(folder);
  return empty;
}

bool drop_bounding_set() {
  for (int capability = 0; ::prctl(PR_CAPBSET_READ, capability) >= 0; capability++)
    if (::prctl(PR_CAPBSET_DROP, capability) != 0) return false;
  return true;
}

bool set_no_capabilities() {
  ::prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {};
  return ::syscall(SYS_capset, &header, none) == 0;
}

bool has_no_capabilities() {
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3] = {};
  if (::syscall(SYS_capget, &header, sets) != 0) return false;
  for (const auto& set : sets)
    if (set.effective != 0 || set.permitted != 0 || set.inheritable != 0) return false;
  return true;
}

bool bounding_set_is_empty() {
  for (int capability = 0;; capability++) {
    const int in = ::prctl(PR_CAPBSET_READ, capability);
    if (in < 0) return true;
    if (in != 0) return false;
  }
}

void append(std::string& list, const std::string& item) {
  if (!list.empty()) list += ", ";
  list += item;
}

}  // namespace

Expected<std::string> enter_zygote_sandbox(const ZygoteSandbox& settings) {
  constexpr int namespaces = CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS;
  std::string missing;
  const uid_t outer_uid = ::geteuid();
  const gid_t outer_gid = ::getegid();
  const std::string old_network = namespace_name("net");
  bool rooted = false, may_drop_bounding = settings.as_root;

  if (settings.as_root) {
    if (settings.uid == 0 || settings.gid == 0) return unproven("the account to become is root");
    if (::unshare(namespaces) == 0) {
      if (namespace_name("net") == old_network) return unproven("the network namespace is the old one");
      if (::sethostname("postern", 7) != 0) append(missing, "own host name");
      rooted = pivot_into(settings.empty_root);
      if (!rooted) append(missing, "own mount namespace");
    } else {
      append(missing, "network, mount, ipc and uts namespaces");
    }
    if (!rooted) {
      if (::chdir(settings.empty_root.c_str()) != 0 || ::chroot(".") != 0) return failed("enter the empty root " + settings.empty_root);
      rooted = true;
    }
    if (!drop_bounding_set()) return failed("drop the bounding set");
    if (::setgroups(0, nullptr) != 0) return failed("drop the supplementary groups");
    if (::setresgid(settings.gid, settings.gid, settings.gid) != 0) return failed("set the group");
    if (::setresuid(settings.uid, settings.uid, settings.uid) != 0) return failed("set the user");
  } else {
    append(missing, "own user (posternd does not run as root)");
    // What a user namespace gives; uid and gid stay what they are. Its files in /proc are writable by a dumpable process only.
    ::prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    if (::unshare(CLONE_NEWUSER | namespaces) == 0) {
      may_drop_bounding = true;
      if (!write_file("/proc/self/setgroups", "deny") ||
          !write_file("/proc/self/uid_map", std::to_string(outer_uid) + " " + std::to_string(outer_uid) + " 1") ||
          !write_file("/proc/self/gid_map", std::to_string(outer_gid) + " " + std::to_string(outer_gid) + " 1"))
        return failed("map the user in its namespace");
      if (namespace_name("net") == old_network) return unproven("the network namespace is the old one");
      rooted = pivot_into(settings.empty_root);
      if (!rooted) append(missing, "empty root");
    } else {
      append(missing, "network, mount, ipc and uts namespaces (no user namespaces here), empty root");
    }
    if (may_drop_bounding && !drop_bounding_set()) return failed("drop the bounding set");
  }
  if (!set_no_capabilities()) return failed("drop all capabilities");
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return failed("set no_new_privs");
  if (::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0) return failed("become undumpable");

  // The proof: read back, and try.
  uid_t ruid, euid, suid;
  gid_t rgid, egid, sgid;
  if (::getresuid(&ruid, &euid, &suid) != 0 || ::getresgid(&rgid, &egid, &sgid) != 0) return failed("read the ids back");
  const uid_t uid = settings.as_root ? settings.uid : outer_uid;
  const gid_t gid = settings.as_root ? settings.gid : outer_gid;
  if (ruid != uid || euid != uid || suid != uid || rgid != gid || egid != gid || sgid != gid) return unproven("the ids are not what was set");
  if (settings.as_root) {
    if (::getgroups(0, nullptr) != 0) return unproven("there are supplementary groups left");
    if (::setuid(0) == 0 || ::setgid(0) == 0) return unproven("root can be taken back");
  }
  if (!has_no_capabilities()) return unproven("there are capabilities left");
  if (may_drop_bounding && !bounding_set_is_empty()) return unproven("the bounding set is not empty");
  if (::prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1) return unproven("no_new_privs is not set");
  if (::prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) != 0) return unproven("the process is dumpable");
  if (rooted && !root_is_empty()) return unproven("the root is not empty");
  return missing;
}

SystemCallFilter::SystemCallFilter() = default;
SystemCallFilter::SystemCallFilter(SystemCallFilter&&) noexcept = default;
SystemCallFilter::~SystemCallFilter() = default;

Expected<SystemCallFilter> SystemCallFilter::compile() {
  struct Context {
    scmp_filter_ctx filter = ::seccomp_init(SCMP_ACT_KILL_PROCESS);
    ~Context() {
      if (filter != nullptr) ::seccomp_release(filter);
    }
  } context;
  if (context.filter == nullptr) return Unexpected{Error{ENOMEM, "sandbox: make a system call filter"}};
  ::seccomp_attr_set(context.filter, SCMP_FLTATR_CTL_OPTIMIZE, 2);  // a binary tree: the filter runs at each call

  int failure = 0;
  const auto allow = [&](int call) { failure = failure != 0 ? failure : ::seccomp_rule_add(context.filter, SCMP_ACT_ALLOW, call, 0); };
  const auto allow_if = [&](int call, std::initializer_list<scmp_arg_cmp> when) {
    failure = failure != 0 ? failure
                           : ::seccomp_rule_add_array(context.filter, SCMP_ACT_ALLOW, call, static_cast<unsigned>(when.size()), when.begin());
  };
  const auto refuse = [&](int call) { failure = failure != 0 ? failure : ::seccomp_rule_add(context.filter, SCMP_ACT_ERRNO(EACCES), call, 0); };

  for (const int call : {
           SCMP_SYS(read), SCMP_SYS(readv), SCMP_SYS(write), SCMP_SYS(writev), SCMP_SYS(close), SCMP_SYS(shutdown),
           SCMP_SYS(recvmsg), SCMP_SYS(sendmsg), SCMP_SYS(recvfrom), SCMP_SYS(sendto), SCMP_SYS(getsockopt),
           SCMP_SYS(poll), SCMP_SYS(ppoll),  // libssh polls with poll(2), we with ppoll(2)
           SCMP_SYS(munmap), SCMP_SYS(mremap), SCMP_SYS(brk), SCMP_SYS(madvise), SCMP_SYS(futex), SCMP_SYS(getrandom),
           SCMP_SYS(clock_gettime), SCMP_SYS(gettimeofday), SCMP_SYS(time), SCMP_SYS(clock_nanosleep), SCMP_SYS(restart_syscall),
           SCMP_SYS(getpid), SCMP_SYS(gettid), SCMP_SYS(rt_sigreturn), SCMP_SYS(rt_sigprocmask), SCMP_SYS(exit), SCMP_SYS(exit_group)})
    allow(call);
  allow_if(SCMP_SYS(fcntl), {SCMP_A1(SCMP_CMP_EQ, F_GETFL)});
  allow_if(SCMP_SYS(fcntl), {SCMP_A1(SCMP_CMP_EQ, F_SETFL)});
  for (const int option : {TCP_NODELAY, TCP_QUICKACK, TCP_CORK})
    allow_if(SCMP_SYS(setsockopt), {SCMP_A1(SCMP_CMP_EQ, IPPROTO_TCP), SCMP_A2(SCMP_CMP_EQ, static_cast<scmp_datum_t>(option))});
  // Memory, never executable.
  allow_if(SCMP_SYS(mmap), {SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0)});
  allow_if(SCMP_SYS(mprotect), {SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0)});
  // Libraries ask; the answer is no. None of these can do harm with that answer.
  for (const int call : {SCMP_SYS(open), SCMP_SYS(openat), SCMP_SYS(stat), SCMP_SYS(fstat), SCMP_SYS(lstat), SCMP_SYS(newfstatat),
                         SCMP_SYS(statx), SCMP_SYS(access), SCMP_SYS(faccessat), SCMP_SYS(faccessat2), SCMP_SYS(readlink),
                         SCMP_SYS(readlinkat), SCMP_SYS(sysinfo), SCMP_SYS(uname)})
    refuse(call);
#if defined(POSTERN_ASAN) || defined(POSTERN_SANITIZED)
  // The sanitizers' runtime: its report must get out before the process ends; UBSan probes memory with a pipe.
  for (const int call : {SCMP_SYS(pipe), SCMP_SYS(pipe2), SCMP_SYS(sigaltstack), SCMP_SYS(sched_yield), SCMP_SYS(prlimit64), SCMP_SYS(getrlimit), SCMP_SYS(rt_sigaction),
                         SCMP_SYS(sched_getaffinity), SCMP_SYS(getuid), SCMP_SYS(geteuid), SCMP_SYS(getppid), SCMP_SYS(set_robust_list)})
    allow(call);
#endif
  if (failure != 0) return Unexpected{system_error("sandbox: write the system call filter", -failure)};

  // libseccomp 2.5 exports to a descriptor only.
  const UniqueFd file{::memfd_create("filter", MFD_CLOEXEC)};
  struct stat about {};
  if (!file || ::seccomp_export_bpf(context.filter, file.get()) != 0 || ::fstat(file.get(), &about) != 0)
    return failed("export the system call filter");
  SystemCallFilter result;
  result.program_.resize(static_cast<std::size_t>(about.st_size) / sizeof(sock_filter));
  if (result.program_.empty() || ::pread(file.get(), result.program_.data(), static_cast<std::size_t>(about.st_size), 0) != about.st_size)
    return failed("read the system call filter");
  return result;
}

Expected<Done> SystemCallFilter::install() const {
#ifdef POSTERN_TSAN
  return Done{};  // ThreadSanitizer starts a thread of its own in every child; its build is for races, not for the sandbox
#else
  sock_fprog program{static_cast<unsigned short>(program_.size()), const_cast<sock_filter*>(program_.data())};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return failed("set no_new_privs");
  if (::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) != 0) return failed("install the system call filter");
  return Done{};
#endif
}

Expected<Done> enter_worker_sandbox(const SystemCallFilter& filter, const WorkerLimits& limits) {
  const auto limit = [](int resource, rlim_t value) {
    // A lower hard limit than ours stays.
    rlimit now{};
    if (::getrlimit(static_cast<__rlimit_resource_t>(resource), &now) != 0) return false;
    if (now.rlim_max != RLIM_INFINITY && now.rlim_max < value) value = now.rlim_max;
    const rlimit set{value, value};
    return ::setrlimit(static_cast<__rlimit_resource_t>(resource), &set) == 0;
  };
  if (!limit(RLIMIT_CORE, 0)) return failed("limit core files");
  if (!limit(RLIMIT_NOFILE, limits.descriptors)) return failed("limit descriptors");
#ifndef POSTERN_TSAN
  if (!limit(RLIMIT_NPROC, 0)) return failed("limit processes");
#endif
#ifndef POSTERN_SANITIZED
  // A write to a regular file (a log that was left open) must fail, not end the process.
  ::signal(SIGXFSZ, SIG_IGN);
  if (!limit(RLIMIT_FSIZE, 0)) return failed("limit file sizes");
  if (!limit(RLIMIT_DATA, limits.data_bytes)) return failed("limit memory");
#endif
  return filter.install();
}

}  // namespace postern::sshd::net
