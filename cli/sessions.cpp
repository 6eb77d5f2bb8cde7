// postern sessions ls|kill, postern status: talks to posternd's control socket (root, or the user that runs posternd).
#include "cli/command.h"
#include "cli/control.h"

#include <CLI/CLI.hpp>

#include <ctime>
#include <iomanip>
#include <iostream>

namespace postern::cli {
namespace {

using json = nlohmann::json;

std::string since(std::int64_t when) {
  const auto seconds = static_cast<std::int64_t>(std::time(nullptr)) - when;
  if (seconds < 120) return std::to_string(seconds) + "s";
  if (seconds < 7200) return std::to_string(seconds / 60) + "m";
  return std::to_string(seconds / 3600) + "h";
}

int list(const std::string& socket, bool as_json) {
  const auto answer = ask(socket, {{"command", "ls"}});
  if (!answer) {
    std::cerr << "postern: " << answer.error().doing << "\n";
    return 1;
  }
  const json& connections = (*answer)["connections"];
  if (as_json) {
    for (const auto& c : connections) std::cout << c.dump() << "\n";
    return 0;
  }
  std::cout << std::left << std::setw(28) << "CONNECTION" << std::setw(18) << "LOCAL USER" << std::setw(28) << "WHO" << std::setw(24) << "FROM" << std::setw(8)
            << "SINCE" << std::setw(6) << "OPEN" << "RECORDING\n";
  for (const auto& c : connections) {
    const std::string user = c["user"], tags = c["tags"];
    std::cout << std::setw(28) << c["connection"].get<std::string>() << std::setw(18) << c["local_user"].get<std::string>() << std::setw(28)
              << (user.empty() ? tags : user) << std::setw(24) << c["peer"].get<std::string>() << std::setw(8) << since(c["since"]) << std::setw(6)
              << c["channels"].get<unsigned>() << (!c["recorded"].get<bool>() ? "no" : c["enforced"].get<bool>() ? "enforced" : "yes") << "\n";
  }
  return 0;
}

int kill(const std::string& socket, const std::string& id, bool all, bool as_json) {
  const auto answer = ask(socket, all ? json{{"command", "kill"}, {"all", true}} : json{{"command", "kill"}, {"connection", id}});
  if (!answer) {
    std::cerr << "postern: " << answer.error().doing << "\n";
    return 1;
  }
  const auto killed = (*answer)["killed"].get<unsigned>();
  if (as_json) std::cout << answer->dump() << "\n";
  else std::cout << killed << (killed == 1 ? " connection ended\n" : " connections ended\n");
  return killed == 0 && !all ? 1 : 0;
}

}  // namespace

void add_sessions(CLI::App& app, const Globals& globals) {
  struct Options {
    std::string id;
    bool json = false, all = false;
  };
  auto options = std::make_shared<Options>();
  const auto end_with = [](int code) {
    if (code != 0) throw Exit{code};
  };
  CLI::App* sessions = app.add_subcommand("sessions", "live connections");
  sessions->require_subcommand(1);
  CLI::App* ls = sessions->add_subcommand("ls", "who is in");
  ls->add_flag("--json", options->json, "a JSON object a line");
  ls->callback([=, &globals] { end_with(list(globals.control, options->json)); });
  CLI::App* end = sessions->add_subcommand("kill", "end one connection with all its programs, or all of them");
  auto* id = end->add_option("CONNECTION", options->id, "as `postern sessions ls` shows it");
  end->add_flag("--all", options->all, "every connection")->excludes(id);
  end->add_flag("--json", options->json, "the answer as JSON");
  end->callback([=, &globals] {
    if (!options->all && options->id.empty()) throw CLI::RequiredError("CONNECTION or --all");
    end_with(kill(globals.control, options->id, options->all, options->json));
  });
  CLI::App* status = app.add_subcommand("status", "where posternd listens, its policy and host keys (JSON)");
  status->callback([=, &globals] {
    const auto answer = ask(globals.control, {{"command", "status"}});
    if (!answer) {
      std::cerr << "postern: " << answer.error().doing << "\n";
      return end_with(1);
    }
    std::cout << answer->dump(2) << "\n";
  });
}

}  // namespace postern::cli
