// postern policy who, postern policy diff: every login that a policy allows, and what another policy changes about that.
#include "cli/policy.h"

#include <algorithm>
#include <iostream>
#include <memory>
#include <optional>
#include <set>

namespace postern::cli::policy {
namespace {

using auth::policy::Denial;
using auth::policy::Outcome;

struct Options {
  std::string policy, new_policy;  // the second one of `diff`
  std::vector<std::string> dst, src, users;
  Inputs inputs;
};

constexpr const char* every_other_name = "autogroup:nonroot";

/// Values once each, in the order of their first appearance.
template <class T>
class Unique {
 public:
  void add(T value) {
    if (seen_.insert(value).second) all_.push_back(std::move(value));
  }
  const std::vector<T>& all() const { return all_; }
  bool has(const T& value) const { return seen_.count(value) != 0; }

 private:
  std::set<T> seen_;
  std::vector<T> all_;
};

/// A name that is asked for, and what it stands for in the answer.
struct AskedName {
  std::string name;
  bool is_every_other = false;

  std::string shown() const { return is_every_other ? every_other_name : name; }
};

/// Without --user: what the policies' rules can let in. A name that no rule writes out stands for all others.
std::vector<AskedName> names_to_ask(const std::vector<std::string>& given, const std::vector<const Policy*>& policies, const Network& network) {
  Unique<std::string> names;
  bool nonroot = false;
  if (!given.empty()) {
    for (const auto& name : given) names.add(name);
  } else {
    bool localparts = false;
    for (const Policy* policy : policies) {
      const auto some = policy->user_names();
      for (const auto& name : some.literal) names.add(name);
      nonroot = nonroot || some.nonroot;
      localparts = localparts || some.localparts;
    }
    if (localparts)
      for (const auto& login : network.users) names.add(login.substr(0, login.find('@')));
    names.add("root");
  }
  std::vector<AskedName> out;
  for (const auto& name : names.all()) out.push_back({name});
  if (!nonroot) return out;
  std::string other = "other";
  while (names.has(other)) other += '_';
  out.push_back({other, true});
  return out;
}

std::vector<const Node*> ends_to_ask(const std::vector<std::string>& given, const Network& network, const char* option) {
  Unique<const Node*> nodes;
  for (const auto& name : given) nodes.add(find_end(network, name, option).node);
  if (given.empty())
    for (const auto& node : network.nodes) nodes.add(&node);
  return nodes.all();
}

/// What is asked of one policy, or of two.
struct Selection {
  std::vector<const Node*> destinations, sources;
  std::vector<AskedName> names;

  Selection(const Options& options, const std::vector<const Policy*>& policies, const Network& network)
      : destinations{ends_to_ask(options.dst, network, "--dst")},
        sources{ends_to_ask(options.src, network, "--src")},
        names{names_to_ask(options.users, policies, network)} {}

  /// Calls `take(login, shown name, verdicts)` for each login that at least one of the policies allows: by destination, source, name.
  template <class Take>
  void for_each_allowed(const std::vector<const Policy*>& policies, const Network& network, bool require_network_rule, const Take& take) const {
    std::vector<Verdict> verdicts(policies.size());
    for (const Node* destination : destinations)
      for (const Node* source : sources) {
        // Where no rule names both ends, no other name changes that.
        std::vector<bool> closed(policies.size(), false);
        for (const auto& name : names) {
          const Login login{{source, {}}, {destination, {}}, name.name, {}};
          bool allowed = false;
          for (std::size_t i = 0; i < policies.size(); i++) {
            verdicts[i] = closed[i] ? Verdict{} : login.decide(*policies[i], network, require_network_rule);
            closed[i] = verdicts[i].denial == Denial::no_rule;
            allowed = allowed || verdicts[i].outcome != Outcome::deny;
            if (name.is_every_other && verdicts[i].outcome != Outcome::deny) verdicts[i].local_user = every_other_name;
          }
          if (allowed) take(login, name.shown(), verdicts);
          if (std::all_of(closed.begin(), closed.end(), [](bool c) { return c; })) break;
        }
      }
  }
};

OrderedJson login_json(const Login& login, const std::string& ssh_user) {
  return {{"src", login.source.node->name}, {"dst", login.destination.node->name}, {"ssh_user", ssh_user}};
}

void add_verdict(OrderedJson& json, const Verdict& verdict) {
  json["verdict"] = word_of(verdict.outcome);
  json["local_user"] = verdict.local_user;
  if (!verdict.accept_env.empty()) json["accept_env"] = verdict.accept_env;
}

std::string counted(std::size_t n, const char* one, const char* many) { return std::to_string(n) + " " + (n == 1 ? one : many); }

void who(const Options& options, const Globals& globals) {
  use_stdin_once({options.policy, options.inputs.network});
  const NetworkFile file = load_network(options.inputs, globals);
  const Network& network = file.network;
  const Policy policy = load_policy(options.policy, options.inputs, file);
  const Selection selection{options, {&policy}, network};
  std::size_t listed = 0, closed = 0;
  const bool required = options.inputs.needs_network_rule(file);
  selection.for_each_allowed({&policy}, network, required, [&](const Login& login, const std::string& ssh_user, const auto& verdicts) {
    OrderedJson line = login_json(login, ssh_user);
    add_verdict(line, verdicts[0]);
    print_json(line);
    listed++;
    if (!required && login.decide(policy, network, true).denial == Denial::no_network_rule) closed++;
  });
  finish_output();
  if (closed != 0)
    std::cerr << "postern policy who: no acl or grant opens port 22 for " << closed << " of " << counted(listed, "login", "logins")
              << " (--require-network-rule leaves them out)\n";
}

bool same_login(const Verdict& a, const Verdict& b) {
  return a.outcome == b.outcome && a.local_user == b.local_user && a.accept_env == b.accept_env && a.record == b.record &&
         a.recorder_tag == b.recorder_tag && a.enforce_recorder == b.enforce_recorder && a.session_rules == b.session_rules;
}

OrderedJson diff_json(const Verdict& verdict) {
  OrderedJson out;
  add_verdict(out, verdict);
  if (verdict.record) {
    out["recorder_tag"] = verdict.recorder_tag;
    out["enforce_recorder"] = verdict.enforce_recorder;
  }
  for (const auto& [name, value] : verdict.session_rules.members()) out["session_rules"][name] = OrderedJson::parse(value, nullptr, false);
  return out;
}

std::string diff_text(const Verdict& verdict, const std::string& ssh_user) {
  std::string out = word_of(verdict.outcome);
  if (verdict.local_user != ssh_user) out += " to " + printable(verdict.local_user);
  if (!verdict.accept_env.empty()) out += ", env " + printable(joined(verdict.accept_env, " "));
  if (verdict.record) out += ", recorded by " + printable(verdict.recorder_tag) + (verdict.enforce_recorder ? " (enforced)" : "");
  for (const auto& [name, value] : verdict.session_rules.members()) out += ", " + printable(name + " = " + value);
  return out;
}

void diff(const Options& options, const Globals& globals) {
  use_stdin_once({options.policy, options.new_policy, options.inputs.network});
  const NetworkFile file = load_network(options.inputs, globals);
  const Network& network = file.network;
  const Policy before = load_policy(options.policy, options.inputs, file);
  const Policy after = load_policy(options.new_policy, options.inputs, file);
  const std::vector<const Policy*> policies{&before, &after};
  const Selection selection{options, policies, network};
  std::size_t gained = 0, lost = 0, changed = 0, other_period = 0;
  selection.for_each_allowed(policies, network, options.inputs.needs_network_rule(file), [&](const Login& login, const std::string& ssh_user, const auto& verdicts) {
    const Verdict &was = verdicts[0], &is = verdicts[1];
    const bool is_gain = was.outcome == Outcome::deny, is_loss = is.outcome == Outcome::deny;
    if (!is_gain && !is_loss && same_login(was, is)) {
      if (was.check_period != is.check_period) other_period++;
      return;
    }
    (is_gain ? gained : is_loss ? lost : changed)++;
    if (options.inputs.json) {
      OrderedJson line{{"change", is_gain ? "gained" : is_loss ? "lost" : "changed"}};
      line.update(login_json(login, ssh_user));
      if (!is_gain) line["old"] = diff_json(was);
      if (!is_loss) line["new"] = diff_json(is);
      return print_json(line);
    }
    std::cout << (is_gain ? "+ " : is_loss ? "- " : "~ ") << printable(login.source.node->name) << " -> " << printable(login.destination.node->name) << " as "
              << printable(ssh_user) << ": " << (is_gain ? "" : diff_text(was, ssh_user)) << (is_gain || is_loss ? "" : " => ")
              << (is_loss ? "" : diff_text(is, ssh_user)) << "\n";
  });
  finish_output();
  if (!options.inputs.json && gained + lost + changed != 0) std::cerr << gained << " gained, " << lost << " lost, " << changed << " changed\n";
  if (other_period != 0) std::cerr << "postern policy diff: " << counted(other_period, "login that stays has", "logins that stay have") << " another check period\n";
}

void add_selection(CLI::App& command, Options& options) {
  // One value each, so that what follows is never swallowed.
  command.add_option("--dst", options.dst, "only these destinations; may be repeated")->allow_extra_args(false);
  command.add_option("--src", options.src, "only these sources; may be repeated")->allow_extra_args(false);
  command.add_option("--user", options.users, "only these names; may be repeated; else all that the rules can let in")->allow_extra_args(false);
  add_question_inputs(command, options.inputs);
}

}  // namespace

void add_who_and_diff(CLI::App& group, const Globals& globals) {
  auto options = std::make_shared<Options>();
  auto* const who_command = group.add_subcommand("who", "every login that the policy allows, one JSON object a line");
  who_command->add_option("--policy", options->policy, "the policy file; - is standard input")->required();
  add_selection(*who_command, *options);
  who_command->callback([options, &globals] { who(*options, globals); });

  options = std::make_shared<Options>();
  auto* const diff_command = group.add_subcommand("diff", "who gains (+), who loses (-), and what changes (~) from one policy to another");
  diff_command->add_option("OLD", options->policy, "the policy file before; - is standard input")->required();
  diff_command->add_option("NEW", options->new_policy, "the policy file after")->required();
  add_selection(*diff_command, *options);
  diff_command->callback([options, &globals] { diff(*options, globals); });
}

}  // namespace postern::cli::policy
