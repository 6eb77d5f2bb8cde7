// postern policy: tries a policy on paper. Reads files (or asks posternd who is in the network), decides, and prints; changes nothing.
#include "cli/policy.h"

#include "auth/policy/hujson.h"
#include "base/file.h"
#include "base/unique_fd.h"
#include "cli/control.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iostream>
#include <system_error>

namespace postern::cli {
namespace policy {
namespace {

[[noreturn]] void refuse(const std::vector<Problem>& problems, std::string_view text) {
  std::cerr << report(problems, Severity::error, text);
  throw Exit{1};
}

template <class T>
T take_or_refuse(Expected<T, std::vector<Problem>> loaded, const Source& source) {
  if (!loaded) refuse(loaded.error(), source.text);
  return std::move(*loaded);
}

Source take_or_refuse(Expected<Source, Problem> source) {
  if (!source) refuse({source.error()}, {});
  return std::move(*source);
}

}  // namespace

Expected<Source, Problem> read_source(const std::string& path) {
  constexpr std::size_t most = auth::policy::hujson::max_file_bytes;
  const bool is_stdin = path == "-";
  Source source{is_stdin ? "<stdin>" : path, {}};
  // Unlike posternd's, a pipe will do: postern policy check <(generate).
  const UniqueFd file{is_stdin ? -1 : ::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (!is_stdin && !file) return Unexpected{Problem{{source.name}, "", std::generic_category().message(errno), ""}};
  auto text = read_to_end(is_stdin ? STDIN_FILENO : file.get(), source.name, most);
  if (!text && text.error().code == EFBIG)
    return Unexpected{Problem{{source.name, 1, 1}, "", "the file is too large", "at most " + std::to_string(most) + " bytes"}};
  if (!text) return Unexpected{Problem{{source.name}, "", std::generic_category().message(text.error().code), ""}};
  source.text = std::move(*text);
  return source;
}

Expected<Source, Problem> read_network_source(const std::string& where, const Globals& globals) {
  if (where != live) return read_source(where);
  auto answer = ask_text(globals.control, {{"command", "network"}});
  if (!answer) return Unexpected{Problem{{"--network live"}, "", answer.error().doing, ""}};
  return Source{"--network live", std::move(*answer)};
}

void use_stdin_once(std::initializer_list<std::string> files) {
  if (std::count(files.begin(), files.end(), "-") > 1) throw CLI::ValidationError("-", "standard input can be one file only");
}

std::string report(const std::vector<Problem>& problems, Severity severity, std::string_view text) {
  const Lines lines{text};
  std::string all;
  for (const auto& p : problems) all += cli::report(p, severity, lines);
  return all;
}

CLI::Option* add_inputs(CLI::App& command, Inputs& inputs, const char* about_network) {
  auto* const network = command.add_option("--network", inputs.network, about_network);
  command.add_option("--session-capability", inputs.session_capability, "name of the app grant with session rules (setting policy.session_capability)");
  command.add_flag("--json", inputs.json, "answer in JSON");
  return network;
}

void add_question_inputs(CLI::App& command, Inputs& inputs) {
  add_inputs(command, inputs, "users and nodes: a file (docs/POLICY.md), or \"live\": what posternd knows now")->required();
  command.add_flag("--require-network-rule", inputs.require_network_rule, "an acl or grant has to open port 22 as well");
}

NetworkFile load_network(const Inputs& inputs, const Globals& globals) {
  const Source source = take_or_refuse(read_network_source(inputs.network, globals));
  return take_or_refuse(auth::policy::read_network(source.text, source.name), source);
}

Policy load_policy(const std::string& path, const Inputs& inputs, const NetworkFile& network) {
  const Source source = take_or_refuse(read_source(path));
  return take_or_refuse(Policy::load(source.text, source.name, inputs.load_options(network)), source);
}

End find_end(const Network& network, const std::string& name, const char* option) {
  for (const auto& node : network.nodes)
    if (node.name == name) return {&node, std::nullopt};
  for (const auto& node : network.nodes)
    if (node.id == name) return {&node, std::nullopt};
  if (const auto address = Address::parse(name))
    if (const Node* node = network.find(*address)) return {node, address};
  std::string some;
  for (std::size_t i = 0; i < network.nodes.size() && i < 5; i++) some += (i == 0 ? "" : ", ") + printable(network.nodes[i].name);
  if (network.nodes.size() > 5) some += ", ...";
  throw CLI::ValidationError(option, "no node is called \"" + printable(name) + "\" or has that address" +
                                         (some.empty() ? " (the network has no nodes)" : " (the network has " + some + ")"));
}

Verdict Login::decide(const Policy& policy, const Network& network, bool require_network_rule) const {
  return from_each_address([&](const auto& question) { return policy.decide(network, question, require_network_rule); },
                           [](const Verdict& v) { return v.denial != auth::policy::Denial::no_network_rule; });
}

auth::policy::Explanation Login::explain(const Policy& policy, const Network& network, bool require_network_rule) const {
  return from_each_address([&](const auto& question) { return policy.explain(network, question, require_network_rule); },
                           [](const auth::policy::Explanation& e) { return e.network_open; });
}

const char* word_of(auth::policy::Outcome outcome) noexcept {
  switch (outcome) {
    case auth::policy::Outcome::accept: return "accept";
    case auth::policy::Outcome::check: return "check";
    case auth::policy::Outcome::deny: break;
  }
  return "deny";
}

OrderedJson place_json(const Place& place) {
  if (place.line == 0) return nullptr;
  return {{"file", place.file}, {"line", place.line}, {"column", place.column}};
}

void print_json(const OrderedJson& json) {
  // ASCII alone: U+009B is a terminal's CSI, and a file may say anything.
  std::cout << json.dump(-1, ' ', true, OrderedJson::error_handler_t::replace) << "\n";
}

std::string joined(const std::vector<std::string>& words, const char* between) {
  std::string out;
  for (const auto& word : words) out += (out.empty() ? "" : between) + word;
  return out;
}

void finish_output() {
  std::cout.flush();
  if (std::cout) return;
  std::cerr << "postern policy: the answer could not be written\n";
  throw Exit{1};
}

}  // namespace policy

void add_policy(CLI::App& app, const Globals& globals) {
  CLI::App* group = app.add_subcommand("policy", "try a policy file on paper: what is wrong with it, and who gets in where");
  group->require_subcommand(1);
  policy::add_check(*group, globals);
  policy::add_decide_and_explain(*group, globals);
  policy::add_who_and_diff(*group, globals);
}

}  // namespace postern::cli
