#pragma once

#include "base/poller.h"
#include "pty/launch.h"
#include "pty/pty.h"
#include "sshd/protocol/channel.h"
#include "sshd/protocol/facts.h"
#include "sshd/session/environment.h"
#include "sshd/session/tee.h"
#include "sshd/session/tree.h"

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace postern::sshd::session {

/// Exit status of a session that had to be recorded and could not be (STYLE.md "Errors").
inline constexpr int recording_required = 254;
/// Pipes between a program and net: few wake-ups for bulk. Above fs.pipe-max-size root still may (CAP_SYS_RESOURCE).
inline constexpr int pipe_size = 1024 * 1024;
/// Input of sftp-server. It reads 16 KiB for each request that it answers into a queue without bound, which it copies when it grows: with more
/// than that ready, psftp's 4 KiB writes take 91 s for 48 MiB in place of 1.2 (2026-11-26); OpenSSH's sftp loses nothing that shows.
inline constexpr int sftp_input_pipe_size = 16 * 1024;

/// From the client's leaving to the hang-up of a program without a terminal. sshd hangs up none of them: clients that send their bytes, EOF and CLOSE at once
/// (asyncssh, paramiko), or leave when exec is confirmed (`nohup x &`), count on the program's getting as far as its input or its nohup(1).
inline constexpr std::chrono::milliseconds hang_up_delay{1'000};
/// Looked for so often, whether a program has read all that a client had sent that then left.
inline constexpr std::chrono::milliseconds input_look{100};

/// How a channel comes to its end.
enum class Leaving {
  ended,     ///< the program's end, all of it shown: what it left behind runs on, as under sshd
  closed,    ///< the client closed it
  sent_all,  ///< likewise, after its EOF: its program reads all of it before it is hung up
  gone,      ///< with the connection
  revoked,   ///< the tree will be ended as a whole: its programs hear of it, and nothing is looked for
};

/// What a channel needs of its connection.
struct ChannelHost {
  Poller& poller;
  const ConnectionFacts& facts;
  const pty::LocalUser& user;
  const std::vector<std::string>& pam_environment;
  const std::string& pam_texts;
  ProcessTree& tree;

  /// pty::launch() with the settings that PAM left; `login_path`: terminal to record a login on, or empty.
  std::function<Expected<pid_t>(pty::Launch& what, const std::string& login_path)> launch;
  std::function<void(channel::Type, std::span<const std::byte>, std::vector<UniqueFd>)> to_net;
  std::function<void(const std::string& name, const std::string& fields)> event;
  std::function<void()> recorder_lost;  ///< fail closed: every session of the connection is to end
  std::function<void()> changed;        ///< something finished: look at finished() later, outside of any handler
  std::function<std::string(std::uint32_t channel)> display = [](std::uint32_t) { return std::string{}; };  ///< for DISPLAY
  std::function<std::string()> agent_socket = [] { return std::string{}; };  ///< the client's ssh-agent is reached there; empty: nowhere
};

/// One SSH session channel: what was asked for it, its program, its descriptors or its tee.
///
/// Requests come from net, which parses strangers' bytes: what is only odd is refused with answer_no; what a sound net never sends
/// ends the connection (SessionProcess::violation).
class SessionChannel {
 public:
  SessionChannel(ChannelHost& host, std::uint32_t number);
  ~SessionChannel();
  SessionChannel(const SessionChannel&) = delete;
  SessionChannel& operator=(const SessionChannel&) = delete;

  bool pty(const channel::Pty& request);
  bool env(std::string_view name, std::string_view value);
  /// Answers by itself: `started`, or answer_no.
  void start(channel::StartKind kind, std::string_view text);
  void window_change(const channel::WindowChange& request);
  /// Whether it was sent.
  bool signal(std::string_view name);
  bool send_break();
  /// Nobody is there any more: what it shows is closed, and its programs are hung up unless it has ended. With a terminal at once, as the kernel does it.
  void closed(Leaving how);
  /// The connection of a closed channel is gone: what its client had sent is waited for only so long.
  void connection_gone();
  /// All of the connection's processes are being ended.
  void leave_hang_up() { host_.poller.cancel(std::exchange(hang_up_timer_, 0)); }
  /// Fail closed, nobody records: one line for the user; the program is killed by the caller, its status will be 254.
  void lose_recorder(std::string_view line);

  void child_exited(int wait_status);
  pid_t pid() const noexcept { return pid_; }  ///< 0: none (yet, or any more)
  /// Nothing of it is left: closed, program reaped or left, recording ended.
  bool finished() const;
  /// Stops waiting for the program: it goes on alone.
  void abandon();
  /// The program of a channel that is going away may end its recording now.

 private:
  enum class State { opened, waiting, running, refused, exited };

  void answer(bool ok);
  void begin_recording(channel::StartKind kind, std::string_view text);
  void spawn();
  void refuse_unrecorded();
  bool make_descriptors(pty::Launch& launch, std::vector<UniqueFd>& theirs, std::vector<UniqueFd>& to_net, channel::Started& started);
  void start_pumps();
  void read_program(int fd, char stream);
  bool records_input() const { return tee_ && host_.facts.rules.record_input != 0; }
  void pump_input();
  void record_input();
  int input_target() const;
  void write_input();
  void close_input();
  void stop_reading(char stream);
  void on_progress();
  void try_report_exit();
  void report_exit();
  void end_recording();
  void log_out();
  void close_terminal();
  void hang_up_later();
  std::vector<pid_t> hang_up_groups();
  void hang_up();
  bool input_unread() const;
  std::string exit_text() const;

  ChannelHost& host_;
  const std::uint32_t number_;
  State state_ = State::opened;
  bool closed_ = false;

  // What was asked for.
  std::optional<pty::Terminal> terminal_;
  pty::Window window_;
  std::string term_;
  Variables environment_;
  std::size_t env_count_ = 0, env_bytes_ = 0;
  channel::StartKind kind_ = channel::StartKind::shell;
  std::optional<std::string> command_;
  std::optional<std::string> original_command_;  // what the client asked for, where a rule forces another

  // The program.
  pid_t pid_ = 0;
  pid_t first_pid_ = 0;
  UniqueFd input_pipe_;    // its stdin without a terminal, by O_PATH: neither reader nor writer, but it can be asked what is in there
  Poller::TimerId hang_up_timer_ = 0;
  bool awaits_input_ = false;  // no hang-up before it has read what the client sent
  std::optional<Poller::Clock::time_point> input_limit_;
  bool logged_in_ = false;
  bool reaped_ = false, reported_ = false, abandoned_ = false;
  int wait_status_ = 0;
  bool forced_status_ = false;

  // Recorded sessions only: our ends of the program's descriptors.
  std::unique_ptr<Tee> tee_;
  UniqueFd from_output_, from_error_;  // pipes; a terminal is read at terminal_->leader
  UniqueFd input_from_net_;            // of a terminal, and of pipes where input is recorded
  UniqueFd to_input_;                  // the program's pipe, where input is recorded
  std::string input_;                  // read from net (and recorded), not taken by the program yet
  bool input_hidden_ = false;          // typed without echo: left out of the recording, and marked
  bool output_over_ = false, error_over_ = true;
  bool output_waits_ = false, error_waits_ = false;  // stopped for want of room
};

/// RFC 4254 section 6.10: "TERM" <-> SIGTERM. 0 and "SIG@openssh.com" for what it does not name (sshd's own name).
int signal_number(std::string_view name);
std::string_view signal_name(int signal);

}  // namespace postern::sshd::session
