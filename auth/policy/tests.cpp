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
    take([&](const Node& n) { return is_member(n) && n.login == text; });
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
  Runner(const Policy& policy, const Compiled& compiled, const Network& network, bool whole) : policy_{policy}, c_{compiled}, network_{network}, whole_{whole} {}

  TestReport run() {
    for (const auto& t : c_.tests) one(t, [&] { network(t); });
    for (const auto& t : c_.ssh_tests) one(t, [&] { ssh(t); });
    return std::move(report_);
  }

 private:
  template <class Test, class Body>
  void one(const Test&, const Body& body) {
    const auto failed = report_.failed.size(), left_out = report_.left_out.size();
    body();
    if (report_.failed.size() == failed && report_.left_out.size() == left_out) report_.passed++;
  }

  template <class At>
  void fail(const At& at, const std::string& why) {
    report_.failed.push_back({Place{c_.file, at.line, at.column}, at.field, "test(s) failed: " + why, ""});
  }
  template <class At>
  void unresolved(const At& at, const std::string& why) {
    if (whole_) fail(at, why);
    else report_.left_out.push_back({Place{c_.file, at.line, at.column}, at.field, "this test cannot be tried here: " + why, "give the network"});
  }

  static Node seen(const Node& node, const std::optional<std::map<std::string, Attribute>>& attributes) {
    Node out = node;
    if (attributes) out.attributes = *attributes;
    return out;
  }

  void ssh(const SshTest& test) {
    using Kinds = SshTest::Expectation::Kind;
    if (test.src.empty()) return fail(test, "src must be specified");
    if (test.dst.empty()) return fail(test, "dst must be specified");
    if (test.expectations.empty()) return fail(test, "nothing is expected: accept, check and deny are all empty");
    const Named sources = nodes_named(c_, network_, test.src);
    if (sources.ends.empty()) return unresolved(test, sources.problem);
    for (const auto& text : test.dst) {
      // The service finds no node by its IPv6 address here (capture sshtest-malformed-dst-bare-ipv6).
      if (const auto address = Address::parse(unbracketed(text)); address && !address->v4()) return fail(test, json_quoted(text) + ": an IPv6 address is no dst of a test");
      for (const End& from : sources.ends) {
        Named destinations;
        if (text == "autogroup:self") {
          for (const Node& n : network_.nodes)
            if (same_user(n, *from.node)) destinations.ends.push_back({&n, n.addresses});
          if (destinations.ends.empty()) destinations.problem = "autogroup:self is no node of the network for " + json_quoted(test.src);
        } else {
          destinations = nodes_named(c_, network_, text);
        }
        if (destinations.ends.empty()) return unresolved(test, destinations.problem);
        const Node source = seen(*from.node, test.attributes);
        for (const End& to : destinations.ends) {
          for (const auto& wanted : test.expectations) {
            const Question question{source, source.addresses.empty() ? Address{} : from.addresses.front(), *to.node, wanted.user, std::nullopt};
            const Verdict verdict = policy_.decide(network_, question, false);
            const bool in = verdict.outcome != Outcome::deny;
            const bool holds = wanted.kind == Kinds::deny ? !in : wanted.kind == Kinds::accept ? in : verdict.outcome == Outcome::check;
            if (holds) continue;
            const char* want = wanted.kind == Kinds::deny ? "deny" : wanted.kind == Kinds::accept ? "accept" : "check";
            const std::string got = !in ? "deny" : (verdict.outcome == Outcome::check ? "check" : "accept") + std::string{" by "} + verdict.rule.text();
            if (told_.insert(wanted.field).second)
              fail(wanted, json_quoted(test.src) + " (" + source.name + ") to " + json_quoted(text) + " (" + to.node->name + ") as " + json_quoted(wanted.user) + ": want " + want +
                               ", got " + got);
          }
        }
      }
    }
  }

  void network(const NetworkTest& test) {
    if (test.src.empty()) return fail(test, "src must be specified");
    if (test.targets.empty()) return fail(test, "nothing is expected: accept and deny are both empty");
    const Named sources = nodes_named(c_, network_, test.src);
    if (sources.ends.empty()) return unresolved(test, sources.problem);
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
      for (const End& from : sources.ends)
        for (const End& to : destinations.ends) pair(test, target, from, to);
    }
  }

  void pair(const NetworkTest& test, const NetworkTest::Target& target, const End& from, const End& to) {
    const Node source = seen(*from.node, test.attributes);
    for (const Address& a : from.addresses) {
      for (const Address& b : to.addresses) {
        if (a.v4() != b.v4() && to.addresses.size() > 1) continue;
        const std::string by = opened_by(source, a, to, b, test.protocol, target.port);
        if (!by.empty() == target.accept) continue;
        if (told_.insert(target.field).second)
          fail(target, json_quoted(test.src) + " (" + source.name + ") to " + json_quoted(target.text) + ": want " + (target.accept ? "accept" : "deny") + ", got " +
                           (by.empty() ? "deny" : "accept by " + by));
        return;
      }
    }
  }

  /// The rule that opens it, or "".
  std::string opened_by(const Node& source, const Address& a, const End& to, const Address& b, std::uint16_t protocol, std::uint16_t port) const {
    if (c_.network_is_open) return "default";
    const bool own = same_user(source, *to.node);
    const bool node = !to.node->id.empty();
    const auto opens = [&](const Open& o) {
      const bool same = o.protocol == 0 || (protocol == 0 ? o.protocol == 6 || o.protocol == 17 : o.protocol == protocol);
      return same && (port == 0 || (o.ports.first <= port && port <= o.ports.last));
    };
    for (const NetworkRule& rule : c_.network) {
      if ((rule.via && node) || first_taking(c_, rule.src, source, {&a, 1}, own) == nullptr || !postures_hold(c_, rule.postures, source.attributes)) continue;
      for (const auto& d : rule.dst) {
        const bool internet = d.who.name == "autogroup:internet" && !node && is_public(b);
        if ((internet || takes(c_, d.who, *to.node, {&b, 1}, own)) && std::any_of(d.opens.begin(), d.opens.end(), opens)) return rule.field;
      }
    }
    return {};
  }

  const Policy& policy_;
  const Compiled& c_;
  const Network& network_;
  const bool whole_;
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

TestReport Policy::run_tests(const Network& network, bool whole_network) const { return Runner{*this, *compiled_, network, whole_network}.run(); }

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
