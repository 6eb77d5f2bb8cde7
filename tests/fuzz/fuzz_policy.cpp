// libFuzzer target for the policy file: any bytes must load or be refused with a place, within the limits, and no decision may let
// somebody in whom no rule of the file could name.
//
//     cmake --preset fuzz && cmake --build --preset fuzz --target fuzz_policy
//     build/fuzz/bin/fuzz_policy -dict=tests/fuzz/policy.dict -max_len=65536 -max_total_time=300 build/fuzz/policy tests/fuzz/corpus/policy
#include "auth/policy/hujson.h"
#include "auth/policy/policy.h"

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

/// The strings at `name` of an object, trimmed as the loader does.
bool names(const hujson::Value& rule, std::string_view name, std::string_view wanted) {
  const auto* m = rule.find(name);
  if (m == nullptr) return false;
  for (const auto& item : m->value.items) {
    std::string_view text = item.text;
    while (!text.empty() && std::string_view{" \t\n\v\f\r"}.find(text.front()) != std::string_view::npos) text.remove_prefix(1);
    while (!text.empty() && std::string_view{" \t\n\v\f\r"}.find(text.back()) != std::string_view::npos) text.remove_suffix(1);
    if (text == wanted) return true;
  }
  return false;
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
  const auto* ssh = root->find("ssh");

  for (const Node& source : network().nodes) {
    for (const Node& destination : network().nodes) {
      for (const std::string_view user : {"root", "alice", "toor", "0", "+x", "a b", ""}) {
        for (const std::optional<std::uint32_t> uid : {std::optional<std::uint32_t>{}, std::optional<std::uint32_t>{0}, std::optional<std::uint32_t>{1000}}) {
          const auto verdict = policy->decide(network(), {source, source.addresses[0], destination, user, uid});
          if (verdict.outcome != Outcome::accept) {
            require(verdict.denial != Denial::none && verdict.local_user.empty() && verdict.recorders.empty());
            continue;
          }
          require(is_mappable_user_name(user) && verdict.local_user == user);
          require(source.id != "n5" && destination.id != "n5");  // neither a user's nor tagged
          // The rule it names stands there, and names this user: root and uid 0 literally.
          require(ssh != nullptr);
          const hujson::Value* rule = nullptr;
          for (const auto& item : ssh->value.items)
            if (item.line == verdict.rule.line && item.column == verdict.rule.column) rule = &item;
          require(rule != nullptr);
          require(names(*rule, "users", user) || (user != "root" && uid != 0u && names(*rule, "users", "autogroup:nonroot")));
          require(root->find("acls") != nullptr || root->find("grants") != nullptr);
          require(verdict.record == !verdict.recorder_tag.empty());
          require(verdict.record || !verdict.enforce_recorder);
        }
      }
    }
  }
  return 0;
}
