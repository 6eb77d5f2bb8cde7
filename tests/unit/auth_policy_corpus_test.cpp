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
    json policy_json = test_case["policy"];
    policy_json.erase("sshTests");  // decides nothing, and is not understood yet
    policy_json.erase("tests");
    const auto policy = Policy::load(policy_json.dump(1), "policy.hujson");
    if (!test_case["accepted"].get<bool>()) {
      REQUIRE_FALSE(policy);
      const auto message = test_case["message"].get<std::string>();
      CHECK(std::any_of(policy.error().begin(), policy.error().end(), [&](const Problem& p) { return p.message == message; }));
      refused++;
      continue;
    }
    if (!policy) FAIL(policy.error().front().text());
    policies++;
    const Network network = network_of(test_case);
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
            REQUIRE((verdict.outcome == Outcome::accept) == (it != expected.end()));
            if (it == expected.end()) continue;
            allowed++;
            CHECK(it->second["verdict"] == "accept");
            CHECK(verdict.local_user == it->second["local_user"]);
            CHECK(verdict.accept_env == it->second.value("accept_env", std::vector<std::string>{}));
          }
        }
      }
    }
  }
  WARN("corpus: " << policies << " policies, " << decisions << " decisions (" << allowed << " let in), " << refused << " refusals");
  CHECK(policies >= 30);
  CHECK(refused >= 5);
  CHECK(allowed > 100);
}
