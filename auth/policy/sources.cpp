#include "auth/policy/sources.h"

#include "auth/policy/hujson.h"
#include "base/log.h"

#include <algorithm>
#include <charconv>
#include <ctime>
#include <set>

namespace postern::auth::policy {
namespace {

using hujson::Kind;
using hujson::Value;
using Clock = std::chrono::system_clock;

constexpr std::size_t most_places = 100'000;  // lines of a Place

std::string json_string(std::string_view text) {
  std::string out{"\""};
  for (const char c : text) {
    constexpr char hex[] = "0123456789abcdef";
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') (out += '\\') += c;
    else if (u < 0x20 || u == 0x7f) ((out += "\\u00") += hex[u >> 4]) += hex[u & 15];
    else out += c;
  }
  return out += '"';
}

/// JSON again, in one line.
void write(const Value& value, std::string& out) {
  switch (value.kind) {
    case Kind::null: out += "null"; break;
    case Kind::boolean: out += value.boolean ? "true" : "false"; break;
    case Kind::number: out += value.text; break;
    case Kind::string: out += json_string(value.text); break;
    case Kind::array:
      out += '[';
      for (std::size_t i = 0; i < value.items.size(); i++) {
        if (i > 0) out += ',';
        write(value.items[i], out);
      }
      out += ']';
      break;
    case Kind::object:
      out += '{';
      for (std::size_t i = 0; i < value.members.size(); i++) {
        if (i > 0) out += ',';
        (out += json_string(value.members[i].name)) += ':';
        write(value.members[i].value, out);
      }
      out += '}';
      break;
  }
}

/// The name by which a rule reaches a node, whoever else it reaches.
std::string selector(const Node& node) { return node.tags.empty() ? node.login : node.tags.front(); }

Verdict denied(Denial why) {
  Verdict v;
  v.denial = why;
  return v;
}

const Value* member(const Value& object, std::string_view name) {
  const auto* m = object.find(name);
  return m != nullptr && m->value.kind != Kind::null ? &m->value : nullptr;
}

bool flag(const Value& object, std::string_view name) {
  const Value* v = member(object, name);
  return v != nullptr && v->kind == Kind::boolean && v->boolean;
}

/// RFC 3339 in UTC, as Go writes it: "2026-11-26T06:54:00Z", with or without a fraction. Nothing: no time.
std::optional<Clock::time_point> utc_time(const std::string& text) {
  std::tm t{};
  const char* const rest = ::strptime(text.c_str(), "%Y-%m-%dT%H:%M:%S", &t);
  if (rest == nullptr) return std::nullopt;
  std::string_view tail{rest};
  if (!tail.empty() && tail.front() == '.') tail.remove_prefix(std::min(tail.find_first_not_of("0123456789", 1), tail.size()));
  if (tail != "Z") return std::nullopt;
  const std::time_t seconds = ::timegm(&t);  // nanoseconds since 1970 end in 2262
  return seconds >= std::chrono::duration_cast<std::chrono::seconds>(Clock::duration::max()).count() ? Clock::time_point::max() : Clock::from_time_t(seconds);
}

/// A rule that has expired, or whose time cannot be read, is none.
bool expired(const Value& rule, Clock::time_point now) {
  const Value* when = member(rule, "ruleExpires");
  if (when == nullptr) return false;
  const auto until = when->kind == Kind::string ? utc_time(when->text) : std::nullopt;
  return !until || *until <= now;
}

/// tailcfg.SSHPrincipal. The service fills one member; of several all must hold, and one that is not known never does.
bool matches(const Value& principal, const Question& question) {
  if (principal.kind != Kind::object || principal.members.empty()) return false;
  for (const auto& m : principal.members) {
    const Value& v = m.value;
    if (v.kind == Kind::null || (v.kind == Kind::string && v.text.empty()) || (v.kind == Kind::boolean && !v.boolean)) continue;
    bool holds = false;
    if (m.name == "any") holds = v.kind == Kind::boolean;
    else if (m.name == "node") holds = v.kind == Kind::string && v.text == question.source.id;
    else if (m.name == "nodeIP") holds = v.kind == Kind::string && Address::parse(v.text) == question.source_address;
    else if (m.name == "userLogin") holds = v.kind == Kind::string && !question.source.tagged() && v.text == question.source.login;
    if (!holds) return false;  // also what is not known
  }
  return std::any_of(principal.members.begin(), principal.members.end(), [](const auto& m) {
    return (m.value.kind == Kind::string && !m.value.text.empty()) || (m.value.kind == Kind::boolean && m.value.boolean);
  });
}

/// The account; empty: this rule has none for the name.
std::string account(const Value& users, const Question& question) {
  const std::string name{question.ssh_user};
  if (const auto* exact = users.find(name); exact != nullptr) {
    if (exact->value.kind != Kind::string) return {};
    return exact->value.text == "=" ? name : exact->value.text;
  }
  const auto* any = users.find("*");
  if (any == nullptr || any->value.kind != Kind::string || any->value.text.empty()) return {};
  // uid 0 is reached by a name that is written out only, as by our own rules.
  if (any->value.text == "=") return name == "root" || question.uid.value_or(1) == 0 || !is_mappable_user_name(name) ? std::string{} : name;
  return any->value.text;
}

std::optional<std::vector<std::string>> texts(const Value* list) {
  std::vector<std::string> out;
  if (list == nullptr) return out;
  if (list->kind != Kind::array) return std::nullopt;
  for (const auto& item : list->items) {
    if (item.kind != Kind::string) return std::nullopt;
    out.push_back(item.text);
  }
  return out;
}

}  // namespace

Verdict GrantedRules::decide(const Network& network, const Question& question, std::string& problem) const {
  const auto granted = question.source.capabilities.find(capability_);
  if (granted == question.source.capabilities.end()) return denied(Denial::no_rule);
  const auto unreadable = [&](std::string why) {
    problem = "app grant " + safe_quoted(capability_, 120) + ": " + why;
    return denied(Denial::no_rule);
  };
  hujson::Problems problems{"grant"};
  const auto rules = hujson::parse(granted->second, problems);
  if (!rules || !problems.empty()) return unreadable(problems.take().front().text());
  if (rules->kind != Kind::array) return unreadable("must be an array of objects");
  std::set<std::string> tags;
  const std::string from = selector(question.source), to = selector(question.destination);
  for (const auto& name : {from, to})
    if (name.rfind("tag:", 0) == 0) tags.insert(name);
  // A user's own machine is no destination for others in the language; the grant's dst has said that it is one.
  const bool personal = question.destination.tags.empty() && to != from;
  const std::string destination = personal ? "tag:postern-granted" : to;
  if (personal) tags.insert(destination);
  // The rule's number is its line.
  std::string text;
  for (const auto& rule : rules->items) {
    if (rule.kind != Kind::object) return unreadable("rule " + std::to_string(&rule - rules->items.data() + 1) + " must be an object");
    for (const char* name : {"src", "dst"})
      if (rule.find(name) != nullptr) return unreadable("rule " + std::to_string(&rule - rules->items.data() + 1) + ": " + name + " is the grant's");
    if (const Value* recorder = member(rule, "recorder"))
      for (const auto& item : recorder->items)
        if (item.kind == Kind::string && item.text.rfind("tag:", 0) == 0) tags.insert(item.text);
    Value whole = rule;
    for (const auto& [name, value] : {std::pair{"src", from}, std::pair{"dst", destination}}) {
      Value one, list;
      one.kind = Kind::string;
      one.text = value;
      list.kind = Kind::array;
      list.items.push_back(one);
      whole.members.push_back({name, 0, 0, list});
    }
    if (!text.empty()) text += ",\n";
    write(whole, text);
  }
  std::string owners;
  for (const auto& tag : tags) owners += (owners.empty() ? "" : ",") + json_string(tag) + ":[]";
  text = "{\"tagOwners\":{" + owners + "},\"ssh\":[" + text + "]}";

  if (read_.size() >= most_remembered) {
    read_.clear();
    problems_.clear();
  }
  auto known = read_.find(text);
  if (known == read_.end()) {
    auto loaded = Policy::load(text, "grant of " + from, options_);
    if (!loaded) problems_[text] = loaded.error().front().text();
    known = read_.emplace(text, loaded ? std::optional{std::move(*loaded)} : std::nullopt).first;
  }
  if (!known->second) return unreadable(problems_[text]);
  Node tagged = question.destination;
  if (personal) tagged.tags = {destination};
  const Question here{.source = question.source, .source_address = question.source_address, .destination = tagged, .ssh_user = question.ssh_user, .uid = question.uid,
                      .port = question.port, .destination_address = question.destination_address};
  return known->second->decide(network, here, false);
}

struct CompiledRules::Read {
  std::optional<Value> policy;
  std::string problem;
};

CompiledRules::CompiledRules(std::string json) : text_{std::move(json)}, read_{std::make_unique<Read>()} {
  hujson::Problems problems{"SSHPolicy"};
  read_->policy = hujson::parse(text_, problems);
  if (!read_->policy || !problems.empty()) read_->problem = problems.empty() ? "no JSON" : problems.take().front().text();
}
CompiledRules::~CompiledRules() = default;
CompiledRules::CompiledRules(CompiledRules&&) noexcept = default;
CompiledRules& CompiledRules::operator=(CompiledRules&&) noexcept = default;

Verdict CompiledRules::decide(const Question& question, Clock::time_point now, std::optional<std::chrono::seconds> check_period, std::uint16_t recorder_port,
                              std::string& problem) const {
  const auto unreadable = [&](std::string why) {
    problem = "the network's ssh rules: " + std::move(why);
    return denied(Denial::no_rule);
  };
  if (!read_->problem.empty()) return unreadable(read_->problem);
  const auto& policy = read_->policy;
  if (policy->kind == Kind::null) return denied(Denial::no_rule);
  if (policy->kind != Kind::object) return unreadable("no object");
  const Value* rules = member(*policy, "rules");
  if (rules == nullptr) return denied(Denial::no_rule);
  if (rules->kind != Kind::array || rules->items.size() > most_places) return unreadable("rules is no list");
  bool reached = false;
  for (std::size_t i = 0; i < rules->items.size(); i++) {
    const Value& rule = rules->items[i];
    const std::string where = "rule " + std::to_string(i + 1) + ": ";
    if (rule.kind != Kind::object) return unreadable(where + "no object");
    if (expired(rule, now)) continue;
    const Value* principals = member(rule, "principals");
    if (principals == nullptr) continue;
    if (principals->kind != Kind::array) return unreadable(where + "principals is no list");
    if (std::none_of(principals->items.begin(), principals->items.end(), [&](const Value& p) { return matches(p, question); })) continue;
    reached = true;
    const Value* action = member(rule, "action");
    if (action == nullptr || action->kind != Kind::object) return unreadable(where + "no action");
    if (flag(*action, "reject")) {  // before users: a rejected peer is rejected for every name (tailscale ssh/tailssh/tailssh.go, matchRule)
      Verdict v = denied(Denial::no_rule);
      v.rule = {"SSHPolicy", static_cast<unsigned>(i + 1), 1};
      return v;
    }
    const Value* users = member(rule, "sshUsers");
    if (users == nullptr) continue;
    if (users->kind != Kind::object) return unreadable(where + "sshUsers is no object");
    const std::string local = account(*users, question);
    if (local.empty()) continue;

    Verdict v;
    v.rule = {"SSHPolicy", static_cast<unsigned>(i + 1), 1};
    v.local_user = local;
    const Value* hold = member(*action, "holdAndDelegate");
    if (hold != nullptr && hold->kind == Kind::string && !hold->text.empty()) {
      v.outcome = Outcome::check;
      v.check_period = check_period;
    } else if (flag(*action, "accept")) {
      v.outcome = Outcome::accept;
    } else {
      return unreadable(where + "an action that is neither accept, reject nor a check");
    }
    v.denial = Denial::none;
    const auto accepted = texts(member(rule, "acceptEnv"));
    if (!accepted) return unreadable(where + "acceptEnv is no list of names");
    v.accept_env = *accepted;
    if (const Value* limit = member(*action, "sessionDuration")) {
      std::int64_t ns = 0;
      const auto [end, error] = std::from_chars(limit->text.data(), limit->text.data() + limit->text.size(), ns);
      if (limit->kind != Kind::number || error != std::errc{} || end != limit->text.data() + limit->text.size() || ns < 0) return unreadable(where + "sessionDuration");
      if (ns > 0) v.session_rules.max_duration = std::max(std::chrono::seconds{1}, std::chrono::duration_cast<std::chrono::seconds>(std::chrono::nanoseconds{ns}));
    }
    // A check's second action would say what is allowed; its first says nothing.
    if (v.outcome == Outcome::accept) {
      v.session_rules.agent_forwarding = flag(*action, "allowAgentForwarding");
      if (!flag(*action, "allowLocalPortForwarding")) v.session_rules.local_forward = SessionRules::TargetLists(1);
      if (!flag(*action, "allowRemotePortForwarding")) v.session_rules.remote_forward = SessionRules::TargetLists(1);
    }
    const auto recorders = texts(member(*action, "recorders"));
    if (!recorders) return unreadable(where + "recorders is no list of addresses");
    if (!recorders->empty()) {
      v.record = true;
      v.recorder_tag = "SSHPolicy";
      for (const auto& text : *recorders)
        if (const auto end = Endpoint::parse(text, recorder_port); end && end->port == recorder_port) {
          Node node;
          node.id = node.name = text;
          node.addresses = {end->address};
          v.recorders.push_back(std::move(node));
        }
      if (const Value* failure = member(*action, "onRecordingFailure")) {
        if (failure->kind != Kind::object) return unreadable(where + "onRecordingFailure");
        for (const char* name : {"RejectSessionWithMessage", "TerminateSessionWithMessage"})
          if (const Value* text = member(*failure, name); text != nullptr && !(text->kind == Kind::string && text->text.empty())) v.enforce_recorder = true;
      }
    }
    return v;
  }
  return denied(reached ? Denial::user_not_permitted : Denial::no_rule);
}

std::optional<Clock::time_point> CompiledRules::next_expiry(Clock::time_point now) const {
  const auto& policy = read_->policy;
  const Value* rules = policy && policy->kind == Kind::object ? member(*policy, "rules") : nullptr;
  std::optional<Clock::time_point> first;
  if (rules == nullptr || !read_->problem.empty()) return first;
  for (const auto& rule : rules->items)
    if (const Value* when = rule.kind == Kind::object ? member(rule, "ruleExpires") : nullptr; when != nullptr && when->kind == Kind::string)
      if (const auto until = utc_time(when->text); until && *until > now && (!first || *until < *first)) first = until;
  return first;
}

Verdict both(Verdict a, const Verdict& b) {
  if (a.outcome == Outcome::deny) return a;
  if (b.outcome == Outcome::deny || a.local_user != b.local_user || (a.record && b.record && a.recorder_tag != b.recorder_tag)) {
    Verdict v = denied(b.outcome == Outcome::deny ? b.denial : Denial::user_not_permitted);
    v.rule = b.rule;
    return v;
  }
  if (b.outcome == Outcome::check) {
    a.check_period = a.outcome != Outcome::check ? b.check_period : a.check_period && b.check_period ? std::optional{std::min(*a.check_period, *b.check_period)} : std::nullopt;
    a.outcome = Outcome::check;
  }
  std::erase_if(a.accept_env, [&](const auto& glob) { return std::find(b.accept_env.begin(), b.accept_env.end(), glob) == b.accept_env.end(); });
  if (b.record && !a.record) {
    a.record = true;
    a.recorders = b.recorders;
    a.recorder_tag = b.recorder_tag;
  }
  a.enforce_recorder = a.enforce_recorder || b.enforce_recorder;
  a.session_rules = stricter(std::move(a.session_rules), b.session_rules);
  return a;
}

}  // namespace postern::auth::policy
