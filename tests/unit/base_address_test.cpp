#include "base/address.h"
#include "base/node.h"
#include "catch.h"

#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <vector>

using namespace postern;

TEST_CASE("addresses are numbers only", "[base][address]") {
  for (const char* good : {"127.0.0.1", "0.0.0.0", "255.255.255.255", "::", "::1", "fd7a:115c:a1e0::1"}) {
    INFO(good);
    REQUIRE(Address::parse(good));
    CHECK(Address::parse(good)->text() == good);
  }
  for (const char* bad :
       {"", " 127.0.0.1", "127.0.0.1 ", "127.0.0", "127.0.0.256", "0127.0.0.1", "127.1", "localhost", "[::1]", "fe80::1%lo", "::1/128", "1::2::3", "12345::"})
    CHECK_FALSE(Address::parse(bad));
  CHECK_FALSE(Address::parse(std::string_view{"127.0.0.1\0x", 11}));
}

TEST_CASE("an IPv4-mapped address is the IPv4 address", "[base][address]") {
  const auto v4 = *Address::parse("100.64.0.1");
  CHECK(*Address::parse("::ffff:100.64.0.1") == v4);
  CHECK(*Address::parse("::ffff:6440:1") == v4);
  CHECK(v4.v4());
  sockaddr_storage s{};
  auto& v6 = reinterpret_cast<sockaddr_in6&>(s);
  v6.sin6_family = AF_INET6;
  const unsigned char mapped[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 100, 64, 0, 1};
  std::memcpy(&v6.sin6_addr, mapped, 16);
  CHECK(*Address::from(s) == v4);
  s.ss_family = AF_UNIX;
  CHECK_FALSE(Address::from(s));
  CHECK(Address::parse("::100.64.0.1") != v4);  // the deprecated compatible form is another address
}

TEST_CASE("addresses sort by number, IPv4 first", "[base][address]") {
  std::vector<Address> all;
  for (const char* a : {"fd7a::1", "100.64.0.20", "::1", "100.64.0.3", "9.0.0.0"}) all.push_back(*Address::parse(a));
  std::sort(all.begin(), all.end());
  std::string order;
  for (const auto& a : all) order += a.text() + " ";
  CHECK(order == "9.0.0.0 100.64.0.3 100.64.0.20 ::1 fd7a::1 ");
}

TEST_CASE("a prefix holds what its bits say, in its own family", "[base][address]") {
  const auto holds = [](const char* prefix, const char* address) { return Prefix::parse(prefix)->contains(*Address::parse(address)); };
  CHECK(holds("100.64.0.0/10", "100.127.255.255"));
  CHECK_FALSE(holds("100.64.0.0/10", "100.128.0.0"));
  CHECK(holds("10.1.2.3/8", "10.9.9.9"));
  CHECK(holds("0.0.0.0/0", "8.8.8.8"));
  CHECK_FALSE(holds("0.0.0.0/0", "::1"));
  CHECK_FALSE(holds("::/0", "8.8.8.8"));
  CHECK(holds("1.2.3.4", "1.2.3.4"));
  CHECK_FALSE(holds("1.2.3.4", "1.2.3.5"));
  CHECK(holds("1.2.3.4/31", "1.2.3.5"));
  CHECK(holds("fd7a:115c:a1e0::/48", "fd7a:115c:a1e0:ffff::1"));
  CHECK_FALSE(holds("fd7a:115c:a1e0::/48", "fd7a:115c:a1e1::1"));
  CHECK(holds("::1/128", "::1"));
  for (const char* bad : {"1.2.3.4/", "1.2.3.4/33", "::/129", "1.2.3.4/-1", "1.2.3.4/08", "1.2.3.4/8/8", "/8", "x/8", "1.2.3.4/ 8"})
    CHECK_FALSE(Prefix::parse(bad));
  CHECK(Prefix::parse("10.0.0.0/8")->text() == "10.0.0.0/8");
}

TEST_CASE("an end point is an address with a port or the default", "[base][address]") {
  const auto text = [](std::string_view from) {
    const auto e = Endpoint::parse(from, 22);
    return e ? e->text() : "";
  };
  CHECK(text("127.0.0.2:2222") == "127.0.0.2:2222");
  CHECK(text("127.0.0.2") == "127.0.0.2:22");
  CHECK(text("[::1]:2222") == "[::1]:2222");
  CHECK(text("[::1]") == "[::1]:22");
  CHECK(text("::1") == "[::1]:22");
  CHECK(text("127.0.0.2:0") == "127.0.0.2:0");
  for (const char* bad :
       {"", ":22", "127.0.0.2:", "127.0.0.2:65536", "127.0.0.2:x", "127.0.0.2:022", "[::1", "[::1]22", "[::1]:", "host:22", "127.0.0.2:22:22"}) {
    INFO(bad);
    CHECK(text(bad) == "");
  }
}

TEST_CASE("tags and logins are checked for form", "[base][node]") {
  for (const char* good : {"tag:server", "tag:a-1", "tag:A"}) CHECK(problem_of_tag(good).empty());
  for (const char* bad : {"", "server", "tag:", "tag:1", "tag:-a", "tag:a_b", "tag:a b", "TAG:a"}) CHECK_FALSE(problem_of_tag(bad).empty());
  for (const char* good : {"alice@example.com", "a@github", "alice@", "d.v+x@e.org"}) CHECK(problem_of_login(good).empty());
  for (const char* bad : {"", "alice", "@example.com", "a@b@c", "a b@c", "*@example.com", "group:a@b", "a@b/c", "a@b\n"})
    CHECK_FALSE(problem_of_login(bad).empty());
}

TEST_CASE("a network finds nodes by address and tag, also when nodes were added after it was indexed", "[base][node]") {
  Network network{{Node{.id = "a", .name = "a", .addresses = {*Address::parse("100.64.0.1")}, .login = "x@y", .tags = {}},
                   Node{.id = "b", .name = "b", .addresses = {*Address::parse("100.64.0.2"), *Address::parse("fd7a::2")}, .login = {}, .tags = {"tag:s", "tag:t"}}}};
  const auto found = [&](const char* address) {
    const Node* n = network.find(*Address::parse(address));
    return n == nullptr ? std::string{} : n->id;
  };
  CHECK(found("100.64.0.1") == "a");
  CHECK(found("fd7a::2") == "b");
  CHECK(found("100.64.0.3").empty());
  CHECK(network.with_tag("tag:t").size() == 1);
  CHECK(network.with_tag("tag:u").empty());
  network.nodes.push_back(Node{.id = "c", .name = "c", .addresses = {*Address::parse("100.64.0.3")}, .login = {}, .tags = {"tag:t"}});
  CHECK(found("100.64.0.3") == "c");
  CHECK(network.with_tag("tag:t").size() == 2);
  network.index();
  CHECK(found("100.64.0.3") == "c");
  // A node that lost an address or tag since then is not found by it.
  network.nodes[2].addresses = {*Address::parse("100.64.0.4")};
  network.nodes[2].tags.clear();
  CHECK(found("100.64.0.3").empty());
  CHECK(network.with_tag("tag:t").size() == 1);
}
