#include "auth/policy/policy.h"
#include "catch.h"

#include <nlohmann/json.hpp>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>

using namespace postern;
using namespace postern::auth::policy;
using nlohmann::json;

namespace {

Network network_of(const json& test_case) {
  std::map<std::string, std::string> logins;
  for (const auto& user : test_case["users"]) logins[user["name"]] = user["email"];
  Network network;
  for (const auto& [name, n] : test_case["nodes"].items()) {
    Node node{.id = name, .name = name, .addresses = {}, .login = {}, .tags = n["tags"].get<std::vector<std::string>>()};
    for (const char* family : {"ipv4", "ipv6"}) node.addresses.push_back(*Address::parse(n[family].get<std::string>()));
    if (n.contains("user")) node.login = logins.at(n["user"]);
    network.nodes.push_back(std::move(node));
  }
  return network;
}

const Node& node_of(const Network& network, const std::string& name) {
  for (const auto& n : network.nodes)
    if (n.name == name) return n;
  throw std::runtime_error{"no node " + name};
}

}  // namespace

TEST_CASE("every decision is the one that the real service made", "[auth][policy][corpus]") {
  std::size_t policies = 0, refused = 0, decisions = 0, allowed = 0;
  for (const auto& entry : std::filesystem::directory_iterator{POSTERN_TEST_DATA "/policy"}) {
    if (entry.path().extension() != ".json") continue;
    INFO(entry.path().filename().string());
    std::ifstream file{entry.path()};
    const json test_case = json::parse(file);
    const std::string text = test_case.contains("policy_text") ? test_case["policy_text"].get<std::string>() : test_case["policy"].dump(1);
    const std::string tailnet = test_case["tailnet"];
    const Network network = network_of(test_case);
    const auto policy = Policy::load(text, "policy.hujson", {.domains = {tailnet.substr(tailnet.find('@') + 1)}});
    std::vector<Problem> problems;
    if (policy) problems = policy->run_tests(network).failed;
    else problems = policy.error();
    if (!test_case["accepted"].get<bool>()) {
      const auto message = test_case["message"].get<std::string>();
      CHECK(std::any_of(problems.begin(), problems.end(), [&](const Problem& p) { return p.message.substr(0, message.size()) == message; }));
      refused++;
      continue;
    }
    if (!problems.empty()) FAIL(problems.front().text());
    policies++;
    std::map<std::tuple<std::string, std::string, std::string>, json> expected;
    for (const auto& a : test_case["allow"]) expected[{a["src"], a["dst"], a["ssh_user"]}] = a;
    for (const auto& dst : test_case["dst_nodes"]) {
      const Node& destination = node_of(network, dst);
      for (const Node& source : network.nodes) {
        for (const auto& user : test_case["ssh_users_probed"]) {
          const std::string name = user;
          INFO(source.name << " -> " << destination.name << " as " << name);
          for (const bool known : {false, true}) {
            Question question{source, source.addresses.front(), destination, name, std::nullopt};
            if (known) question.uid = name == "root" ? 0 : 1000;
            const auto verdict = policy->decide(network, question, false);
            decisions++;
            const auto it = expected.find({source.name, destination.name, name});
            REQUIRE((verdict.outcome != Outcome::deny) == (it != expected.end()));
            if (it == expected.end()) continue;
            allowed++;
            CHECK(it->second["verdict"] == (verdict.outcome == Outcome::check ? "check" : "accept"));
            CHECK(verdict.local_user == it->second["local_user"]);
            CHECK(verdict.accept_env == it->second.value("accept_env", std::vector<std::string>{}));
          }
        }
      }
    }
  }
  WARN("corpus: " << policies << " policies, " << decisions << " decisions (" << allowed << " let in), " << refused << " refusals");
  CHECK(policies == 47);
  CHECK(refused == 20);
  CHECK(allowed > 100);
}
