#pragma once

#include "auth/policy/network_file.h"
#include "auth/policy/policy.h"
#include "base/expected.h"
#include "cli/command.h"
#include "cli/report.h"

#include <nlohmann/json.hpp>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

// What the commands of `postern policy` share: files, networks, nodes, and how a verdict is put into words. They ask the same
// auth::policy::Policy that posternd asks, and decide nothing themselves.
namespace postern::cli::policy {

using auth::policy::NetworkFile;
using auth::policy::Policy;
using auth::policy::Verdict;
using OrderedJson = nlohmann::ordered_json;

/// A file, and what it is called in reports.
struct Source {
  std::string name, text;
};
/// Reads `path` ("-": standard input), at most as much as a policy may have.
Expected<Source, Problem> read_source(const std::string& path);
/// Wrong usage (exit 2) when more than one of them is "-".
void use_stdin_once(std::initializer_list<std::string> files);
/// `where`: a file, "-", or "live": what posternd's identity provider knows.
Expected<Source, Problem> read_network_source(const std::string& where, const Globals& globals);

std::string report(const std::vector<Problem>& problems, Severity severity, std::string_view text);

/// Stands for a network file in --network.
inline constexpr std::string_view live = "live";

/// What a policy is judged with.
struct Inputs {
  std::string network;  ///< a file, "-", or "live"
  std::optional<std::string> session_capability;
  bool require_network_rule = false;
  bool json = false;

  // What is not said here posternd may have said (--network live).
  std::string capability(const NetworkFile& file) const {
    return session_capability.value_or(file.session_capability.value_or(std::string{auth::policy::default_session_capability}));
  }
  bool needs_network_rule(const NetworkFile& file) const { return require_network_rule || file.require_network_rule.value_or(false); }
  auth::policy::LoadOptions load_options(const NetworkFile& file) const { return {capability(file), file.domains}; }
};
/// --network, --session-capability, --json. Returns the first.
CLI::Option* add_inputs(CLI::App& command, Inputs& inputs, const char* about_network);
/// The same for the commands that ask questions: they need a network, and may need a network rule.
void add_question_inputs(CLI::App& command, Inputs& inputs);

/// For the commands that ask questions: what cannot be used is told on stderr, and the command ends with 1.
NetworkFile load_network(const Inputs& inputs, const Globals& globals);
Policy load_policy(const std::string& path, const Inputs& inputs, const NetworkFile& network);

/// One end of a login: a node, and the address it was named by, if it was.
struct End {
  const Node* node = nullptr;
  std::optional<Address> address;
};
/// By name, id or address. Wrong usage (exit 2) when there is none.
End find_end(const Network& network, const std::string& name, const char* option);

/// Decides as if `ssh_user` were an account of its own, with a uid other than 0 unless it is root or `uid` says so.
///
/// A source that was named without an address may come from any that it has: the first that a network rule lets through counts.
struct Login {
  End source, destination;
  std::string ssh_user;
  std::optional<std::uint32_t> uid;

  /// ask(question) for one address of the source after the other, until is_open(answer): a network rule opened the port.
  template <class Ask, class IsOpen>
  auto from_each_address(const Ask& ask, const IsOpen& is_open) const {
    std::vector<Address> addresses = source.node->addresses;
    if (source.address || addresses.empty()) addresses.assign(1, source.address.value_or(Address{}));
    for (std::size_t i = 0;; i++) {
      auto answer = ask(auth::policy::Question{.source = *source.node,
                                               .source_address = addresses[i],
                                               .destination = *destination.node,
                                               .ssh_user = ssh_user,
                                               .uid = uid ? *uid : ssh_user == "root" ? 0U : 1000U,
                                               .destination_address = destination.address});
      if (i + 1 == addresses.size() || is_open(answer)) return answer;
    }
  }
  Verdict decide(const Policy& policy, const Network& network, bool require_network_rule) const;
  auth::policy::Explanation explain(const Policy& policy, const Network& network, bool require_network_rule) const;
};

const char* word_of(auth::policy::Outcome outcome) noexcept;  ///< "accept" "check" "deny"
OrderedJson place_json(const Place& place);                    ///< null when there is none
void print_json(const OrderedJson& json);                      ///< a line, ASCII alone
std::string joined(const std::vector<std::string>& words, const char* between);

/// Ends a command whose output could not be written (a full disk; a pager that was left ends us by SIGPIPE).
void finish_output();

void add_check(CLI::App& group, const Globals& globals);
void add_decide_and_explain(CLI::App& group, const Globals& globals);
void add_who_and_diff(CLI::App& group, const Globals& globals);

}  // namespace postern::cli::policy
