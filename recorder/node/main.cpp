// postern-recorder: takes recordings from relays, keeps them on disk, lists and hands them out.
//
// Runs as its own user without rights. Reads what relays and readers of allowed addresses send; all of it is hostile until parsed.
// Never links sshd, PAM or policy code, never trusts a recording's header, never calls a byte kept that is not on disk.

#include "base/daemon.h"
#include "base/log.h"
#include "recorder/node/server.h"
#include "recorder/node/settings.h"

#include <fmt/ranges.h>
#include <spdlog/spdlog.h>
#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>

#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

int main(int argc, char* argv[]) {
  using namespace postern;
  const auto read = read_daemon_options(argc, argv, "postern-recorder: keeps recordings", "/etc/postern/recorder.toml", "docs/SETTINGS.recorder.md",
                                        "postern-recorder " POSTERN_VERSION);
  if (const int* status = std::get_if<int>(&read)) return *status;
  const auto& options = std::get<DaemonOptions>(read);
  const auto settings = recorder::node::load_settings(options.config);
  if (!settings) {
    std::cerr << settings.error().doing << "\n";
    return 1;
  }
  if (options.check) {
    std::cout << options.config << ": ok\n";
    return 0;
  }
  set_up_log("postern-recorder", settings->log_level);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a file size limit is an error of one write
  ::umask(027);
  if (settings->ingest.empty()) spdlog::warn("event=nobody_may_upload hint=\"ingest.allow in {}\"", options.config);
  try {
    boost::asio::io_context io{1};
    boost::asio::signal_set signals{io, SIGTERM, SIGINT, SIGHUP};
    recorder::node::Server server{io, *settings};
    if (auto started = server.start(); !started) {
      std::cerr << "postern-recorder: " << started.error().doing << "\n";
      return 1;
    }
    boost::asio::steady_timer deadline{io};
    std::function<void()> wait;
    wait = [&] {
      signals.async_wait([&](const boost::system::error_code& ec, int number) {
        if (ec) return;
        if (number == SIGHUP) {
          if (auto again = recorder::node::load_settings(options.config)) {
            server.reload(*again);
            spdlog::info("event=settings_loaded file={} taken=\"ingest read\"", options.config);
          } else {
            spdlog::error("event=settings_kept reason={}", postern::safe_quoted(again.error().doing, 1000));
          }
          return wait();
        }
        spdlog::info("event=stopping signal={}", number);
        notify_systemd("STOPPING=1");
        server.stop([&] { io.stop(); });
        deadline.expires_after(settings->stop_timeout);
        deadline.async_wait([](const boost::system::error_code& error) {
          if (error) return;
          // The disk hangs, and with it the threads that we would wait for. Nothing that was acked is lost by this.
          spdlog::critical("event=stop_forced reason=\"storage does not answer\"");
          ::_exit(1);
        });
      });
    };
    wait();
    std::vector<std::string> listening;
    for (const auto& e : server.listening()) listening.push_back(e.text());
    spdlog::info("event=serving listening={}", fmt::join(listening, ","));
    tell_ready(options.ready_fd, listening);
    io.run();
    spdlog::info("event=stopped");
  } catch (const std::exception& e) {
    spdlog::critical("event=failed reason=\"{}\"", e.what());
    return 1;
  }
  return 0;
}
