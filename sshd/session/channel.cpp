#include "sshd/session/channel.h"

#include "sshd/session/logins.h"

#include <fcntl.h>
#include <signal.h>
#include <spdlog/spdlog.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <ctime>
#include <utility>

namespace postern::sshd::session {
namespace {

namespace ch = sshd::channel;

constexpr std::size_t input_chunk = 16 * 1024;
constexpr std::string_view no_recorder_line = "Recording is required here, and no recorder can be reached.";

struct SignalName {
  std::string_view name;
  int number;
};
constexpr std::array signal_names{SignalName{"ABRT", SIGABRT}, SignalName{"ALRM", SIGALRM}, SignalName{"FPE", SIGFPE},
                                  SignalName{"HUP", SIGHUP},   SignalName{"ILL", SIGILL},   SignalName{"INT", SIGINT},
                                  SignalName{"KILL", SIGKILL}, SignalName{"PIPE", SIGPIPE}, SignalName{"QUIT", SIGQUIT},
                                  SignalName{"SEGV", SIGSEGV}, SignalName{"TERM", SIGTERM}, SignalName{"USR1", SIGUSR1},
                                  SignalName{"USR2", SIGUSR2}};

struct PipeEnds {
  UniqueFd read, write;
};
/// `large`: for bulk. Of pipe_size even an empty one takes 10 KiB of kernel memory (40 bytes a page, pipe(7)).
bool make_pipe(PipeEnds& p, bool large = true) {
  int fds[2];
  if (::pipe2(fds, O_CLOEXEC) != 0) return false;
  p.read.reset(fds[0]);
  p.write.reset(fds[1]);
  if (large) ::fcntl(fds[1], F_SETPIPE_SZ, pipe_size);  // where the limit is lower the default has to do
  return true;
}
std::string own_descriptor(int fd) { return "/proc/self/fd/" + std::to_string(fd); }
void no_blocking(int fd) { ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK); }

std::vector<std::string> split(std::string_view list) {
  std::vector<std::string> parts;
  while (!list.empty()) {
    const auto comma = list.find(',');
    if (comma != 0) parts.emplace_back(list.substr(0, comma));
    list.remove_prefix(comma == std::string_view::npos ? list.size() : comma + 1);
  }
  return parts;
}

/// A terminal name from a stranger goes into the environment and a recording: what is printable, else nothing.
std::string clean_term(std::string_view term) {
  const bool good = std::all_of(term.begin(), term.end(), [](unsigned char c) { return c >= 0x20 && c < 0x7f; });
  return good ? std::string{term} : std::string{};
}

/// Where all programs' output passes through; one at a time, the process is single-threaded. Never zeroed: its pages come as output needs them.
std::span<std::byte> scratch() {
  static const std::unique_ptr<std::byte[]> buffer{new std::byte[largest_read]};
  return {buffer.get(), largest_read};
}

}  // namespace

int signal_number(std::string_view name) {
  for (const auto& s : signal_names)
    if (s.name == name) return s.number;
  return 0;
}
std::string_view signal_name(int signal) {
  for (const auto& s : signal_names)
    if (s.number == signal) return s.name;
  return "SIG@openssh.com";
}

SessionChannel::SessionChannel(ChannelHost& host, std::uint32_t number) : host_{host}, number_{number} {}

SessionChannel::~SessionChannel() {
  leave_hang_up();
  for (const UniqueFd* fd : {&from_output_, &from_error_, &input_from_net_, &to_input_})
    if (*fd) host_.poller.forget(fd->get());
  close_terminal();
}

void SessionChannel::answer(bool ok) {
  const ch::Answer a{number_, 0};
  host_.to_net(ok ? ch::Type::answer_ok : ch::Type::answer_no, std::as_bytes(std::span{&a, 1}), {});
}

// --- requests -------------------------------------------------------------------------------------------------------------------

bool SessionChannel::pty(const ch::Pty& request) {
  if (state_ != State::opened || terminal_ || closed_ || host_.facts.rules.no_pty != 0) return false;
  auto terminal = pty::open_terminal(host_.user.uid);
  if (!terminal) {
    spdlog::warn("event=pty_failed channel={} reason=\"{}\"", number_, terminal.error().doing);
    return false;
  }
  window_ = {request.cols, request.rows, request.xpixels, request.ypixels};
  term_ = clean_term(request.term.get());
  if (const auto set = pty::apply_modes(terminal->follower.get(), request.modes.get()); !set)
    spdlog::warn("event=modes_not_set channel={} reason=\"{}\"", number_, set.error().doing);
  if (!pty::set_window(terminal->leader.get(), window_)) return false;
  terminal_ = std::move(*terminal);
  return true;
}

bool SessionChannel::env(std::string_view name, std::string_view value) {
  if (state_ != State::opened || closed_) return false;
  if (++env_count_ > ch::max_env_count || name.size() > ch::max_env_name || value.size() > ch::max_env_value) return false;
  if (name.size() + value.size() > ch::max_env_bytes - env_bytes_) return false;
  env_bytes_ += name.size() + value.size();
  if (!accepts_environment(host_.facts, name, value)) return false;
  for (auto& [n, v] : environment_)
    if (n == name) {
      v = value;
      return true;
    }
  environment_.emplace_back(name, value);
  return true;
}

void SessionChannel::start(ch::StartKind kind, std::string_view text) {
  if (state_ != State::opened || closed_ || text.size() > ch::max_command || text.find('\0') != std::string_view::npos) return answer(false);
  const auto& rules = host_.facts.rules;
  kind_ = kind;
  if (kind == ch::StartKind::exec) command_ = std::string{text};
  if (kind == ch::StartKind::subsystem) {
    // The one that there is: OpenSSH's sftp-server as the user, started like sshd starts an external subsystem (shell -c path).
    if (text != "sftp" || host_.facts.sftp_server.get().empty() || rules.sftp == ConnectionFacts::Rules::Sftp::none) return answer(false);
    command_ = std::string{host_.facts.sftp_server.get()} + (rules.sftp == ConnectionFacts::Rules::Sftp::read_only ? " -R" : "");  // sftp-server(8)
  }
  // In place of all of them, and what would have run is told to it (sshd 9.2, session.c do_exec; of a shell nothing is).
  if (!rules.command.get().empty()) original_command_ = std::exchange(command_, std::string{rules.command.get()});
  if (host_.facts.record == 0) return spawn();
  state_ = State::waiting;
  begin_recording(kind, text);
}

void SessionChannel::window_change(const ch::WindowChange& request) {
  if (!terminal_ || !terminal_->leader || closed_) return;
  const bool another = request.cols != window_.cols || request.rows != window_.rows;
  window_ = {request.cols, request.rows, request.xpixels, request.ypixels};
  if (const auto set = pty::set_window(terminal_->leader.get(), window_); !set) return;
  // Clients repeat themselves; the kernel sends no SIGWINCH for that, and a recording has no resize.
  if (another && tee_ && (state_ == State::running || state_ == State::waiting)) tee_->resize(window_.cols, window_.rows);
}

bool SessionChannel::signal(std::string_view name) {
  const int number = signal_number(name);
  if (number == 0 || pid_ <= 0) return false;
  // As sshd: a program that the client did not choose is not the client's to stop (session.c session_signal_req).
  if (kind_ == ch::StartKind::subsystem || !host_.facts.rules.command.get().empty()) {
    spdlog::info("event=signal_refused channel={} signal={}", number_, name);
    return false;
  }
  pty::signal_program_as(host_.user, pid_, number);
  return true;
}

bool SessionChannel::send_break() {
  if (!terminal_ || !terminal_->leader || state_ != State::running) return false;
  ::tcsendbreak(terminal_->leader.get(), 0);
  return true;
}

// --- recording ------------------------------------------------------------------------------------------------------------------

void SessionChannel::begin_recording(ch::StartKind kind, std::string_view text) {
  const auto& f = host_.facts;
  const Id recording = Id::random();
  recorder::cast::Header h;
  if (terminal_) {
    h.width = std::min<std::uint32_t>(window_.cols, 65535);
    h.height = std::min<std::uint32_t>(window_.rows, 65535);
    h.pty = true;
    h.term = term_;
  }
  h.timestamp = std::time(nullptr);
  h.recording_id = recording.text();
  h.connection_id = f.id().text();
  if (kind == ch::StartKind::exec) h.command = text;
  if (!f.rules.command.get().empty()) h.original_command = std::exchange(h.command, f.rules.command.get());
  if (kind == ch::StartKind::subsystem) h.subsystem = text;
  h.src_node = f.node_name.get();
  h.src_node_id = f.node_id.get();
  h.src_address = f.peer_address.get();
  h.src_user = f.login.get();
  h.src_tags = split(f.tags.get());
  h.dst_node_id = f.server_node_id.get();
  h.dst_address = f.server_address.get();
  h.ssh_user = f.ssh_user.get();
  h.local_user = f.local_user.get();
  h.rule = f.rule.get();

  Tee::Handlers handlers;
  handlers.started = [this] {
    if (state_ == State::waiting) spawn();
  };
  handlers.lost = [this] {
    if (state_ == State::waiting)
      refuse_unrecorded();
    else
      host_.recorder_lost();
  };
  handlers.progress = [this] { on_progress(); };
  handlers.ended = [this] { host_.changed(); };
  handlers.event = host_.event;
  tee_ = std::make_unique<Tee>(host_.poller, f, h, recording, std::move(handlers));
}

void SessionChannel::refuse_unrecorded() {
  state_ = State::refused;
  host_.event("session_refused", "channel=" + std::to_string(number_) + " reason=no_recorder recording=" + tee_->id().text());
  // Ordinary descriptors, so that the line takes the way that a program's output takes: stderr, or the terminal's one stream.
  PipeEnds in, out, err;
  if (!make_pipe(in) || !make_pipe(out) || !make_pipe(err, false)) {
    answer(false);
  } else {
    const std::string line = std::string{no_recorder_line} + "\r\n";
    const int to = terminal_ ? out.write.get() : err.write.get();
    if (::write(to, line.data(), line.size()) < 0) spdlog::warn("event=message_not_shown channel={}", number_);
    ch::Started started;
    started.channel = number_;
    started.input = started.output = 1;
    started.error = terminal_ ? 0 : 1;
    started.pty = terminal_ ? 1 : 0;
    no_blocking(in.write.get());
    no_blocking(out.read.get());
    no_blocking(err.read.get());
    std::vector<UniqueFd> fds;
    fds.push_back(std::move(in.write));
    fds.push_back(std::move(out.read));
    if (!terminal_) fds.push_back(std::move(err.read));
    host_.to_net(ch::Type::started, std::as_bytes(std::span{&started, 1}), std::move(fds));
    forced_status_ = true;
    report_exit();
  }
  close_terminal();
  tee_->end("254");  // nothing ran; a recorder that comes back learns that
  host_.changed();
}

void SessionChannel::lose_recorder(std::string_view line) {
  if (!tee_ || tee_->is_ended()) return;
  if (!reported_) forced_status_ = true;  // else it is with the client, which waits for what a job that was left behind still says
  if (state_ == State::waiting) return refuse_unrecorded();
  tee_->cut_off(terminal_ ? 'o' : 'e', line);
  stop_reading('o');
  stop_reading('e');
  close_terminal();
  close_input();
  if (reaped_) try_report_exit();
}

// --- the program ----------------------------------------------------------------------------------------------------------------

bool SessionChannel::make_descriptors(pty::Launch& launch, std::vector<UniqueFd>& theirs, std::vector<UniqueFd>& to_net,
                                      ch::Started& started) {
  started.channel = number_;
  const auto give = [&to_net](UniqueFd fd) {
    no_blocking(fd.get());
    to_net.push_back(std::move(fd));
  };
  if (terminal_) {
    launch.input = launch.output = launch.error = terminal_->follower.get();
    launch.terminal = true;
    started.pty = 1;
    if (!tee_) {
      // The real leader; ours is for the window's size alone, and closes with the channel, else nothing would ever hang up.
      UniqueFd leader{::fcntl(terminal_->leader.get(), F_DUPFD_CLOEXEC, 3)};
      if (!leader) return false;
      started.combined = 1;
      give(std::move(leader));
      return true;
    }
    PipeEnds in, out;
    if (!make_pipe(in) || !make_pipe(out)) return false;
    no_blocking(in.read.get());
    no_blocking(out.write.get());
    input_from_net_ = std::move(in.read);
    tee_->attach('o', std::move(out.write));
    started.input = started.output = 1;
    give(std::move(in.write));
    give(std::move(out.read));
    return true;
  }
  PipeEnds in, out, err;
  if (!make_pipe(in) || !make_pipe(out) || !make_pipe(err, false)) return false;
  // The user's, as under sshd, which makes them as the user: who opens /dev/stdin, /dev/stdout or /dev/stderr opens the pipe anew (proc(5)),
  // and is asked for its owner's rights.
  for (const PipeEnds* const pipe : {&in, &out, &err})
    if (::fchown(pipe->read.get(), host_.user.uid, host_.user.gid) != 0 && ::geteuid() == 0) return false;
  if (kind_ == ch::StartKind::subsystem && !original_command_) ::fcntl(in.write.get(), F_SETPIPE_SZ, sftp_input_pipe_size);
  input_pipe_.reset(::open(own_descriptor(in.read.get()).c_str(), O_PATH | O_CLOEXEC));
  launch.input = in.read.get();
  launch.output = out.write.get();
  launch.error = err.write.get();
  started.input = started.output = started.error = 1;
  if (records_input()) {
    PipeEnds typed;
    if (!make_pipe(typed, false)) return false;
    no_blocking(typed.read.get());
    no_blocking(in.write.get());
    input_from_net_ = std::move(typed.read);
    to_input_ = std::move(in.write);
    give(std::move(typed.write));
  } else {
    give(std::move(in.write));  // the program's own pipe
  }
  if (!tee_) {
    give(std::move(out.read));
    give(std::move(err.read));
  } else {
    PipeEnds shown_out, shown_err;
    if (!make_pipe(shown_out) || !make_pipe(shown_err, false)) return false;
    no_blocking(shown_out.write.get());
    no_blocking(shown_err.write.get());
    tee_->attach('o', std::move(shown_out.write));
    tee_->attach('e', std::move(shown_err.write));
    give(std::move(shown_out.read));
    give(std::move(shown_err.read));
    no_blocking(out.read.get());
    no_blocking(err.read.get());
    from_output_ = std::move(out.read);
    from_error_ = std::move(err.read);
  }
  theirs.push_back(std::move(in.read));
  theirs.push_back(std::move(out.write));
  theirs.push_back(std::move(err.write));
  return true;
}

void SessionChannel::spawn() {
  pty::Launch launch;
  launch.user = host_.user;
  launch.command = command_;
  launch.environment = make_environment({host_.facts, host_.user, environment_, host_.pam_environment,
                                         terminal_ ? terminal_->path : std::string{}, terminal_ ? term_ : std::string{}, original_command_, host_.agent_socket(), host_.display(number_)});
  std::vector<UniqueFd> theirs, to_net;
  ch::Started started;
  const UniqueFd entrance = host_.tree.entrance();
  launch.cgroup = entrance.get();
  bool ok = make_descriptors(launch, theirs, to_net, started);
  if (ok && terminal_ && !command_) {
    launch.greeting = host_.pam_texts + greeting(last_login(host_.user.uid));
  }
  if (ok) {
    if (const auto pid = host_.launch(launch, terminal_ ? terminal_->path : std::string{})) {
      pid_ = first_pid_ = *pid;
    } else {
      spdlog::error("event=start_failed channel={} reason=\"{}\"", number_, pid.error().doing);
      ok = false;
    }
  }
  if (terminal_) terminal_->follower.reset();
  if (!ok) {
    state_ = State::refused;
    answer(false);
    close_terminal();
    end_recording();
    host_.changed();
    return;
  }
  state_ = State::running;
  logged_in_ = terminal_.has_value();
  host_.event("session_start", "channel=" + std::to_string(number_) + " kind=" +
                                   (kind_ == ch::StartKind::shell ? "shell" : kind_ == ch::StartKind::exec ? "exec" : "subsystem") +
                                   (host_.facts.rules.command.get().empty() ? "" : " forced=1") + " pty=" + (terminal_ ? "1" : "0") + " pid=" + std::to_string(pid_) +
                                   (tee_ ? " recording=" + tee_->id().text() : ""));
  host_.to_net(ch::Type::started, std::as_bytes(std::span{&started, 1}), std::move(to_net));
  if (tee_) start_pumps();
}

void SessionChannel::start_pumps() {
  if (terminal_) {
    const int leader = terminal_->leader.get();
    host_.poller.watch(leader, POLLIN, [this, leader](short events) {
      if ((events & POLLOUT) != 0) write_input();
      if (terminal_ && terminal_->leader && (events & (POLLIN | POLLHUP | POLLERR)) != 0) read_program(leader, 'o');
    });
    host_.poller.watch(input_from_net_.get(), POLLIN, [this](short) { pump_input(); });
    return;
  }
  error_over_ = false;
  if (to_input_) {
    host_.poller.watch(to_input_.get(), 0, [this](short events) {
      if ((events & POLLERR) != 0) return close_input();  // the program closed its end, pipe(7): net is to see it
      write_input();
    });
    host_.poller.watch(input_from_net_.get(), POLLIN, [this](short) { pump_input(); });
  }
  host_.poller.watch(from_output_.get(), POLLIN, [this](short) { read_program(from_output_.get(), 'o'); });
  host_.poller.watch(from_error_.get(), POLLIN, [this](short) { read_program(from_error_.get(), 'e'); });
}

void SessionChannel::read_program(int fd, char stream) {
  if (terminal_ && output_over_) return host_.poller.disable(fd);
  if (!tee_->outlet_open(stream)) return stop_reading(stream);  // nobody reads it: the program is to get its SIGPIPE
  const std::size_t most = tee_->may_read(stream);
  if (most == 0) {
    (stream == 'o' ? output_waits_ : error_waits_) = true;
    if (terminal_ && !input_.empty())
      host_.poller.set_events(fd, POLLOUT);
    else
      host_.poller.disable(fd);
    return;
  }
  // As much as is there, up to one event's worth: a terminal hands out at most 4 KiB a read, and each event costs a way to the relay.
  const auto buffer = scratch();
  std::size_t filled = 0;
  bool over = false;
  while (filled < most) {
    const ssize_t n = ::read(fd, buffer.data() + filled, most - filled);
    if (n > 0) {
      filled += static_cast<std::size_t>(n);
      over = false;
      continue;
    }
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) break;
    // End of file; a terminal says EIO when its last user is gone (pty(7)). It may say so while the last bytes are still on their way between the two
    // ends (n_tty_read() looks for them before it looks whether anybody is there): asked again it has them.
    if (std::exchange(over, true) || !terminal_) break;
  }
  if (filled > 0) tee_->put(stream, buffer.first(filled));
  if (over) {
    // The leader stays open until the program has ended, as under sshd: it may have closed its terminal and run on (GNU's rm, sort and others
    // close theirs just before they exit), and would die of the hang-up.
    if (terminal_) {
      output_over_ = true;
      host_.poller.disable(fd);
    } else {
      stop_reading(stream);
    }
    tee_->finish(stream);
  }
  if (reaped_) try_report_exit();
}

void SessionChannel::stop_reading(char stream) {
  bool& over = stream == 'o' ? output_over_ : error_over_;
  if (over) return;
  over = true;
  if (stream == 'o' && terminal_) {
    close_terminal();
  } else {
    UniqueFd& fd = stream == 'o' ? from_output_ : from_error_;
    if (fd) host_.poller.forget(fd.get());
    fd.reset();
  }
}

void SessionChannel::on_progress() {
  if (state_ != State::running && state_ != State::exited) return;
  const auto resume = [this](char stream, bool& waits, int fd) {
    if (!waits || fd < 0) return;
    if (tee_->outlet_open(stream) && tee_->may_read(stream) == 0) return;
    waits = false;
    host_.poller.set_events(fd, static_cast<short>(POLLIN | (terminal_ && !input_.empty() ? POLLOUT : 0)));
  };
  resume('o', output_waits_, terminal_ ? terminal_->leader.get() : from_output_.get());
  resume('e', error_waits_, from_error_.get());
  if (input_from_net_ && input_.empty()) host_.poller.set_events(input_from_net_.get(), POLLIN);
  if (!output_over_ && !tee_->outlet_open('o')) stop_reading('o');
  if (!error_over_ && !tee_->outlet_open('e')) stop_reading('e');
  if (reaped_) try_report_exit();
}

void SessionChannel::pump_input() {
  if (!input_from_net_ || !input_.empty()) return;
  if (records_input() && !tee_->may_take_input()) return host_.poller.disable(input_from_net_.get());  // until on_progress()
  input_.resize(input_chunk);
  ssize_t n;
  do {
    n = ::read(input_from_net_.get(), input_.data(), input_.size());
  } while (n < 0 && errno == EINTR);
  input_.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
  if (n < 0 && errno == EAGAIN) return;
  if (n <= 0) {
    // The client's EOF: a pipe's end. A terminal has no such thing; sshd does nothing either (its write end is the leader itself).
    close_input();
    return;
  }
  record_input();
  write_input();
}

void SessionChannel::record_input() {
  if (!records_input()) return;
  if (terminal_) {
    // Lines without echo: somebody asks for a password (getpass(3), sudo, ssh). What programs read key by key (readline, editors: no lines,
    // no echo) is recorded. One mark a run, so that it tells neither how many keys there were nor when.
    termios modes{};
    const bool hidden = ::tcgetattr(terminal_->leader.get(), &modes) == 0 && (modes.c_lflag & ICANON) != 0 && (modes.c_lflag & ECHO) == 0;
    if (hidden && !input_hidden_) tee_->mark("input: not recorded while the terminal does not echo");
    input_hidden_ = hidden;
    if (hidden) return;
  }
  tee_->input(std::as_bytes(std::span{input_}));
}

int SessionChannel::input_target() const { return to_input_ ? to_input_.get() : terminal_ ? terminal_->leader.get() : -1; }

void SessionChannel::write_input() {
  const int target = input_target();
  if (target < 0) {
    input_.clear();
    return;
  }
  while (!input_.empty()) {
    const ssize_t n = ::write(target, input_.data(), input_.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno != EAGAIN) {
      if (to_input_) return close_input();
      input_.clear();
      break;
    }
    if (n <= 0) break;
    input_.erase(0, static_cast<std::size_t>(n));
  }
  const bool full = !input_.empty();
  if (to_input_)
    host_.poller.set_events(target, full ? POLLOUT : 0);
  else if (full || !output_waits_)
    host_.poller.set_events(target, static_cast<short>((output_waits_ ? 0 : POLLIN) | (full ? POLLOUT : 0)));
  else
    host_.poller.disable(target);
  if (!input_from_net_) return;
  if (full)
    host_.poller.disable(input_from_net_.get());
  else
    host_.poller.set_events(input_from_net_.get(), POLLIN);
}

void SessionChannel::close_input() {
  for (UniqueFd* fd : {&input_from_net_, &to_input_}) {
    if (*fd) host_.poller.forget(fd->get());
    fd->reset();
  }
  input_.clear();
}

// --- the end --------------------------------------------------------------------------------------------------------------------

void SessionChannel::child_exited(int wait_status) {
  pid_ = 0;
  reaped_ = true;
  wait_status_ = wait_status;
  state_ = State::exited;
  log_out();
  try_report_exit();
  if (hang_up_timer_ != 0 && host_.tree.members_of_session(first_pid_, false).empty()) {
    leave_hang_up();
    host_.changed();
  }
}

void SessionChannel::try_report_exit() {
  if (!reaped_) return;
  if (tee_ && !reported_ && !forced_status_ && !closed_) {
    // What the program wrote is in its pipe or terminal by now, and is to be recorded and shown before its status: SSH clients leave
    // at the status. When there is no room now, on_progress() comes back here.
    const auto unread = [](int fd) {
      int n = 0;
      return fd >= 0 && ::ioctl(fd, FIONREAD, &n) == 0 && n > 0;
    };
    const auto pending = [&](bool over, int fd) {
      if (over) return false;
      pollfd p{fd, POLLIN, 0};
      // poll(2), not FIONREAD, for a terminal: it flushes what is still on its way between the two ends (n_tty_poll).
      return terminal_ ? ::poll(&p, 1, 0) > 0 && (p.revents & POLLIN) != 0 : unread(fd);
    };
    if (pending(output_over_, terminal_ ? terminal_->leader.get() : from_output_.get())) return;
    if (pending(error_over_, from_error_.get())) return;
    if (!tee_->drained('o') || !tee_->drained('e')) return;
  }
  if (!reported_) report_exit();
  if (terminal_) {
    // Programs left behind on the terminal get their hang-up now, like under sshd. Unrecorded, net still reads what is there and then
    // closes the last leader.
    if (!output_over_) stop_reading('o');
    close_terminal();
    if (tee_) tee_->finish('o');
  }
  end_recording();
}

void SessionChannel::report_exit() {
  reported_ = true;
  ch::Exited e;
  e.channel = number_;
  e.close_now = terminal_ || forced_status_ ? 1 : 0;
  if (forced_status_) {
    e.status = recording_required;
  } else if (WIFSIGNALED(wait_status_)) {
    e.by_signal = 1;
    e.core = WCOREDUMP(wait_status_) ? 1 : 0;
    if (!e.name.set(signal_name(WTERMSIG(wait_status_)))) e.by_signal = 1;
  } else {
    e.status = static_cast<std::uint32_t>(WEXITSTATUS(wait_status_));
  }
  host_.event("session_end", "channel=" + std::to_string(number_) + " status=" + exit_text());
  if (!closed_) host_.to_net(ch::Type::exited, std::as_bytes(std::span{&e, 1}), {});
}

std::string SessionChannel::exit_text() const {
  if (forced_status_) return std::to_string(recording_required);
  if (!reaped_) return "HUP";  // left to itself
  return WIFSIGNALED(wait_status_) ? std::string{signal_name(WTERMSIG(wait_status_))} : std::to_string(WEXITSTATUS(wait_status_));
}

void SessionChannel::end_recording() {
  // Programs that a shell left behind may still write to its pipes: recorded until they close them, as they are shown until then.
  const bool over = closed_ || forced_status_ || abandoned_ || state_ == State::refused || (output_over_ && error_over_);
  if (!over) return;
  stop_reading('o');
  stop_reading('e');
  close_terminal();
  if (to_input_) close_input();  // what it carried now would be in no recording
  if (tee_) tee_->end(exit_text());
  host_.changed();
}

void SessionChannel::log_out() {
  if (!logged_in_) return;
  logged_in_ = false;
  record_logout(terminal_->path, first_pid_);
}

void SessionChannel::close_terminal() {
  if (!terminal_ || !terminal_->leader) return;
  host_.poller.forget(terminal_->leader.get());
  terminal_->leader.reset();
  terminal_->follower.reset();
  close_input();
}

void SessionChannel::closed(Leaving how) {
  if (closed_) return;
  closed_ = true;
  if (how == Leaving::ended && !reported_) how = Leaving::closed;  // net can say what it likes
  if (how == Leaving::revoked) {
    hang_up_groups();
  } else if (first_pid_ > 0 && how != Leaving::ended) {
    awaits_input_ = how != Leaving::closed;
    if (how == Leaving::gone) connection_gone();
    if (terminal_)
      hang_up();
    else if (pid_ > 0 || !host_.tree.members_of_session(first_pid_, false).empty())
      hang_up_timer_ = host_.poller.after(hang_up_delay, [this] { hang_up_later(); });
  }
  stop_reading('o');
  stop_reading('e');
  close_terminal();
  if (state_ == State::waiting) state_ = State::refused;
  if (reaped_ || state_ == State::refused) end_recording();
  host_.changed();
}

void SessionChannel::connection_gone() {
  // Half of the time that the connection's end waits for programs: the other half is for their own way out.
  if (!input_limit_) input_limit_ = Poller::Clock::now() + hang_up_delay + std::chrono::milliseconds{host_.facts.hang_up_ms} / 2;
}

void SessionChannel::hang_up_later() {
  hang_up_timer_ = 0;
  if (awaits_input_ && input_unread() && (!input_limit_ || Poller::Clock::now() < *input_limit_)) {
    hang_up_timer_ = host_.poller.after(input_look, [this] { hang_up_later(); });
    return;
  }
  hang_up();
  host_.changed();
}

/// Is something on its way to the program that it may still read?
bool SessionChannel::input_unread() const {
  if (to_input_) return true;  // closed when it has all
  // A writer for a moment: a reader would keep from net, whose pipe it is, that the program has closed its end.
  const UniqueFd pipe{input_pipe_ ? ::open(own_descriptor(input_pipe_.get()).c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC) : -1};
  pollfd p{pipe.get(), 0, 0};
  int n = 0;
  if (!pipe || ::poll(&p, 1, 0) != 0) return false;  // POLLERR: nobody reads, pipe(7)
  return ::ioctl(pipe.get(), FIONREAD, &n) == 0 && n > 0;
}

/// SIGHUP for the program's process group; which ones have it now.
std::vector<pid_t> SessionChannel::hang_up_groups() {
  std::vector<pid_t> groups;
  if (pid_ <= 0) return groups;
  // Of a terminal also the group in the foreground; the kernel does it when the last leader closes, and net's may close later.
  if (terminal_ && terminal_->leader)
    if (const pid_t front = ::tcgetpgrp(terminal_->leader.get()); front > 1 && front != pid_) {
      ::kill(-front, SIGHUP);
      groups.push_back(front);
    }
  pty::signal_program(pid_, SIGHUP);
  pty::signal_program(pid_, SIGCONT);  // a stopped group would never see it
  groups.push_back(pid_);
  return groups;
}

/// SIGHUP for the program and all that is in its session still, in whatever process group: what made itself independent has left it, or ignores it.
void SessionChannel::hang_up() {
  leave_hang_up();
  host_.tree.hang_up_session(first_pid_, pid_ > 0, hang_up_groups());
}

void SessionChannel::abandon() {
  if (hang_up_timer_ != 0) hang_up();
  if (pid_ == 0) return;
  abandoned_ = true;
  pid_ = 0;
  log_out();
  end_recording();
}

bool SessionChannel::finished() const { return closed_ && pid_ == 0 && hang_up_timer_ == 0 && (!tee_ || tee_->is_ended()); }

}  // namespace postern::sshd::session
