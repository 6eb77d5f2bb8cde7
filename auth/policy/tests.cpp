// `tests` and `sshTests`: assertions that the file makes about itself (tailscale.com/kb/1337/policy-syntax#tests, #ssh-tests).
//
// What a test names is looked up when it runs, not at load: who and what there is says the network.
#include "auth/policy/matching.h"
#include "auth/policy/reading.h"

#include <algorithm>
#include <array>
#include <set>

namespace postern::auth::policy {
namespace {

using hujson::Kind;
using hujson::Member;
using hujson::Value;

// -- reading ------------------------------------------------------------------------------------------------------------------

std::string source_of(Reading& r, const Value& entry, const std::string& field, std::string_view name) {
  const Member* m = Reading::find(entry, name);
  if (m == nullptr || m->value.kind == Kind::null) return {};
  if (m->value.kind == Kind::string) return std::string{trimmed(m->value.text)};
  r.wrong_kind(m->value, field + "." + std::string{name}, "a string");
  return {};
}

NetworkTest network_test(Reading& r, const Value& entry, std::string field) {
  static constexpr std::array<std::string_view, 7> known{"src", "srcPostureAttrs", "proto", "accept", "deny", "user", "allow"};
  r.check_members(entry, field, known, "a test");
  NetworkTest test;
  test.line = entry.line;
  test.column = entry.column;
  test.src = source_of(r, entry, field, Reading::find(entry, "src") == nullptr ? "user" : "src");  // "user", "allow": old names
  test.attributes = r.posture_attributes(entry, field);
  if (const auto name = source_of(r, entry, field, "proto"); !name.empty()) {
    if (const auto protocol = Reading::protocol(name)) test.protocol = *protocol;
    else r.problem(Reading::find(entry, "proto")->value, field + ".proto", json_quoted(name) + " is not a protocol", "tcp, udp, icmp, ... or a number up to 255");
  }
  for (const std::string_view list : {"accept", "allow", "deny"}) {
    std::size_t index = 0;
    for (const auto& [raw, at] : r.strings(entry, list, field)) {
      NetworkTest::Target target;
      target.line = at->line;
      target.column = at->column;
      target.field = field + "." + std::string{list} + "[" + std::to_string(index++) + "]";
      target.text = trimmed(raw);
      target.accept = list != "deny";
      const auto colon = target.text.rfind(':');
      target.host = colon == std::string::npos ? target.text : target.text.substr(0, colon);
      const auto ports = colon == std::string::npos ? std::nullopt : Reading::port_list(std::string_view{target.text}.substr(colon + 1));
      if (ports && ports->size() == 1 && ports->front().first == ports->front().last) target.port = ports->front().first;
      test.targets.push_back(std::move(target));
    }
  }
  test.field = std::move(field);
  return test;
}

SshTest ssh_test(Reading& r, const Value& entry, std::string field) {
  static constexpr std::array<std::string_view, 6> known{"src", "dst", "accept", "check", "deny", "srcPostureAttrs"};
  r.check_members(entry, field, known, "an ssh test");
  SshTest test;
  test.line = entry.line;
  test.column = entry.column;
  test.src = source_of(r, entry, field, "src");
  test.attributes = r.posture_attributes(entry, field);
  std::size_t index = 0;
  for (const auto& [raw, at] : r.strings(entry, "dst", field)) {
    const std::string where = field + ".dst[" + std::to_string(index++) + "]";
    const auto text = trimmed(raw);
    const auto host = r.out.hosts.find(text);
    const auto prefix = host == r.out.hosts.end() ? Prefix::parse(text) : std::optional{host->second};
    const bool many = prefix && prefix->length != (prefix->address.v4() ? 32 : 128);
    if (many || text == "*" || text == "autogroup:internet" || (text.find('/') != std::string_view::npos && prefix))
      r.problem(*at, where, "SSH tests dst contains disallowed element " + json_quoted(text), "one user, group, tag, host or IPv4 address");
    else if (text.substr(0, 4) == "tag:" && !r.has_tag(text))
      r.problem(*at, where, "SSH tests dst contains unknown tag " + json_quoted(text), "define it in tagOwners; no port here");
    test.dst.emplace_back(text);
  }
  using Kinds = SshTest::Expectation::Kind;
  for (const auto& [list, kind] : std::array<std::pair<std::string_view, Kinds>, 3>{{{"accept", Kinds::accept}, {"check", Kinds::check}, {"deny", Kinds::deny}}}) {
    index = 0;
    for (const auto& [text, at] : r.strings(entry, list, field))
      test.expectations.push_back({at->line, at->column, field + "." + std::string{list} + "[" + std::to_string(index++) + "]", std::string{text}, kind});
  }
  test.field = std::move(field);
  return test;
}

// -- who and what a test names --------------------------------------------------------------------------------------------------

struct End {
  const Node* node;
  std::vector<Address> addresses;  ///< of the node, or the one that was named
};

struct Named {
  std::vector<End> ends;
  std::string problem;  ///< why there are none
};

std::string_view unbracketed(std::string_view text) {
  return text.size() > 2 && text.front() == '[' && text.back() == ']' ? text.substr(1, text.size() - 2) : text;
}

/// A single address that `text` names, by itself or through `hosts`.
std::optional<Address> address_named(const Compiled& policy, std::string_view text) {
  auto prefix = Prefix::parse(unbracketed(text));
  if (const auto host = policy.hosts.find(text); host != policy.hosts.end()) prefix = host->second;
  if (!prefix || prefix->length != (prefix->address.v4() ? 32 : 128)) return std::nullopt;
  return prefix->address;
}

Named nodes_named(const Compiled& policy, const Network& network, std::string_view text) {
  Named out;
  const auto take = [&](const auto& wanted) {
    for (const Node& n : network.nodes)
      if (wanted(n)) out.ends.push_back({&n, n.addresses});
  };
  if (const auto address = address_named(policy, text)) {
    if (const Node* n = network.find(*address)) out.ends.push_back({n, {*address}});
  } else if (text.substr(0, 4) == "tag:") {
    if (policy.tags.find(text) == policy.tags.end()) out.problem = "tag not found: " + json_quoted(text);
    take([&](const Node& n) { return std::find(n.tags.begin(), n.tags.end(), text) != n.tags.end(); });
  } else if (text.substr(0, 6) == "group:") {
    const auto group = policy.groups.find(text);
    if (group == policy.groups.end()) out.problem = "group not found: " + json_quoted(text);
    else take([&](const Node& n) { return takes(policy, {What::group, std::string{text}}, n, {}, false); });
  } else if (text == "autogroup:member") {
    take([](const Node& n) { return is_member(n); });
  } else if (text == "autogroup:tagged") {
    take([](const Node& n) { return n.tagged(); });
  } else if (is_login(text)) {
    take([&](const Node& n) { return has_user(n) && n.login == text; });
  } else {
    out.problem = json_quoted(text) + " is no user, group, tag, host or address";
  }
  if (out.ends.empty() && out.problem.empty()) out.problem = json_quoted(text) + " is no node of the network";
  return out;
}

/// Outside of every network that is not the internet's (RFC 6890); what autogroup:internet means.
bool is_public(const Address& a) {
  static const std::vector<Prefix> others = [] {
    std::vector<Prefix> out;
    for (const char* text : {"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/3", "::/8",
                             "fc00::/7", "fe80::/10", "ff00::/8"})
      out.push_back(*Prefix::parse(text));
    return out;
  }();
  return std::none_of(others.begin(), others.end(), [&](const Prefix& p) { return p.contains(a); });
}

// -- running ------------------------------------------------------------------------------------------------------------------

class Runner {
 public:
  Runner(const Policy& policy, const Compiled& compiled, const Network& network, bool whole, std::size_t most_pairs)
      : policy_{policy}, c_{compiled}, network_{network}, whole_{whole}, pairs_left_{most_pairs} {}

  TestReport run() {
    for (const auto& t : c_.tests) one([&] { network(t); });
    for (const auto& t : c_.ssh_tests) one([&] { ssh(t); });
    return std::move(report_);
  }

 private:
  template <class Body>
  void one(const Body& body) {
    const auto failed = failures_, left_out = report_.left_out.size();
    body();
    if (failures_ == failed && report_.left_out.size() == left_out) report_.passed++;
  }

  template <class At>
  void fail(const At& at, const std::string& why) {
    if (++failures_ > hujson::max_problems) return;
    const bool last = failures_ == hujson::max_problems;
    report_.failed.push_back({Place{c_.file, at.line, at.column}, at.field, "test(s) failed: " + why, last ? "further ones are not shown" : ""});
  }
  template <class At>
  void leave_out(const At& at, const std::string& why, const std::string& hint) {
    report_.left_out.push_back({Place{c_.file, at.line, at.column}, at.field, "this test cannot be tried here: " + why, hint});
  }
  template <class At>
  void unresolved(const At& at, const std::string& why) {
    if (whole_) fail(at, why);
    else leave_out(at, why, "give the network");
  }
  /// False when there is no time for so many; then it has been told.
  template <class At>
  bool may_try(const At& at, std::size_t sources, std::size_t destinations) {
    const std::size_t pairs = sources * destinations;  // both below 2^32
    if (pairs > pairs_left_) {
      leave_out(at, std::to_string(pairs) + " pairs of nodes are too many", "postern policy check tries them");
      return false;
    }
    if (pairs_left_ != Policy::any_number_of_pairs) pairs_left_ -= pairs;
    return true;
  }

  static Node seen(const Node& node, const std::optional<std::map<std::string, Attribute>>& attributes) {
    Node out = node;
    if (attributes) out.attributes = *attributes;
    return out;
  }

  void ssh(const SshTest& test) {
    if (test.src.empty()) return fail(test, "src must be specified");
    if (test.dst.empty()) return fail(test, "dst must be specified");
    if (test.expectations.empty()) return fail(test, "nothing is expected: accept, check and deny are all empty");
    const Named sources = nodes_named(c_, network_, test.src);
    if (sources.ends.empty()) return unresolved(test, sources.problem);
    for (const auto& text : test.dst) {
      // The service finds no node by its IPv6 address here (capture sshtest-malformed-dst-bare-ipv6).
      if (const auto address = Address::parse(unbracketed(text)); address && !address->v4()) return fail(test, json_quoted(text) + ": an IPv6 address is no dst of a test");
      Named destinations;
      const bool self = text == "autogroup:self";
      if (!self) {
        destinations = nodes_named(c_, network_, text);
        if (destinations.ends.empty()) return unresolved(test, destinations.problem);
      }
      if (!may_try(test, sources.ends.size(), self ? network_.nodes.size() : destinations.ends.size())) return;
      for (const End& from : sources.ends) {
        if (self) {
          destinations.ends.clear();
          for (const Node& n : network_.nodes)
            if (same_user(n, *from.node)) destinations.ends.push_back({&n, n.addresses});
          if (destinations.ends.empty()) return unresolved(test, "autogroup:self is no node of the network for " + json_quoted(test.src));
        }
        const Node source = seen(*from.node, test.attributes);
        for (const End& to : destinations.ends)
          for (const auto& wanted : test.expectations) expect(test, text, wanted, source, from, *to.node);
      }
    }
  }

  void expect(const SshTest& test, const std::string& dst, const SshTest::Expectation& wanted, const Node& source, const End& from, const Node& to) {
    using Kinds = SshTest::Expectation::Kind;
    const Question question{source, from.addresses.empty() ? Address{} : from.addresses.front(), to, wanted.user, std::nullopt};
    const Verdict verdict = policy_.decide(network_, question, false);
    const bool in = verdict.outcome != Outcome::deny;
    const bool holds = wanted.kind == Kinds::deny ? !in : wanted.kind == Kinds::accept ? in : verdict.outcome == Outcome::check;
    if (holds || !told_.insert(wanted.field).second) return;
    const char* want = wanted.kind == Kinds::deny ? "deny" : wanted.kind == Kinds::accept ? "accept" : "check";
    const std::string got = !in ? "deny" : (verdict.outcome == Outcome::check ? "check" : "accept") + std::string{" by "} + verdict.rule.text();
    fail(wanted, json_quoted(test.src) + " (" + source.name + ") to " + json_quoted(dst) + " (" + to.name + ") as " + json_quoted(wanted.user) + ": want " + want + ", got " + got);
  }

  /// One address of one node, and the network rules that name it on its side.
  struct Spotted {
    const Node* node;
    Address address;
    RuleSet rules, own_rules;  ///< own_rules: where the other end is a device of the same user
  };
  std::vector<Spotted> places(const Side& side, const std::vector<End>& ends) const {
    std::vector<Spotted> out;
    const auto any_port = [](PortsId) { return true; };
    for (const End& end : ends)
      for (const Address& a : end.addresses) {
        const std::array<Address, 1> one{a};
        out.push_back({end.node, a, rules_for(c_, side, c_.network.size(), *end.node, one, false, any_port), rules_for(c_, side, c_.network.size(), *end.node, one, true, any_port)});
      }
    return out;
  }

  void network(const NetworkTest& test) {
    if (test.src.empty()) return fail(test, "src must be specified");
    if (test.targets.empty()) return fail(test, "nothing is expected: accept and deny are both empty");
    Named sources = nodes_named(c_, network_, test.src);
    if (sources.ends.empty()) return unresolved(test, sources.problem);
    std::vector<Node> with_attributes;
    if (test.attributes) {
      for (const End& e : sources.ends) with_attributes.push_back(seen(*e.node, test.attributes));
      for (std::size_t i = 0; i < sources.ends.size(); i++) sources.ends[i].node = &with_attributes[i];
    }
    std::vector<Spotted> from;
    for (const auto& target : test.targets) {
      if (target.port == 0 && test.protocol != 1 && test.protocol != 58) {
        fail(target, json_quoted(target.text) + " is not host:port with one port");
        continue;
      }
      // An address need not be a node's: it may be behind a subnet router.
      Named destinations = nodes_named(c_, network_, target.host);
      Node elsewhere;
      if (const auto address = address_named(c_, target.host); address && destinations.ends.empty()) {
        elsewhere.name = address->text();
        elsewhere.addresses = {*address};
        destinations.ends.push_back({&elsewhere, {*address}});
      }
      if (destinations.ends.empty()) {
        unresolved(target, destinations.problem);
        continue;
      }
      if (!may_try(target, sources.ends.size(), destinations.ends.size())) continue;
      if (from.empty()) from = places(c_.any_src, sources.ends);
      all_pairs(test, target, from, places(c_.any_dst, destinations.ends), address_named(c_, target.host).has_value());
    }
  }

  /// `one_address`: the test names it, whatever family the sources have.
  void all_pairs(const NetworkTest& test, const NetworkTest::Target& target, const std::vector<Spotted>& from, const std::vector<Spotted>& to, bool one_address) {
    std::size_t compared = 0;
    for (const Spotted& a : from)
      for (const Spotted& b : to) {
        if (a.address.v4() != b.address.v4() && !one_address) continue;
        compared++;
        const std::string by = opened_by(a, b, test.protocol, target.port);
        if (!by.empty() == target.accept) continue;
        return fail(target, json_quoted(test.src) + " (" + a.node->name + ") to " + json_quoted(target.text) + ": want " + (target.accept ? "accept" : "deny") + ", got " +
                                (by.empty() ? "deny" : "accept by " + by));
      }
    if (compared == 0) fail(target, json_quoted(test.src) + " and " + json_quoted(target.host) + " have no addresses of one family");
  }

  /// The rule that opens it, or "".
  std::string opened_by(const Spotted& a, const Spotted& b, std::uint16_t protocol, std::uint16_t port) const {
    if (c_.network_is_open) return "default";
    const bool own = same_user(*a.node, *b.node);
    const bool is_node = !b.node->id.empty(), internet = !is_node && is_public(b.address);
    const auto opens = [&](const Open& o) {
      const bool same = o.protocol == 0 || (protocol == 0 ? o.protocol == 6 || o.protocol == 17 : o.protocol == protocol);
      return same && (port == 0 || (o.ports.first <= port && port <= o.ports.last));
    };
    const auto opened = [&](const NetworkRule& rule) {
      if ((rule.via && is_node) || !postures_hold(c_, rule.postures, a.node->attributes)) return false;
      return std::any_of(rule.dst.begin(), rule.dst.end(), [&](const auto& d) {
        const bool takes_it = takes(c_, d.who, *b.node, {&b.address, 1}, own) || (internet && d.who.name == "autogroup:internet");
        return takes_it && std::any_of(d.opens.begin(), d.opens.end(), opens);
      });
    };
    const RuleSet& named = own ? b.own_rules : b.rules;
    for (long n = RuleSet::first_common(a.rules, named); n >= 0; n = RuleSet::first_common(a.rules, named, static_cast<std::size_t>(n) + 1))
      if (const NetworkRule& rule = c_.network[static_cast<std::size_t>(n)]; opened(rule)) return rule.field;
    if (internet)  // no list holds what is no node
      for (long n = RuleSet::first_common(a.rules, a.rules); n >= 0; n = RuleSet::first_common(a.rules, a.rules, static_cast<std::size_t>(n) + 1))
        if (const NetworkRule& rule = c_.network[static_cast<std::size_t>(n)]; opened(rule)) return rule.field;
    return {};
  }

  const Policy& policy_;
  const Compiled& c_;
  const Network& network_;
  const bool whole_;
  std::size_t pairs_left_;
  std::size_t failures_ = 0;
  TestReport report_;
  std::set<std::string> told_;
};

}  // namespace

void read_tests(Reading& r) {
  const auto each = [&](std::string_view name, const auto& read) {
    const Value* all = r.section(name, Kind::array);
    if (all == nullptr) return;
    for (std::size_t i = 0; i < all->items.size(); i++) {
      std::string field = std::string{name} + "[" + std::to_string(i) + "]";
      if (all->items[i].kind != Kind::object) r.wrong_kind(all->items[i], field, "an object");
      else read(all->items[i], std::move(field));
    }
  };
  each("tests", [&](const Value& v, std::string field) { r.out.tests.push_back(network_test(r, v, std::move(field))); });
  each("sshTests", [&](const Value& v, std::string field) { r.out.ssh_tests.push_back(ssh_test(r, v, std::move(field))); });
}

TestReport Policy::run_tests(const Network& network, bool whole_network, std::size_t most_pairs) const {
  return Runner{*this, *compiled_, network, whole_network, most_pairs}.run();
}

Network Policy::imagined_network() const {
  const Compiled& c = *compiled_;
  std::set<std::string> users;
  std::set<Address> taken;
  for (const auto& members : c.group_members) users.insert(members.begin(), members.end());
  const auto add = [&](const std::vector<Principal>& principals) {
    for (const auto& p : principals)
      if (p.what == What::user) users.insert(p.name);
  };
  for (const SshRule& rule : c.ssh) {
    add(rule.src);
    add(rule.dst);
  }
  for (const NetworkRule& rule : c.network) {
    add(rule.src);
    for (const auto& d : rule.dst) add({d.who});
  }
  const auto mention = [&](const std::string& text) {
    if (is_login(text)) users.insert(text);
  };
  for (const auto& t : c.tests) {
    mention(t.src);
    for (const auto& target : t.targets) mention(target.host);
  }
  for (const auto& t : c.ssh_tests) {
    mention(t.src);
    for (const auto& dst : t.dst) mention(dst);
  }
  for (const auto& [name, prefix] : c.hosts) taken.insert(prefix.address);

  Network out;
  out.users.assign(users.begin(), users.end());
  std::uint32_t next = 0;
  const auto address = [&] {
    for (;;) {
      next++;
      const auto a = *Address::parse("100.127." + std::to_string(next / 256 % 256) + "." + std::to_string(next % 256));
      if (taken.insert(a).second || next > 65'535) return a;
    }
  };
  for (const auto& user : users) out.nodes.push_back({.id = user, .name = user, .addresses = {address()}, .login = user, .tags = {}});
  std::set<std::string> tags;
  for (const auto& [tag, defined] : c.tags) tags.insert(tag);
  for (const auto& tag : tags) out.nodes.push_back({.id = tag, .name = tag, .addresses = {address()}, .login = {}, .tags = {tag}});
  out.index();
  return out;
}

}  // namespace postern::auth::policy
