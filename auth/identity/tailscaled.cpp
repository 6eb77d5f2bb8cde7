#include "auth/identity/tailscaled.h"

#include "base/log.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <set>

namespace postern::auth::identity {
namespace {

using Json = nlohmann::json;

/// pgproxy and friends know it by this name; headscale and Tailscale both use it for every tagged node.
constexpr std::string_view tagged_devices = "tagged-devices";
constexpr const char* unnameable_tag = "tag:?";

Unexpected<Error> strange(const std::string& what) {
  return {Error{EAGAIN, "tailscaled's answer: " + what}};
}
Unexpected<Error> refused(std::string doing, std::string user_message) {
  return {Error{EACCES, std::move(doing), std::move(user_message)}};
}

/// Builds an object, of whose members only those are kept for which `wanted(depth, key)` holds; depth 1 is the outermost. In time linear in the text, which the
/// library's own parser with a callback is not: at the end of each object it looks through all that its parent has so far.
template <class Wanted>
class Filter : public nlohmann::json_sax<Json> {
 public:
  explicit Filter(const Wanted& wanted) : wanted_{wanted} {}
  Json root;
  bool too_deep = false;

  bool null() override { return value(nullptr); }
  bool boolean(bool v) override { return value(v); }
  bool number_integer(number_integer_t v) override { return value(v); }
  bool number_unsigned(number_unsigned_t v) override { return value(v); }
  bool number_float(number_float_t v, const string_t&) override { return value(v); }
  bool string(string_t& v) override { return value(std::move(v)); }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return start(Json::object()); }
  bool start_array(std::size_t) override { return start(Json::array()); }
  bool end_object() override { return end(); }
  bool end_array() override { return end(); }
  bool key(string_t& k) override {
    if (skipped_ > 0) return true;
    skip_next_ = !wanted_(static_cast<int>(open_.size()), k);
    key_ = std::move(k);
    return true;
  }
  bool parse_error(std::size_t, const std::string&, const Json::exception&) override { return false; }

 private:
  Json* place(Json v) {
    if (open_.empty()) return &(root = std::move(v));
    if (open_.back()->is_array()) return &open_.back()->emplace_back(std::move(v));
    return &((*open_.back())[key_] = std::move(v));
  }
  bool value(Json v) {
    if (skipped_ > 0 || std::exchange(skip_next_, false)) return true;
    place(std::move(v));
    return true;
  }
  bool start(Json v) {
    too_deep = open_.size() + skipped_ >= max_tailscaled_nesting;
    if (too_deep) return false;
    if (skipped_ > 0 || std::exchange(skip_next_, false))
      skipped_++;
    else
      open_.push_back(place(std::move(v)));
    return true;
  }
  bool end() {
    if (skipped_ > 0)
      skipped_--;
    else
      open_.pop_back();
    return true;
  }
  const Wanted& wanted_;
  std::vector<Json*> open_;
  std::size_t skipped_ = 0;
  std::string key_;
  bool skip_next_ = false;
};

template <class Wanted>
Expected<Json> read_object(std::string_view text, const Wanted& wanted) {
  Filter<Wanted> filter{wanted};
  const bool whole = Json::sax_parse(text.begin(), text.end(), &filter);
  if (filter.too_deep) return strange("nested too deeply");
  if (!whole) return strange("no JSON");
  if (!filter.root.is_object()) return strange(std::string{"JSON, but "} + filter.root.type_name() + ", not an object");
  return std::move(filter.root);
}

// Go's encoding/json leaves members out or writes null for what is empty: both read as empty, a wrong type never does.
class Reader {
 public:
  const Json* object(const Json& of, const char* key) {
    const Json* v = member(of, key);
    return v == nullptr || expect(v->is_object(), key) ? v : nullptr;
  }
  const Json* array(const Json& of, const char* key) {
    const Json* v = member(of, key);
    return v == nullptr || expect(v->is_array(), key) ? v : nullptr;
  }
  std::string text(const Json& of, const char* key) {
    const Json* v = member(of, key);
    if (v == nullptr || !expect(v->is_string(), key)) return {};
    return plain(v->get_ref<const std::string&>(), key);
  }
  /// What a node says of itself: whatever it says, the rest of the answer is the network's.
  static std::string said(const Json& of, const char* key) {
    const Json* v = member(of, key);
    return v != nullptr && v->is_string() && is_plain(v->get_ref<const std::string&>()) ? v->get<std::string>() : std::string{};
  }
  bool flag(const Json& of, const char* key, bool otherwise = false) {
    const Json* v = member(of, key);
    return v == nullptr || !expect(v->is_boolean(), key) ? otherwise : v->get<bool>();
  }
  static bool said_yes(const Json& of, const char* key) {
    const Json* v = member(of, key);
    return v != nullptr && v->is_boolean() && v->get<bool>();
  }
  /// A user's id: 0 where there is none.
  std::int64_t number(const Json& of, const char* key) {
    const Json* v = member(of, key);
    return v == nullptr || !expect(v->is_number_integer(), key) ? 0 : v->get<std::int64_t>();
  }
  std::vector<std::string> texts(const Json& of, const char* key) {
    std::vector<std::string> out;
    const Json* all = array(of, key);
    if (all == nullptr) return out;
    for (const Json& v : *all)
      if (expect(v.is_string(), key)) out.push_back(plain(v.get_ref<const std::string&>(), key));
    return out;
  }
  /// A tag that no policy can name (Headscale takes "tag:web_server") is one all the same: its node is no user's.
  std::vector<std::string> tags(const Json& of) {
    auto out = texts(of, "Tags");
    for (auto& tag : out)
      if (!problem_of_tag(tag).empty()) tag = unnameable_tag;
    std::sort(out.begin(), out.end());
    out.erase(std::unique(out.begin(), out.end()), out.end());
    return out;
  }
  /// Empty, or what is not as it should be.
  const std::string& wrong() const { return wrong_; }
  bool expect(bool holds, std::string_view key) {
    if (!holds && wrong_.empty()) wrong_ = std::string{key} + " is of a wrong type";
    return holds;
  }

 private:
  static const Json* member(const Json& of, const char* key) {
    const auto it = of.find(key);
    return it == of.end() || it->is_null() ? nullptr : &*it;
  }
  static bool is_plain(const std::string& s) {
    return s.size() <= 320 && std::none_of(s.begin(), s.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; });
  }
  const std::string& plain(const std::string& s, const char* key) {
    if (!is_plain(s) && wrong_.empty()) wrong_ = std::string{key} + " is too long or holds control characters";
    return s;
  }
  std::string wrong_;
};

std::string first_label(std::string_view name) {
  return std::string{name.substr(0, name.find('.'))};
}

/// A login, as policies write it. Headscale's users without an e-mail address have no "@", and its policies write "alice@" for them.
std::string login_of(std::string name) {
  if (name.empty() || name == tagged_devices) return {};
  if (name.find('@') == std::string::npos) name += '@';
  return problem_of_login(name).empty() ? name : std::string{};
}

/// Tailscale's posture documents write node:os in lower case ("macos"), nodes report "macOS".
std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
  return text;
}

bool always(int, const std::string&) {
  return true;
}

}  // namespace

std::optional<WallTime> read_go_time(std::string_view text) {
  using namespace std::chrono;
  const auto digits = [&](std::size_t at, std::size_t n) -> std::optional<int> {
    if (at + n > text.size()) return std::nullopt;
    int value = 0;
    const auto [end, ec] = std::from_chars(text.data() + at, text.data() + at + n, value);
    if (ec != std::errc{} || end != text.data() + at + n || text[at] == '-') return std::nullopt;
    return value;
  };
  const auto is = [&](std::size_t at, char c) { return at < text.size() && text[at] == c; };
  const auto y = digits(0, 4), mo = digits(5, 2), d = digits(8, 2), h = digits(11, 2), mi = digits(14, 2), s = digits(17, 2);
  if (!y || !mo || !d || !h || !mi || !s || !is(4, '-') || !is(7, '-') || !(is(10, 'T') || is(10, 't')) || !is(13, ':') || !is(16, ':')) return std::nullopt;
  const year_month_day date{year{*y}, month{static_cast<unsigned>(*mo)}, day{static_cast<unsigned>(*d)}};
  if (!date.ok() || *h > 23 || *mi > 59 || *s > 60) return std::nullopt;
  // From 1678 to 2261 system_clock's nanoseconds hold; beyond is "none" (0001-01-01) or "never".
  if (*y < 1970 || *y > 2250) return std::nullopt;
  std::size_t at = 19;
  nanoseconds fraction{0};
  if (is(at, '.')) {
    std::int64_t scale = 100'000'000;
    for (at++; at < text.size() && text[at] >= '0' && text[at] <= '9'; at++, scale /= 10) fraction += nanoseconds{(text[at] - '0') * scale};
  }
  minutes offset{0};
  if (is(at, 'Z') || is(at, 'z')) {
    at++;
  } else {
    const auto oh = digits(at + 1, 2), om = digits(at + 4, 2);
    if (!(is(at, '+') || is(at, '-')) || !oh || !om || !is(at + 3, ':') || *oh > 23 || *om > 59) return std::nullopt;
    offset = hours{*oh} + minutes{*om};
    if (text[at] == '-') offset = -offset;
    at += 6;
  }
  if (at != text.size()) return std::nullopt;
  return WallTime{sys_days{date}} + hours{*h} + minutes{*mi} + seconds{*s} + duration_cast<WallTime::duration>(fraction) - offset;
}

Expected<WhoisAnswer> read_whois(std::string_view json, const std::optional<Address>& asked, const WhoisContext& context) {
  auto whois = read_object(json, always);
  if (!whois) return Unexpected{std::move(whois.error())};
  Reader read;
  const Json* n = read.object(*whois, "Node");
  if (n == nullptr) return strange("whois without a Node");
  const Json none = Json::object();
  const auto object_or_none = [&none](const Json& of, const char* key) -> const Json& {
    const auto it = of.find(key);
    return it != of.end() && it->is_object() ? *it : none;
  };
  const Json& profile = object_or_none(*whois, "UserProfile");
  const Json& host = object_or_none(*n, "Hostinfo");  // the node's own words

  WhoisAnswer answer;
  Node& node = answer.node;
  node.id = read.text(*n, "StableID");
  if (node.id.empty()) return strange("whois without StableID");
  node.name = Reader::said(*n, "ComputedName");
  if (node.name.empty()) node.name = first_label(Reader::said(*n, "Name"));
  if (node.name.empty()) node.name = node.id;
  node.tags = read.tags(*n);
  for (const auto& text : read.texts(*n, "Addresses"))
    if (const auto prefix = Prefix::parse(text); prefix && prefix->length == (prefix->address.v4() ? 32u : 128u)) node.addresses.push_back(prefix->address);
  const std::string login_name = Reader::said(profile, "LoginName");
  const auto expiry = read_go_time(read.text(*n, "KeyExpiry"));
  const bool shared = read.number(*n, "Sharer") != 0 || Reader::said_yes(host, "ShareeNode");
  node.shared = shared;
  const bool expired = read.flag(*n, "Expired") || (expiry && *expiry <= context.now);
  const bool jailed = read.flag(*n, "IsJailed"), unsigned_peer = read.flag(*n, "UnsignedPeerAPIOnly");
  // Left out where false (tailcfg.Node: omitempty); a network that approves devices lets the others see none of them.
  const bool authorized = read.flag(*n, "MachineAuthorized");
  if (auto os = lower(Reader::said(host, "OS")); !os.empty()) node.attributes.emplace("node:os", std::move(os));
  if (auto version = Reader::said(host, "OSVersion"); !version.empty()) node.attributes.emplace("node:osVersion", std::move(version));
  // "1.102.5-t0123abcd-g4567": what follows is the build.
  if (auto version = Reader::said(host, "IPNVersion"); !version.empty()) node.attributes.emplace("node:tsVersion", version.substr(0, version.find('-')));

  // A whole answer about a node. What is wrong with it denies, and ends what the node has: that it cannot be read does not pass by itself.
  const std::string who = "node " + safe_quoted(node.name, 80) + " (" + safe_quoted(node.id, 40) + ") ";
  const auto deny = [&](std::string doing, std::string user_message) {
    return refused(who + std::move(doing), std::move(user_message));
  };
  if (node.id == context.own_id) return deny("is this machine itself", "This machine cannot log in to itself by its address in the network.");
  if (expired) return deny("has an expired key", "The key of your machine in the network has expired. Sign in to the network again.");
  if (jailed) return deny("is jailed", "The network does not let your machine open connections.");
  if (unsigned_peer) return deny("is not signed by the network's lock", "Your machine is not signed by the network's lock (tailnet lock).");
  constexpr const char* unreadable = "What the network says of your machine cannot be read.";
  if (!read.wrong().empty()) return deny("cannot be read: " + read.wrong(), unreadable);
  if (asked && std::find(node.addresses.begin(), node.addresses.end(), *asked) == node.addresses.end())
    return strange("whois of " + asked->text() + " names " + who + "whose own address that is not");
  if (!authorized) return deny("is not approved", "Your machine is not approved in the network yet.");
  if (shared && !context.shared_users) return deny("is shared with another network", "Machines of other networks may not log in here.");
  if (!node.tagged()) {
    if (login_name.empty() || login_name == tagged_devices) return deny("has neither a user nor tags", unreadable);
    node.login = login_of(login_name);
    if (node.login.empty()) return deny("has the user " + safe_quoted(login_name, 80) + ", which no rule can name", "The network's name for your user cannot be used here.");
  }

  if (const Json* caps = read.object(*whois, "CapMap")) {
    for (const auto& [name, value] : caps->items()) {
      if (!value.is_array() && !value.is_null()) return deny("has the capability " + safe_quoted(name, 80) + ", which is no array", unreadable);
      std::string text = value.is_null() ? "[]" : value.dump();
      if (text.size() > max_whois_capability_bytes)
        return Unexpected{Error{E2BIG, who + "has more than " + std::to_string(max_whois_capability_bytes) + " bytes of the capability " + safe_quoted(name, 80),
                                "The network's rules for your machine are too long."}};
      node.capabilities.emplace(name, std::move(text));
    }
  }
  if (!read.wrong().empty()) return deny("cannot be read: " + read.wrong(), unreadable);
  return answer;
}

Expected<TailscaledStatus> read_status(std::string_view json, bool shared_users) {
  static const std::set<std::string, std::less<>> outer{"BackendState", "TUN", "Self", "Peer", "User"};
  // Self at depth 2, peers at 3, users at 3. The rest (traffic, endpoints, capabilities) is most of it, and none of ours.
  static const std::set<std::string, std::less<>> inner{"ID",   "DNSName",   "HostName", "UserID", "TailscaleIPs", "Tags", "KeyExpiry", "ShareeNode", "AltSharerUserID",
                                                        "LoginName"};
  bool in_self = false;
  auto whole = read_object(json, [&in_self](int depth, const std::string& key) {
    if (depth == 1) {
      in_self = key == "Self";
      return outer.contains(key);
    }
    return (depth == 2 && !in_self) || inner.contains(key);
  });
  if (!whole) return Unexpected{std::move(whole.error())};
  Reader read;
  TailscaledStatus status;
  status.state = read.text(*whole, "BackendState");
  status.tun = read.flag(*whole, "TUN", true);
  if (!read.wrong().empty()) return strange("status: " + read.wrong());
  if (status.state.empty()) return strange("status without BackendState");
  if (!status.running()) return status;

  std::map<std::int64_t, std::string> users;
  if (const Json* all = read.object(*whole, "User")) {
    for (const auto& [id, user] : all->items()) {
      std::int64_t number = 0;
      if (std::from_chars(id.data(), id.data() + id.size(), number).ec != std::errc{} || !user.is_object()) continue;
      if (auto login = login_of(Reader::said(user, "LoginName")); !login.empty()) users.emplace(number, std::move(login));
    }
  }
  std::vector<Node> nodes;
  std::set<std::int64_t> ours, others;  // users
  // One that cannot be read is no node of the network; the others are.
  const auto take = [&](const Json& peer, bool self) {
    Reader its;
    Reader& of = self ? read : its;
    if (!of.expect(peer.is_object(), "Peer")) return;
    Node node;
    node.id = of.text(peer, "ID");
    std::string dns_name = Reader::said(peer, "DNSName");
    if (dns_name.ends_with('.')) dns_name.pop_back();
    node.name = first_label(dns_name);
    if (node.name.empty()) node.name = Reader::said(peer, "HostName");
    node.tags = of.tags(peer);
    for (const auto& text : of.texts(peer, "TailscaleIPs"))
      if (const auto address = Address::parse(text); of.expect(address.has_value(), "TailscaleIPs")) node.addresses.push_back(*address);
    const std::int64_t user = of.number(peer, "UserID");
    const bool shared = of.flag(peer, "ShareeNode") || of.number(peer, "AltSharerUserID") != 0;
    const auto expiry = read_go_time(of.text(peer, "KeyExpiry"));
    if (!of.wrong().empty()) return;
    if (const auto it = users.find(user); it != users.end() && !node.tagged()) node.login = it->second;
    if (self) {
      status.own_id = node.id;
      status.own_addresses = node.addresses;
    } else if (expiry) {
      status.key_expiries.push_back(*expiry);
    }
    node.shared = shared;
    // One of another network, or one that nobody stands for (a user whose name no rule can have): no rule is about it.
    const bool foreign = shared && !shared_users;
    if (!foreign && !dns_name.empty()) status.dns_names.insert_or_assign(node.id, std::move(dns_name));
    if (!node.tagged()) (foreign ? others : ours).insert(user);
    if (!foreign && !node.id.empty() && (node.tagged() || !node.login.empty())) nodes.push_back(std::move(node));
  };
  const Json* self = read.object(*whole, "Self");
  if (self == nullptr) return strange("status without Self");
  take(*self, true);
  if (const Json* peers = read.object(*whole, "Peer"))
    for (const auto& [key, peer] : peers->items()) take(peer, false);
  if (!read.wrong().empty()) return strange("status: " + read.wrong());
  if (status.own_id.empty()) return strange("status without this machine's ID");
  std::vector<std::string> logins;
  for (const auto& [id, login] : users)
    if (ours.contains(id) || !others.contains(id)) logins.push_back(login);
  std::sort(logins.begin(), logins.end());
  logins.erase(std::unique(logins.begin(), logins.end()), logins.end());
  status.network = Network{std::move(nodes), std::move(logins)};
  return status;
}

Expected<bool> read_run_ssh(std::string_view json) {
  auto prefs = read_object(json, [](int depth, const std::string& key) { return depth == 1 && key == "RunSSH"; });
  if (!prefs) return Unexpected{std::move(prefs.error())};
  Reader read;
  const bool on = read.flag(*prefs, "RunSSH");
  if (!read.wrong().empty()) return strange("prefs: " + read.wrong());
  return on;
}

Expected<std::optional<bool>> read_bus_line(std::string_view json) {
  auto notify = read_object(json, [](int depth, const std::string& key) { return depth == 1 ? key == "Prefs" : depth == 2 && key == "RunSSH"; });
  if (!notify) return Unexpected{std::move(notify.error())};
  Reader read;
  std::optional<bool> run_ssh;
  if (const Json* prefs = read.object(*notify, "Prefs"); prefs != nullptr) run_ssh = read.flag(*prefs, "RunSSH");
  if (!read.wrong().empty()) return strange("the bus: " + read.wrong());
  return run_ssh;
}

Expected<std::optional<std::string>> read_ssh_policy(std::string_view json, bool on_bus) {
  const int outer = on_bus ? 1 : 0;
  auto whole = read_object(json, [outer](int depth, const std::string& key) {
    if (depth == outer) return key == "NetMap";
    return depth == outer + 1 ? key == "SSHPolicy" : depth > outer + 1;
  });
  if (!whole) return Unexpected{std::move(whole.error())};
  const Json* netmap = &*whole;
  if (on_bus) {
    const auto it = whole->find("NetMap");
    if (it == whole->end() || it->is_null()) return std::optional<std::string>{};
    netmap = &*it;
  }
  if (!netmap->is_object()) return strange("a netmap that is no object");
  const auto it = netmap->find("SSHPolicy");
  if (it == netmap->end()) return std::optional<std::string>{};
  if (it->is_null()) return std::optional<std::string>{"{\"rules\":[]}"};
  if (!it->is_object()) return strange("an SSHPolicy that is no object");
  return std::optional<std::string>{it->dump()};
}

}  // namespace postern::auth::identity
