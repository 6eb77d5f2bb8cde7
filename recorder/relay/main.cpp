// postern-relay: carries recordings from the sessions of this host to the recorders.
//
// Runs as its own user without rights. Reads the sessions' encoded streams (from root, opaque bytes) and what recorders answer.
// Never encodes, never signs, knows neither keys nor policy.

#include "base/daemon.h"
#include "base/log.h"
#include "recorder/relay/relay.h"
#include "recorder/relay/settings.h"

#include <CLI/CLI.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <spdlog/spdlog.h>

#include <csignal>
#include <iostream>

int main(int argc, char* argv[]) {
  using namespace postern;
  CLI::App app{"postern-relay: carries recordings from this host's sessions to the recorders"};
  std::string config = "/etc/postern/relay.toml";
  bool check = false;
  int ready_fd = -1;
  app.add_option("--config", config, "settings (docs/SETTINGS.relay.md)");
  app.add_flag("--check-config", check, "read the settings, tell what is wrong, and end");
  app.add_option("--ready-fd", ready_fd, "write one line of JSON there when serving");
  app.set_version_flag("--version", "postern-relay " POSTERN_VERSION);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  const auto settings = recorder::relay::load_settings(config);
  if (!settings) {
    std::cerr << settings.error().doing << "\n";
    return 1;
  }
  if (check) {
    std::cout << config << ": ok\n";
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
    tell_ready(ready_fd, {settings->session_socket}, {{"control", settings->control_socket}});
    io.run();
    relay.stop();
  } catch (const std::exception& e) {
    spdlog::critical("event=failed reason=\"{}\"", e.what());
    return 1;
  }
  return 0;
}
