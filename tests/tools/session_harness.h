#pragma once

// Stand-ins for the broker, postern-net and postern-relay around the real postern-session. Tests only.

#include "base/id.h"
#include "base/seqpacket.h"
#include "base/unique_fd.h"
#include "recorder/wire/local.h"
#include "sshd/protocol/channel.h"
#include "sshd/protocol/facts.h"
#include "sshd/protocol/net.h"
#include "sshd/protocol/session.h"

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace postern::test {

using namespace std::chrono_literals;
namespace ch = postern::sshd::channel;
namespace ses = postern::sshd::session;

/// Waits until `what` is true; false after `limit`.
bool eventually(const std::function<bool()>& what, std::chrono::milliseconds limit = 10s);
bool is_root();
/// No process, or a zombie.
bool is_gone(pid_t pid);
std::string read_whole(const std::string& path);

struct TemporaryFolder {
  TemporaryFolder();
  ~TemporaryFolder();
  std::string path;
};

/// The account that sessions log in to: as root one made for this test (bash, a home, group "users" as a supplementary one) and removed
/// after it; as an ordinary user oneself.
class TestUser {
 public:
  TestUser();
  ~TestUser();
  std::string name, home, shell;
  uid_t uid = 0;
  gid_t gid = 0;

 private:
  bool made_ = false;
};

/// A relay on a unix socket that keeps recordings in memory and acknowledges as told.
class StandInRelay {
 public:
  explicit StandInRelay(std::string path);
  ~StandInRelay();
  void start();
  void stop();  ///< closes the socket and all connections; what it has stays
  std::atomic<bool> writes{true};    ///< acknowledges `written` and `journaled`
  std::atomic<bool> commits{true};   ///< a recorder is there: `committed`, state recording; else state none
  std::atomic<bool> fails{false};    ///< says journal_failed at the next data
  std::string bytes() const;         ///< of the newest recording
  bool ended() const;
  std::size_t recordings() const;

 private:
  struct Recording {
    Id id;
    std::string bytes;
    bool ended = false;
  };
  void serve();

  std::string path_;
  mutable std::mutex mutex_;
  std::vector<Recording> recordings_;
  std::atomic<bool> stop_{false};
  UniqueFd listener_;
  std::thread thread_;
};

/// What a channel of the session gave net.
struct Running {
  ch::Started started;
  UniqueFd combined, input, output, error;
};

/// postern-session's zygote, and one session of it.
class Harness {
 public:
  Harness();
  ~Harness();

  TemporaryFolder folder;
  sshd::ConnectionFacts facts;  ///< change before grant()
  std::string pam_service = "account required pam_permit.so\nsession required pam_permit.so\nauth required pam_permit.so\n";

  /// Starts the zygote; its warnings.
  std::string start_zygote();
  /// Forks a session and looks the account up.
  ses::User look_up(const std::string& name);
  /// Gives the facts and net's end.
  ses::Ready grant();
  /// All of it, for `user`.
  void log_in(const TestUser& user);

  // As net.
  bool open(std::uint32_t channel);
  bool pty(std::uint32_t channel, std::string_view modes = {}, unsigned cols = 80, unsigned rows = 24);
  bool env(std::uint32_t channel, std::string_view name, std::string_view value);
  std::optional<Running> start(std::uint32_t channel, ch::StartKind kind, std::string_view text);
  void close_channel(std::uint32_t channel);
  template <class Body>
  void net_send(ch::Type type, const Body& body, std::string_view tail = {}) {
    (void)send_body(net.get(), ch::version, static_cast<std::uint16_t>(type), body, tail);
  }
  /// Next message of the session to net; nothing at its end or after `limit`.
  std::optional<Message> net_receive(std::chrono::milliseconds limit = 15s);
  std::optional<ch::Exited> exited(std::chrono::milliseconds limit = 15s);

  // As broker: events of the session are kept in `events`, channel counts passed over.
  std::optional<Message> broker_receive(std::chrono::milliseconds limit = 15s);
  void revoke(std::string_view text, std::chrono::milliseconds clear_up = {});

  UniqueFd control, broker, net;
  pid_t session_pid = 0;
  UniqueFd session_pidfd;
  pid_t net_stand_in = 0;  ///< the process whose pidfd the session holds as net's
  std::vector<std::string> events;
  /// The zygote's report of the session's death: wait status.
  std::optional<int> session_died(std::chrono::milliseconds limit = 20s);
  pid_t zygote_pid() const { return zygote_; }

 private:
  std::optional<Message> receive(int fd, std::chrono::milliseconds limit);
  pid_t zygote_ = 0;
  std::uint64_t token_ = 0;
};

/// Reads a descriptor to its end (EIO counts: terminals), at most `limit` long.
std::string read_to_end(int fd, std::chrono::milliseconds limit = 30s);
/// Reads until `text` has been seen.
std::string read_until(int fd, std::string_view text, std::chrono::milliseconds limit = 15s);
void write_all(int fd, std::string_view text);

/// Runs a command in a fresh session as `user`: {stdout, stderr, exited}.
struct Outcome {
  std::string out, err;
  ch::Exited exited;
};
Outcome run(Harness& h, std::uint32_t channel, std::string_view command, std::string_view input = {});

}  // namespace postern::test
