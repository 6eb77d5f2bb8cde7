// The real postern-session between stand-ins of broker, net and relay.
#include "sshd/session/process.h"
#include "tests/tools/session_harness.h"

#include "catch.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>
#include <utmpx.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>

using namespace postern;
using namespace postern::test;

namespace {

std::string line_of(const std::string& text, const std::string& start) {
  std::istringstream in{text};
  for (std::string line; std::getline(in, line);)
    if (line.starts_with(start)) return line;
  return {};
}

/// pids that a program of the test wrote to a file, once it has.
pid_t pid_from(const std::string& path) {
  pid_t pid = 0;
  eventually([&] {
    std::ifstream in{path};
    return static_cast<bool>(in >> pid) && pid > 0;
  });
  return pid;
}

/// A folder that the test's user may write to.
struct OpenFolder : TemporaryFolder {
  OpenFolder() { ::chmod(path.c_str(), 01777); }
};

int count_fds(pid_t pid) {
  int n = 0;
  for (int fd = 0; fd < 1024; fd++)
    if (char to[8]; ::readlink(("/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd)).c_str(), to, sizeof to) > 0) n++;
  return n;
}

}  // namespace

TEST_CASE("a command runs as the user: ids, groups, place, umask, environment", "[session]") {
  TestUser user;
  Harness h;
  h.log_in(user);
  const auto o = run(h, 0, "id -u; id -g; id -un; pwd; umask; echo $0; env; ls -l /proc/self/fd | wc -l; grep -c . /proc/$$/oom_score_adj");
  std::istringstream lines{o.out};
  std::string uid, gid, name, place, mask, zero;
  std::getline(lines, uid), std::getline(lines, gid), std::getline(lines, name), std::getline(lines, place), std::getline(lines, mask),
      std::getline(lines, zero);
  CHECK(uid == std::to_string(user.uid));
  CHECK(gid == std::to_string(user.gid));
  CHECK(name == user.name);
  CHECK(place == user.home);
  CHECK(mask == "0022");
  CHECK(zero == user.shell.substr(user.shell.rfind('/') + 1));
  CHECK(line_of(o.out, "HOME=") == "HOME=" + user.home);
  CHECK(line_of(o.out, "USER=") == "USER=" + user.name);
  CHECK(line_of(o.out, "LOGNAME=") == "LOGNAME=" + user.name);
  CHECK(line_of(o.out, "SHELL=") == "SHELL=" + user.shell);
  CHECK(line_of(o.out, "MAIL=") == "MAIL=/var/mail/" + user.name);
  CHECK(line_of(o.out, "SSH_CONNECTION=") == "SSH_CONNECTION=192.0.2.1 50000 192.0.2.2 2222");
  CHECK(line_of(o.out, "SSH_CLIENT=") == "SSH_CLIENT=192.0.2.1 50000 2222");
  CHECK(line_of(o.out, "SSH_TTY=").empty());
  CHECK(o.exited.by_signal == 0);
  CHECK(o.exited.status == 0);
  if (is_root()) {
    const auto groups = run(h, 1, "id -Gn; grep -E '^(CapEff|CapPrm|Uid|Gid)' /proc/self/status");
    CHECK(groups.out.find("users") != std::string::npos);
    CHECK(groups.out.find("CapEff:\t0000000000000000") != std::string::npos);
    CHECK(groups.out.find("root") == std::string::npos);
  }
}

TEST_CASE("a program gets no descriptor but 0, 1 and 2", "[session]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  const bool recorded = GENERATE(false, true);
  h.facts.record = recorded ? 1 : 0;
  h.log_in(user);
  REQUIRE(h.open(0));
  REQUIRE(h.open(1));
  auto first = h.start(0, ch::StartKind::exec, "sleep 100");
  REQUIRE(first);
  h.close_channel(1);
  // No pipe in the command: the shell itself is looked at, and would hold its ends for a moment.
  CHECK(run(h, 2, "ls /proc/$$/fd; true").out == "0\n1\n2\n");
}

TEST_CASE("exit statuses and signals reach the client", "[session]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = GENERATE(0, 1);
  h.log_in(user);
  CHECK(run(h, 0, "exit 7").exited.status == 7);
  CHECK(run(h, 1, "exit 255").exited.status == 255);
  const auto o = run(h, 2, "kill -TERM $$");
  CHECK(o.exited.by_signal == 1);
  CHECK(o.exited.name.get() == "TERM");
  CHECK(run(h, 3, "kill -KILL $$").exited.name.get() == "KILL");
  CHECK(run(h, 4, "no-such-command-here").exited.status == 127);
}

TEST_CASE("stdout and stderr stay apart, and stdin's end is seen", "[session]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = GENERATE(0, 1);
  h.log_in(user);
  const auto o = run(h, 0, "echo out; echo err >&2; cat; echo end", "some input");
  CHECK(o.out == "out\nsome inputend\n");
  CHECK(o.err == "err\n");
}

TEST_CASE("a missing home is told, and the session starts in /", "[session]") {
  if (!is_root()) {
    WARN("needs root: an account whose home is gone");
    return;
  }
  TestUser user;
  Harness h;
  h.log_in(user);
  REQUIRE(::rename(user.home.c_str(), (user.home + ".away").c_str()) == 0);
  const auto o = run(h, 0, "pwd");
  REQUIRE(::rename((user.home + ".away").c_str(), user.home.c_str()) == 0);
  CHECK(o.out == "/\n");
  CHECK(o.err == "Could not chdir to home directory " + user.home + ": No such file or directory\n");
}

TEST_CASE("a client's variables arrive if the rule accepts them", "[session]") {
  TestUser user;
  Harness h;
  (void)h.facts.accept_env[0].set("*");
  h.facts.accept_env_count = 1;
  h.log_in(user);
  REQUIRE(h.open(0));
  CHECK(h.env(0, "FOO", "bar=\xc3\xa4 baz"));
  CHECK(h.env(0, "LC_TIME", "C"));
  CHECK_FALSE(h.env(0, "LD_PRELOAD", "/tmp/x.so"));
  CHECK_FALSE(h.env(0, "A=B", "x"));
  for (int i = 0; i < 200; i++) {
    const bool ok = h.env(0, "V" + std::to_string(i), "x");
    CHECK(ok == (i < 128 - 4));  // refused ones count: 128 in all
  }
  auto r = h.start(0, ch::StartKind::exec, "env; tr '\\0' '\\n' < /proc/$$/cmdline");
  REQUIRE(r);
  const auto out = read_to_end(r->output.get());
  CHECK(line_of(out, "FOO=") == "FOO=bar=\xc3\xa4 baz");
  CHECK(line_of(out, "LC_TIME=") == "LC_TIME=C");
  CHECK(line_of(out, "LD_PRELOAD=").empty());
}

TEST_CASE("a login shell on a terminal: its name, its tty, its size, its modes, its login record", "[session][pty]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  const int record = GENERATE(0, 1);
  h.facts.record = static_cast<std::uint8_t>(record);
  h.log_in(user);
  REQUIRE(h.open(0));
  REQUIRE(h.pty(0, std::string("\x48\x00\x00\x00\x00\x00", 6), 132, 43));  // ONLCR off
  auto r = h.start(0, ch::StartKind::shell, {});
  REQUIRE(r);
  CHECK(r->started.combined == (record ? 0 : 1));
  if (record) CHECK(r->started.error == 0);
  const int in = record ? r->input.get() : r->combined.get();
  const int out = record ? r->output.get() : r->combined.get();
  write_all(in, "PS1=; PS2=; stty -echo; echo \"begin:$0:$(tty):$SSH_TTY:$TERM:$(stty size):$(stty -a | grep -o -- '-*onlcr')\"\n");
  const auto text = read_until(out, ":-onlcr\n");
  const auto begin = text.rfind("begin:-bash:/dev/pts/");
  if (user.shell == "/bin/bash") REQUIRE(begin != std::string::npos);
  CHECK(text.find(":xterm-256color:43 132:-onlcr\n") != std::string::npos);
  ch::WindowChange w;
  w.channel = 0;
  w.cols = 100;
  w.rows = 50;
  h.net_send(ch::Type::window_change, w);
  write_all(in, "while [ \"$(stty size)\" != '50 100' ]; do sleep 0.05; done; echo resized; exit 3\n");
  CHECK(read_until(out, "resized").find("resized") != std::string::npos);
  const auto e = h.exited();
  REQUIRE(e);
  CHECK(e->status == 3);
  CHECK(e->close_now == 1);
  if (record) {
    CHECK(eventually([&] { return relay.bytes().find("\"r\",\"100x50\"]") != std::string::npos; }));
    CHECK(eventually([&] { return relay.ended(); }));
    CHECK(relay.bytes().find("\"x\",\"3\"]") != std::string::npos);
  }
}

TEST_CASE("Ctrl-C interrupts the program in the foreground, and its shell goes on", "[session][pty]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  const int record = GENERATE(0, 1);
  h.facts.record = static_cast<std::uint8_t>(record);
  h.log_in(user);
  REQUIRE(h.open(0));
  REQUIRE(h.pty(0));
  // Ready says the program, not its shell; without noflsh the kernel may throw "caught" away after it sent the signal (n_tty.c, isig).
  auto r = h.start(0, ch::StartKind::exec, "stty noflsh; trap 'echo caught' INT; sh -c 'echo rea\"\"dy; exec sleep 60'; echo after");
  REQUIRE(r);
  const int in = record ? r->input.get() : r->combined.get();
  const int out = record ? r->output.get() : r->combined.get();
  read_until(out, "ready");
  write_all(in, "\x03");
  CHECK(read_until(out, "after").find("caught") != std::string::npos);
}

TEST_CASE("signals that the client sends reach the program", "[session]") {
  TestUser user;
  Harness h;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "trap 'echo got; exit 4' USR1; echo ready; while :; do sleep 0.05; done");
  REQUIRE(r);
  read_until(r->output.get(), "ready");
  ch::Signal s;
  s.channel = 0;
  (void)s.name.set("USR1");
  h.net_send(ch::Type::signal, s);
  CHECK(read_until(r->output.get(), "got").find("got") != std::string::npos);
  const auto e = h.exited();
  REQUIRE(e);
  CHECK(e->status == 4);
}

TEST_CASE("exit is told while a child that was left behind still holds the pipes", "[session]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = GENERATE(0, 1);
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "(read x; echo late) <&0 & echo now; exit 5");
  REQUIRE(r);
  const auto e = h.exited();
  REQUIRE(e);
  CHECK(e->status == 5);
  CHECK(e->close_now == 0);
  write_all(r->input.get(), "go\n");
  r->input.reset();
  CHECK(read_to_end(r->output.get()) == "now\nlate\n");
}

TEST_CASE("the client goes away: the programs get their hang-up, the session ends", "[session]") {
  TestUser user;
  OpenFolder folder;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = GENERATE(0, 1);
  h.log_in(user);
  const bool terminal = GENERATE(false, true);
  REQUIRE(h.open(0));
  if (terminal) REQUIRE(h.pty(0));
  auto r = h.start(0, ch::StartKind::exec,
                   "trap 'echo hup > " + folder.path + "/hup; exit' HUP; sleep 300 & echo $! > " + folder.path + "/child; echo $$ > " +
                       folder.path + "/pid; wait");
  REQUIRE(r);
  const pid_t pid = pid_from(folder.path + "/pid");
  const pid_t child = pid_from(folder.path + "/child");
  // Before its exec it is a copy of bash, in which a hang-up only sets bash's flag and is lost.
  REQUIRE(eventually([&] { return read_whole("/proc/" + std::to_string(child) + "/comm") == "sleep\n"; }));
  h.net.reset();
  *r = Running{};
  CHECK(eventually([&] { return read_whole(folder.path + "/hup") == "hup\n"; }));
  const auto died = h.session_died();
  REQUIRE(died);
  CHECK(*died == 0);
  CHECK(eventually([&] { return is_gone(pid) && is_gone(child); }));
}

TEST_CASE("revoke shows the text, ends net, and kills all, also what has left its session and ignores hang-ups", "[session]") {
  TestUser user;
  OpenFolder folder;
  Harness h;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec,
                   "trap '' HUP TERM; setsid nohup sh -c 'trap \"\" HUP TERM; echo $$ > " + folder.path +
                       "/far; while :; do sleep 1; done' >/dev/null 2>&1 & echo $$ > " + folder.path + "/pid; while :; do sleep 1; done");
  REQUIRE(r);
  const pid_t pid = pid_from(folder.path + "/pid");
  const pid_t far = pid_from(folder.path + "/far");
  REQUIRE(pid > 0);
  REQUIRE(far > 0);
  h.revoke("Access revoked.");
  const auto m = h.net_receive();
  REQUIRE(m);
  REQUIRE(m->type == static_cast<std::uint16_t>(ch::Type::disconnect));
  CHECK(m->body<ch::Disconnect>()->text.get() == "Access revoked.");
  const auto died = h.session_died(8s);
  REQUIRE(died);
  CHECK(eventually([&] { return is_gone(pid) && is_gone(far); }, 1s));  // killed; the kernel may still be tearing them down
  CHECK(eventually([&] { return is_gone(h.net_stand_in); }));
  if (is_root()) CHECK(eventually([&] { return ::access(("/sys/fs/cgroup/unified/postern/" + h.facts.id().text()).c_str(), F_OK) != 0; }));
}

TEST_CASE("one of many that are revoked is told at once, and its programs are ended behind that", "[session]") {
  TestUser user;
  OpenFolder folder;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = GENERATE(0, 1);
  h.facts.farewell_ms = 500;
  h.log_in(user);
  REQUIRE(h.open(0));
  REQUIRE(h.pty(0));
  auto r = h.start(0, ch::StartKind::exec, "trap '' HUP TERM; echo $$ > " + folder.path + "/pid; while :; do sleep 1; done");
  REQUIRE(r);
  const pid_t pid = pid_from(folder.path + "/pid");
  REQUIRE(pid > 0);
  h.revoke("Access revoked.", 1500ms);
  const auto m = h.net_receive();
  REQUIRE(m);
  CHECK(m->body<ch::Disconnect>()->text.get() == "Access revoked.");
  const bool net_goes = GENERATE(true, false);
  if (net_goes) h.net.reset();
  else CHECK(eventually([&] { return is_gone(h.net_stand_in); }));  // its time is over
  CHECK_FALSE(is_gone(pid));
  REQUIRE(h.session_died(8s));
  CHECK(eventually([&] { return is_gone(pid); }, 1s));
}

TEST_CASE("SIGTERM ends a session like a revoke", "[session]") {
  TestUser user;
  Harness h;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "sleep 300");
  REQUIRE(r);
  ::kill(h.session_pid, SIGTERM);
  const auto m = h.net_receive();
  REQUIRE(m);
  CHECK(m->type == static_cast<std::uint16_t>(ch::Type::disconnect));
  CHECK(h.session_died(8s));
}

// --- recording ------------------------------------------------------------------------------------------------------------------

TEST_CASE("no byte is shown before the relay has it", "[session][recording]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = 1;
  h.log_in(user);
  REQUIRE(h.open(0));
  relay.writes = false;
  auto r = h.start(0, ch::StartKind::exec, "echo secret");
  REQUIRE(r);
  REQUIRE(eventually([&] { return relay.bytes().find("secret\\n") != std::string::npos; }));  // the relay has it, and has not said so
  pollfd p{r->output.get(), POLLIN, 0};
  CHECK(::poll(&p, 1, 300) == 0);
  relay.writes = true;
  CHECK(read_to_end(r->output.get()) == "secret\n");
  const auto e = h.exited();
  REQUIRE(e);
  CHECK(e->status == 0);
}

TEST_CASE("the recording holds what the user saw, between a header and an end", "[session][recording]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = 1;
  h.log_in(user);
  const auto o = run(h, 0, "seq 1 200000; echo oops >&2");
  REQUIRE(eventually([&] { return relay.ended(); }));
  const auto cast = relay.bytes();
  CHECK(cast.starts_with("{\"version\":2"));
  CHECK(cast.find("\"command\":\"seq 1 200000; echo oops >&2\"") != std::string::npos);
  CHECK(cast.find("\"srcNode\":\"alice-laptop\"") != std::string::npos);
  CHECK(cast.ends_with("\"x\",\"0\"]\n"));
  std::string out;
  std::istringstream lines{cast};
  for (std::string line; std::getline(lines, line);) {
    const auto o_event = line.find(",\"o\",\"");
    if (o_event == std::string::npos || o_event > 24) continue;
    auto text = line.substr(o_event + 6, line.size() - o_event - 8);
    for (std::size_t at; (at = text.find("\\n")) != std::string::npos;) text.replace(at, 2, "\n");
    out += text;
  }
  CHECK(out == o.out);
  CHECK(cast.find("\"e\",\"oops\\n\"]") != std::string::npos);
}

TEST_CASE("fail closed: without a recorder nothing runs, the user is told, the status is 254", "[session][recording]") {
  TestUser user;
  OpenFolder folder;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = h.facts.enforce_recorder = 1;
  h.facts.recorder_start_ms = 300;
  relay.commits = false;
  if (GENERATE(false, true)) relay.stop();  // no relay at all
  h.log_in(user);
  const bool terminal = GENERATE(false, true);
  REQUIRE(h.open(0));
  if (terminal) REQUIRE(h.pty(0));
  auto r = h.start(0, ch::StartKind::exec, "touch " + folder.path + "/ran");
  REQUIRE(r);
  const auto text = read_to_end(terminal ? r->output.get() : r->error.get());
  CHECK(text.find("ecording is required") != std::string::npos);
  const auto e = h.exited();
  REQUIRE(e);
  CHECK(e->status == 254);
  CHECK(e->by_signal == 0);
  CHECK(::access((folder.path + "/ran").c_str(), F_OK) != 0);
}

TEST_CASE("fail closed: a recorder that goes and does not come back ends the session and all it started", "[session][recording]") {
  TestUser user;
  OpenFolder folder;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = h.facts.enforce_recorder = 1;
  h.facts.recorder_grace_ms = 600;
  h.log_in(user);
  const bool terminal = GENERATE(false, true);
  REQUIRE(h.open(0));
  if (terminal) REQUIRE(h.pty(0));
  auto r = h.start(0, ch::StartKind::exec,
                   "trap '' HUP TERM; nohup setsid sh -c 'echo $$ > " + folder.path +
                       "/far; while :; do sleep 1; done' >/dev/null 2>&1 & echo $$ > " + folder.path + "/pid; echo ready; while :; do sleep 1; done");
  REQUIRE(r);
  read_until(r->output.get(), "ready");
  const pid_t pid = pid_from(folder.path + "/pid");
  const pid_t far = pid_from(folder.path + "/far");
  if (GENERATE(false, true))
    relay.commits = false;  // the relay says that there is no recorder
  else
    relay.stop();
  const auto text = read_to_end(terminal ? r->output.get() : r->error.get());
  CHECK(text.find("ecording is required") != std::string::npos);
  const auto e = h.exited();
  REQUIRE(e);
  CHECK(e->status == 254);
  CHECK(eventually([&] { return is_gone(pid) && is_gone(far); }));
}

TEST_CASE("fail closed: a recorder that comes back within the grace is not noticed", "[session][recording]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = h.facts.enforce_recorder = 1;
  h.facts.recorder_grace_ms = 20'000;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "echo one; read x; echo two; exit 6");
  REQUIRE(r);
  read_until(r->output.get(), "one");
  relay.stop();
  write_all(r->input.get(), "\n");
  pollfd p{r->output.get(), POLLIN, 0};
  CHECK(::poll(&p, 1, 700) == 0);  // stalls while the relay is away
  relay.start();
  CHECK(read_to_end(r->output.get()) == "two\n");
  const auto e = h.exited();
  REQUIRE(e);
  CHECK(e->status == 6);
  CHECK(eventually([&] { return relay.ended(); }));
  CHECK(relay.recordings() == 1);
}

TEST_CASE("fail open: a relay that stays away costs a gap, not the session", "[session][recording]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = 1;
  h.facts.recorder_grace_ms = 500;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "echo one; read x; echo two; read x; echo three; read x; echo four");
  REQUIRE(r);
  read_until(r->output.get(), "one");
  relay.stop();
  write_all(r->input.get(), "\n");
  CHECK(read_until(r->output.get(), "two").find("two") != std::string::npos);  // after the grace
  write_all(r->input.get(), "\n");
  CHECK(read_until(r->output.get(), "three").find("three") != std::string::npos);
  relay.start();
  REQUIRE(eventually([&] { return relay.bytes().find("were not recorded") != std::string::npos; }));
  write_all(r->input.get(), "\n");
  CHECK(read_until(r->output.get(), "four").find("four") != std::string::npos);
  REQUIRE(h.exited());
  REQUIRE(eventually([&] { return relay.ended(); }));
  const auto cast = relay.bytes();
  CHECK(cast.find("one\\n") != std::string::npos);
  CHECK(cast.find("two\\n") != std::string::npos);     // was encoded before the gap, and kept
  CHECK(cast.find("three\\n") == std::string::npos);   // is the gap
  CHECK(cast.find("four\\n") != std::string::npos);
  h.net.reset();
  (void)h.broker_receive(5s);
  CHECK(std::any_of(h.events.begin(), h.events.end(),
                    [](const auto& e) { return e.find("recording_gap") == 0 && e.find("state=over bytes=6") != std::string::npos; }));
}

TEST_CASE("fail open: a journal that fails for good costs the rest of the recording, not the session", "[session][recording]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = 1;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "echo one; read x; echo two; seq 1 100000; exit 2");
  REQUIRE(r);
  read_until(r->output.get(), "one");
  relay.fails = true;
  write_all(r->input.get(), "\n");
  const auto text = read_to_end(r->output.get());
  CHECK(text.find("two\n") != std::string::npos);
  CHECK(text.ends_with("100000\n"));
  const auto e = h.exited();
  REQUIRE(e);
  CHECK(e->status == 2);
}

TEST_CASE("64 MiB of output arrive whole through a recording", "[session][recording]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = 1;
  h.log_in(user);
  const auto begin = std::chrono::steady_clock::now();
  const auto o = run(h, 0, "yes 0123456789abcdefghijklmnopqrstuvwxyz | head -c 67108864");
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - begin).count();
  UNSCOPED_INFO("64 MiB in " << ms << " ms");
  if (std::getenv("POSTERN_TEST_TIMES") != nullptr) WARN("64 MiB recorded in " << ms << " ms");
  REQUIRE(o.out.size() == 67108864);
  std::string expected;
  while (expected.size() < o.out.size()) expected += "0123456789abcdefghijklmnopqrstuvwxyz\n";
  expected.resize(o.out.size());
  CHECK(o.out == expected);
}

// --- hostile net ----------------------------------------------------------------------------------------------------------------

namespace {
/// The session must have ended cleanly, hung up its programs and killed net.
void check_clean_end(Harness& h) {
  const auto died = h.session_died();
  REQUIRE(died);
  CHECK(WIFEXITED(*died));
  CHECK(WEXITSTATUS(*died) == 0);
  CHECK(eventually([&] { return is_gone(h.net_stand_in); }));
}
}  // namespace

TEST_CASE("a net that sends what no net sends is ended, with its programs, and nothing else", "[session][hostile]") {
  TestUser user;
  OpenFolder folder;
  Harness h;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "echo $$ > " + folder.path + "/pid; sleep 300");
  REQUIRE(r);
  const pid_t pid = pid_from(folder.path + "/pid");
  const int what = GENERATE(range(0, 14));
  INFO("case " << what);
  const auto raw = [&](std::uint16_t version, std::uint16_t type, std::string_view bytes, std::span<const int> fds = {}) {
    (void)send_message(h.net.get(), version, type, {}, bytes, fds);
  };
  const auto of = [](ch::Type t) { return static_cast<std::uint16_t>(t); };
  const int a_descriptor = 2;
  switch (what) {
    case 0: raw(ch::version, 0, {}); break;
    case 1: raw(ch::version, 999, "x"); break;
    case 2: raw(ch::version, of(ch::Type::started), std::string(sizeof(ch::Started), '\0')); break;
    case 3: raw(ch::version + 1, of(ch::Type::open), std::string(4, '\x01')); break;
    case 4: raw(ch::version, of(ch::Type::open), std::string(3, '\0')); break;
    case 5: h.net_send(ch::Type::open, ch::ChannelRef{0}); break;  // is open already
    case 6: h.net_send(ch::Type::open, ch::ChannelRef{65536}); break;
    case 7: h.net_send(ch::Type::start, ch::Start{17, ch::StartKind::exec}, "id"); break;  // never opened
    case 8: h.net_send(ch::Type::start, ch::Start{0, static_cast<ch::StartKind>(3)}, "id"); break;
    case 9: raw(ch::version, of(ch::Type::open), std::string("\x05\0\0\0", 4), {&a_descriptor, 1}); break;
    case 10: {
      ch::Pty p;
      p.modes.length = 0xffffffff;
      h.net_send(ch::Type::pty, p);
      break;
    }
    case 11: h.net_send(ch::Type::env, ch::Env{0, 100}, "short"); break;
    case 12: raw(ch::version, of(ch::Type::env), std::string(ch::max_message + 1000, 'x')); break;  // truncated
    case 13: {
      const char half[5] = {1, 0, 1, 0, 0};  // not even a header
      REQUIRE(::send(h.net.get(), half, sizeof half, MSG_NOSIGNAL) == 5);
      break;
    }
    default: break;
  }
  check_clean_end(h);
  CHECK(eventually([&] { return is_gone(pid); }));
}

TEST_CASE("requests in the wrong order are refused and leave the channel usable", "[session][hostile]") {
  TestUser user;
  Harness h;
  h.log_in(user);
  REQUIRE(h.open(0));
  CHECK(h.pty(0));
  CHECK_FALSE(h.pty(0));
  CHECK_FALSE(h.start(0, ch::StartKind::exec, std::string("a\0b", 3)));
  CHECK_FALSE(h.start(0, ch::StartKind::subsystem, "nope"));
  auto r = h.start(0, ch::StartKind::exec, "echo hello; sleep 0.2");
  REQUIRE(r);
  CHECK_FALSE(h.start(0, ch::StartKind::exec, "id"));
  CHECK(read_until(r->combined.get(), "hello").find("hello") != std::string::npos);
  CHECK(h.exited());
  CHECK_FALSE(h.env(0, "LANG", "C"));
  h.close_channel(0);
  CHECK(h.open(0));  // the number may come again
}

TEST_CASE("a connection has so many sessions and no more", "[session][hostile]") {
  TestUser user;
  Harness h;
  h.facts.sessions_per_connection = 3;
  h.log_in(user);
  for (std::uint32_t i = 0; i < 3; i++) CHECK(h.open(i));
  CHECK_FALSE(h.open(3));
  h.close_channel(1);
  CHECK(h.open(4));
}

TEST_CASE("a net that never reads its answers does not make the session grow or stall its end", "[session][hostile]") {
  TestUser user;
  Harness h;
  h.log_in(user);
  for (int i = 0; i < 5000; i++) {
    const auto sent = send_body(h.net.get(), ch::version, static_cast<std::uint16_t>(ch::Type::open), ch::ChannelRef{60000});
    if (!sent) break;
    (void)send_body(h.net.get(), ch::version, static_cast<std::uint16_t>(ch::Type::closed), ch::ChannelRef{60000});
  }
  h.revoke("enough");
  CHECK(h.session_died(8s));
}

TEST_CASE("10,000 random messages give no descriptor before a start, and no crash", "[session][hostile]") {
  TestUser user;
  const char* given = std::getenv("POSTERN_TEST_SEED");
  const unsigned seed = given != nullptr ? static_cast<unsigned>(std::strtoul(given, nullptr, 10)) : std::random_device{}();
  std::printf("seed %u (POSTERN_TEST_SEED repeats it)\n", seed);
  std::mt19937 random{seed};
  Harness h;
  h.start_zygote();
  (void)h.facts.accept_env[0].set("*");
  h.facts.accept_env_count = 1;
  int sessions = 0;
  bool alive = false;
  for (int i = 0; i < 10'000; i++) {
    if (!alive) {
      if (++sessions > 150) break;  // each violation costs a session: enough have been seen
      h.facts.connection_id = Id::random().bytes;
      h.log_in(user);
      alive = true;
    }
    std::string bytes;
    // Mostly well-formed sizes with random contents, so that the state machine is reached and not only the size check.
    static const std::size_t sizes[] = {4, 4, sizeof(ch::Pty), sizeof(ch::Env), sizeof(ch::Start), sizeof(ch::WindowChange), sizeof(ch::Signal), 4, 4};
    const unsigned type = random() % 100 == 0 ? random() % 40 : 1 + random() % 9;
    std::size_t size = type >= 1 && type <= 8 ? sizes[type - 1] : random() % 300;
    if (random() % 200 == 0) size = random() % 3000;
    bytes.resize(size);
    if (random() % 4 == 0)
      for (auto& c : bytes) c = static_cast<char>(random());
    if (size >= 4 && random() % 50 != 0) {
      const std::uint32_t channel = random() % 4;
      std::memcpy(bytes.data(), &channel, 4);
    }
    if (type == 3 || type == 4) {  // env, start: a tail; of starts only kinds that exist, mostly
      if (type == 4 && size >= 8) {
        const std::uint32_t kind = random() % 50 == 0 ? random() : 1 + random() % 2;
        std::memcpy(bytes.data() + 4, &kind, 4);
        bytes += random() % 2 == 0 ? "exit 0" : "true";
      } else if (size >= 8) {
        const std::uint32_t length = random() % 12;
        std::memcpy(bytes.data() + 4, &length, 4);
        bytes += "LC_NUMERIC12";
      }
    }
    const auto sent = send_message(h.net.get(), ch::version, static_cast<std::uint16_t>(type), {}, bytes);
    // What comes back: descriptors only with `started`.
    for (;;) {
      auto m = receive_message(h.net.get(), ch::max_message);
      if (!m) {
        if (m.error().code != EAGAIN) alive = false;
        break;
      }
      if (!*m) {
        alive = false;
        break;
      }
      if ((*m)->type != static_cast<std::uint16_t>(ch::Type::started)) REQUIRE((*m)->fds.empty());
    }
    if (!sent && sent.error().code != EAGAIN) alive = false;
    if (!alive) {
      h.broker.reset();
      h.net.reset();
      const auto died = h.session_died(20s);
      REQUIRE(died);
      REQUIRE(WIFEXITED(*died));
      REQUIRE(WEXITSTATUS(*died) == 0);
      ::waitpid(h.net_stand_in, nullptr, WNOHANG);
      ::kill(h.net_stand_in, SIGKILL);
      ::waitpid(h.net_stand_in, nullptr, 0);
      h.net_stand_in = 0;
    }
  }
}

TEST_CASE("net asks for more signatures than rekeys need: they come slower, and the broker hears of few", "[session][hostile]") {
  TestUser user;
  Harness h;
  h.log_in(user);
  sshd::net::AskSign ask;
  (void)ask.data.set(std::string(32, 'h'));
  const auto signed_once = [&] {
    h.net_send(ch::Type::ask_sign, ask);
    const auto m = h.broker_receive(5s);
    REQUIRE(m);
    REQUIRE(m->type == static_cast<std::uint16_t>(ses::Type::ask_sign));
    sshd::net::Signature s;
    (void)s.blob.set("signed");
    (void)send_body(h.broker.get(), ses::version, static_cast<std::uint16_t>(ses::Type::signature), s);
    const auto answer = h.net_receive();
    REQUIRE(answer);
    CHECK(answer->body<sshd::net::Signature>()->blob.get() == "signed");
  };
  const auto begin = std::chrono::steady_clock::now();
  constexpr int more = 3;
  for (unsigned i = 0; i < sshd::session::sign_burst + more; i++) signed_once();
  // None is refused: that would end a good connection. Each beyond the burst waits for its turn.
  CHECK(std::chrono::steady_clock::now() - begin >= sshd::session::sign_refill * (more - 1));
}

TEST_CASE("net asks for more signatures at once than a sound one ever would: the connection ends", "[session][hostile]") {
  TestUser user;
  Harness h;
  h.log_in(user);
  sshd::net::AskSign ask;
  (void)ask.data.set(std::string(32, 'h'));
  for (unsigned i = 0; i < 4 * sshd::session::sign_burst; i++) h.net_send(ch::Type::ask_sign, ask);
  CHECK(h.session_died(5s));
}

// --- the broker goes and comes --------------------------------------------------------------------------------------------------

TEST_CASE("a session outlives its broker, registers with the next one and is revocable again", "[session][broker]") {
  TestUser user;
  Harness h;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "while read x; do echo got $x; done");
  REQUIRE(r);
  h.broker.reset();
  write_all(r->input.get(), "one\n");
  CHECK(read_until(r->output.get(), "got one").find("got one") != std::string::npos);

  UniqueFd listener{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
  sockaddr_un a{};
  a.sun_family = AF_UNIX;
  std::strncpy(a.sun_path, h.facts.registration_socket.text, std::min<std::size_t>(h.facts.registration_socket.length, sizeof a.sun_path - 1));
  REQUIRE(::bind(listener.get(), reinterpret_cast<sockaddr*>(&a), sizeof a) == 0);
  REQUIRE(::listen(listener.get(), 8) == 0);
  pollfd p{listener.get(), POLLIN, 0};
  REQUIRE(::poll(&p, 1, 10'000) == 1);
  h.broker.reset(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  const auto m = h.broker_receive();
  REQUIRE(m);
  REQUIRE(m->type == static_cast<std::uint16_t>(ses::Type::register_session));
  REQUIRE(m->fds.size() == 3);
  const auto facts = sshd::read_facts(m->fds[0].get());
  REQUIRE(facts);
  CHECK(facts->connection_id == h.facts.connection_id);
  const auto body = m->body<ses::Register>();
  REQUIRE(body);
  CHECK(body->session_pid == h.session_pid);
  CHECK(body->net_pid == h.net_stand_in);
  (void)send_body(h.broker.get(), ses::version, static_cast<std::uint16_t>(ses::Type::registered), ses::Registered{1});
  write_all(r->input.get(), "two\n");
  CHECK(read_until(r->output.get(), "got two").find("got two") != std::string::npos);
  sshd::net::AskSign ask;
  (void)ask.data.set(std::string(32, 'h'));
  h.net_send(ch::Type::ask_sign, ask);
  const auto sign = h.broker_receive();
  REQUIRE(sign);
  CHECK(sign->type == static_cast<std::uint16_t>(ses::Type::ask_sign));
  h.revoke("Access revoked.");
  CHECK(h.session_died(8s));
}

TEST_CASE("a session that finds no broker ends at its orphan limit", "[session][broker]") {
  TestUser user;
  Harness h;
  h.facts.orphan_limit_seconds = 1;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "sleep 300");
  REQUIRE(r);
  h.broker.reset();
  const auto m = h.net_receive();
  REQUIRE(m);
  CHECK(m->type == static_cast<std::uint16_t>(ch::Type::disconnect));
  CHECK(h.session_died(10s));
}

TEST_CASE("the zygote goes when its broker goes, its sessions stay", "[session][broker]") {
  TestUser user;
  Harness h;
  h.log_in(user);
  h.control.reset();
  CHECK(eventually([&] { return is_gone(h.zygote_pid()); }));
  const auto o = run(h, 0, "echo still here");
  CHECK(o.out == "still here\n");
  h.revoke("end");
  CHECK(eventually([&] { return is_gone(h.session_pid); }));
}

TEST_CASE("an account that there is not is not found, and a denied session is gone", "[session][broker]") {
  Harness h;
  h.start_zygote();
  CHECK(h.look_up("no-such-user-here").found == 0);
  (void)send_message(h.broker.get(), ses::version, static_cast<std::uint16_t>(ses::Type::deny), {});
  const auto died = h.session_died();
  REQUIRE(died);
  CHECK(*died == 0);
  if (!is_root()) CHECK(h.look_up("root").found == 0);
}

TEST_CASE("facts of another account than the one looked up are refused", "[session][broker]") {
  TestUser user;
  Harness h;
  h.start_zygote();
  REQUIRE(h.look_up(user.name).found == 1);
  (void)h.facts.local_user.set("root");
  h.facts.uid = 0;
  if (!is_root() && user.uid == 0) return;
  CHECK(h.grant().ok == 0);
}

// --- PAM ------------------------------------------------------------------------------------------------------------------------

TEST_CASE("an account that PAM refuses does not get in, with one clear line", "[session][pam]") {
  TestUser user;
  Harness h;
  h.pam_service = "account required pam_deny.so\nsession required pam_permit.so\n";
  h.start_zygote();
  REQUIRE(h.look_up(user.name).found == 1);
  (void)h.facts.local_user.set(user.name);
  h.facts.uid = user.uid;
  const auto ready = h.grant();
  CHECK(ready.ok == 0);
  CHECK_FALSE(ready.text.get().empty());
  CHECK(ready.text.get().find('\n') == std::string_view::npos);
  CHECK(h.session_died());
}

TEST_CASE("PAM's environment, limits and umask are the user's, not the session process's", "[session][pam]") {
  TestUser user;
  Harness h;
  std::ofstream{h.folder.path + "/environment"} << "FROM_PAM=yes\nLANG=C.UTF-8\n";
  std::ofstream{h.folder.path + "/limits.conf"} << "* - nofile 777\n* - core 0\n";
  std::ofstream{h.folder.path + "/none"} << "";
  h.pam_service = "account required pam_permit.so\nauth required pam_permit.so\n"
                  "session optional pam_limits.so conf=" + h.folder.path + "/limits.conf\n"
                  "session optional pam_umask.so umask=027\n"
                  "session optional pam_env.so conffile=" + h.folder.path + "/none envfile=" + h.folder.path + "/environment\n"
                  "session required pam_permit.so\n";
  h.log_in(user);
  const auto o = run(h, 0, "echo $FROM_PAM; ulimit -n; umask; echo $LANG");
  CHECK(o.out == "yes\n777\n0027\nC.UTF-8\n");
  if (is_root()) {
    const auto limits = read_whole("/proc/" + std::to_string(h.session_pid) + "/limits");
    CHECK(line_of(limits, "Max open files").find(" 777 ") == std::string::npos);
  }
}

TEST_CASE("descriptors do not pile up over many sessions", "[session]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = 1;
  h.log_in(user);
  run(h, 0, "true");
  const auto settled = [&] {
    int n = 0;
    eventually([&] {
      const int before = n;
      n = count_fds(h.session_pid);
      return n == before;
    });
    return n;
  };
  const int before = settled();
  for (std::uint32_t i = 1; i < 40; i++) run(h, i, "true");
  CHECK(eventually([&] { return count_fds(h.session_pid) <= before; }));
}

// Not part of the suite: sshd_session_test "[.speed]" prints what one session costs between stand-ins.
TEST_CASE("speed of recorded output", "[.speed]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  const bool recorded = GENERATE(false, true);
  h.facts.record = recorded ? 1 : 0;
  h.log_in(user);
  const bool terminal = GENERATE(false, true);
  REQUIRE(h.open(0));
  if (terminal) REQUIRE(h.pty(0));
  constexpr std::size_t size = 256 * 1024 * 1024;
  const auto begin = std::chrono::steady_clock::now();
  auto r = h.start(0, ch::StartKind::exec, (terminal ? "stty raw; " : "") + std::string{"yes 0123456789abcdefghijklmnopqrstuvwxyz | head -c "} + std::to_string(size));
  REQUIRE(r);
  const int out = r->combined ? r->combined.get() : r->output.get();
  std::size_t got = 0;
  std::vector<char> buffer(256 * 1024);
  while (got < size) {
    pollfd p{out, POLLIN, 0};
    ::poll(&p, 1, 5000);
    const ssize_t n = ::read(out, buffer.data(), buffer.size());
    if (n <= 0 && errno != EAGAIN) break;
    if (n > 0) got += static_cast<std::size_t>(n);
  }
  const auto seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const auto stat = read_whole("/proc/" + std::to_string(h.session_pid) + "/stat");
  std::istringstream rest{stat.substr(stat.rfind(')') + 2)};
  std::string word;
  for (int i = 3; i < 14; i++) rest >> word;
  double user_ticks = 0, system_ticks = 0;
  rest >> user_ticks >> system_ticks;
  std::printf("%s %s: %.0f MiB/s; the session's CPU: user %.2f s, system %.2f s\n", terminal ? "terminal" : "pipe",
              recorded ? "recorded" : "unrecorded",
              static_cast<double>(got) / 1048576 / seconds, user_ticks / 100, system_ticks / 100);
}
