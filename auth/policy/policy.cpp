#include "auth/policy/policy.h"

#include "auth/policy/compiled.h"
#include "auth/policy/hujson.h"
#include "auth/policy/matching.h"
#include "auth/policy/reading.h"
#include "base/log.h"

#include <algorithm>
#include <bit>

namespace postern::auth::policy {
namespace {

/// The first network rule that opens question.port from source to destination, or -1.
long first_network_rule(const Compiled& policy, const Question& question) {
  const bool own = same_user(question.source, question.destination);
  const auto any_port = [](PortsId) { return true; };
  const auto is_open = [&](PortsId id) { return policy.opens(id, question.port); };
  const std::array<Address, 1> from{question.source_address};
  const auto src = rules_for(policy, policy.network_src, policy.network.size(), question.source, from, own, any_port);
  const auto dst = rules_for(policy, policy.network_dst, policy.network.size(), question.destination, dialled(question), own, is_open);
  for (long found = RuleSet::first_common(src, dst); found >= 0; found = RuleSet::first_common(src, dst, static_cast<std::size_t>(found) + 1))
    if (postures_hold(policy, policy.network[static_cast<std::size_t>(found)].postures, question.source.attributes)) return found;
  return -1;
}

/// What the app grants from source to destination ask of a session. They only narrow, so where it is not certain that one does not hold, it
/// holds: whatever the device's posture, and for each address of both ends.
SessionRules granted_rules(const Compiled& policy, const Question& question) {
  SessionRules rules;
  if (policy.grants_with_rules.empty()) return rules;
  const bool own = same_user(question.source, question.destination);
  const auto any_port = [](PortsId) { return true; };
  std::vector<Address> from = question.source.addresses;
  from.push_back(question.source_address);
  std::vector<Address> to = question.destination.addresses;
  if (question.destination_address) to.push_back(*question.destination_address);
  const std::size_t grants = policy.grants_with_rules.size();
  auto both = rules_for(policy, policy.rules_src, grants, question.source, from, own, any_port);
  both &= rules_for(policy, policy.rules_dst, grants, question.destination, to, own, any_port);
  for (long n = RuleSet::first_common(both, both); n >= 0; n = RuleSet::first_common(both, both, static_cast<std::size_t>(n) + 1))
    rules = stricter(std::move(rules), *policy.network[policy.grants_with_rules[static_cast<std::size_t>(n)]].session_rules);
  return rules;
}

}  // namespace

bool is_foreign_user_name(std::string_view name) noexcept {
  if (name.empty() || name.size() > 256 || hujson::find_invalid_utf8(name) != std::string_view::npos) return false;
  bool foreign = false;
  for (std::size_t i = 0; i < name.size();) {
    const auto first = static_cast<unsigned char>(name[i]);
    const std::size_t length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    std::uint32_t c = length == 1 ? first : first & (0xff >> (length + 1));
    for (std::size_t k = 1; k < length; k++) c = c << 6 | (static_cast<unsigned char>(name[i + k]) & 0x3f);
    i += length;
    if (c < 0x80) {
      const bool letter = (c | 0x20) >= 'a' && (c | 0x20) <= 'z';
      const bool inside = (c >= '0' && c <= '9') || c == '.' || c == '-';
      if (!letter && c != '_' && !(inside && i > 1)) return false;
      continue;
    }
    foreign = true;
    if (c <= 0xa0 || c == 0xad || c == 0x61c || c == 0x1680 || c == 0x180e || (c >= 0x2000 && c <= 0x200f) || (c >= 0x2028 && c <= 0x202f) ||
        (c >= 0x205f && c <= 0x206f) || c == 0x3000 || (c >= 0xd800 && c <= 0xf8ff) || c == 0xfeff || (c >= 0xfff0 && c <= 0xffff) || c >= 0xe0000)
      return false;
  }
  return foreign;
}

RuleSet& RuleSet::operator|=(const RuleSet& other) noexcept {
  for (std::size_t i = 0; i < words_.size(); i++) words_[i] |= other.words_[i];
  return *this;
}

RuleSet& RuleSet::operator&=(const RuleSet& other) noexcept {
  for (std::size_t i = 0; i < words_.size(); i++) words_[i] &= other.words_[i];
  return *this;
}

long RuleSet::first_common(const RuleSet& a, const RuleSet& b, std::size_t from) noexcept {
  std::uint64_t mask = ~std::uint64_t{0} << (from % 64);
  for (std::size_t i = from / 64; i < a.words_.size(); i++, mask = ~std::uint64_t{0})
    if (const std::uint64_t both = a.words_[i] & b.words_[i] & mask; both != 0) return static_cast<long>(i * 64) + std::countr_zero(both);
  return -1;
}

bool RuleSet::empty() const noexcept {
  return std::all_of(words_.begin(), words_.end(), [](std::uint64_t w) { return w == 0; });
}

void RuleList::add(std::uint32_t rule) {
  if (numbers_.empty() || numbers_.back() != rule) numbers_.push_back(rule);
}

void RuleList::finish(std::size_t rules) {
  const std::size_t words = (rules + 63) / 64;
  if (numbers_.size() <= words) return;
  words_.assign(words, 0);
  for (const auto rule : numbers_) words_[rule / 64] |= std::uint64_t{1} << (rule % 64);
  numbers_ = {};
}

void RuleList::add_to(RuleSet& set) const {
  for (const auto rule : numbers_) set.add(rule);
  for (std::size_t i = 0; i < words_.size(); i++) set.words_[i] |= words_[i];
}

void RuleList::append(const RuleList& later) {
  for (const auto rule : later.numbers_) add(rule);
}

void PortedRules::add(std::uint32_t rule, PortsId ports) {
  if (lists_.empty() || lists_.back().first != ports) lists_.emplace_back(ports, RuleList{});
  lists_.back().second.add(rule);
}

void PortedRules::finish(std::size_t rules) {
  // One list for equal ports, made here at once: a search at every add() would be quadratic in the ports that a file names.
  std::stable_sort(lists_.begin(), lists_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<std::pair<PortsId, RuleList>> merged;
  for (auto& [id, list] : lists_) {
    if (!merged.empty() && merged.back().first == id) merged.back().second.append(list);
    else merged.emplace_back(id, std::move(list));
  }
  lists_ = std::move(merged);
  for (auto& [id, list] : lists_) list.finish(rules);
}

PrefixRules::Key PrefixRules::key(const Address& address, unsigned length) noexcept {
  Key k{};
  const unsigned whole = length / 8, rest = length % 8;
  std::copy_n(address.bytes().begin(), whole, k.begin());
  if (rest != 0) k[whole] = static_cast<std::uint8_t>(address.bytes()[whole] & (0xff << (8 - rest)));
  return k;
}

PortedRules& PrefixRules::at(const Prefix& prefix) {
  auto table = std::find_if(tables_.begin(), tables_.end(), [&](const Table& t) { return t.v4 == prefix.address.v4() && t.length == prefix.length; });
  if (table == tables_.end()) table = tables_.insert(table, Table{prefix.address.v4(), prefix.length, {}});
  return table->rules[key(prefix.address, prefix.length)];
}

void PrefixRules::finish(std::size_t rules) {
  for (auto& table : tables_)
    for (auto& [prefix, list] : table.rules) list.finish(rules);
}

void Side::finish(std::size_t rules) {
  for (PortedRules* list : {&everyone, &member, &tagged, &self}) list->finish(rules);
  for (auto* named : {&users, &domains, &tags})
    for (auto& [name, list] : *named) list.finish(rules);
  for (auto& list : groups) list.finish(rules);
  for (auto& [number, list] : sets) list.finish(rules);
  prefixes.finish(rules);
}

Verdict Policy::decide(const Network& network, const Question& question, bool require_network_rule) const {
  const Compiled& policy = *compiled_;
  const Node& source = question.source;
  const Node& destination = question.destination;
  Verdict verdict;

  const bool mappable = is_mappable_user_name(question.ssh_user);
  if (!mappable && !is_foreign_user_name(question.ssh_user)) {
    verdict.denial = Denial::invalid_user_name;
    return verdict;
  }

  const bool own = same_user(source, destination);
  const auto any_port = [](PortsId) { return true; };
  constexpr std::array<Address, 0> no_address;  // ssh rules name no addresses

  RuleSet reach = rules_for(policy, policy.ssh_dst, policy.ssh.size(), destination, no_address, own, any_port);
  if (source.id == destination.id) policy.ssh_own_node.add_to(reach);
  reach &= rules_for(policy, policy.ssh_src, policy.ssh.size(), source, no_address, own, any_port);
  if (reach.empty()) {
    verdict.denial = mappable ? Denial::no_rule : Denial::invalid_user_name;
    return verdict;
  }

  RuleSet users{policy.ssh.size()};
  if (const auto it = policy.ssh_users.find(question.ssh_user); it != policy.ssh_users.end()) it->second.add_to(users);
  if (question.ssh_user != "root" && question.uid.value_or(1) != 0) {  // matching.cpp, user_by()
    if (mappable) policy.ssh_nonroot.add_to(users);
    if (mappable && has_user(source) && localpart_of(source.login) == question.ssh_user)
      if (const auto it = policy.ssh_localparts.find(domain_of(source.login)); it != policy.ssh_localparts.end()) it->second.add_to(users);
  }
  bool any_met = false;
  long found = -1;
  for (long next = RuleSet::first_common(reach, users); next >= 0 && found < 0; next = RuleSet::first_common(reach, users, static_cast<std::size_t>(next) + 1)) {
    any_met = true;
    const Postures& postures = policy.ssh[static_cast<std::size_t>(next)].postures;
    if (postures_hold(policy, postures, source.attributes)) found = next;
    else if (postures_unknown(postures, source)) break;
  }
  if (found < 0) {
    verdict.denial = any_met ? Denial::posture : mappable ? Denial::user_not_permitted : Denial::invalid_user_name;
    return verdict;
  }

  if (require_network_rule && !policy.network_is_open && first_network_rule(policy, question) < 0) {
    verdict.denial = Denial::no_network_rule;
    return verdict;
  }

  const SshRule& rule = policy.ssh[static_cast<std::size_t>(found)];
  verdict.outcome = rule.verdict;
  verdict.denial = Denial::none;
  verdict.rule = Place{policy.file, rule.line, rule.column};
  verdict.local_user = question.ssh_user;
  verdict.accept_env = rule.accept_env;
  verdict.check_period = rule.check_period;
  verdict.session_rules = granted_rules(policy, question);
  if (rule.recorder_tag.empty()) return verdict;

  verdict.record = true;
  verdict.recorder_tag = rule.recorder_tag;
  verdict.enforce_recorder = rule.enforce_recorder;
  std::vector<std::pair<Address, const Node*>> recorders;
  for (const Node* node : network.with_tag(rule.recorder_tag))
    if (!node->addresses.empty()) recorders.emplace_back(*std::min_element(node->addresses.begin(), node->addresses.end()), node);
  std::sort(recorders.begin(), recorders.end(),
            [](const auto& a, const auto& b) { return a.first != b.first ? a.first < b.first : a.second->id < b.second->id; });
  for (const auto& [lowest, node] : recorders) verdict.recorders.push_back(*node);
  return verdict;
}

const std::vector<Problem>& Policy::warnings() const noexcept { return compiled_->warnings; }

std::string denial_text(Denial denial, std::string_view ssh_user) {
  switch (denial) {
    case Denial::none: return "";
    case Denial::no_rule:
    case Denial::posture:
    case Denial::no_network_rule: return "tailnet policy does not permit you to SSH to this node";
    case Denial::invalid_user_name:
    case Denial::user_not_permitted: break;
  }
  return "tailnet policy does not permit you to SSH as user " + safe_quoted(ssh_user, 64);
}

bool is_mappable_user_name(std::string_view name) noexcept {
  if (name.empty() || name.size() > 32) return false;
  const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; };
  if (!letter(name.front())) return false;
  if (name.back() == '$') name.remove_suffix(1);  // Samba's machine accounts, useradd(8)
  return std::all_of(name.begin(), name.end(), [&](char c) { return letter(c) || (c >= '0' && c <= '9') || c == '.' || c == '-' || c == '+'; });
}

bool glob_matches(std::string_view pattern, std::string_view name) noexcept {
  // Goes back to the last star only: quadratic at worst, where trying every star would be exponential.
  std::size_t p = 0, n = 0, star = std::string_view::npos, resume = 0;
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == name[n])) {
      p++;
      n++;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      n = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') p++;
  return p == pattern.size();
}

}  // namespace postern::auth::policy
