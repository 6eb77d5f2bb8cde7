// libFuzzer target for the policy file: any bytes must load or be refused with a place, within the limits, and no decision may let
// somebody in whom no rule of the file could name.
//
//     cmake --preset fuzz && cmake --build --preset fuzz --target fuzz_policy
//     build/fuzz/bin/fuzz_policy -dict=tests/fuzz/policy.dict -max_len=65536 -max_total_time=300 build/fuzz/policy tests/fuzz/corpus/policy
#include "auth/policy/hujson.h"
#include "auth/policy/policy.h"
#include "auth/policy/reading.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>

using namespace postern;
using namespace postern::auth::policy;

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

const Network& network() {
  static const Network n{{
      Node{"n1", "alice-laptop", {*Address::parse("100.64.0.1")}, "alice@example.com", {}},
      Node{"n2", "bob-laptop", {*Address::parse("100.64.0.2")}, "bob@example.com", {}},
      Node{"n3", "server", {*Address::parse("100.64.0.10"), *Address::parse("fd7a::10")}, "", {"tag:server"}},
      Node{"n4", "recorder", {*Address::parse("100.64.0.20")}, "", {"tag:recorder"}},
      Node{"n5", "nobody", {*Address::parse("100.64.0.30")}, "", {}},
  }};
  return n;
}

/// True when the list at `name` of a rule holds `wanted`, trimmed as the loader does.
bool names(const hujson::Value& rule, std::string_view name, std::string_view wanted) {
  const auto* m = Reading::find(rule, name);
  if (m == nullptr) return false;
  return std::any_of(m->value.items.begin(), m->value.items.end(), [&](const hujson::Value& item) { return trimmed(item.text) == wanted; });
}

/// Every node reaches every node, n5 too, which only "*" and addresses could name.
bool told_open(const Policy& policy) {
  const auto& nodes = network().nodes;
  return policy.explain(network(), {nodes[4], nodes[4].addresses[0], nodes[4], "x", std::nullopt}).network_why.find("neither acls nor grants") != std::string::npos;
}

bool is_there(const hujson::Value& root, std::string_view section) {
  const auto* m = Reading::find(root, section);
  return m != nullptr && m->value.kind != hujson::Kind::null;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text{reinterpret_cast<const char*>(data), size};
  const auto policy = Policy::load(text, "p");
  if (!policy) {
    require(!policy.error().empty());
    for (const auto& p : policy.error()) {
      require(p.place.line >= 1 && p.place.column >= 1 && !p.message.empty());
      require(p.text().find('\0') == std::string::npos);
    }
    return 0;
  }
  hujson::Problems problems{"p"};
  const auto root = hujson::parse(text, problems);
  require(root && problems.empty());
  const auto* ssh = Reading::find(*root, "ssh");
  for (const bool whole : {true, false}) {
    const auto report = policy->run_tests(whole ? network() : policy->imagined_network(), whole);
    for (const auto& p : report.failed) require(p.place.line >= 1 && p.message.find("test(s) failed") == 0);
  }

  for (const Node& source : network().nodes) {
    for (const Node& destination : network().nodes) {
      for (const std::string_view user : {"root", "alice", "toor", "0", "+x", "a b", ""}) {
        for (const std::optional<std::uint32_t> uid : {std::optional<std::uint32_t>{}, std::optional<std::uint32_t>{0}, std::optional<std::uint32_t>{1000}}) {
          const Question question{source, source.addresses[0], destination, user, uid};
          const auto verdict = policy->decide(network(), question);
          const auto told = policy->explain(network(), question);
          const auto by = std::find_if(told.rules.begin(), told.rules.end(), [](const RuleTrace& r) { return r.decides; });
          if (verdict.outcome == Outcome::deny) {
            require(verdict.denial != Denial::none && verdict.local_user.empty() && verdict.recorders.empty());
            require(by == told.rules.end() || !told.network_open);
            continue;
          }
          require(is_mappable_user_name(user) && verdict.local_user == user);
          require(source.id != "n5" && destination.id != "n5");  // neither a user's nor tagged
          // The rule it names stands there, is the one that explain() names, and names this user: root and uid 0 literally.
          require(by != told.rules.end() && by->rule.text() == verdict.rule.text() && told.network_open);
          require(ssh != nullptr);
          const hujson::Value* rule = nullptr;
          for (const auto& item : ssh->value.items)
            if (item.line == verdict.rule.line && item.column == verdict.rule.column) rule = &item;
          require(rule != nullptr);
          const bool own_name = source.login == "alice@example.com" && user == "alice";
          require(names(*rule, "users", user) ||
                  (user != "root" && uid != 0u && (names(*rule, "users", "autogroup:nonroot") || (own_name && names(*rule, "users", "localpart:*@example.com")))));
          if (verdict.outcome == Outcome::check) require(!source.tagged());
          require(verdict.record == !verdict.recorder_tag.empty());
          require(verdict.record || !verdict.enforce_recorder);
        }
      }
    }
  }
  // Without acls and grants everything is open; an empty one of them opens nothing.
  if (told_open(*policy)) require(!is_there(*root, "acls") && !is_there(*root, "grants"));
  return 0;
}
