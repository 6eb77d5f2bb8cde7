// Policy::explain: what each rule says, one after the other. decide() gives the verdict; the rules here are looked at one by one.
#include "auth/policy/compiled.h"
#include "auth/policy/matching.h"
#include "auth/policy/policy.h"
#include "base/log.h"

#include <algorithm>
#include <array>

namespace postern::auth::policy {
namespace {

std::string who(const Node& node) {
  std::string out = node.name.empty() ? node.id : node.name;
  if (node.tagged()) {
    out += " (";
    for (const auto& tag : node.tags) out += (tag == node.tags.front() ? "" : ", ") + tag;
    return out + ")";
  }
  return node.login.empty() ? out : out + " (" + node.login + ")";
}

std::string quoted(const Principal& p) { return "\"" + text_of(p) + "\""; }

std::string names_of(const Compiled& policy, const Postures& postures) {
  std::string out;
  for (const auto n : postures) out += (out.empty() ? "" : " or ") + policy.postures[n].name;
  return out;
}

}  // namespace

Explanation Policy::explain(const Network& network, const Question& question, bool require_network_rule) const {
  const Compiled& policy = *compiled_;
  const Node& source = question.source;
  const Node& destination = question.destination;
  const bool own = same_user(source, destination);
  Explanation out;
  out.verdict = decide(network, question, require_network_rule);

  const bool is_name = is_mappable_user_name(question.ssh_user) || is_foreign_user_name(question.ssh_user);
  bool decided = false;
  for (const SshRule& rule : policy.ssh) {
    RuleTrace trace;
    trace.rule = Place{policy.file, rule.line, rule.column};
    trace.field = rule.field;
    trace.action = rule.verdict;
    const Principal* src = first_taking(policy, rule.src, source, {}, own);
    const Principal* dst = first_taking(policy, rule.dst, destination, {}, own);
    const bool own_node = dst == nullptr && source.id == destination.id && reaches_own_node(rule);
    const std::string user = is_name ? user_by(rule, source, question.ssh_user, question.uid) : std::string{};
    trace.src = src != nullptr;
    trace.dst = dst != nullptr || own_node;
    trace.user = !user.empty();
    trace.posture = postures_hold(policy, rule.postures, source.attributes);
    std::string no;
    const auto but = [&](const std::string& why) { no += (no.empty() ? "" : "; ") + why; };
    if (!trace.src) but(rule.src.empty() ? "src is empty" : "src does not name " + who(source));
    if (!trace.dst) but(rule.dst.empty() ? "dst is empty" : "dst does not name " + who(destination));
    if (!trace.user)
      but(!is_name ? safe_quoted(question.ssh_user, 64) + " can never be the name of an account"
                   : "users do not allow " + safe_quoted(question.ssh_user, 64) +
                         (question.ssh_user != "root" && question.uid == 0u ? " (uid 0: only a rule that writes this name out does)" : ""));
    const bool unknown = no.empty() && !trace.posture && postures_unknown(rule.postures, source);
    if (!trace.posture)
      but(unknown ? "nothing is known of the device, so nobody can say whether it meets " + names_of(policy, rule.postures) + (decided ? "" : ": denied")
                  : "the device does not meet " + names_of(policy, rule.postures));
    decided = decided || unknown;
    if (no.empty()) {
      trace.why = "src " + quoted(*src) + ", dst " + (own_node ? "the source's own node (localpart rules reach it)" : quoted(*dst)) + ", user \"" + user + "\"";
      if (!rule.postures.empty()) trace.why += ", " + names_of(policy, rule.postures);
      if (decided) trace.why += "; an earlier rule has decided";
      trace.decides = !decided;
      decided = true;
    } else {
      trace.why = std::move(no);
    }
    out.rules.push_back(std::move(trace));
  }

  if (policy.network_is_open) {
    out.network_open = true;
    out.network_why = "the file has neither acls nor grants: everybody may reach port " + std::to_string(question.port);
    return out;
  }
  const std::array<Address, 1> from{question.source_address};
  const auto to = dialled(question);
  for (const NetworkRule& rule : policy.network) {
    if (rule.via || !postures_hold(policy, rule.postures, source.attributes)) continue;
    const Principal* src = first_taking(policy, rule.src, source, from, own);
    if (src == nullptr) continue;
    for (const auto& d : rule.dst) {
      const bool open = std::any_of(d.opens.begin(), d.opens.end(), [&](const Open& o) {
        return (o.protocol == 0 || o.protocol == 6) && o.ports.first <= question.port && question.port <= o.ports.last;
      });
      if (!open || !takes(policy, d.who, destination, to, own)) continue;
      out.network_open = true;
      out.network_rule = Place{policy.file, rule.line, rule.column};
      out.network_why = rule.field + " opens port " + std::to_string(question.port) + ": src " + quoted(*src) + ", dst " + quoted(d.who);
      return out;
    }
  }
  out.network_why = "no acl or grant opens port " + std::to_string(question.port) + " from " + who(source) + " to " + who(destination);
  return out;
}

std::size_t Policy::ssh_rule_count() const noexcept { return compiled_->ssh.size(); }

Policy::UserNames Policy::user_names() const {
  UserNames out;
  for (const SshRule& rule : compiled_->ssh) {
    out.literal.insert(out.literal.end(), rule.users.begin(), rule.users.end());
    out.nonroot = out.nonroot || rule.nonroot;
    out.localparts = out.localparts || !rule.localparts.empty();
  }
  std::sort(out.literal.begin(), out.literal.end());
  out.literal.erase(std::unique(out.literal.begin(), out.literal.end()), out.literal.end());
  return out;
}

}  // namespace postern::auth::policy
