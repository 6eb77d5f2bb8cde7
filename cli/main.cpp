// postern: the command for people. Replays and lists recordings, lists and ends sessions, tries policies on paper.
//
// Runs as whoever calls it and has no rights of its own: what it may see and do is decided by the sockets and recorders it asks.

#include "cli/command.h"

#include <iostream>

int main(int argc, char* argv[]) {
  using namespace postern::cli;
  CLI::App app{"Postern: look at sessions and recordings, and try policies on paper"};
  app.set_version_flag("--version", "postern " POSTERN_VERSION);
  app.require_subcommand(1);
  Globals globals;
  app.add_option("--control", globals.control, "posternd's control socket")->envname("POSTERN_CONTROL")->capture_default_str();

  add_host_keys(app, globals);
  add_known_hosts(app);
  add_play(app);
  add_policy(app, globals);
  add_recordings(app);
  add_sessions(app, globals);

  try {
    app.parse(argc, argv);
  } catch (const Exit& e) {
    return e.get_exit_code();
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  } catch (const std::exception& e) {
    std::cerr << "postern: " << e.what() << "\n";
    return 1;
  }
  return 0;
}
