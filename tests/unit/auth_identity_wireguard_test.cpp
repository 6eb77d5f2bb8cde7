#include "auth/identity/identity.h"
#include "auth/identity/wireguard.h"
#include "catch.h"
#include "temp_dir.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/read_until.hpp>
#include <boost/asio/write.hpp>
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <linux/wireguard.h>
#include <netinet/in.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <unistd.h>

using namespace postern;
using namespace postern::auth::identity;
using namespace std::chrono_literals;

namespace {

constexpr const char* alice_hex = "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33";
constexpr const char* router_hex = "58402e695ba1772b1cc9309755f043251ea77fdcf10fbe63989ceb7e19321376";
constexpr const char* alice_key = "uFmW/sycfx/G0lcqdu2hHVm80gvo5UOxXOS9hajnWjM=";
constexpr const char* router_key = "WEAuaVuhdyscyTCXVfBDJR6nf9zxD75jmJzrfhkyE3Y=";

/// As wireguard-go prints it (its values are those of wireguard.com/xplatform).
const std::string uapi = std::string{"private_key=e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a\nlisten_port=12912\n"} + "public_key=" + alice_hex +
                         "\npreshared_key=188515093e952f5f22e865cef3012e72f8b5f0b598ac0309d5dacce3b70fcf52\nprotocol_version=1\nendpoint=[abcd:23::33%2]:51820\n"
                         "last_handshake_time_sec=0\nlast_handshake_time_nsec=0\ntx_bytes=0\nrx_bytes=0\npersistent_keepalive_interval=0\nallowed_ip=10.9.0.2/32\nallowed_ip=fd00::2/128\n"
                         "public_key=" + router_hex + "\nallowed_ip=10.9.0.3/32\nallowed_ip=10.9.0.0/16\nallowed_ip=192.168.4.0/24\nprotocol_version=1\nerrno=0\n\n";

Expected<PeerTable> read(std::string text, std::size_t piece = 1 << 20) {
  UapiReader reader;
  for (std::size_t i = 0; i < text.size(); i += piece) {
    const auto whole = reader.put({text.data() + i, std::min(piece, text.size() - i)});
    if (!whole) return Unexpected{whole.error()};
    if (*whole) return reader.take();
  }
  return Unexpected{Error{EAGAIN, "not whole"}};
}

std::string key_at(const PeerTable& table, const char* address) {
  const auto match = table.find(*Address::parse(address));
  return match ? key_text(match->key) : "";
}

// ---- netlink, by hand

std::string attribute(std::uint16_t type, const std::string& value) {
  nlattr head{static_cast<std::uint16_t>(sizeof head + value.size()), type};
  std::string out{reinterpret_cast<const char*>(&head), sizeof head};
  out += value;
  out.resize(NLA_ALIGN(out.size()));
  return out;
}
template <class T>
std::string raw(const T& value) { return {reinterpret_cast<const char*>(&value), sizeof value}; }

std::string raw_key(const char* hex) {
  std::string out;
  for (int i = 0; i < 32; i++) out += static_cast<char>(std::stoi(std::string{hex + 2 * i, 2}, nullptr, 16));
  return out;
}
std::string allowed(const char* address, std::uint8_t length) {
  const auto a = *Address::parse(address);
  const std::string bytes{reinterpret_cast<const char*>(a.bytes().data()), a.v4() ? 4U : 16U};
  return attribute(NLA_F_NESTED, attribute(WGALLOWEDIP_A_FAMILY, raw(static_cast<std::uint16_t>(a.v4() ? AF_INET : AF_INET6))) + attribute(WGALLOWEDIP_A_IPADDR, bytes) +
                                     attribute(WGALLOWEDIP_A_CIDR_MASK, raw(length)));
}
std::string peer(const char* hex, const std::string& ips) {
  return attribute(NLA_F_NESTED, attribute(WGPEER_A_PUBLIC_KEY, raw_key(hex)) + attribute(WGPEER_A_FLAGS, raw(std::uint32_t{0})) + attribute(WGPEER_A_ALLOWEDIPS | NLA_F_NESTED, ips));
}
std::string message(std::uint16_t type, const std::string& body, std::uint16_t more = 0) {
  nlmsghdr head{static_cast<std::uint32_t>(NLMSG_HDRLEN + body.size()), type, static_cast<std::uint16_t>(NLM_F_MULTI | more), 1, 0};
  std::string out{reinterpret_cast<const char*>(&head), sizeof head};
  out += body;
  out.resize(NLMSG_ALIGN(out.size()));
  return out;
}
std::string device(const std::string& peers) {
  return message(0x1c, raw(genlmsghdr{WG_CMD_GET_DEVICE, 1, 0}) + attribute(WGDEVICE_A_PRIVATE_KEY, std::string(32, 'k')) + attribute(WGDEVICE_A_IFNAME, std::string{"wg0\0", 4}) +
                           attribute(WGDEVICE_A_PEERS | NLA_F_NESTED, peers));
}
const std::string done = message(NLMSG_DONE, raw(std::int32_t{0}));

struct Dump {
  PeerTable table;
  std::optional<PublicKey> last;
  Expected<bool> put(const std::string& datagram) { return read_wireguard_netlink(std::as_bytes(std::span{datagram}), table, last); }
};

}  // namespace

TEST_CASE("an address is that of the peer to which WireGuard routes it: the longest prefix", "[auth][identity][wireguard]") {
  for (const std::size_t piece : {std::size_t{1}, std::size_t{7}, std::size_t{1 << 20}}) {
    const auto table = read(uapi, piece);
    REQUIRE(table);
    CHECK(key_at(*table, "10.9.0.2") == alice_key);
    CHECK(key_at(*table, "fd00::2") == alice_key);
    CHECK(key_at(*table, "10.9.0.3") == router_key);
    CHECK(key_at(*table, "10.9.7.7") == router_key);
    CHECK(key_at(*table, "192.168.4.255") == router_key);
    CHECK(key_at(*table, "192.168.5.0").empty());
    CHECK(key_at(*table, "fd00::3").empty());
    CHECK(table->find(*Address::parse("10.9.7.7"))->prefix.text() == "10.9.0.0/16");
  }
}

TEST_CASE("what is no answer of WireGuard's says nothing", "[auth][identity][wireguard]") {
  for (const std::string& text : {std::string{"errno=1\n\n"}, std::string{"\n"}, std::string{"hello\n"}, std::string{"public_key=zz\nerrno=0\n\n"}, std::string{"allowed_ip=10.0.0.1/32\nerrno=0\n\n"},
                                 "public_key=" + std::string{alice_hex} + "\nallowed_ip=10.0.0.1\nerrno=0\n\n", "public_key=" + std::string{alice_hex} + "\nallowed_ip=10.0.0.1/33\nerrno=0\n\n",
                                 std::string(100000, 'x'), uapi.substr(0, uapi.size() - 10)}) {
    INFO(text.substr(0, 100));
    const auto table = read(text);
    REQUIRE_FALSE(table);
    CHECK(table.error().code == EAGAIN);
  }
}

TEST_CASE("private keys are wiped from what was read, and are nowhere in the table", "[auth][identity][wireguard]") {
  std::string text = uapi;
  UapiReader reader;
  REQUIRE(reader.put({text.data(), text.size()}));
  CHECK(text == std::string(text.size(), '\0'));
}

TEST_CASE("the kernel's dump is read over several messages, also a peer that goes on in the next", "[auth][identity][wireguard]") {
  Dump dump;
  auto over = dump.put(device(peer(alice_hex, allowed("10.9.0.2", 32)) + peer(router_hex, allowed("10.9.0.0", 16))));
  REQUIRE(over);
  CHECK_FALSE(*over);
  over = dump.put(device(peer(router_hex, allowed("fd00::", 64))) + done);
  REQUIRE(over);
  CHECK(*over);
  CHECK(key_at(dump.table, "10.9.0.2") == alice_key);
  CHECK(key_at(dump.table, "10.9.1.1") == router_key);
  CHECK(key_at(dump.table, "fd00::9") == router_key);
}

TEST_CASE("a dump during which the peers changed is no answer: those that are missing would be cut off", "[auth][identity][wireguard]") {
  Dump dump;
  REQUIRE(dump.put(device(peer(alice_hex, allowed("10.9.0.2", 32)))));
  const auto over = dump.put(message(NLMSG_DONE, raw(std::int32_t{0}), NLM_F_DUMP_INTR));
  REQUIRE_FALSE(over);
  CHECK(over.error().code == EINTR);
}

TEST_CASE("a dump that is cut off anywhere, or lies about lengths, is an error and reads nothing beyond its end", "[auth][identity][wireguard]") {
  const std::string whole = device(peer(alice_hex, allowed("10.9.0.2", 32)));
  for (std::size_t n = 1; n < whole.size(); n++) {
    Dump dump;
    const std::string part = whole.substr(0, n);
    CHECK_FALSE(dump.put(part));
  }
  for (std::size_t i = 0; i < whole.size(); i++) {
    std::string bent = whole;
    bent[i] = static_cast<char>(bent[i] ^ 0x55);
    Dump dump;
    (void)dump.put(bent);  // under the sanitizers: no access out of bounds
  }
}

TEST_CASE("the kernel without WireGuard, or without the interface, says so", "[auth][identity][wireguard]") {
  for (const int code : {ENODEV, ENOENT, EOPNOTSUPP}) {
    Dump dump;
    const auto over = dump.put(message(NLMSG_ERROR, raw(std::int32_t{-code}) + std::string(16, '\0')));
    REQUIRE_FALSE(over);
    CHECK(over.error().code == ENODEV);
  }
}

TEST_CASE("the file of names says what is wrong, where", "[auth][identity][wireguard]") {
  const auto problems = [](const std::string& text) {
    const auto read = read_toml_nodes(text, "w.toml", NodesForm::keys);
    std::string all;
    if (!read)
      for (const auto& p : read.error()) all += p.text() + "\n";
    return all;
  };
  const std::string self = "[self]\nname = \"server\"\ntags = [\"tag:server\"]\n";
  const std::string key = std::string{"public_key = \""} + alice_key + "\"\n";
  CHECK(problems(self + "[[peer]]\n" + key + "name = \"a\"\nuser = \"a@example.com\"\nnetworks = [\"10.0.0.0/24\"]\n").empty());
  CHECK(problems("[[peer]]\n" + key + "name = \"a\"\nuser = \"a@example.com\"\n").find("w.toml:1:1: self: is missing") != std::string::npos);
  CHECK(problems(self + "[[peer]]\nname = \"a\"\nuser = \"a@example.com\"\n").find("w.toml:4:1: peer[0]: public_key is missing") != std::string::npos);
  CHECK(problems(self + "[[peer]]\npublic_key = \"abc\"\nname = \"a\"\nuser = \"a@example.com\"\n").find("w.toml:5:14: peer[0].public_key: is no public key") != std::string::npos);
  CHECK(problems(self + "[[peer]]\n" + key + "name = \"a\"\nuser = \"a@b.c\"\n[[peer]]\n" + key + "name = \"b\"\nuser = \"a@b.c\"\n").find("another node has the public key") != std::string::npos);
  CHECK(problems(self + "[[peer]]\n" + key + "name = \"a\"\nuser = \"a@b.c\"\nnetworks = [\"10.0.0.1\"]\n").find("peer[0].networks[0]: not a network") != std::string::npos);
  CHECK(problems(self + "[[peer]]\n" + key + "name = \"a\"\nuser = \"a@b.c\"\naddresses = [\"10.0.0.1\"]\n").find("unknown key \"addresses\"") != std::string::npos);
  CHECK(problems(self + "[[node]]\n").find("[self] and [[peer]]") != std::string::npos);
}

namespace {

/// A user space implementation that says what the test wants.
struct Scene {
  Scene() {
    settings = {.interface = "lo", .file = dir.file("names.toml"), .uapi_dir = dir.path, .poll = 50ms, .timeout = 200ms};
    names(alice_key);
    listen();
  }
  ~Scene() {
    provider.reset();
    if (acceptor) acceptor->close();
    io.restart();
    io.run_for(10ms);
  }
  void names(const std::string& key, const std::string& more = "") {
    std::ofstream{dir.file("new")} << "[self]\nname = \"server\"\ntags = [\"tag:server\"]\n[[peer]]\npublic_key = \"" << key << "\"\nname = \"alice-laptop\"\nuser = \"alice@example.com\"\n" << more;
    ::rename(dir.file("new").c_str(), settings.file.c_str());
  }
  void listen() {
    ::unlink(dir.file("lo.sock").c_str());
    acceptor.emplace(io, boost::asio::local::stream_protocol::endpoint{dir.file("lo.sock")});
    accept();
  }
  void accept() {
    acceptor->async_accept([this](boost::system::error_code ec, boost::asio::local::stream_protocol::socket s) {
      if (ec) return;
      auto kept = std::make_shared<boost::asio::local::stream_protocol::socket>(std::move(s));
      auto text = std::make_shared<std::string>(says);
      boost::asio::async_write(*kept, boost::asio::buffer(*text), [this, kept, text](boost::system::error_code, std::size_t) {
        if (!closes) held.push_back(kept);
      });
      accept();
    });
  }
  bool until(const std::function<bool()>& condition, std::chrono::milliseconds limit = 5s) {
    const auto end = std::chrono::steady_clock::now() + limit;
    while (!condition() && std::chrono::steady_clock::now() < end) {
      io.restart();
      io.run_one_for(20ms);
    }
    return condition();
  }
  void begin() {
    auto made = make_wireguard_provider(io, settings);
    REQUIRE(made);
    provider = std::move(*made);
    bool ready = false;
    provider->start([&ready](Expected<Done> r) { ready = r.has_value(); }, [this] { changes++; });
    REQUIRE(until([&ready] { return ready; }));
  }
  /// "name", "stranger", or "?": it cannot say.
  std::string who(const char* address) {
    std::string said = "nothing";
    provider->who_is(Endpoint{*Address::parse(address), 1}, [&](const auto& answer) { said = !answer ? "?" : !*answer ? "stranger" : (*answer)->name; });
    return said;
  }

  boost::asio::io_context io;
  TempDir dir;
  std::string says = uapi;
  bool closes = false;
  WireguardSettings settings;
  std::optional<boost::asio::local::stream_protocol::acceptor> acceptor;
  std::vector<std::shared_ptr<boost::asio::local::stream_protocol::socket>> held;
  std::unique_ptr<Provider> provider;
  int changes = 0;
};

}  // namespace

TEST_CASE("a peer is known by the name of its public key, who comes from behind it is a stranger unless its network is named", "[auth][identity][wireguard]") {
  Scene s;
  s.begin();
  CHECK(s.who("10.9.0.2") == "alice-laptop");
  CHECK(s.who("fd00::2") == "alice-laptop");
  CHECK(s.who("10.9.0.3") == "stranger");  // a peer without a name
  CHECK(s.who("10.8.0.1") == "stranger");
  REQUIRE(s.provider->network().nodes.size() == 2);
  CHECK(s.provider->network().nodes[1].id == alice_key);

  s.names(router_key);
  REQUIRE(s.until([&] { return s.changes > 0; }));
  CHECK(s.who("10.9.0.2") == "stranger");
  CHECK(s.who("10.9.0.3") == "alice-laptop");
  CHECK(s.who("192.168.4.9") == "stranger");
  s.names(router_key, "networks = [\"192.168.4.0/24\"]\n");
  REQUIRE(s.until([&] { return s.who("192.168.4.9") == "alice-laptop"; }));
  CHECK(s.who("10.9.7.7") == "stranger");
}

TEST_CASE("a peer that is removed is told, and a table that stays the same is not", "[auth][identity][wireguard]") {
  Scene s;
  s.begin();
  s.until([] { return false; }, 200ms);
  CHECK(s.changes == 0);
  s.says = "errno=0\n\n";
  REQUIRE(s.until([&] { return s.changes > 0; }));
  CHECK(s.who("10.9.0.2") == "stranger");
}

TEST_CASE("a WireGuard that answers nothing, half, garbage, or is away: nobody is known, nothing is told to have changed, and it comes back", "[auth][identity][wireguard]") {
  Scene s;
  s.begin();
  for (const std::string& text : {std::string{}, uapi.substr(0, 100), std::string{"garbage\n"}}) {
    for (const bool closes : {false, true}) {
      s.says = text;
      s.closes = closes;
      REQUIRE(s.until([&] { return s.who("10.9.0.2") == "?"; }));
      s.says = uapi;
      REQUIRE(s.until([&] { return s.who("10.9.0.2") == "alice-laptop"; }, 1s));
    }
  }
  const int before = s.changes;
  s.acceptor->close();
  REQUIRE(s.until([&] { return s.who("10.9.0.2") == "?"; }));
  CHECK(s.changes == before);
  s.listen();
  REQUIRE(s.until([&] { return s.who("10.9.0.2") == "alice-laptop"; }, 1s));
}

TEST_CASE("a file of names with a mistake is not taken, the old one stays", "[auth][identity][wireguard]") {
  Scene s;
  s.begin();
  s.names("abc");
  CHECK_FALSE(s.provider->reload());
  CHECK(s.who("10.9.0.2") == "alice-laptop");
}
