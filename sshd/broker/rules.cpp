#include "sshd/broker/rules.h"

#include "auth/policy/hujson.h"
#include "base/file.h"
#include "base/log.h"

#include <cerrno>

namespace postern::sshd::broker {
namespace {

/// Pairs of nodes for which a policy's own tests are tried at a load: about 0.2 s. Nobody is let in meanwhile.
constexpr std::size_t most_test_pairs = 100'000;

}  // namespace

Rules::Rules(const Config& config) : config_{config}, granted_{config.policy.login_capability, load_options(config)} {}

bool Rules::file_changed() const {
  if (!config_.policy.has(PolicySource::file)) return false;
  const auto text = read_whole_file(config_.policy.file, auth::policy::hujson::max_file_bytes);
  return !text || *text != text_;
}

Expected<Done> Rules::load(const Network& network, bool first) {
  if (!config_.policy.has(PolicySource::file)) return Done{};
  auto text = read_whole_file(config_.policy.file, auth::policy::hujson::max_file_bytes);
  if (!text) return Unexpected{text.error()};
  auto loaded = auth::policy::Policy::load(*text, config_.policy.file, load_options(config_));
  if (!loaded) {
    for (const auto& p : loaded.error()) spdlog::error("event=policy_problem problem={}", safe_quoted(p.text(), 1000));
    return Unexpected{Error{EINVAL, text_of(loaded.error())}};
  }
  // The file's own assertions, on the nodes that are seen here. A new file of which one fails is not taken, as in the real service.
  const auto tests = loaded->run_tests(network, false, most_test_pairs);
  for (const auto& p : tests.left_out) spdlog::info("event=policy_test_left_out problem={}", safe_quoted(p.text(), 1000));
  for (const auto& p : tests.failed) spdlog::error("event=policy_test_failed problem={}", safe_quoted(p.text(), 1000));
  if (!tests.failed.empty() && !first) return Unexpected{Error{EINVAL, text_of(tests.failed)}};
  file_ = std::move(*loaded);
  text_ = std::move(*text);
  version_++;
  for (const auto& w : file_->warnings()) spdlog::warn("event=policy_warning problem={}", safe_quoted(w.text(), 1000));
  spdlog::info("event=policy_loaded file={} version={} first={}", safe_quoted(config_.policy.file), version_, first);
  return Done{};
}

const auth::policy::CompiledRules* Rules::compiled(const auth::identity::Provider& provider, std::string& unavailable) const {
  auto text = provider.ssh_policy();
  if (!text) {
    unavailable = text.error().user_message.empty() ? "this server cannot read the network's ssh rules right now; try again later" : text.error().user_message;
    return nullptr;
  }
  if (!compiled_ || compiled_->text() != *text) compiled_.emplace(std::move(*text));
  return &*compiled_;
}

Rules::Decision Rules::decide(const auth::identity::Provider& provider, const auth::policy::Question& question) const {
  using namespace auth::policy;
  std::optional<Decision> all;
  bool sure = false;  // denied by one source for sure is denied, whatever another cannot say
  const auto also = [&](Decision one) {
    if (!all) {
      all = std::move(one);
      return;
    }
    all->verdict = both(std::move(all->verdict), one.verdict);
    if (all->unavailable.empty()) all->unavailable = std::move(one.unavailable);
    if (all->problem.empty()) all->problem = std::move(one.problem);
  };
  for (const PolicySource source : config_.policy.source) {  // at least one
    Decision one;
    switch (source) {
      case PolicySource::file:
        if (file_) one.verdict = file_->decide(provider.network(), question, config_.policy.require_network_rule);
        break;
      case PolicySource::grants: one.verdict = granted_.decide(provider.network(), question, one.problem); break;
      case PolicySource::tailnet:
        if (const auto* rules = compiled(provider, one.unavailable))
          one.verdict = rules->decide(question, std::chrono::system_clock::now(), config_.policy.tailnet_check_period, config_.recorder.port, one.problem);
        break;
    }
    sure = sure || (one.unavailable.empty() && one.verdict.outcome == Outcome::deny);
    also(std::move(one));
  }
  if (sure) all->unavailable.clear();
  return std::move(*all);
}

std::optional<std::chrono::system_clock::time_point> Rules::next_expiry(const auth::identity::Provider& provider) const {
  if (!config_.policy.has(PolicySource::tailnet)) return std::nullopt;
  std::string ignored;
  const auto* rules = compiled(provider, ignored);
  return rules != nullptr ? rules->next_expiry(std::chrono::system_clock::now()) : std::nullopt;
}

}  // namespace postern::sshd::broker
