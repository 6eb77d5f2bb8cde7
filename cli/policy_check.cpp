// postern policy check FILE: all that is wrong with a policy file, as a compiler tells it, and whether its own tests hold.
#include "cli/policy.h"

#include <algorithm>
#include <iostream>
#include <memory>
#include <optional>
#include <utility>

namespace postern::cli::policy {
namespace {

struct Options {
  std::string file;
  Inputs inputs;
};

struct Finding {
  Severity severity;
  Problem problem;
  const std::string* text;  ///< of the file that the problem is in
};

struct Result {
  std::vector<Finding> findings;
  std::size_t rules = 0, tests_passed = 0;
  bool judged = false;  ///< the policy file was there

  std::size_t count(Severity severity) const {
    return static_cast<std::size_t>(std::count_if(findings.begin(), findings.end(), [&](const Finding& f) { return f.severity == severity; }));
  }
  void add(Severity severity, const std::vector<Problem>& problems, const std::string& text) {
    for (const auto& p : problems) findings.push_back({severity, p, &text});
  }
};

std::string counted(std::size_t n, const char* noun) { return std::to_string(n) + " " + noun + (n == 1 ? "" : "s"); }

OrderedJson json_of(const Result& result, Severity severity) {
  OrderedJson list = OrderedJson::array();
  for (const auto& f : result.findings) {
    if (f.severity != severity) continue;
    OrderedJson one{{"file", f.problem.place.file}};
    if (f.problem.place.line != 0) {
      one["line"] = f.problem.place.line;
      one["column"] = f.problem.place.column;
    }
    if (!f.problem.field.empty()) one["field"] = f.problem.field;
    one["message"] = f.problem.message;
    if (!f.problem.hint.empty()) one["hint"] = f.problem.hint;
    list.push_back(std::move(one));
  }
  return list;
}

void print(const Result& result, const std::string& name) {
  const std::string* text = nullptr;
  Lines lines{""};
  for (const auto& f : result.findings) {
    if (f.text != text) lines = Lines{*f.text};
    text = f.text;
    std::cout << cli::report(f.problem, f.severity, lines);
  }
  if (!result.judged) return;
  const std::size_t errors = result.count(Severity::error), warnings = result.count(Severity::warning);
  std::cout << printable(name) << ": ";
  if (errors == 0) {
    const std::size_t left_out = result.count(Severity::note);
    std::cout << "fine, " << counted(result.rules, "ssh rule") << ", "
              << (result.tests_passed + left_out == 0 ? "no tests" : counted(result.tests_passed, "test") + " passed")
              << (left_out == 0 ? "" : ", " + std::to_string(left_out) + " left out");
  } else {
    std::cout << "refused, " << counted(errors, "error");
  }
  std::cout << (warnings == 0 ? "" : ", " + counted(warnings, "warning")) << "\n";
}

/// The network, when one was named and can be read; else what is wrong with it is in `result`.
std::optional<NetworkFile> network_for(const Inputs& inputs, const Globals& globals, Source& source, Result& result) {
  if (inputs.network.empty()) return std::nullopt;
  auto read = read_network_source(inputs.network, globals);
  if (!read) {
    result.add(Severity::error, {read.error()}, source.text);
    return std::nullopt;
  }
  source = std::move(*read);
  auto network = auth::policy::read_network(source.text, source.name);
  if (network) return std::move(*network);
  result.add(Severity::error, network.error(), source.text);
  return std::nullopt;
}

/// What there is to say of the policy itself, in its order.
void judge(const Source& source, const Inputs& inputs, const std::optional<NetworkFile>& network, Result& result) {
  result.judged = true;
  const bool may_test = result.findings.empty();  // of a network that cannot be read nothing is known
  const auto policy = Policy::load(source.text, source.name, inputs.load_options(network.value_or(NetworkFile{})));
  if (!policy) return result.add(Severity::error, policy.error(), source.text);
  result.rules = policy->ssh_rule_count();
  const auto first = static_cast<std::ptrdiff_t>(result.findings.size());
  result.add(Severity::warning, policy->warnings(), source.text);
  if (may_test) {
    // posternd may see a part of the network only, and an imagined one has no given addresses.
    const bool whole = network && inputs.network != live;
    const auto tests = policy->run_tests(network ? network->network : policy->imagined_network(), whole);
    result.tests_passed = tests.passed;
    result.add(Severity::error, tests.failed, source.text);
    result.add(Severity::note, tests.left_out, source.text);
  }
  std::stable_sort(result.findings.begin() + first, result.findings.end(), [](const Finding& a, const Finding& b) {
    return std::pair{a.problem.place.line, a.problem.place.column} < std::pair{b.problem.place.line, b.problem.place.column};
  });
}

void check(const Options& options, const Globals& globals) {
  use_stdin_once({options.file, options.inputs.network});
  Result result;
  Source network_source, source{options.file, {}};
  const auto network = network_for(options.inputs, globals, network_source, result);
  if (auto read = read_source(options.file)) {
    source = std::move(*read);
    judge(source, options.inputs, network, result);
  } else {
    result.add(Severity::error, {read.error()}, source.text);
  }
  const bool fine = result.count(Severity::error) == 0;
  if (options.inputs.json)
    print_json({{"file", source.name}, {"fine", fine}, {"ssh_rules", result.rules}, {"tests_passed", result.tests_passed},
                {"errors", json_of(result, Severity::error)}, {"warnings", json_of(result, Severity::warning)},
                {"tests_left_out", json_of(result, Severity::note)}});
  else
    print(result, source.name);
  finish_output();
  if (!fine) throw Exit{1};
}

}  // namespace

void add_check(CLI::App& group, const Globals& globals) {
  auto options = std::make_shared<Options>();
  auto* const command = group.add_subcommand("check", "all that is wrong with a policy file; runs its tests and sshTests");
  command->add_option("FILE", options->file, "the policy file; - is standard input")->required();
  add_inputs(*command, options->inputs, "users and nodes to run the tests on: a file (docs/POLICY.md), or \"live\"; else those that the policy itself names");
  command->callback([options, &globals] { check(*options, globals); });
}

}  // namespace postern::cli::policy
