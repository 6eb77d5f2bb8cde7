// postern play FILE|URL: replays a recording in the terminal, or gives back its exact bytes.

#include "base/log.h"
#include "cli/command.h"
#include "cli/http.h"
#include "recorder/cast/decoder.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <iostream>
#include <memory>
#include <thread>

#include "base/unique_fd.h"

namespace postern::cli {
namespace {

struct Options {
  std::string source;
  double speed = 1;
  double idle_limit = 0;
  bool raw = false, of_stderr = false;
  std::string bind_to;
};

[[noreturn]] void fail(const std::string& what) {
  std::cerr << "postern play: " << what << "\n";
  throw Exit{1};
}

void put(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw Exit{1};  // a pager that was left
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
}

class Player {
 public:
  explicit Player(const Options& options)
      : options_{options},
        decoder_{{[this](const recorder::cast::Header&) { header_ = true; }, [this](const recorder::cast::Event& e) { on_event(e); },
                  [](std::uint64_t line, const std::string& what) { std::cerr << "postern play: line " << line << ": " << what << "\n"; }}} {}

  void feed(std::string_view bytes) { decoder_.feed(bytes); }
  bool finish() {
    decoder_.finish();  // what is cut was told, and what there is was shown
    return header_;
  }

 private:
  void on_event(const recorder::cast::Event& e) {
    if (e.code != "o" && e.code != "e") return;
    if (options_.raw) {
      if (e.code == (options_.of_stderr ? "e" : "o")) put(STDOUT_FILENO, e.bytes);
      return;
    }
    double pause = std::max(e.time - last_, 0.0);
    last_ = std::max(last_, e.time);
    if (options_.idle_limit > 0) pause = std::min(pause, options_.idle_limit);
    due_ += std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>{std::min(pause / options_.speed, 1e6)});
    std::this_thread::sleep_until(due_);
    if (e.code == "o" ? !options_.of_stderr : true) put(e.code == "o" ? STDOUT_FILENO : STDERR_FILENO, e.bytes);
  }

  const Options& options_;
  recorder::cast::Decoder decoder_;
  bool header_ = false;
  double last_ = 0;
  std::chrono::steady_clock::time_point due_ = std::chrono::steady_clock::now();
};

void play(const Options& options) {
  Player player{options};
  if (options.source.rfind("http://", 0) == 0) {
    const auto url = parse_url(options.source);
    if (!url) fail(url.error().doing);
    std::string refusal;
    unsigned status = 0;
    const auto done = http_get(
        *url, options.bind_to,
        [&](const Answer& answer) {
          status = answer.status;
          if (const auto state = answer.headers.find("postern-state"); state != answer.headers.end() && state->second != "whole")
            std::cerr << "postern play: this copy is " << safe_quoted(state->second, 20) << "\n";
          return true;
        },
        [&](std::string_view bytes) {
          if (status == 200)
            player.feed(bytes);
          else if (refusal.size() < 1000)
            refusal += bytes;
          return true;
        },
        std::chrono::seconds{60});
    if (!done) fail(done.error().doing);
    if (status != 200) fail(options.source + ": HTTP status " + std::to_string(status) + (refusal.empty() ? "" : ": " + safe_quoted(refusal)));
  } else {
    const UniqueFd file{::open(options.source.c_str(), O_RDONLY | O_CLOEXEC)};
    if (!file) fail(options.source + ": " + std::strerror(errno));
    std::array<char, 64 * 1024> piece;
    for (;;) {
      const ssize_t n = ::read(file.get(), piece.data(), piece.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail(options.source + ": " + std::strerror(errno));
      if (n == 0) break;
      player.feed({piece.data(), static_cast<std::size_t>(n)});
    }
  }
  if (!player.finish()) throw Exit{1};
}

}  // namespace

void add_play(CLI::App& app) {
  auto options = std::make_shared<Options>();
  auto* const command = app.add_subcommand("play", "replay a recording in the terminal");
  command->add_option("source", options->source, "a .cast file, or http://recorder:port/postern/v1/recordings/ID")->required();
  command->add_option("--speed", options->speed, "times faster than it was")->check(CLI::Range(0.01, 1e9))->capture_default_str();
  command->add_option("--idle-limit", options->idle_limit, "longest pause in seconds; 0 = as it was")->check(CLI::Range(0.0, 1e9));
  command->add_flag("--raw", options->raw, "no timing: the exact bytes of standard output (or of the terminal)");
  command->add_flag("--stderr", options->of_stderr, "standard error alone");
  command->add_option("--bind", options->bind_to, "address of this machine to ask from");
  command->callback([options] { play(*options); });
}

}  // namespace postern::cli
