#include "auth/identity/tailscaled.h"
#include "catch.h"

#include <cerrno>

using namespace postern;
using namespace postern::auth::identity;

namespace {

/// From a real tailscaled 1.102.5 on Headscale 0.29.2, shortened; `more` are further members of Node.
std::string whois(const std::string& more = "", const std::string& profile = R"({"ID":1,"LoginName":"alice@example.com","DisplayName":"Alice"})",
                  const std::string& caps = R"({"example.com/cap/lab":[{"hello": "tailnet"}]})", bool authorized = true) {
  return R"({"Node":{"ID":3,"StableID":"3","Name":"alice-laptop.lab.example.com.","User":1,"Key":"nodekey:8234",)"
         R"("Addresses":["100.64.0.3/32","fd7a:115c:a1e0::3/128"],"Online":true,"ComputedName":"alice-laptop",)"
         R"("Hostinfo":{"OS":"macOS","OSVersion":"15.1","IPNVersion":"1.102.5-t0123-g45"})" +
         std::string{authorized ? R"(,"MachineAuthorized":true)" : ""} + more + R"(},"UserProfile":)" + profile + R"(,"CapMap":)" + caps + "}";
}

const WallTime now = *read_go_time("2026-11-26T07:00:00Z");

Expected<WhoisAnswer> read(const std::string& json, const std::string& asked = "100.64.0.3", bool shared_users = false) {
  return read_whois(json, *Address::parse(asked), {"1", shared_users, now});
}

}  // namespace

TEST_CASE("whois names a user's node, with what rules may ask of it", "[auth][identity][tailscaled]") {
  const auto a = read(whois());
  REQUIRE(a);
  CHECK(a->node.id == "3");
  CHECK(a->node.name == "alice-laptop");
  CHECK(a->node.login == "alice@example.com");
  CHECK_FALSE(a->node.tagged());
  REQUIRE(a->node.addresses.size() == 2);
  CHECK(a->node.addresses[1].text() == "fd7a:115c:a1e0::3");
  CHECK(a->node.capabilities.at("example.com/cap/lab") == R"([{"hello":"tailnet"}])");
  CHECK(a->node.attributes.at("node:os") == Attribute{std::string{"macos"}});
  CHECK(a->node.attributes.at("node:tsVersion") == Attribute{std::string{"1.102.5"}});
}

TEST_CASE("a tagged node has no user, whatever the profile says", "[auth][identity][tailscaled]") {
  for (const char* profile : {R"({"LoginName":"tagged-devices"})", R"({"LoginName":"alice@example.com"})"}) {
    const auto a = read(whois(R"(,"Tags":["tag:z","tag:a","tag:z"])", profile, "null"));
    REQUIRE(a);
    CHECK(a->node.login.empty());
    CHECK(a->node.tags == std::vector<std::string>{"tag:a", "tag:z"});
    CHECK(a->node.capabilities.empty());
  }
  CHECK(read(whois("", R"({"LoginName":"tagged-devices"})")).error().code == EACCES);
  // Headscale takes tags that no policy can name: no user's node for that.
  const auto odd = read(whois(R"(,"Tags":["tag:web_server","tag:a,tag:b"])"));
  REQUIRE(odd);
  CHECK(odd->node.tags == std::vector<std::string>{"tag:?"});
  CHECK(odd->node.login.empty());
  const auto headscale = read(whois("", R"({"LoginName":"alice"})"));
  REQUIRE(headscale);
  CHECK(headscale->node.login == "alice@");
}

TEST_CASE("a node that the network no longer stands for is refused with a sentence", "[auth][identity][tailscaled]") {
  const auto refused = [](const Expected<WhoisAnswer>& a) { return !a && a.error().code == EACCES && !a.error().user_message.empty(); };
  CHECK(refused(read(whois(R"(,"Expired":true)"))));
  CHECK(refused(read(whois(R"(,"KeyExpiry":"2026-11-26T06:59:59Z")"))));
  CHECK(refused(read(whois(R"(,"IsJailed":true)"))));
  CHECK(refused(read(whois(R"(,"UnsignedPeerAPIOnly":true)"))));
  CHECK(refused(read(whois("", R"({"LoginName":"alice@example.com"})", "null", false))));
  CHECK(refused(read_whois(whois(), *Address::parse("100.64.0.3"), {"3", false, now})));
  CHECK(refused(read(whois(R"(,"Sharer":7)"))));
  CHECK(read(whois(R"(,"Sharer":7)"), "100.64.0.3", true));
  std::string sharee = whois();
  sharee.replace(sharee.find(R"("OS")"), 0, R"("ShareeNode":true,)");
  CHECK(refused(read(sharee)));
  CHECK(read(sharee, "100.64.0.3", true));
  CHECK(read(whois(R"(,"KeyExpiry":"2026-11-26T09:00:01+02:00")")));
  CHECK(read(whois(R"(,"KeyExpiry":"0001-01-01T00:00:00Z")")));
}

TEST_CASE("what a node says of itself neither hides that it has expired nor makes it unknown", "[auth][identity][tailscaled]") {
  for (const std::string& said : std::vector<std::string>{R"("1.102.5\u0001")", "7", "null", "[]", '"' + std::string(400, 'x') + '"'}) {
    for (const char* field : {"\"macOS\"", "\"15.1\"", "\"1.102.5-t0123-g45\"", "\"alice-laptop\""}) {
      const auto with = [&](const std::string& more) {
        std::string text = whois(more);
        return text.replace(text.find(field), std::string_view{field}.size(), said);
      };
      const auto good = read(with(""));
      REQUIRE(good);
      CHECK(good->node.login == "alice@example.com");
      CHECK(read(with(R"(,"Expired":true)")).error().code == EACCES);
    }
  }
  std::string odd = whois();
  const auto host = odd.find(R"("Hostinfo":{)");
  odd.replace(host, odd.find('}', host) - host + 1, R"("Hostinfo":[1])");
  CHECK(read(odd));
}

TEST_CASE("an answer that is not whois's says nothing, and one that is denies what it should not hold", "[auth][identity][tailscaled]") {
  const std::string good = whois();
  for (std::size_t n = 0; n < good.size(); n++) REQUIRE(read(good.substr(0, n)).error().code == EAGAIN);
  CHECK(read(good, "100.64.0.4").error().code == EAGAIN);
  CHECK(read(whois(R"(,"Tags":"tag:a")")).error().code == EACCES);
  CHECK(read(whois(R"(,"Expired":"no")")).error().code == EACCES);
  CHECK(read("[]").error().code == EAGAIN);
  CHECK(read("{}").error().code == EAGAIN);
  CHECK(read(whois("", R"({"LoginName":"a@b"})", R"({"c":{}})")).error().code == EACCES);
  CHECK(read(whois("", R"({"LoginName":"a@b"})", "{\"c\":" + std::string(100'000, '[') + std::string(100'000, ']') + "}")).error().code == EAGAIN);
  CHECK(read(whois("", R"({"LoginName":"a@b"})", "{\"c\":[\"" + std::string(max_whois_capability_bytes, 'x') + "\"]}")).error().code == E2BIG);
  // A route of the node's is not the node.
  std::string route = whois();
  route.replace(route.find("100.64.0.3/32"), 13, "100.64.0.0/24");
  CHECK(read(route).error().code == EAGAIN);
}

TEST_CASE("status gives the visible network, without other networks' users", "[auth][identity][tailscaled]") {
  const std::string text = R"({"Version":"1.102.5","TUN":true,"BackendState":"Running","TailscaleIPs":["100.64.0.1"],
    "Self":{"ID":"1","HostName":"server","DNSName":"server.lab.example.com.","UserID":2147455555,"TailscaleIPs":["100.64.0.1","fd7a::1"],"Tags":["tag:server"],"CapMap":{"x":[1]}},
    "Peer":{"nodekey:a":{"ID":"3","HostName":"h","DNSName":"alice-laptop.lab.example.com.","UserID":1,"TailscaleIPs":["100.64.0.3"],"KeyExpiry":"2026-12-01T00:00:00Z","RxBytes":9},
            "nodekey:b":{"ID":"4","HostName":"guest","DNSName":"","UserID":9,"TailscaleIPs":["100.64.0.4"],"ShareeNode":true}},
    "User":{"1":{"ID":1,"LoginName":"alice@example.com"},"2":{"LoginName":"bob@example.com"},"9":{"LoginName":"eve@other.net"},"2147455555":{"LoginName":"tagged-devices"}}})";
  const auto s = read_status(text, false);
  REQUIRE(s);
  CHECK(s->running());
  CHECK(s->tun);
  CHECK(s->own_id == "1");
  CHECK(s->own_addresses.size() == 2);
  REQUIRE(s->network.nodes.size() == 2);
  const Node* alice = s->network.find(*Address::parse("100.64.0.3"));
  REQUIRE(alice != nullptr);
  CHECK(alice->name == "alice-laptop");
  CHECK(alice->login == "alice@example.com");
  CHECK(s->network.with_tag("tag:server").size() == 1);
  CHECK(s->dns_names == std::map<std::string, std::string>{{"1", "server.lab.example.com"}, {"3", "alice-laptop.lab.example.com"}});
  CHECK(s->network.users == std::vector<std::string>{"alice@example.com", "bob@example.com"});
  CHECK(s->key_expiries.size() == 1);
  CHECK(read_status(text, true)->network.nodes.size() == 3);
  // One that cannot be read is not in the network, and the others are.
  for (const char* peer : {"7", "{}", R"({"ID":7})", R"({"ID":"5","DNSName":"x.","TailscaleIPs":["nowhere"],"UserID":1})", R"({"ID":"5\u0007","TailscaleIPs":[],"UserID":1})"}) {
    std::string more = text;
    more.insert(more.find(R"("nodekey:a")"), R"("nodekey:c":)" + std::string{peer} + ",");
    const auto read = read_status(more, false);
    REQUIRE(read);
    CHECK(read->network.nodes.size() == 2);
  }
  std::string tagged = text;
  tagged.insert(tagged.find(R"("nodekey:a")"), R"("nodekey:c":{"ID":"5","DNSName":"ci.lab.","TailscaleIPs":["100.64.0.5"],"UserID":1,"Tags":["tag:web_server"]},)");
  REQUIRE(read_status(tagged, false));
  CHECK(read_status(tagged, false)->network.find(*Address::parse("100.64.0.5"))->login.empty());
  CHECK(read_status(text, true)->network.users.size() == 3);
  for (const char* bad : {"", "{}", "[]", R"({"BackendState":"Running"})", R"({"BackendState":"Running","Self":{"ID":7}})"}) CHECK(read_status(bad, false).error().code == EAGAIN);
  const auto stopped = read_status(R"({"BackendState":"NeedsLogin","TUN":false,"Peer":null,"Self":{"TailscaleIPs":["100.64.0.1"]}})", false);
  REQUIRE(stopped);
  CHECK_FALSE(stopped->running());
  CHECK_FALSE(stopped->tun);
  CHECK(stopped->own_addresses.empty());
}

TEST_CASE("bus lines, preferences and the network's ssh rules are read for what is needed of them", "[auth][identity][tailscaled]") {
  CHECK_FALSE(*read_bus_line(R"({"Version":"1"})"));
  CHECK_FALSE(*read_bus_line(R"({"State":6,"Prefs":null})"));
  CHECK(**read_bus_line(R"({"State":2,"Prefs":{"RunSSH":true,"X":{"RunSSH":false}}})"));
  CHECK(read_bus_line("x").error().code == EAGAIN);
  CHECK(*read_run_ssh(R"({"RunSSH":true})"));
  CHECK_FALSE(*read_run_ssh("{}"));
  CHECK(**read_ssh_policy(R"({"NetMap":{"Peers":[{"SSHPolicy":1}],"SSHPolicy":{"rules": [{"SSHPolicy":{"a":1}}]}}})", true) == R"({"rules":[{"SSHPolicy":{"a":1}}]})");
  CHECK(**read_ssh_policy(R"({"Peers":[{"a":1}],"SSHPolicy":{"rules": []}})", false) == R"({"rules":[]})");
  CHECK(**read_ssh_policy(R"({"SSHPolicy":null})", false) == R"({"rules":[]})");
  CHECK_FALSE(*read_ssh_policy(R"({"NetMap":null})", true));
  CHECK_FALSE(*read_ssh_policy(R"({"Peers":[]})", false));
}
