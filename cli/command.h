#pragma once

#include <CLI/CLI.hpp>

#include <string>

namespace postern::cli {

/// What every command may need; given before the command ("postern --control PATH sessions ls").
struct Globals {
  std::string control = "/run/postern/control.sock";  ///< posternd's
};

/// A command ends with an exit code other than 0 by throwing Exit{code}; it has said why on stderr.
/// Codes: 0 done, 1 it could not be done, 2 wrong usage.
using Exit = CLI::RuntimeError;

// One file a command: its options, and what it does, as the subcommand's callback.
void add_host_keys(CLI::App& app, const Globals& globals);
void add_known_hosts(CLI::App& app);
void add_play(CLI::App& app);
void add_policy(CLI::App& app, const Globals& globals);
void add_recordings(CLI::App& app);
void add_sessions(CLI::App& app, const Globals& globals);

}  // namespace postern::cli
