// relay_feed: a session in a test's hand. Reads standard input as a program's output, encodes it, streams it to a relay by RelayLink
// and says on standard output, one line each, what the relay says. Ends at EOF of the input with the end, waits for `ended`.
//
//   relay_feed SOCKET RECORDER[,RECORDER...] [--enforce] [--id ID] [--no-end] [--command TEXT]
//
// Lines: "id ID", "written N", "journaled N", "committed N", "state S R", "connection 0|1", "journal_failed WHY", "ended",
// "raw N" (bytes read in all). Only the newest number of each kind is printed, at most every 5 ms.

#include "base/poller.h"
#include "recorder/cast/encoder.h"
#include "recorder/wire/relay_link.h"

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>

using namespace postern;
using namespace postern::recorder;

namespace {

std::uint64_t boot_time_ns() {
  timespec t{};
  ::clock_gettime(CLOCK_BOOTTIME, &t);
  return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(t.tv_nsec);
}

std::uint64_t own_start_time() {
  std::ifstream in{"/proc/self/stat"};
  const std::string text{std::istreambuf_iterator<char>{in}, {}};
  std::istringstream fields{text.substr(text.rfind(')') + 1)};
  std::string skipped;
  for (int field = 3; field < 22; field++) fields >> skipped;
  std::uint64_t n = 0;
  fields >> n;
  return n;
}

void say(const std::string& line) {
  std::cout << line << "\n" << std::flush;
}

}  // namespace

int main(int argc, char* argv[]) {
  if (argc < 3) return 2;
  wire::RecordingOpen open;
  open.recording = Id::random();
  bool want_end = true;
  std::string command = "relay_feed";
  std::stringstream list{argv[2]};
  for (std::string r; std::getline(list, r, ',');) open.recorders.push_back(r);
  for (int i = 3; i < argc; i++) {
    if (!std::strcmp(argv[i], "--enforce")) open.enforce = true;
    else if (!std::strcmp(argv[i], "--no-end")) want_end = false;
    else if (!std::strcmp(argv[i], "--id") && i + 1 < argc) open.recording = *Id::parse(argv[++i]);
    else if (!std::strcmp(argv[i], "--command") && i + 1 < argc) command = argv[++i];
    else return 2;
  }
  std::ifstream boot{"/proc/sys/kernel/random/boot_id"};
  std::getline(boot, open.boot_id);
  open.pid = ::getpid();
  open.start_time = own_start_time();
  say("id " + open.recording.text());

  Poller poller;
  std::uint64_t raw = 0, told_written = 0, told_journaled = 0, told_committed = 0;
  bool done = false, failed = false, input_over = false, reading = true;
  std::unique_ptr<wire::RelayLink> link;
  cast::Encoder encoder{boot_time_ns()};
  const auto report = [&] {
    if (link->written() != told_written) say("written " + std::to_string(told_written = link->written()));
    if (link->journaled() != told_journaled) say("journaled " + std::to_string(told_journaled = link->journaled()));
    if (link->committed() != told_committed) say("committed " + std::to_string(told_committed = link->committed()));
  };
  wire::RelayLink::Handlers handlers;
  handlers.state = [](wire::RecorderState s, const std::string& r) {
    const char* const names[] = {"searching", "recording", "none"};
    say(std::string{"state "} + names[static_cast<int>(s)] + " " + r);
  };
  handlers.connection = [](bool c) { say(c ? "connection 1" : "connection 0"); };
  handlers.journal_failed = [&](const std::string& why) {
    say("journal_failed " + why);
    failed = true;
  };
  handlers.ended = [&] {
    report();
    say("ended");
    done = true;
  };
  link = std::make_unique<wire::RelayLink>(poller, argv[1], open, std::move(handlers));
  cast::Header header;
  header.recording_id = open.recording.text();
  header.connection_id = Id::random().text();
  header.command = command;
  header.timestamp = ::time(nullptr);
  header.local_user = "nobody";
  link->append(cast::encode_header(header));

  std::string buffer(64 * 1024, '\0'), out;
  const auto on_input = [&](short) {
    const ssize_t n = ::read(STDIN_FILENO, buffer.data(), buffer.size());
    if (n <= 0) {
      poller.forget(STDIN_FILENO);
      input_over = true;
      if (want_end && !failed) {
        out.clear();
        encoder.exit("0", boot_time_ns(), out);
        link->append(out);
        link->end();
      }
      return;
    }
    raw += static_cast<std::uint64_t>(n);
    out.clear();
    encoder.output('o', std::as_bytes(std::span{buffer.data(), static_cast<std::size_t>(n)}), boot_time_ns(), out);
    link->append(out);
  };
  poller.watch(STDIN_FILENO, POLLIN, on_input);
  auto next = Poller::Clock::now();
  while (!done && !failed) {
    poller.run_once(std::chrono::milliseconds{20});
    if (!input_over) {
      const bool want = link->room() > 0;
      if (want != reading) {
        if (want)
          poller.set_events(STDIN_FILENO, POLLIN);
        else
          poller.disable(STDIN_FILENO);
        reading = want;
      }
    }
    if (Poller::Clock::now() >= next) {
      report();
      next = Poller::Clock::now() + std::chrono::milliseconds{5};
    }
    if (input_over && !want_end && link->written() == link->appended()) {
      report();
      break;
    }
  }
  say("raw " + std::to_string(raw));
  return failed ? 1 : 0;
}
