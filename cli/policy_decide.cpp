// postern policy decide, postern policy explain: one login, and why it is decided so.
#include "base/go_duration.h"
#include "cli/policy.h"

#include <iostream>
#include <memory>
#include <optional>

namespace postern::cli::policy {
namespace {

using auth::policy::Denial;
using auth::policy::Explanation;
using auth::policy::Outcome;
using auth::policy::RuleTrace;

struct Options {
  std::string policy, src, dst, user;
  std::optional<std::uint32_t> uid;
  Inputs inputs;
};

std::string check_period_text(const Verdict& verdict) { return verdict.check_period ? go_duration_text(*verdict.check_period) : "always"; }

std::string node_text(const Node& node) {
  std::vector<std::string> addresses;
  for (const auto& a : node.addresses) addresses.push_back(a.text());
  return printable(node.name) + " (" + joined(addresses, ", ") + ")";
}

OrderedJson json_of(const Explanation& explanation, const Login& login, bool required, bool with_rules) {
  const Verdict& v = explanation.verdict;
  OrderedJson out{{"src", login.source.node->name}, {"dst", login.destination.node->name}, {"ssh_user", login.ssh_user}};
  if (with_rules) {
    OrderedJson& rules = out["rules"] = OrderedJson::array();
    for (const RuleTrace& r : explanation.rules)
      rules.push_back({{"rule", place_json(r.rule)}, {"field", r.field}, {"action", word_of(r.action)}, {"src", r.src}, {"dst", r.dst},
                       {"user", r.user}, {"posture", r.posture}, {"decides", r.decides}, {"why", r.why}});
  }
  out["verdict"] = word_of(v.outcome);
  if (v.outcome == Outcome::deny) out["message"] = denial_text(v.denial, login.ssh_user);
  out["rule"] = place_json(v.rule);
  if (v.outcome != Outcome::deny) {
    out["local_user"] = v.local_user;
    out["accept_env"] = v.accept_env;
    if (v.outcome == Outcome::check) out["check_period"] = check_period_text(v);
    out["recorder_tag"] = v.record ? OrderedJson(v.recorder_tag) : OrderedJson();
    out["recorders"] = OrderedJson::array();
    for (const Node& node : v.recorders) out["recorders"].push_back(node.name);
    out["enforce_recorder"] = v.enforce_recorder;
    OrderedJson& session = out["session_rules"] = OrderedJson::object();
    for (const auto& [name, value] : v.session_rules.members()) session[name] = OrderedJson::parse(value, nullptr, false);
  }
  out["network"] = {{"open", explanation.network_open}, {"required", required}, {"rule", place_json(explanation.network_rule)}, {"why", explanation.network_why}};
  return out;
}

void print_member(const char* name, const std::string& value) {
  std::cout << "  " << name << std::string(16 - std::string_view{name}.size(), ' ') << value << "\n";
}

void print_rules(const Explanation& explanation) {
  std::size_t field = 0, place = 0;
  for (const RuleTrace& r : explanation.rules) {
    field = std::max(field, r.field.size());
    place = std::max(place, columns_of(printable(r.rule.text())));
  }
  const auto padded = [](std::string text, std::size_t to) { return text + std::string(to + 2 - std::min(columns_of(text), to), ' '); };
  for (const RuleTrace& r : explanation.rules)
    std::cout << (r.decides ? "> " : "  ") << padded(r.field, field) << padded(printable(r.rule.text()), place) << padded(word_of(r.action), 6)
              << (r.decides ? "decides: " : "") << printable(r.why) << "\n";
  if (explanation.rules.empty()) std::cout << "  no ssh rules\n";
}

void print_verdict(const Explanation& explanation, const Login& login, bool required) {
  const Verdict& v = explanation.verdict;
  const bool allowed = v.outcome != Outcome::deny;
  std::cout << word_of(v.outcome) << ": " << printable(login.source.node->name) << " -> " << printable(login.destination.node->name) << " as " << printable(login.ssh_user)
            << (allowed ? "" : ": " + printable(denial_text(v.denial, login.ssh_user))) << "\n";
  if (allowed) {
    print_member("rule", printable(v.rule.text()));
    print_member("local user", printable(v.local_user));
    print_member("accept env", v.accept_env.empty() ? "nothing" : printable(joined(v.accept_env, " ")));
    if (v.outcome == Outcome::check) print_member("check period", check_period_text(v));
    if (!v.record) {
      print_member("recorders", "not recorded");
    } else {
      std::vector<std::string> nodes;
      for (const Node& node : v.recorders) nodes.push_back(node_text(node));
      print_member("recorders", printable(v.recorder_tag) + ": " + (nodes.empty() ? "no node carries it" : joined(nodes, ", ")));
      print_member("enforce", v.enforce_recorder ? "yes: no session without a recorder" : "no: sessions go on without a recorder");
    }
    for (const auto& [name, value] : v.session_rules.members()) print_member("session rule", printable(name + " = " + value));
  }
  const std::string place = explanation.network_rule.line == 0 ? "" : printable(explanation.network_rule.text()) + ": ";
  print_member("network rule", place + printable(explanation.network_why) + (required ? "" : " (not asked for)"));
}

void answer(const Options& options, const Globals& globals, bool with_rules) {
  use_stdin_once({options.policy, options.inputs.network});
  const NetworkFile network = load_network(options.inputs, globals);
  const Policy policy = load_policy(options.policy, options.inputs, network);
  const Login login{find_end(network.network, options.src, "--src"), find_end(network.network, options.dst, "--dst"), options.user, options.uid};
  const bool required = options.inputs.needs_network_rule(network);
  Explanation explanation = login.explain(policy, network.network, required);
  // What the network itself says of the node narrows it as well (whois's CapMap); posternd.toml's [session_rules] is another file's business.
  if (const auto own = auth::policy::capability_rules(*login.source.node, options.inputs.capability(network))) {
    explanation.verdict.session_rules = stricter(std::move(explanation.verdict.session_rules), *own);
  } else if (explanation.verdict.outcome != Outcome::deny) {
    std::cerr << "postern policy: posternd denies this login: " << printable(own.error().doing) << "\n";
    explanation.verdict = Verdict{};
  }
  if (options.inputs.json) {
    print_json(json_of(explanation, login, required, with_rules));
  } else {
    if (with_rules) print_rules(explanation);
    print_verdict(explanation, login, required);
  }
  finish_output();
  if (explanation.verdict.outcome == Outcome::deny) throw Exit{1};
  if (!required && !explanation.network_open)
    std::cerr << "postern policy: no acl or grant opens port 22 for this login; where posternd asks for one (its default) it is denied (--require-network-rule)\n";
}

void add(CLI::App& group, const Globals& globals, const char* name, const char* about, bool with_rules) {
  auto options = std::make_shared<Options>();
  auto* const command = group.add_subcommand(name, about);
  command->add_option("--policy", options->policy, "the policy file; - is standard input")->required();
  command->add_option("--src", options->src, "where the login comes from: a node, or an address of one")->required();
  command->add_option("--dst", options->dst, "where it goes")->required();
  command->add_option("--user", options->user, "the name that the client gives")->required();
  command->add_option("--uid", options->uid, "uid of that account; else 0 for root, and another one for every other name");
  add_question_inputs(*command, options->inputs);
  command->callback([options, &globals, with_rules] { answer(*options, globals, with_rules); });
}

}  // namespace

void add_decide_and_explain(CLI::App& group, const Globals& globals) {
  add(group, globals, "decide", "may this source log in there as that user? Exit status 1: no", false);
  add(group, globals, "explain", "the same, with what each ssh rule says to it", true);
}

}  // namespace postern::cli::policy
