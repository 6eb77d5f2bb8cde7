// The provider against a stand-in for tailscaled's LocalAPI that answers late, half, with garbage, too much, or not at all.
#include "auth/identity/identity.h"
#include "catch.h"
#include "temp_dir.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/read_until.hpp>
#include <boost/asio/streambuf.hpp>
#include <boost/asio/write.hpp>

#include <cerrno>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <unistd.h>

using namespace postern;
using namespace postern::auth::identity;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using boost::asio::local::stream_protocol;

namespace {

const Address alice = *Address::parse("100.64.0.3");

std::string chunk(const std::string& text) {
  char size[32];
  std::snprintf(size, sizeof size, "%zx\r\n", text.size());
  return size + text + "\r\n";
}
std::string ok(const std::string& body) {
  return "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}
const std::string bus_open = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

std::string whois(const std::string& more = "", const std::string& login = "alice@example.com") {
  return R"({"Node":{"ID":3,"StableID":"3","Name":"alice-laptop.lab.example.com.","Addresses":["100.64.0.3/32"],"MachineAuthorized":true)" + more +
         R"(},"UserProfile":{"ID":1,"LoginName":")" + login + R"("},"CapMap":null})";
}

std::string status(const std::string& state = "Running", const std::string& own = "100.64.0.1", bool tun = true) {
  return std::string{R"({"Version":"1.102.5","TUN":)"} + (tun ? "true" : "false") + R"(,"BackendState":")" + state + R"(","Self":{"ID":"1","HostName":"server","DNSName":"server.lab.example.com.","TailscaleIPs":[")" + own +
         R"("],"Tags":["tag:server"]},"Peer":{"k":{"ID":"3","HostName":"alice-laptop","DNSName":"alice-laptop.lab.example.com.","UserID":1,"TailscaleIPs":["100.64.0.3"]}},)"
         R"("User":{"1":{"ID":1,"LoginName":"alice@example.com"}}})";
}

/// Each question by the part of its target before '?'. What it does with a connection is up to the test; nothing: silence.
struct Standin {
  struct Connection : std::enable_shared_from_this<Connection> {
    Connection(Standin& of, stream_protocol::socket s) : owner{of}, socket{std::move(s)} {}
    void read() {
      boost::asio::async_read_until(socket, in, "\r\n\r\n", [self = shared_from_this()](boost::system::error_code ec, std::size_t n) {
        if (ec) return self->close();
        std::string head(n, ' ');
        self->in.sgetn(head.data(), static_cast<std::streamsize>(n));
        const std::string target = head.substr(head.find(' ') + 1, head.find_first_of("? ", head.find(' ') + 1) - head.find(' ') - 1);
        const std::string what = target.substr(target.rfind('/') + 1);
        self->owner.asked[what]++;
        self->owner.targets[what] = head.substr(head.find(' ') + 1, head.find(" HTTP") - head.find(' ') - 1);
        if (what == "watch-ipn-bus") {
          self->owner.bus = self;
          self->write(bus_open + chunk("{\"Version\":\"1.102.5\"}\n"));
        } else if (const auto it = self->owner.answers.find(what); it != self->owner.answers.end()) {
          it->second(*self);
        }
        self->read();
      });
    }
    void write(std::string text) {
      auto kept = std::make_shared<std::string>(std::move(text));
      boost::asio::async_write(socket, boost::asio::buffer(*kept), [self = shared_from_this(), kept](boost::system::error_code, std::size_t) {});
    }
    void close() {
      boost::system::error_code ignored;
      socket.close(ignored);
      owner.open.erase(shared_from_this());
    }
    Standin& owner;
    stream_protocol::socket socket;
    boost::asio::streambuf in;
  };
  using Does = std::function<void(Connection&)>;

  Standin(boost::asio::io_context& context, std::string at) : io{context}, path{std::move(at)} {
    says("prefs", R"({"RunSSH":false})");
    says("status", status());
    says("whois", whois());
    start();
  }
  ~Standin() { stop(); }
  void start() {
    acceptor.emplace(io, stream_protocol::endpoint{path});
    accept();
  }
  void stop() {
    acceptor.reset();
    ::unlink(path.c_str());
    for (const auto& c : std::set<std::shared_ptr<Connection>>{open}) c->close();
    bus.reset();
  }
  void accept() {
    acceptor->async_accept([this](boost::system::error_code ec, stream_protocol::socket s) {
      if (ec) return;
      const auto c = std::make_shared<Connection>(*this, std::move(s));
      open.insert(c);
      c->read();
      accept();
    });
  }
  void says(const std::string& what, const std::string& json) {
    answers[what] = [text = ok(json)](Connection& c) { c.write(text); };
  }
  void notice(const std::string& line = R"({"PeersChanged":[]})") {
    if (const auto c = bus.lock()) c->write(chunk(line + "\n"));
  }

  boost::asio::io_context& io;
  std::string path;
  std::optional<stream_protocol::acceptor> acceptor;
  std::set<std::shared_ptr<Connection>> open;
  std::weak_ptr<Connection> bus;
  std::map<std::string, Does> answers;
  std::map<std::string, int> asked;
  std::map<std::string, std::string> targets;  ///< the last of each
};

struct Scene {
  Scene() {
    settings.socket = dir.file("s");
    settings.timeout = 300ms;
    standin = std::make_unique<Standin>(io, settings.socket);
  }
  ~Scene() {
    standin.reset();
    provider.reset();
    ::unlink(settings.socket.c_str());
  }
  /// Runs until `condition`, at most `limit`: whether it came.
  bool until(const std::function<bool()>& condition, std::chrono::milliseconds limit = 5s) {
    const auto end = Clock::now() + limit;
    while (!condition() && Clock::now() < end) {
      io.restart();
      io.run_one_for(20ms);
    }
    return condition();
  }
  void begin() {
    provider = make_tailscaled_provider(io, settings);
    provider->start([this](Expected<Done> r) { ready = std::move(r); }, [this] { changes++; });
    REQUIRE(until([this] { return ready.has_value(); }));
  }
  Expected<std::optional<Node>> ask(const Address& peer = alice, std::uint16_t port = 1) {
    std::optional<Expected<std::optional<Node>>> got;
    const auto begin = Clock::now();
    provider->who_is(Endpoint{peer, port}, [&got](Expected<std::optional<Node>> a) { got = std::move(a); });
    REQUIRE(until([&got] { return got.has_value(); }));
    took = Clock::now() - begin;
    return std::move(*got);
  }
  bool admitted() {
    const auto a = ask();
    if (!a) UNSCOPED_INFO(a.error().doing);
    return a && *a && (*a)->login == "alice@example.com";
  }

  boost::asio::io_context io;
  TempDir dir;
  TailscaledSettings settings;
  std::unique_ptr<Standin> standin;
  std::unique_ptr<Provider> provider;
  std::optional<Expected<Done>> ready;
  int changes = 0;
  Clock::duration took{};
};

}  // namespace

TEST_CASE("a node is known by what tailscaled says of its address, the server listens on its own", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  REQUIRE(*s.ready);
  CHECK(s.admitted());
  REQUIRE(s.provider->own_addresses().size() == 1);
  CHECK(s.provider->own_addresses()[0].text() == "100.64.0.1");
  CHECK(s.provider->network().nodes.size() == 2);
  s.standin->answers["whois"] = [](Standin::Connection& c) { c.write("HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno\n"); };
  const auto stranger = s.ask(*Address::parse("100.64.0.9"));
  REQUIRE(stranger);
  CHECK_FALSE(stranger->has_value());
}

TEST_CASE("Tailscale SSH being on is an error at the start, with the command that turns it off", "[auth][identity][tailscaled]") {
  Scene s;
  s.standin->says("prefs", R"({"RunSSH":true})");
  s.begin();
  REQUIRE_FALSE(*s.ready);
  CHECK(s.ready->error().doing.find("tailscale set --ssh=false") != std::string::npos);
}

TEST_CASE("whatever a tailscaled that lies or is slow says, the question ends within its time and nobody gets in", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  struct Case {
    const char* name;
    Standin::Does does;
    bool too_long = false;
  };
  const Case cases[] = {
      {"silence", [](Standin::Connection&) {}},
      {"closes at once", [](Standin::Connection& c) { c.close(); }},
      {"half a header", [](Standin::Connection& c) { c.write("HTTP/1.1 200 OK\r\nConte"); }},
      {"half a body", [](Standin::Connection& c) { c.write("HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + whois()); }},
      {"half a body, then the end", [](Standin::Connection& c) { boost::system::error_code e; boost::asio::write(c.socket, boost::asio::buffer(std::string{"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"Node\""}), e); c.close(); }},
      {"no HTTP", [](Standin::Connection& c) { c.write("SSH-2.0-OpenSSH_9.2\r\n\r\n"); }},
      {"no JSON", [](Standin::Connection& c) { c.write(ok("<html>")); }},
      {"JSON of another kind", [](Standin::Connection& c) { c.write(ok("[1,2]")); }},
      {"an empty object", [](Standin::Connection& c) { c.write(ok("{}")); }},
      {"another machine", [](Standin::Connection& c) { c.write(ok(R"({"Node":{"StableID":"4","Name":"x.","Addresses":["100.64.0.4/32"],"MachineAuthorized":true},"UserProfile":{"LoginName":"bob@example.com"}})")); }},
      {"deep nesting", [](Standin::Connection& c) { c.write(ok(std::string(100000, '['))); }},
      {"huge", [](Standin::Connection& c) { c.write("HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n" + std::string(2'000'000, ' ')); }, true},
      {"more than may come, as promised", [](Standin::Connection& c) { c.write("HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n" + std::string(2'000'000, ' ')); }, true},
      {"a length beyond any memory", [](Standin::Connection& c) { c.write("HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n{"); }},
      {"huge, in chunks", [](Standin::Connection& c) { c.write(bus_open + chunk(std::string(2000000, ' '))); }, true},
      {"an endless header", [](Standin::Connection& c) { c.write("HTTP/1.1 200 OK\r\nX: " + std::string(100000, 'x')); }},
      {"status 500", [](Standin::Connection& c) { c.write("HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"); }},
      {"status 403", [](Standin::Connection& c) { c.write("HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"); }},
  };
  for (const auto& c : cases) {
    INFO(c.name);
    s.standin->answers["whois"] = c.does;
    const auto answer = s.ask();
    CHECK_FALSE(answer);
    if (!answer) CHECK(answer.error().code == (c.too_long ? E2BIG : EAGAIN));
    if (!answer && c.too_long) CHECK(answer.error().doing.find("bytes") != std::string::npos);  // not because its time was over
    CHECK(s.took < 3s);
    // The next question is answered as if nothing had been.
    s.standin->says("whois", whois());
    CHECK(s.admitted());
    s.standin->notice();  // so that no answer is kept for the next case
    const int before = s.changes;
    REQUIRE(s.until([&] { return s.changes > before; }));
  }
}

TEST_CASE("an answer that comes too late is not taken for the next question's", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  std::shared_ptr<Standin::Connection> late;
  s.standin->answers["whois"] = [&](Standin::Connection& c) { late = c.shared_from_this(); };
  CHECK(s.ask().error().code == EAGAIN);
  s.standin->answers["whois"] = [](Standin::Connection& c) { c.write("HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"); };
  late->write(ok(whois()));
  const auto next = s.ask();
  REQUIRE(next);
  CHECK_FALSE(next->has_value());
}

TEST_CASE("one slow question does not hold up others", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  s.standin->answers["whois"] = [](Standin::Connection&) {};
  int ended = 0;
  for (int i = 0; i < 3; i++) s.provider->who_is(Endpoint{*Address::parse("100.64.1." + std::to_string(i)), 1}, [&](const auto&) { ended++; });
  s.standin->says("whois", whois());
  CHECK(s.admitted());
  CHECK(s.took < 200ms);
  CHECK(s.until([&] { return ended == 3; }));
}

TEST_CASE("tailscaled away: an error that says so, and nothing is told to have changed, back: it works within a second", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  CHECK(s.admitted());
  s.standin->stop();
  REQUIRE(s.until([&] { return !s.ask(); }));
  CHECK(s.ask().error().code == EAGAIN);
  CHECK(s.ask().error().doing.find("tailscaled") != std::string::npos);
  CHECK(s.changes == 0);
  s.standin->start();
  const auto back = Clock::now();
  REQUIRE(s.until([&] { return s.admitted(); }));
  CHECK(Clock::now() - back < 1s);
  CHECK(s.changes == 1);  // what changed meanwhile was told by nobody
}

TEST_CASE("a server that starts before tailscaled starts all the same", "[auth][identity][tailscaled]") {
  Scene s;
  s.standin->stop();
  s.begin();
  REQUIRE(*s.ready);
  CHECK(s.provider->own_addresses().empty());
  CHECK(s.ask().error().code == EAGAIN);
  s.standin->start();
  REQUIRE(s.until([&] { return s.changes > 0; }));
  CHECK(s.provider->own_addresses().size() == 1);
  CHECK(s.admitted());
}

TEST_CASE("logged out of the network: nobody is known, live sessions are for the broker to keep", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  s.standin->says("status", status("NeedsLogin"));
  s.standin->notice();
  REQUIRE(s.until([&] { return s.changes > 0; }));
  const auto a = s.ask();
  REQUIRE_FALSE(a);
  CHECK(a.error().doing.find("NeedsLogin") != std::string::npos);
}

TEST_CASE("each notice of the bus is passed on, and no answer of before it is given after it", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  CHECK(s.admitted());
  s.standin->says("whois", whois(R"(,"Expired":true)"));
  s.standin->notice();
  REQUIRE(s.until([&] { return s.changes > 0; }));
  const auto expired = s.ask();
  REQUIRE_FALSE(expired);
  CHECK(expired.error().code == EACCES);
  CHECK_FALSE(expired.error().user_message.empty());

  s.standin->says("status", status("Running", "100.64.0.7"));
  const int before = s.changes;
  s.standin->notice();
  REQUIRE(s.until([&] { return s.changes > before; }));
  CHECK(s.provider->own_addresses()[0].text() == "100.64.0.7");
}

TEST_CASE("a stream of notices costs a look at the network now and then, not one each", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  const int before = s.standin->asked["status"];
  for (int i = 0; i < 200; i++) s.standin->notice();
  REQUIRE(s.until([&] { return s.changes > 0; }));
  s.until([] { return false; }, 300ms);
  CHECK(s.standin->asked["status"] - before < 10);
}

TEST_CASE("a thousand who ask for one address at once cost one question", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  const int before = s.standin->asked["whois"];
  int answered = 0;
  for (int i = 0; i < 1000; i++) s.provider->who_is(Endpoint{alice, 1}, [&](const auto& a) { answered += a && *a; });
  REQUIRE(s.until([&] { return answered == 1000; }));
  CHECK(s.standin->asked["whois"] - before == 1);
}

TEST_CASE("garbage on the bus: nothing is answered until there is a bus again", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  for (const std::string& line : {std::string{"garbage"}, std::string(17 * 1024 * 1024, 'x')}) {
    const int before = s.changes;
    s.standin->notice(line);
    REQUIRE(s.until([&] { return s.changes > before; }));
    CHECK(s.admitted());
  }
}

TEST_CASE("a status that cannot be read leaves nobody admitted, and the next good one ends that", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  s.standin->says("status", "{\"BackendState\":7}");
  s.standin->notice();
  REQUIRE(s.until([&] { return !s.ask(); }));
  CHECK(s.ask().error().code == EAGAIN);
  s.standin->says("status", status());
  REQUIRE(s.until([&] { return s.admitted(); }));
}

TEST_CASE("userspace networking: peers are known by the port of tailscaled's proxy, and by nothing else", "[auth][identity][tailscaled]") {
  Scene s;
  s.standin->says("status", status("Running", "100.64.0.1", false));
  s.begin();
  const Address here = *Address::parse("127.0.0.1");
  REQUIRE(s.provider->own_addresses() == std::vector{here});
  REQUIRE(s.provider->network().find(here) != nullptr);
  CHECK(s.provider->network().find(here)->id == "1");
  const auto proxied = s.ask(here, 40000);
  REQUIRE(proxied);
  REQUIRE(proxied->has_value());
  CHECK((*proxied)->login == "alice@example.com");
  CHECK(s.standin->targets["whois"] == "/localapi/v0/whois?proto=tcp&addr=127.0.0.1:40000");
  // Another port is another connection, and an address of the network that comes by a cable is nobody's.
  s.standin->answers["whois"] = [](Standin::Connection& c) { c.write("HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"); };
  const auto local = s.ask(here, 40001);
  REQUIRE(local);
  CHECK_FALSE(local->has_value());
  const int asked = s.standin->asked["whois"];
  const auto spoofed = s.ask(alice);
  REQUIRE(spoofed);
  CHECK_FALSE(spoofed->has_value());
  CHECK(s.standin->asked["whois"] == asked);
}

TEST_CASE("userspace networking: who has a peer's port next is not that peer, however soon", "[auth][identity][tailscaled]") {
  Scene s;
  s.standin->says("status", status("Running", "100.64.0.1", false));
  s.begin();
  const Address here = *Address::parse("127.0.0.1");
  REQUIRE(*s.ask(here, 40000));
  s.standin->answers["whois"] = [](Standin::Connection& c) { c.write("HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"); };
  const auto next = s.ask(here, 40000);
  REQUIRE(next);
  CHECK_FALSE(next->has_value());
  // Nor is it while the question about the first one is still open.
  std::shared_ptr<Standin::Connection> slow;
  s.standin->answers["whois"] = [&](Standin::Connection& c) { slow = c.shared_from_this(); };
  bool first = false;
  s.provider->who_is(Endpoint{here, 40001}, [&](const auto& a) { first = a && *a; });
  REQUIRE(s.until([&] { return slow != nullptr; }));
  s.standin->answers["whois"] = [](Standin::Connection& c) { c.write("HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"); };
  const auto second = s.ask(here, 40001);
  REQUIRE(second);
  CHECK_FALSE(second->has_value());
  slow->write(ok(whois()));
  CHECK(s.until([&] { return first; }));
}

TEST_CASE("a tailscaled that sends no network map leaves the network's ssh rules unknown and nothing else", "[auth][identity][tailscaled]") {
  Scene s;
  s.settings.ssh_policy = true;
  s.begin();
  REQUIRE(*s.ready);
  CHECK(s.ask());
  REQUIRE_FALSE(s.provider->ssh_policy());
  CHECK(s.provider->ssh_policy().error().code == ENOTSUP);
  CHECK(s.provider->ssh_policy().error().user_message.find("no longer tells it") != std::string::npos);
  REQUIRE(s.until([&] {
    s.standin->notice(R"({"NetMap":{"SSHPolicy":{"rules":[]}}})");
    s.until([] { return false; }, 20ms);
    return s.provider->ssh_policy().has_value();
  }));
}

TEST_CASE("a provider that goes with questions open calls nobody", "[auth][identity][tailscaled]") {
  Scene s;
  s.begin();
  s.standin->answers["whois"] = [](Standin::Connection&) {};
  bool called = false;
  for (int i = 0; i < 50; i++) s.provider->who_is(Endpoint{*Address::parse("100.64.2." + std::to_string(i)), 1}, [&](const auto&) { called = true; });
  s.standin->notice();
  s.until([] { return false; }, 50ms);
  s.provider.reset();
  s.until([] { return false; }, 500ms);
  CHECK_FALSE(called);
}
