#include "auth/identity/identity.h"
#include "catch.h"
#include "temp_dir.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

using namespace postern;
using namespace postern::auth::identity;

namespace {

using Lines = std::vector<std::string>;

Lines problems_of(std::string_view text) {
  const auto network = parse_static_nodes(text, "n");
  Lines out;
  if (!network)
    for (const auto& p : network.error()) out.push_back(p.place.text() + ": " + (p.field.empty() ? "" : p.field + ": ") + p.message);
  return out;
}

const std::string alice = "[[node]]\nname = \"alice\"\naddresses = [\"127.0.0.1\"]\nuser = \"alice@example.com\"\n";


std::optional<Node> who(Provider& provider, const std::string& address) {
  std::optional<Node> found;
  bool answered = false;
  provider.who_is(Endpoint{*Address::parse(address), 1}, [&](Expected<std::optional<Node>> answer) {
    REQUIRE(answer);
    answered = true;
    found = *answer;
  });
  REQUIRE(answered);
  return found;
}

/// The nodes in a file of the test's own.
struct NodesFile : TempDir {
  std::string write(const std::string& text) const {
    std::ofstream{path / "nodes.toml"} << text;
    return file("nodes.toml");
  }
};
}  // namespace

TEST_CASE("nodes are read with their addresses, users and tags", "[auth][identity]") {
  const auto network = parse_static_nodes(
      alice + "[[node]]\nname = \"server\"\nid = \"n7\"\naddresses = [\"127.0.0.2\", \"::1\", \"::ffff:127.0.0.3\"]\ntags = [\"tag:z\", \"tag:a\"]\n", "n");
  REQUIRE(network);
  REQUIRE(network->nodes.size() == 2);
  CHECK(network->nodes[0].id == "alice");
  CHECK(network->nodes[0].login == "alice@example.com");
  CHECK_FALSE(network->nodes[0].tagged());
  CHECK(network->nodes[1].id == "n7");
  CHECK(network->nodes[1].name == "server");
  CHECK(network->nodes[1].tags == std::vector<std::string>{"tag:a", "tag:z"});
  CHECK(network->nodes[1].addresses[2] == *Address::parse("127.0.0.3"));
  CHECK(network->nodes[1].login.empty());
  REQUIRE(parse_static_nodes("", "n"));
  CHECK(parse_static_nodes("", "n")->nodes.empty());
}

TEST_CASE("what is wrong in the file of nodes is told with its place, all at once", "[auth][identity]") {
  CHECK(problems_of("nodes = 1\n" + alice) == Lines{"n:1:1: nodes: unknown key \"nodes\""});
  CHECK(problems_of("[node]\nname = \"x\"\n").size() == 1);
  CHECK(problems_of("node = [1]\n") == Lines{"n:1:9: node[0]: must be a table, not an integer"});
  CHECK(problems_of(alice + "  adresses = []\n") == Lines{"n:5:3: node[0].adresses: unknown key \"adresses\""});
  CHECK(problems_of(alice + "tags = [\"tag:x\"]\n") == Lines{"n:1:1: node[0]: a node has a user or tags, not both"});
  CHECK(problems_of("[[node]]\n") ==
        Lines{"n:1:1: node[0]: name is missing", "n:1:1: node[0]: addresses is missing", "n:1:1: node[0]: user or tags is missing"});
  CHECK(problems_of("[[node]]\nname = 5\naddresses = \"127.0.0.1\"\nuser = \"bob\"\n") ==
        Lines{"n:2:8: node[0].name: must be a string, not an integer", "n:3:13: node[0].addresses: must be an array of strings, not a string",
              "n:4:8: node[0].user: a user must be written name@domain"});
  CHECK(problems_of(
            "[[node]]\nname = \"\u00e4\"\naddresses = [ \"\u00e4\", \"10.0.0.0/8\", 7, \"localhost\"]\ntags = [\"tag:x\", \"tag:x\", \"y\", \"tag:1\"]\n") ==
        Lines{"n:3:15: node[0].addresses[0]: not an IP address: \"\\xc3\\xa4\"", "n:3:21: node[0].addresses[1]: not an IP address: \"10.0.0.0/8\"",
              "n:3:35: node[0].addresses[2]: must be a string, not an integer", "n:3:38: node[0].addresses[2]: not an IP address: \"localhost\"",
              "n:4:18: node[0].tags[1]: the tag tag:x is named twice", "n:4:27: node[0].tags[2]: \"y\": tags must start with 'tag:'",
              "n:4:32: node[0].tags[3]: \"tag:1\": tag names must start with a letter, after 'tag:'"});
  CHECK(problems_of("[[node]]\nname = \"x\"\naddresses = []\ntags = []\n") ==
        Lines{"n:3:13: node[0].addresses: must hold at least one address", "n:4:8: node[0].tags: must hold at least one tag"});
  CHECK(problems_of("[[node]]\nname = \"\"\naddresses = [\"127.0.0.9\"]\nuser = \"a\\u0007@b\"\n") ==
        Lines{"n:2:8: node[0].name: must not be empty", "n:4:8: node[0].user: holds a control character"});
  CHECK(problems_of("[[node]\nname").size() == 1);
  CHECK(problems_of("[[node]]\nname = \"a\"\nname = \"b\"\n").at(0).substr(0, 4) == "n:3:");
}

TEST_CASE("a name, an id and an address belong to one node", "[auth][identity]") {
  const auto other = [](const std::string& name, const std::string& id, const std::string& address) {
    return problems_of(alice + "[[node]]\nname = \"" + name + "\"\n" + (id.empty() ? "" : "id = \"" + id + "\"\n") + "addresses = [\"" + address +
                       "\"]\nuser = \"bob@example.com\"\n");
  };
  CHECK(other("bob", "", "127.0.1.2").empty());
  CHECK(other("alice", "", "127.0.1.2") == Lines{"n:6:8: node[1].name: another node has the name \"alice\""});
  CHECK(other("bob", "alice", "127.0.1.2") == Lines{"n:7:6: node[1].id: another node has the id \"alice\""});
  CHECK(other("bob", "", "127.0.0.1") == Lines{"n:7:14: node[1].addresses[0]: the address 127.0.0.1 is named twice"});
  CHECK(other("bob", "", "::ffff:127.0.0.1") == Lines{"n:7:14: node[1].addresses[0]: the address 127.0.0.1 is named twice"});
  CHECK(problems_of("[[node]]\nname = \"a\"\nid = \"b\"\naddresses = [\"127.0.0.1\"]\nuser = \"a@b\"\n[[node]]\nname = \"b\"\naddresses = "
                    "[\"127.0.0.2\"]\nuser = \"a@b\"\n") == Lines{"n:7:8: node[1].id: another node has the id \"b\""});
}

TEST_CASE("an address is a node or a stranger", "[auth][identity]") {
  const NodesFile dir;
  auto provider = make_static_provider(dir.write(alice + "[[node]]\nname = \"server\"\naddresses = [\"127.0.0.2\", \"::1\"]\ntags = [\"tag:server\"]\n"));
  REQUIRE(provider);
  CHECK(who(**provider, "127.0.0.1")->name == "alice");
  CHECK(who(**provider, "::ffff:127.0.0.1")->name == "alice");
  CHECK(who(**provider, "::1")->name == "server");
  CHECK_FALSE(who(**provider, "127.0.0.3"));
  CHECK_FALSE(who(**provider, "::2"));
  CHECK((*provider)->network().nodes.size() == 2);
}

TEST_CASE("a reload takes a good file and keeps the old nodes on a broken one", "[auth][identity]") {
  const NodesFile dir;
  const auto file = dir.write(alice);
  auto provider = make_static_provider(file);
  REQUIRE(provider);
  dir.write(alice + "x = 1\n");
  const auto broken = (*provider)->reload();
  REQUIRE_FALSE(broken);
  CHECK(broken.error()[0].text().find(file + ":5:1: node[0].x: unknown key") == 0);
  CHECK(who(**provider, "127.0.0.1"));
  std::filesystem::remove(file);
  CHECK_FALSE((*provider)->reload());
  CHECK(who(**provider, "127.0.0.1"));
  dir.write("[[node]]\nname = \"bob\"\naddresses = [\"127.0.1.2\"]\nuser = \"bob@example.com\"\n");
  CHECK((*provider)->reload());
  CHECK_FALSE(who(**provider, "127.0.0.1"));
  CHECK(who(**provider, "127.0.1.2")->login == "bob@example.com");
}

TEST_CASE("a missing file, a directory or a FIFO in its place is a problem, not a wait", "[auth][identity]") {
  const NodesFile dir;
  CHECK(make_static_provider((dir.path / "none").string()).error()[0].message.find("No such file") != std::string::npos);
  CHECK(make_static_provider(dir.path.string()).error()[0].message.find("Is a directory") != std::string::npos);
  const auto fifo = (dir.path / "fifo").string();
  REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
  CHECK(make_static_provider(fifo).error()[0].message.find("not a regular file") != std::string::npos);
}

TEST_CASE("a node's capabilities and attributes are read", "[auth][identity]") {
  const auto network = parse_static_nodes(alice + "[node.capabilities]\n\"postern.internal/cap/ssh\" = '[{\"sftp\": \"none\"}]'\n\"example.com/cap/x\" = \"[]\"\n"
                                                  "[node.attributes]\n\"node:os\" = \"macos\"\n\"custom:level\" = 3\n\"custom:score\" = -1.5\n\"node:tsAutoUpdate\" = true\n"
                                                  "[[node]]\nname = \"b\"\naddresses = [\"::1\"]\nuser = \"b@b\"\nattributes = {\"custom:a\" = false}\n", "n");
  REQUIRE(network);
  const Node& n = network->nodes[0];
  CHECK(n.capabilities == std::map<std::string, std::string>{{"example.com/cap/x", "[]"}, {"postern.internal/cap/ssh", "[{\"sftp\": \"none\"}]"}});
  CHECK(n.attributes == std::map<std::string, Attribute>{{"custom:level", 3.0}, {"custom:score", -1.5}, {"node:os", std::string{"macos"}}, {"node:tsAutoUpdate", true}});
  CHECK(network->nodes[1].attributes == std::map<std::string, Attribute>{{"custom:a", false}});
  CHECK(network->nodes[1].capabilities.empty());
}

TEST_CASE("capabilities that are no JSON array, and attributes that are nothing to compare with, are told with their place", "[auth][identity]") {
  const auto capability = [](const std::string& text) { return problems_of(alice + "[node.capabilities]\n\"a.b/c\" = " + text + "\n"); };
  const std::string at = "n:6:11: node[0].capabilities[\"a.b/c\"]: ";
  CHECK(capability("5") == Lines{at + "must be a string, not an integer"});
  CHECK(capability("[]") == Lines{at + "must be a string, not an array"});
  CHECK(capability("\"\"") == Lines{at + "is no JSON: wrong at byte 1"});
  CHECK(capability("'[{]'") == Lines{at + "is no JSON: wrong at byte 3"});
  CHECK(capability("'[1,]'") == Lines{at + "is no JSON: wrong at byte 4"});
  CHECK(capability("'[] // x'") == Lines{at + "is no JSON: wrong at byte 4"});
  CHECK(capability("'{}'") == Lines{at + "must be a JSON array, not object"});
  CHECK(capability("'[\"" + std::string(70'000, 'x') + "\"]'") == Lines{at + "is too long"});
  CHECK(capability("'" + std::string(30'000, '[') + std::string(30'000, ']') + "'").empty());  // deep, and a valid array: who reads it has a limit
  CHECK(problems_of(alice + "[node.capabilities]\na.b/c = \"[]\"\n").size() == 1);
  CHECK(problems_of(alice + "[node.capabilities]\na.b = \"[]\"\n") == Lines{"n:6:1: node[0].capabilities[\"a\"]: is a table"});
  CHECK(problems_of(alice + "capabilities = '[]'\n") == Lines{"n:5:16: node[0].capabilities: must be a table, not a string"});

  const auto attribute = [](const std::string& text) { return problems_of(alice + "[node.attributes]\n\"custom:a\" = " + text + "\n"); };
  const std::string there = "n:6:14: node[0].attributes[\"custom:a\"]: ";
  CHECK(attribute("[1]") == Lines{there + "must be a string, a number, true or false, not an array"});
  CHECK(attribute("1979-05-27") == Lines{there + "must be a string, a number, true or false, not a date or time"});
  CHECK(attribute("nan") == Lines{there + "is not a number that can be compared"});
  CHECK(attribute("9007199254740993") == Lines{there + "is too large a number"});
  CHECK(attribute("-9223372036854775808") == Lines{there + "is too large a number"});
  CHECK(attribute("\"\"") == Lines{there + "must not be empty"});
  CHECK(problems_of(alice + "attributes = 1\n") == Lines{"n:5:14: node[0].attributes: must be a table, not an integer"});
}
