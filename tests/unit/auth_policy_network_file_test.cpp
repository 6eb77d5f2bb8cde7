#include "auth/policy/network_file.h"
#include "catch.h"

using namespace postern;
using namespace postern::auth::policy;

namespace {

NetworkFile good(std::string_view text) {
  auto read = read_network(text, "net.json");
  if (!read) FAIL(read.error().front().text());
  return std::move(*read);
}

/// All problems, a line each.
std::string problems_of(std::string_view text) {
  const auto read = read_network(text, "net.json");
  REQUIRE_FALSE(read);
  std::string all;
  for (const auto& p : read.error()) all += p.text() + "\n";
  return all;
}

}  // namespace

TEST_CASE("a network in the corpus's form is read, nodes in the file's order", "[auth][policy][network]") {
  const auto file = good(R"({
    "id": "a case", "policy": {"ssh": [{"no": "matter"}]}, "allow": [1], // what else a case holds is left alone
    "tailnet": "odin@example.com",
    "users": [{"id": 2, "name": "thor", "email": "thor@example.org"}, {"id": 1, "name": "odin", "email": "odin@example.com"}],
    "nodes": {
      "zebra": {"hostname": "zebra", "ipv4": "100.64.0.9", "ipv6": "fd7a::9", "tags": [], "user": "thor"},
      "ape":   {"hostname": "ape", "ipv4": "100.64.0.1", "tags": ["tag:server", "tag:prod"]},
    },
  })");
  REQUIRE(file.network.nodes.size() == 2);
  const Node& zebra = file.network.nodes[0];
  CHECK(zebra.name == "zebra");
  CHECK(zebra.id == "zebra");
  CHECK(zebra.login == "thor@example.org");
  CHECK(zebra.addresses == std::vector{*Address::parse("100.64.0.9"), *Address::parse("fd7a::9")});
  const Node& ape = file.network.nodes[1];
  CHECK(ape.login.empty());
  CHECK(ape.tags == std::vector<std::string>{"tag:prod", "tag:server"});  // sorted
  CHECK(file.network.users == std::vector<std::string>{"thor@example.org", "odin@example.com"});
  CHECK(file.domains == std::vector<std::string>{"example.com"});
}

TEST_CASE("the network's domain is the tailnet's, else that of the user with the lowest id, else nothing", "[auth][policy][network]") {
  const auto domains = [](std::string_view members) { return good("{" + std::string{members} + R"(, "nodes": {}})").domains; };
  const std::string users = R"("users": [{"id": 10, "name": "b", "email": "b@ten.example"}, {"id": 9, "name": "a", "email": "a@nine.example"}])";
  CHECK(domains(users + R"(, "tailnet": "x@example.com")") == std::vector<std::string>{"example.com"});
  CHECK(domains(users + R"(, "tailnet": "example.net")") == std::vector<std::string>{"example.net"});
  CHECK(domains(users + R"(, "tailnet": "example.net", "domains": ["a.example", "b.example"])") == std::vector<std::string>{"a.example", "b.example"});
  CHECK(domains(users) == std::vector<std::string>{"nine.example"});
  CHECK(domains(R"("users": [{"name": "a", "email": "a@nine.example"}])").empty());
  CHECK(domains(R"("users": [{"id": 1, "name": "a", "email": "a@"}])").empty());
  CHECK(good(R"({"nodes": {}})").domains.empty());
}

TEST_CASE("a node's user may be a login that nobody listed", "[auth][policy][network]") {
  const auto file = good(R"({"nodes": {"a": {"ipv4": "1.2.3.4", "user": "alice@example.com"}, "b": {"ipv4": "1.2.3.5", "user": "alice@example.com"}}})");
  CHECK(file.network.nodes[0].login == "alice@example.com");
  CHECK(file.network.users == std::vector<std::string>{"alice@example.com"});
}

TEST_CASE("a user without an address of mail has headscale's login", "[auth][policy][network]") {
  const auto file = good(R"({"users": [{"id": 1, "name": "carol"}, {"id": 2, "name": "dave", "email": ""}], "nodes": {"a": {"ipv4": "1.2.3.4", "user": "dave"}}})");
  CHECK(file.network.users == std::vector<std::string>{"carol@", "dave@"});
  CHECK(file.network.nodes[0].login == "dave@");
}

TEST_CASE("a tagged node is nobody's, whoever made it", "[auth][policy][network]") {
  const auto file = good(R"({"users": [{"id": 1, "name": "u", "email": "u@example.com"}], "nodes": {"a": {"ipv4": "1.2.3.4", "user": "u", "tags": ["tag:a"]}}})");
  CHECK(file.network.nodes[0].login.empty());
}

TEST_CASE("attributes, capabilities, ids and lists of addresses are read", "[auth][policy][network]") {
  const auto file = good(R"({"nodes": {"a": {
    "id": 77, "addresses": ["fd7a::1", "100.64.0.1"], "tags": ["tag:a"],
    "attributes": {"node:os": "linux", "custom:tier": -1.5, "custom:managed": true},
    "capabilities": {"postern.internal/cap/ssh": [{"sftp": "read-\"only\"", /* a comment */ "n": [1, 2.50, null, false, {}],}], "empty": []},
  }}})");
  const Node& node = file.network.nodes.at(0);
  CHECK(node.id == "77");
  CHECK(node.addresses == std::vector{*Address::parse("fd7a::1"), *Address::parse("100.64.0.1")});
  REQUIRE(node.attributes.size() == 3);
  CHECK(std::get<std::string>(node.attributes.at("node:os")) == "linux");
  CHECK(std::get<double>(node.attributes.at("custom:tier")) == -1.5);
  CHECK(std::get<bool>(node.attributes.at("custom:managed")));
  CHECK(node.capabilities.at("postern.internal/cap/ssh") == R"([{"sftp":"read-\"only\"","n":[1,2.50,null,false,{}]}])");
  CHECK(node.capabilities.at("empty") == "[]");
}

TEST_CASE("all that is wrong with a network is told at once, with its place", "[auth][policy][network]") {
  CHECK(problems_of("{\"nodes\": {}") == "net.json:1:1: this \"{\" is not closed (is the file whole?)\n");
  CHECK(problems_of("[]").find("net.json:1:1: must be an object") == 0);
  CHECK(problems_of("{\"users\": []}").find("net.json:1:1: nodes: nodes are missing") == 0);
  CHECK(problems_of(R"({
  "tailnet": 7, "domains": [8],
  "users": [{"id": 1, "name": "a", "email": "a@x.y"}, {"id": 1, "name": "a", "email": "no login"}, 5, {"id": -1, "name": "c"}, {"email": "d@x.y"}],
  "nodes": {
    "one": {"ipv4": "100.64.0.1", "user": "nobody"},
    "two": {"ipv4": "100.64.0.1", "ipv6": "100.64.0.300", "tags": ["server", 3], "attributes": {"node:os": []}, "capabilities": {"x": {}}},
    "three": {"tags": ["tag:a"], "id": "two"},
    "four": {"ipv4": "100.64.0.4"},
    "": {"ipv4": "fd7a::1", "user": 3},
  },
})") ==
        R"(net.json:2:14: tailnet: must be a string, not a number
net.json:2:29: domains[0]: must be a string, not a number
net.json:3:62: users[1].id: another user has the id 1
net.json:3:73: users[1].name: another user has the name "a"
net.json:3:87: users[1].email: "no login": a user must be written name@domain
net.json:3:100: users[2]: must be an object, not a number
net.json:3:110: users[3].id: must be a whole number
net.json:3:128: users[4]: a user must have a name
net.json:5:43: nodes["one"].user: user not found: "nobody" (a name of "users", or a login such as alice@example.com)
net.json:6:21: nodes["two"].ipv4: another node has the address 100.64.0.1 (it is "one"'s)
net.json:6:43: nodes["two"].ipv6: "100.64.0.300" is not an IPv6 address
net.json:6:68: nodes["two"].tags[0]: "server": tags must start with 'tag:' ("tag:server")
net.json:6:78: nodes["two"].tags[1]: must be a string, not a number
net.json:6:108: nodes["two"].attributes["node:os"]: must be a string, a number, true or false, not an array
net.json:6:135: nodes["two"].capabilities["x"]: must be an array, not an object
net.json:7:14: nodes["three"]: a node must have an address ("ipv4", "ipv6", "addresses")
net.json:7:40: nodes["three"].id: another node has the id "two"
net.json:8:13: nodes["four"]: a node must have a user or tags ("user": "alice@example.com", or "tags": ["tag:server"])
net.json:9:5: nodes[""]: a node must have a name
net.json:9:18: nodes[""].ipv4: "fd7a::1" is not an IPv4 address
net.json:9:37: nodes[""].user: must be a string, not a number
)");
}

TEST_CASE("what a provider knows reads back as the same network", "[auth][policy][network]") {
  Network network;
  network.nodes = {
      {"n1", "alice \"laptop\"", {*Address::parse("100.64.0.1"), *Address::parse("fd7a::1")}, "alice@example.com", {}, {{"node:os", std::string{"mac\nOS"}}, {"n", 0.1}, {"b", false}}, {{"cap", "[{\"a\":1}]"}}},
      {"server", "server", {*Address::parse("100.64.0.2")}, "", {"tag:a", "tag:b"}},
  };
  network.users = {"alice@example.com", "bob@example.com"};
  const std::string text = network_text({.network = network});
  CHECK(text.find('\n') == std::string::npos);
  const auto file = good(text);
  REQUIRE(file.network.nodes.size() == 2);
  for (std::size_t i = 0; i < 2; i++) {
    const Node &a = network.nodes[i], &b = file.network.nodes[i];
    CHECK(a.id == b.id);
    CHECK(a.name == b.name);
    CHECK(a.addresses == b.addresses);
    CHECK(a.login == b.login);
    CHECK(a.tags == b.tags);
    CHECK(a.attributes == b.attributes);
    CHECK(a.capabilities == b.capabilities);
  }
  CHECK(file.network.users == network.users);
  CHECK(file.domains.empty());
  CHECK(good(network_text({.network = network, .domains = {"example.com"}})).domains == std::vector<std::string>{"example.com"});
}
