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

Unexpected<Error> strange(const std::string& what) {
  return {Error{EAGAIN, "tailscaled's answer: " + what}};
}
Unexpected<Error> refused(std::string doing, std::string user_message) {
  return {Error{EACCES, std::move(doing), std::move(user_message)}};
}

bool nested_too_deep(std::string_view json) {
  std::size_t depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < json.size(); i++) {
    const char c = json[i];
    if (in_string) {
      if (c == '\\') i++;
      else if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > max_tailscaled_nesting) return true;
    } else if ((c == '}' || c == ']') && depth > 0) {
      depth--;
    }
  }
  return false;
}

/// An object, of whose members only those are kept for which `wanted(depth, key)` holds; depth 1 is the outermost.
template <class Wanted>
Expected<Json> read_object(std::string_view text, const Wanted& wanted) {
  if (nested_too_deep(text)) return strange("nested too deeply");
  const auto filter = [&wanted](int depth, Json::parse_event_t event, Json& value) {
    return event != Json::parse_event_t::key || wanted(depth, value.get_ref<const std::string&>());
  };
  Json json = Json::parse(text.begin(), text.end(), filter, false);
  if (json.is_discarded()) return strange("no JSON");
  if (!json.is_object()) return strange(std::string{"JSON, but "} + json.type_name() + ", not an object");
  return json;
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
  bool flag(const Json& of, const char* key, bool otherwise = false) {
    const Json* v = member(of, key);
    return v == nullptr || !expect(v->is_boolean(), key) ? otherwise : v->get<bool>();
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
  std::vector<std::string> tags(const Json& of) {
    auto out = texts(of, "Tags");
    for (const auto& tag : out)
      if (const auto why = problem_of_tag(tag); !why.empty() && wrong_.empty()) wrong_ = "the tag " + safe_quoted(tag, 80) + ": " + std::string{why};
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
  const std::string& plain(const std::string& s, const char* key) {
    const bool bad = s.size() > 320 || std::any_of(s.begin(), s.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; });
    if (bad && wrong_.empty()) wrong_ = std::string{key} + " is too long or holds control characters";
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
  const Json* profile = read.object(*whois, "UserProfile");
  const Json* host = read.object(*n, "Hostinfo");
  if (profile == nullptr) profile = &none;
  if (host == nullptr) host = &none;

  WhoisAnswer answer;
  Node& node = answer.node;
  node.id = read.text(*n, "StableID");
  node.name = read.text(*n, "ComputedName");
  const std::string full_name = read.text(*n, "Name");
  if (node.name.empty()) node.name = first_label(full_name);
  node.tags = read.tags(*n);
  for (const auto& text : read.texts(*n, "Addresses")) {
    const auto prefix = Prefix::parse(text);
    if (!read.expect(prefix.has_value(), "Addresses")) break;
    if (prefix->length == (prefix->address.v4() ? 32u : 128u)) node.addresses.push_back(prefix->address);
  }
  const std::string login_name = read.text(*profile, "LoginName");
  const std::string key_expiry = read.text(*n, "KeyExpiry");
  const auto expiry = read_go_time(key_expiry);
  const bool shared = read.number(*n, "Sharer") != 0 || read.flag(*host, "ShareeNode");
  const bool expired = read.flag(*n, "Expired") || (expiry && *expiry <= context.now);
  const bool jailed = read.flag(*n, "IsJailed"), unsigned_peer = read.flag(*n, "UnsignedPeerAPIOnly");
  // Left out where false (tailcfg.Node: omitempty); a network that approves devices lets the others see none of them.
  const bool authorized = read.flag(*n, "MachineAuthorized");
  if (auto os = lower(read.text(*host, "OS")); !os.empty()) node.attributes.emplace("node:os", std::move(os));
  if (auto version = read.text(*host, "OSVersion"); !version.empty()) node.attributes.emplace("node:osVersion", std::move(version));
  // "1.102.5-t0123abcd-g4567": what follows is the build.
  if (auto version = read.text(*host, "IPNVersion"); !version.empty()) node.attributes.emplace("node:tsVersion", version.substr(0, version.find('-')));
  if (!read.wrong().empty()) return strange("whois: " + read.wrong());
  if (node.id.empty() || node.name.empty()) return strange("whois without StableID or a name");
  if (asked && std::find(node.addresses.begin(), node.addresses.end(), *asked) == node.addresses.end())
    return strange("whois of " + asked->text() + " names " + safe_quoted(node.name, 80) + ", whose own address that is not");

  const std::string who = "node " + safe_quoted(node.name, 80) + " (" + safe_quoted(node.id, 40) + ") ";
  if (node.id == context.own_id) return refused(who + "is this machine itself", "This machine cannot log in to itself by its address in the network.");
  if (expired) return refused(who + "has an expired key", "The key of your machine in the network has expired. Sign in to the network again.");
  if (jailed) return refused(who + "is jailed", "The network does not let your machine open connections.");
  if (unsigned_peer) return refused(who + "is not signed by the network's lock", "Your machine is not signed by the network's lock (tailnet lock).");
  if (!authorized) return refused(who + "is not approved", "Your machine is not approved in the network yet.");
  if (shared && !context.shared_users) return refused(who + "is shared with another network", "Machines of other networks may not log in here.");
  if (!node.tagged()) {
    if (login_name.empty() || login_name == tagged_devices) return strange("whois: " + who + "has neither a user nor tags");
    node.login = login_of(login_name);
    if (node.login.empty())
      return refused(who + "has the user " + safe_quoted(login_name, 80) + ", which no rule can name", "The network's name for your user cannot be used here.");
  }

  if (const Json* caps = read.object(*whois, "CapMap")) {
    for (const auto& [name, value] : caps->items()) {
      if (!value.is_array() && !value.is_null()) return strange("whois: the capability " + safe_quoted(name, 80) + " is no array");
      std::string text = value.is_null() ? "[]" : value.dump();
      if (text.size() > max_whois_capability_bytes)
        return Unexpected{Error{E2BIG, who + "has more than " + std::to_string(max_whois_capability_bytes) + " bytes of the capability " + safe_quoted(name, 80),
                                "The network's rules for your machine are too long."}};
      node.capabilities.emplace(name, std::move(text));
    }
  }
  if (!read.wrong().empty()) return strange("whois: " + read.wrong());
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
      if (std::from_chars(id.data(), id.data() + id.size(), number).ec != std::errc{} || !read.expect(user.is_object(), "User")) continue;
      if (auto login = login_of(read.text(user, "LoginName")); !login.empty()) users.emplace(number, std::move(login));
    }
  }
  std::vector<Node> nodes;
  std::set<std::int64_t> ours, others;  // users
  const auto take = [&](const Json& peer, bool self) {
    if (!read.expect(peer.is_object(), "Peer")) return;
    Node node;
    node.id = read.text(peer, "ID");
    node.name = first_label(read.text(peer, "DNSName"));
    if (node.name.empty()) node.name = read.text(peer, "HostName");
    node.tags = read.tags(peer);
    for (const auto& text : read.texts(peer, "TailscaleIPs"))
      if (const auto address = Address::parse(text); read.expect(address.has_value(), "TailscaleIPs")) node.addresses.push_back(*address);
    const std::int64_t user = read.number(peer, "UserID");
    const bool shared = read.flag(peer, "ShareeNode") || read.number(peer, "AltSharerUserID") != 0;
    if (const auto it = users.find(user); it != users.end() && !node.tagged()) node.login = it->second;
    if (self) {
      status.own_id = node.id;
      status.own_addresses = node.addresses;
    } else if (const auto expiry = read_go_time(read.text(peer, "KeyExpiry"))) {
      status.key_expiries.push_back(*expiry);
    }
    // One of another network, or one that nobody stands for (a user whose name no rule can have): no rule is about it.
    const bool foreign = shared && !shared_users;
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
