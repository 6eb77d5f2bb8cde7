// postern-relay: carries recordings from the sessions of this host to the recorders.
//
// Runs as its own user without rights. Reads the sessions' encoded streams (from root, opaque bytes) and what recorders answer.
// Never encodes, never signs, knows neither keys nor policy.

#include "base/daemon.h"
#include "base/log.h"
#include "recorder/relay/relay.h"
#include "recorder/relay/settings.h"

#include <spdlog/spdlog.h>
#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>

#include <csignal>
#include <iostream>

int main(int argc, char* argv[]) {
  using namespace postern;
  const auto read = read_daemon_options(argc, argv, "postern-relay: carries recordings from this host's sessions to the recorders", "/etc/postern/relay.toml",
                                        "docs/SETTINGS.relay.md", "postern-relay " POSTERN_VERSION);
  if (const int* status = std::get_if<int>(&read)) return *status;
  const auto& options = std::get<DaemonOptions>(read);
  const auto settings = recorder::relay::load_settings(options.config);
  if (!settings) {
    std::cerr << settings.error().doing << "\n";
    return 1;
  }
  if (options.check) {
    std::cout << options.config << ": ok\n";
    return 0;
  }
  set_up_log("postern-relay", settings->log_level);
  std::signal(SIGPIPE, SIG_IGN);
  try {
    boost::asio::io_context io{1};
    boost::asio::signal_set signals{io, SIGTERM, SIGINT};
    recorder::relay::Relay relay{io, *settings};
    if (auto started = relay.start(); !started) {
      std::cerr << "postern-relay: " << started.error().doing << "\n";
      return 1;
    }
    signals.async_wait([&](boost::system::error_code, int number) {
      spdlog::info("event=stopping signal={}", number);
      notify_systemd("STOPPING=1");
      relay.stop();
      io.stop();
    });
    spdlog::info("event=serving socket={} journal={}", settings->session_socket, settings->journal.dir.string());
    tell_ready(options.ready_fd, {settings->session_socket}, {{"control", settings->control_socket}});
    io.run();
    relay.stop();
  } catch (const std::exception& e) {
    spdlog::critical("event=failed reason=\"{}\"", e.what());
    return 1;
  }
  return 0;
}
