// policy_bench POLICY NETWORK QUESTIONS: loads a policy, answers questions as posternd does, and says how long that took (JSON).
//
// Beside each load stands nlohmann::json::parse of the same text (a JSON reader that most C++ programs use, comments on): reading is the
// least that any implementation has to do. Beside each decision stands the same by looking at every rule in turn (Policy::explain).
#include "auth/policy/network_file.h"
#include "auth/policy/policy.h"
#include "base/file.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <random>

using namespace postern;
using namespace postern::auth::policy;

namespace {

using Clock = std::chrono::steady_clock;

template <class Unit>
double since(Clock::time_point begin) {
  return std::chrono::duration<double, Unit>(Clock::now() - begin).count();
}

double percentile(std::vector<double> values, double part) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<std::size_t>(part * static_cast<double>(values.size())))];
}

[[noreturn]] void stop(const std::string& why) {
  std::cerr << why << "\n";
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) stop("usage: policy_bench POLICY NETWORK QUESTIONS");
  constexpr std::size_t largest = 64 * 1024 * 1024;
  const auto text = read_whole_file(argv[1], largest), network_text = read_whole_file(argv[2], largest);
  if (!text || !network_text) stop("cannot read " + std::string{text ? argv[2] : argv[1]});
  const auto file = read_network(*network_text, argv[2]);
  if (!file) stop(file.error().front().text());
  const Network& network = file->network;

  std::vector<double> loads, reads;
  for (int round = 0; round < 7; round++) {
    auto begin = Clock::now();
    const auto loaded = Policy::load(*text, argv[1]);
    loads.push_back(since<std::milli>(begin));
    if (!loaded) stop(loaded.error().front().text());
    begin = Clock::now();
    const auto parsed = nlohmann::json::parse(*text, nullptr, false, true);
    reads.push_back(since<std::milli>(begin));
    if (parsed.is_discarded()) stop("the peer does not read this file");
  }

  const auto policy = Policy::load(*text, argv[1]);
  const auto names = policy->user_names().literal;
  std::mt19937 random{1};
  const auto any = [&](const auto& of) -> const auto& { return of[random() % of.size()]; };
  std::vector<double> decisions, scans;
  std::size_t let_in = 0;
  const auto questions = std::strtoul(argv[3], nullptr, 10);
  for (std::size_t i = 0; i < questions; i++) {
    const Node &source = any(network.nodes), &destination = any(network.nodes);
    const Question question{source, source.addresses.front(), destination, any(names), 1000};
    const auto begin = Clock::now();
    const auto verdict = policy->decide(network, question);
    decisions.push_back(since<std::micro>(begin));
    let_in += verdict.outcome != Outcome::deny;
  }
  // Apart from them: a scan leaves nothing in the caches for the decision after it.
  for (std::size_t i = 0; i < 100; i++) {
    const Node &source = any(network.nodes), &destination = any(network.nodes);
    const auto begin = Clock::now();
    (void)policy->explain(network, {source, source.addresses.front(), destination, any(names), 1000});
    scans.push_back(since<std::micro>(begin));
  }
  std::cout << nlohmann::json{{"bytes", text->size()}, {"nodes", network.nodes.size()}, {"questions", questions}, {"let_in", let_in},
                              {"load_ms", percentile(loads, 0.5)}, {"load_worst_ms", percentile(loads, 1)}, {"read_ms", percentile(reads, 0.5)},
                              {"decide_p50_us", percentile(decisions, 0.5)}, {"decide_p99_us", percentile(decisions, 0.99)}, {"scan_p50_us", percentile(scans, 0.5)}}
                   .dump()
            << "\n";
}
