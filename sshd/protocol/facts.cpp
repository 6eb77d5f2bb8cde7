#include "sshd/protocol/facts.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace postern::sshd {
namespace {
constexpr int all_seals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
}

bool ConnectionFacts::Rules::operator==(const Rules& other) const noexcept {
  return command.get() == other.command.get() && max_duration_seconds == other.max_duration_seconds && idle_timeout_seconds == other.idle_timeout_seconds &&
         max_sessions == other.max_sessions && record_input == other.record_input && sftp == other.sftp && no_pty == other.no_pty;
}

bool ConnectionFacts::Rules::valid() const noexcept {
  return command.valid() && max_duration_seconds > 0 && idle_timeout_seconds > 0 && record_input <= 1 && sftp <= Sftp::none && no_pty <= 1 && spare == 0;
}

bool ConnectionFacts::Forwarding::operator==(const Forwarding& other) const noexcept {
  return local == other.local && remote == other.remote && agent == other.agent && x11 == other.x11 && local_targets.get() == other.local_targets.get() &&
         remote_targets.get() == other.remote_targets.get();
}

bool ConnectionFacts::Forwarding::valid() const noexcept {
  return local <= 1 && remote <= 1 && agent <= 1 && x11 <= 1 && local_targets.valid() && remote_targets.valid();
}

Expected<UniqueFd> seal_facts(const ConnectionFacts& facts) {
  ConnectionFacts copy = facts;
  copy.magic = ConnectionFacts::expected_magic;
  copy.size = sizeof copy;
  UniqueFd fd{::memfd_create("postern-facts", MFD_CLOEXEC | MFD_ALLOW_SEALING)};
  if (!fd) return Unexpected{system_error("make the facts memfd")};
  const ssize_t n = ::pwrite(fd.get(), &copy, sizeof copy, 0);
  if (n != static_cast<ssize_t>(sizeof copy)) return Unexpected{system_error("write the facts memfd", n < 0 ? errno : EIO)};
  if (::fcntl(fd.get(), F_ADD_SEALS, all_seals) != 0) return Unexpected{system_error("seal the facts memfd")};
  return fd;
}

Expected<ConnectionFacts> read_facts(int memfd) {
  const auto bad = [](const char* what) { return Unexpected{Error{EBADMSG, std::string{"read the facts memfd: "} + what}}; };
  const int seals = ::fcntl(memfd, F_GET_SEALS);
  if (seals < 0 || (seals & all_seals) != all_seals) return bad("it is not sealed");
  struct stat st {};
  if (::fstat(memfd, &st) != 0) return bad("it cannot be read");
  const auto size = static_cast<std::size_t>(st.st_size);
  if (size != sizeof(ConnectionFacts) && size != facts_version_3_size) return bad("its size is not ours");
  ConnectionFacts facts;  // what an older one does not have keeps its default
  if (::pread(memfd, &facts, size, 0) != st.st_size) return bad("it cannot be read");
  if (facts.magic != ConnectionFacts::expected_magic || facts.size != size) return bad("it is not ours");
  if (facts.version != (size == facts_version_3_size ? 3 : 4)) return bad("its version is not ours");
  bool ok = facts.exchange_hash.valid() && facts.peer_address.valid() && facts.server_address.valid() && facts.node_id.valid() &&
            facts.node_name.valid() && facts.login.valid() && facts.tags.valid() && facts.server_node_id.valid() && facts.rule.valid() &&
            facts.ssh_user.valid() && facts.local_user.valid() && facts.recorder_tag.valid() && facts.relay_socket.valid() && facts.registration_socket.valid() &&
            facts.pam_service.valid() && facts.pam_confdir.valid() && facts.sftp_server.valid() && facts.recorder_count <= max_recorders &&
            facts.accept_env_count <= max_accept_env && facts.rules.valid() && facts.forwarding.valid() &&
            facts.gateway_ports <= 1 && facts.unlink_sockets <= 1 && facts.xauth.valid();
  for (const auto& r : facts.recorders) ok = ok && r.valid();
  for (const auto& e : facts.accept_env) ok = ok && e.valid();
  if (!ok) return bad("a length in it is wrong");
  return facts;
}

}  // namespace postern::sshd
