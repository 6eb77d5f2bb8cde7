#include "sshd/broker/takeover.h"

#include "base/unique_fd.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

namespace postern::sshd::broker {
namespace {

/// Its complaint, or nothing.
Expected<Done> run(const std::string& program, const std::string& input, std::chrono::milliseconds timeout) {
  const UniqueFd in{::memfd_create("nft", MFD_CLOEXEC)}, err{::memfd_create("nft-errors", MFD_CLOEXEC)};
  if (!in || !err || ::write(in.get(), input.data(), input.size()) != static_cast<ssize_t>(input.size()) || ::lseek(in.get(), 0, SEEK_SET) != 0)
    return Unexpected{system_error("run " + program)};
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, in.get(), 0);
  ::posix_spawn_file_actions_adddup2(&actions, err.get(), 1);
  ::posix_spawn_file_actions_adddup2(&actions, err.get(), 2);
  std::string name = program, dash_f = "-f", dash = "-", path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
  char* arguments[] = {name.data(), dash_f.data(), dash.data(), nullptr};
  char* environment[] = {path.data(), nullptr};
  pid_t pid = -1;
  const int error = ::posix_spawn(&pid, program.c_str(), &actions, nullptr, arguments, environment);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return Unexpected{system_error("run " + program, error)};
  const UniqueFd pidfd{static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))};
  pollfd p{pidfd.get(), POLLIN, 0};
  const bool ended = pidfd && ::poll(&p, 1, static_cast<int>(timeout.count())) == 1;
  if (!ended) ::kill(pid, SIGKILL);
  int status = 0;
  if (::waitpid(pid, &status, 0) != pid) return Unexpected{system_error("wait for " + program)};
  if (ended && WIFEXITED(status) && WEXITSTATUS(status) == 0) return Done{};
  std::string said(1000, '\0');
  const ssize_t n = ::pread(err.get(), said.data(), said.size(), 0);
  said.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
  return Unexpected{Error{EIO, program + ": " + (ended ? said : "did not end in " + std::to_string(timeout.count()) + " ms")}};
}

}  // namespace

std::string Takeover::script(const std::vector<Redirect>& redirects) {
  // Made first, so that deleting it never fails: nft has no "if it exists" before 1.0.8.
  std::string text = std::string{"table inet "} + table + "\ndelete table inet " + table + "\n";
  if (redirects.empty()) return text;
  text += std::string{"table inet "} + table + " {\n  chain prerouting {\n    type nat hook prerouting priority dstnat; policy accept;\n";
  for (const auto& r : redirects) {
    const bool v4 = r.dialled.address.v4();
    text += std::string{"    "} + (v4 ? "ip" : "ip6") + " daddr " + r.dialled.address.text() + " tcp dport " + std::to_string(r.dialled.port) + " dnat " + (v4 ? "ip" : "ip6") +
            " to " + Endpoint{r.dialled.address, r.to}.text() + "\n";
  }
  return text + "  }\n}\n";
}

Takeover::Takeover(std::string nft, std::chrono::milliseconds timeout, std::string mark)
    : nft_{std::move(nft)}, timeout_{timeout}, mark_{std::move(mark)}, left_{::access(mark_.c_str(), F_OK) == 0} {}

Expected<Done> Takeover::set(const std::vector<Redirect>& redirects) {
  if (redirects == redirects_ && !left_) return Done{};
  if (!redirects.empty() && !UniqueFd{::open(mark_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600)}) return Unexpected{system_error("write " + mark_)};
  left_ = true;  // until it is known what there is: an nft that is killed may have done it
  if (auto done = run(nft_, script(redirects), timeout_); !done) return done;
  if (redirects.empty()) ::unlink(mark_.c_str());
  left_ = false;
  redirects_ = redirects;
  return Done{};
}

}  // namespace postern::sshd::broker
