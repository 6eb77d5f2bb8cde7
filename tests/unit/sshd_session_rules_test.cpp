// Session rules, as the real postern-session enforces them between stand-ins of broker, net and relay.
#include "tests/tools/session_harness.h"

#include "catch.h"
#include "recorder/cast/decoder.h"
#include "sshd/session/limits.h"

#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>

using namespace postern;
using namespace postern::test;

namespace {

using Rules = sshd::ConnectionFacts::Rules;
using Clock = std::chrono::steady_clock;

/// A folder that the test's user may write to.
struct OpenFolder : TemporaryFolder {
  OpenFolder() { ::chmod(path.c_str(), 01777); }
};

pid_t pid_from(const std::string& path) {
  pid_t pid = 0;
  eventually([&] {
    std::ifstream in{path};
    return static_cast<bool>(in >> pid) && pid > 0;
  });
  return pid;
}

/// The exact bytes of each stream of a recording, and the texts of its marks.
struct Cast {
  explicit Cast(const std::string& bytes) {
    recorder::cast::Decoder decoder{{[this](const auto& h) { header = h; }, [this](const auto& e) {
                                       if (e.code == "m") marks.push_back(e.text);
                                       streams[e.code] += e.bytes;
                                     },
                                     [this](auto, const auto& what) { problems.push_back(what); }}};
    decoder.feed(bytes);
    decoder.finish();
  }
  recorder::cast::Header header;
  std::map<std::string, std::string> streams;
  std::vector<std::string> marks, problems;
};

Cast recording_of(StandInRelay& relay) {
  REQUIRE(eventually([&] { return relay.ended(); }));
  return Cast{relay.bytes()};
}

int in_of(const Running& r) { return r.started.combined != 0 ? r.combined.get() : r.input.get(); }

/// The next message of the session to net that is of this type.
std::optional<Message> message_of(Harness& h, ch::Type type, std::chrono::milliseconds limit = 15s) {
  const auto until = Clock::now() + limit;
  while (Clock::now() < until) {
    auto m = h.net_receive(std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()));
    if (!m || m->type == static_cast<std::uint16_t>(type)) return m;
  }
  return std::nullopt;
}

std::string text_of_end(Harness& h, std::chrono::milliseconds limit = 15s) {
  const auto m = message_of(h, ch::Type::disconnect, limit);
  const auto d = m ? m->body<ch::Disconnect>() : std::nullopt;
  return d ? std::string{d->text.get()} : std::string{};
}

}  // namespace

// --- forced command -------------------------------------------------------------------------------------------------------------

TEST_CASE("a forced command runs for commands, shells and subsystems, and learns what was asked for", "[session][rules]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = GENERATE(0, 1);
  REQUIRE(h.facts.rules.command.set("echo \"forced ${SSH_ORIGINAL_COMMAND-nothing}\"; exit 4"));
  (void)h.facts.accept_env[0].set("*");
  h.facts.accept_env_count = 1;
  h.log_in(user);
  const auto result = [&](std::uint32_t channel, ch::StartKind kind, std::string_view text) {
    REQUIRE(h.open(channel));
    CHECK_FALSE(h.env(channel, "SSH_ORIGINAL_COMMAND", "a lie"));
    auto r = h.start(channel, kind, text);
    REQUIRE(r);
    const auto out = read_to_end(r->output.get());
    const auto e = h.exited();
    REQUIRE(e);
    CHECK(e->status == 4);
    return out;
  };
  CHECK(result(0, ch::StartKind::exec, "echo 'asked  for'; rm -rf \"$x\"") == "forced echo 'asked  for'; rm -rf \"$x\"\n");
  CHECK(result(1, ch::StartKind::exec, "") == "forced \n");
  CHECK(result(2, ch::StartKind::shell, "") == "forced nothing\n");
  CHECK(result(3, ch::StartKind::subsystem, "sftp") == "forced /usr/lib/openssh/sftp-server\n");  // as sshd 9.2: the subsystem's program
  REQUIRE(h.open(4));
  CHECK_FALSE(h.start(4, ch::StartKind::subsystem, "no-such-subsystem"));
}

TEST_CASE("a forced command on a terminal is no login shell", "[session][rules][pty]") {
  TestUser user;
  Harness h;
  REQUIRE(h.facts.rules.command.set("echo \"[$0] $(tty)\""));
  h.log_in(user);
  REQUIRE(h.open(0));
  REQUIRE(h.pty(0));
  auto r = h.start(0, ch::StartKind::shell, {});
  REQUIRE(r);
  const auto out = read_to_end(r->combined.get());
  CHECK(out.find("] /dev/pts/") != std::string::npos);
  CHECK(out.find("[-") == std::string::npos);
  CHECK(out.starts_with("["));  // no greeting before it
}

TEST_CASE("the recording names the forced command and what was asked for", "[session][rules][recording]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = 1;
  REQUIRE(h.facts.rules.command.set("echo forced"));
  h.log_in(user);
  CHECK(run(h, 0, "id -u").out == "forced\n");
  const auto cast = recording_of(relay);
  CHECK(cast.header.command == "echo forced");
  CHECK(cast.header.original_command == "id -u");
}

// --- sftp, pty, sessions --------------------------------------------------------------------------------------------------------

TEST_CASE("sftp can be read-only or not there at all", "[session][rules]") {
  TestUser user;
  Harness h;
  REQUIRE(h.facts.sftp_server.set("/bin/echo"));
  const auto rule = GENERATE(Rules::Sftp::full, Rules::Sftp::read_only, Rules::Sftp::none);
  h.facts.rules.sftp = rule;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::subsystem, "sftp");
  if (rule == Rules::Sftp::none) {
    CHECK_FALSE(r);
    CHECK(run(h, 1, "echo other things run").out == "other things run\n");
  } else {
    REQUIRE(r);
    CHECK(read_to_end(r->output.get()) == (rule == Rules::Sftp::read_only ? "-R\n" : "\n"));
  }
}

TEST_CASE("a forced command does not bring sftp back, and learns that it would have been read-only", "[session][rules]") {
  TestUser user;
  Harness h;
  REQUIRE(h.facts.rules.command.set("echo \"$SSH_ORIGINAL_COMMAND\""));
  h.facts.rules.sftp = GENERATE(Rules::Sftp::read_only, Rules::Sftp::none);
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::subsystem, "sftp");
  CHECK(r.has_value() == (h.facts.rules.sftp == Rules::Sftp::read_only));
  if (r) CHECK(read_to_end(r->output.get()) == "/usr/lib/openssh/sftp-server -R\n");
}

TEST_CASE("no terminal where the rules give none", "[session][rules]") {
  TestUser user;
  Harness h;
  h.facts.rules.no_pty = 1;
  h.log_in(user);
  REQUIRE(h.open(0));
  CHECK_FALSE(h.pty(0));
  auto r = h.start(0, ch::StartKind::exec, "tty");
  REQUIRE(r);
  CHECK(read_to_end(r->output.get()) == "not a tty\n");
}

TEST_CASE("the lower of both limits on sessions holds", "[session][rules]") {
  TestUser user;
  Harness h;
  const auto [of_rule, of_settings] = GENERATE(std::pair{2U, 5U}, std::pair{5U, 2U});
  h.facts.rules.max_sessions = of_rule;
  h.facts.sessions_per_connection = of_settings;
  h.log_in(user);
  CHECK(h.open(0));
  CHECK(h.open(1));
  CHECK_FALSE(h.open(2));
  h.close_channel(0);
  CHECK(h.open(3));
}

TEST_CASE("a rule of no session at all leaves none", "[session][rules]") {
  TestUser user;
  Harness h;
  h.facts.rules.max_sessions = 0;
  h.log_in(user);
  CHECK_FALSE(h.open(0));
}

// --- time -----------------------------------------------------------------------------------------------------------------------

TEST_CASE("the time of a connection ends it with all it started, whatever it does", "[session][rules]") {
  TestUser user;
  OpenFolder folder;
  Harness h;
  h.facts.rules.max_duration_seconds = 1;
  h.log_in(user);
  const auto begin = Clock::now();
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec,
                   "trap '' HUP TERM; setsid nohup sh -c 'trap \"\" HUP TERM; echo $$ > " + folder.path +
                       "/far; while :; do sleep 1; done' >/dev/null 2>&1 & echo $$ > " + folder.path + "/pid; while :; do echo busy; sleep 0.05; done");
  REQUIRE(r);
  const pid_t pid = pid_from(folder.path + "/pid"), far = pid_from(folder.path + "/far");
  REQUIRE(pid > 0);
  REQUIRE(far > 0);
  CHECK(text_of_end(h) == "Session timeout of 1s elapsed.");
  CHECK(Clock::now() - begin >= 900ms);
  CHECK(h.session_died(10s));
  CHECK(eventually([&] { return is_gone(pid) && is_gone(far); }, 1s));
  CHECK(eventually([&] { return is_gone(h.net_stand_in); }));
}

TEST_CASE("a connection without any session has its time, too", "[session][rules]") {
  TestUser user;
  Harness h;
  h.facts.rules.max_duration_seconds = 1;
  h.log_in(user);
  CHECK(text_of_end(h) == "Session timeout of 1s elapsed.");
  CHECK(h.session_died(10s));
}

TEST_CASE("a connection on which nothing moves ends after its idle time", "[session][rules]") {
  TestUser user;
  Harness h;
  h.facts.rules.idle_timeout_seconds = 1;
  h.log_in(user);
  const auto m = message_of(h, ch::Type::watch_activity);
  REQUIRE(m);
  const auto asked = m->body<ch::WatchActivity>();
  REQUIRE(asked);
  CHECK(asked->interval_ms == 50);
  const bool with_session = GENERATE(false, true);
  if (with_session) {
    REQUIRE(h.open(0));
    REQUIRE(h.start(0, ch::StartKind::exec, "sleep 300"));
  }
  const auto begin = Clock::now();
  CHECK(text_of_end(h) == "Idle timeout of 1s elapsed.");
  CHECK(Clock::now() - begin >= (with_session ? 900ms : 0ms));
  CHECK(h.session_died(10s));
}

TEST_CASE("what net saw moving keeps the connection, and only so long", "[session][rules]") {
  TestUser user;
  Harness h;
  h.facts.rules.idle_timeout_seconds = 1;
  h.log_in(user);
  REQUIRE(message_of(h, ch::Type::watch_activity));
  const auto begin = Clock::now();
  auto last = begin;
  while (Clock::now() - begin < 2500ms) {
    last = Clock::now();
    h.net_send(ch::Type::activity, ch::Activity{});
    pollfd p{h.net.get(), POLLIN, 0};
    REQUIRE(::poll(&p, 1, 100) == 0);  // no word of an end
  }
  CHECK(text_of_end(h) == "Idle timeout of 1s elapsed.");
  CHECK(Clock::now() - last >= 1s);
}

TEST_CASE("a net that reports what nobody asked for is no sound net", "[session][rules][hostile]") {
  TestUser user;
  Harness h;
  h.log_in(user);
  REQUIRE(h.open(0));
  h.net_send(ch::Type::activity, ch::Activity{});
  CHECK(h.session_died());
  CHECK(eventually([&] { return is_gone(h.net_stand_in); }));
}

// --- input in the recording -----------------------------------------------------------------------------------------------------

TEST_CASE("typed input is in the recording where a rule says so, and nowhere else", "[session][rules][recording]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = 1;
  const bool terminal = GENERATE(false, true), recorded = GENERATE(false, true);
  h.facts.rules.record_input = recorded ? 1 : 0;
  h.log_in(user);
  REQUIRE(h.open(0));
  if (terminal) REQUIRE(h.pty(0));
  auto r = h.start(0, ch::StartKind::exec, "echo ready; read line; echo got ${#line}");
  REQUIRE(r);
  read_until(r->output.get(), "ready");
  write_all(in_of(*r), "caf\xc3\xa9\n");
  read_until(r->output.get(), "got ");
  REQUIRE(h.exited());
  h.close_channel(0);
  const auto cast = recording_of(relay);
  CHECK(cast.problems.empty());
  CHECK(cast.streams.contains("i") == recorded);
  if (recorded) CHECK(cast.streams.at("i") == "caf\xc3\xa9\n");
  CHECK((cast.streams.at("o").find("caf\xc3\xa9") != std::string::npos) == terminal);  // its echo
}

TEST_CASE("a password typed without echo is not in the recording, and a mark says that something was typed", "[session][rules][recording][pty]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = h.facts.rules.record_input = 1;
  h.log_in(user);
  REQUIRE(h.open(0));
  REQUIRE(h.pty(0));
  auto r = h.start(0, ch::StartKind::exec, "read first; stty -echo; echo password:; read secret; stty echo; echo again:; read last; echo done ${#secret}");
  REQUIRE(r);
  write_all(in_of(*r), "before\n");
  read_until(r->output.get(), "password:");
  for (const char* key : {"h", "u", "n", "t", "e", "r", "2", "\n"}) write_all(in_of(*r), key);
  read_until(r->output.get(), "again:");
  write_all(in_of(*r), "after\n");
  CHECK(read_until(r->output.get(), "done ").find("done ") != std::string::npos);
  REQUIRE(h.exited());
  const auto cast = recording_of(relay);
  CHECK(cast.streams.at("i") == "before\nafter\n");
  CHECK(relay.bytes().find("hunter") == std::string::npos);
  CHECK(cast.marks == std::vector<std::string>{"input: not recorded while the terminal does not echo"});  // one: not how many keys, nor when
  CHECK(cast.streams.at("o").find("done 7") != std::string::npos);
}

TEST_CASE("what is typed at a program that reads keys itself is in the recording", "[session][rules][recording][pty]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = h.facts.rules.record_input = 1;
  h.log_in(user);
  REQUIRE(h.open(0));
  REQUIRE(h.pty(0));
  // No echo, no lines: an editor, or readline at a shell's prompt.
  auto r = h.start(0, ch::StartKind::exec, "stty raw -echo; echo ready; head -c 4 >/dev/null; echo done");
  REQUIRE(r);
  read_until(r->output.get(), "ready");
  write_all(in_of(*r), "\x1b[A\xff");
  read_until(r->output.get(), "done");
  REQUIRE(h.exited());
  const auto cast = recording_of(relay);
  CHECK(cast.streams.at("i") == "\x1b[A\xff");
  CHECK(cast.problems.empty());
}

TEST_CASE("8 MiB of any bytes go to a program and into the recording, with their end", "[session][rules][recording]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = h.facts.rules.record_input = 1;
  h.log_in(user);
  std::string bytes(8 * 1024 * 1024, '\0');
  std::uint32_t x = 88172645;
  for (auto& c : bytes) {
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    c = static_cast<char>(x);
  }
  const auto o = run(h, 0, "wc -c; echo end", bytes);
  std::istringstream out{o.out};
  std::size_t count = 0;
  out >> count;
  CHECK(count == bytes.size());
  CHECK(o.out.ends_with("end\n"));
  const auto cast = recording_of(relay);
  CHECK(cast.problems.empty());
  CHECK((cast.streams.at("i") == bytes));
  CHECK(cast.streams.at("o") == o.out);
}

TEST_CASE("a program that closes its input is seen by net, recorded or not", "[session][rules][recording]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = 1;
  h.facts.rules.record_input = GENERATE(0, 1);
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "exec <&-; echo closed; sleep 300");
  REQUIRE(r);
  read_until(r->output.get(), "closed");
  CHECK(eventually([&] {
    pollfd p{r->input.get(), 0, 0};
    return ::poll(&p, 1, 0) > 0 && (p.revents & POLLERR) != 0;
  }));
}

TEST_CASE("input for a program that does not read waits in the pipes, and what was taken is recorded", "[session][rules][recording]") {
  TestUser user;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = h.facts.rules.record_input = 1;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "echo ready; read go < /dev/tty 2>/dev/null; sleep 300");
  REQUIRE(r);
  read_until(r->output.get(), "ready");
  // Two pipes of 1 MiB and one read of ours: more does not go in, and nothing grows.
  const std::string piece(64 * 1024, 'x');
  std::size_t taken = 0;
  while (taken < 16 * 1024 * 1024) {
    pollfd p{r->input.get(), POLLOUT, 0};
    if (::poll(&p, 1, 500) <= 0) break;
    const ssize_t n = ::write(r->input.get(), piece.data(), piece.size());
    if (n <= 0) break;
    taken += static_cast<std::size_t>(n);
  }
  CHECK(taken <= 3 * 1024 * 1024);
  CHECK(taken >= 64 * 1024);
}

TEST_CASE("input reaches a program whose output waits for a relay that is away", "[session][rules][recording][pty]") {
  TestUser user;
  OpenFolder folder;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = h.facts.rules.record_input = 1;
  h.facts.recorder_grace_ms = 60'000;
  h.log_in(user);
  const bool terminal = GENERATE(false, true);
  REQUIRE(h.open(0));
  if (terminal) REQUIRE(h.pty(0));
  // On a terminal a Ctrl-C. A control character takes six times its own room in the recording: without a terminal one read alone overfills it.
  const std::string got = "echo got > " + folder.path + "/got", flood = "echo ready; head -c 8388608 /dev/zero; sleep 300";
  auto r = h.start(0, ch::StartKind::exec, terminal ? "trap '" + got + "; exit 1' INT; stty -opost; " + flood : "(read go; " + got + ") <&0 & " + flood);
  REQUIRE(r);
  read_until(r->output.get(), "ready");
  relay.stop();
  // The recording has no room any more: the program stops in the middle of a write.
  CHECK(eventually([&] {
    pollfd p{r->output.get(), POLLIN, 0};
    char buffer[65536];
    while (::poll(&p, 1, 100) > 0)
      if (::read(r->output.get(), buffer, sizeof buffer) <= 0) return false;
    return true;
  }));
  write_all(in_of(*r), terminal ? "\x03" : "go\n");
  CHECK(eventually([&] { return read_whole(folder.path + "/got") == "got\n"; }));
  relay.start();
}

TEST_CASE("fail closed: what is typed once nobody records reaches no program", "[session][rules][recording]") {
  TestUser user;
  OpenFolder folder;
  Harness h;
  StandInRelay relay{h.folder.path + "/relay.sock"};
  h.facts.record = h.facts.enforce_recorder = h.facts.rules.record_input = 1;
  h.facts.recorder_grace_ms = 300;
  h.log_in(user);
  REQUIRE(h.open(0));
  auto r = h.start(0, ch::StartKind::exec, "echo $$ > " + folder.path + "/pid; echo ready; cat > " + folder.path + "/got");
  REQUIRE(r);
  read_until(r->output.get(), "ready");
  relay.fails = true;
  write_all(r->input.get(), "x\n");  // its data makes the relay say that the journal has failed
  const auto text = read_to_end(r->error.get());
  CHECK(text.find("ecording is required") != std::string::npos);
  const auto e = h.exited();
  REQUIRE(e);
  CHECK(e->status == 254);
  const pid_t pid = pid_from(folder.path + "/pid");
  CHECK(eventually([&] { return is_gone(pid); }));
}
