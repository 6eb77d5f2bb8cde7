#include "recorder_node_fixture.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

using namespace recorder_node_test;

namespace {

const std::string first = "{\"version\":2,\"width\":80,\"height\":24,\"env\":{\"TERM\":\"xterm\"},\"srcNodeTags\":[\"tag:a\"]}\n";

std::string http1(Recorder& r, const std::string& request) {
  tcp::socket socket{r.io};
  socket.connect(wire::to_asio(r.endpoint()));
  asio::write(socket, asio::buffer(request));
  std::string out;
  std::array<char, 4096> piece{};
  bool done = false;
  std::function<void()> read = [&] {
    socket.async_read_some(asio::buffer(piece), [&](boost::system::error_code ec, std::size_t n) {
      out.append(piece.data(), n);
      if (ec) done = true;
      else read();
    });
  };
  read();
  r.until([&] { return done; });
  return out;
}

/// postern-recorder as a process.
struct Process {
  pid_t pid = -1;
  std::string endpoint;
  explicit Process(const fs::path& config) {
    int ready[2];
    REQUIRE(::pipe2(ready, O_CLOEXEC) == 0);
    pid = ::fork();
    if (pid == 0) {
      ::dup2(ready[1], 9);
      const int null = ::open("/dev/null", O_WRONLY);
      ::dup2(null, 2);
      ::execl(POSTERN_RECORDER, "postern-recorder", "--config", config.c_str(), "--ready-fd", "9", nullptr);
      ::_exit(127);
    }
    ::close(ready[1]);
    std::string line;
    char c = 0;
    while (::read(ready[0], &c, 1) == 1) line += c;
    ::close(ready[0]);
    REQUIRE_FALSE(line.empty());
    endpoint = nlohmann::json::parse(line)["listening"][0].get<std::string>();
  }
  int end(int signal) {
    ::kill(pid, signal);
    int status = 0;
    ::waitpid(pid, &status, 0);
    pid = -1;
    return status;
  }
  ~Process() {
    if (pid > 0) end(SIGKILL);
  }
};

}  // namespace

TEST_CASE("a browser or curl lists and reads over plain HTTP on the same port", "[recorder_node]") {
  Recorder r;
  Relay relay{r, r.endpoint()};
  const Id id = Id::random();
  auto u = relay.opened(id, 1);
  u->data(0, first);
  relay.ack(u, first.size());
  const std::string host = "Host: " + r.endpoint().text() + "\r\n\r\n";
  const auto read = http1(r, "GET /postern/v1/recordings/" + id.text() + " HTTP/1.1\r\n" + host);
  CHECK(read.starts_with("HTTP/1.1 200 OK\r\n"));
  CHECK(read.ends_with("\r\n\r\n" + first));
  CHECK(read.find("content-length: " + std::to_string(first.size())) != std::string::npos);
  CHECK(read.find("content-type: application/x-asciicast") != std::string::npos);
  const auto list = http1(r, "GET /postern/v1/recordings HTTP/1.1\r\n" + host);
  CHECK(list.find("transfer-encoding: chunked") != std::string::npos);
  CHECK(list.find("\"state\":\"live\"") != std::string::npos);
  CHECK(list.find("\"TERM\":\"xterm\"") != std::string::npos);
  CHECK(list.ends_with("0\r\n\r\n"));
  const auto head = http1(r, "HEAD /postern/v1/recordings/" + id.text() + " HTTP/1.1\r\n" + host);
  CHECK(head.starts_with("HTTP/1.1 200"));
  CHECK(head.ends_with("\r\n\r\n"));
  CHECK(http1(r, "GET /postern/v1/recordings/" + Id::random().text() + " HTTP/1.1\r\n" + host).starts_with("HTTP/1.1 404"));
  CHECK(http1(r, "GET /postern/v1/recordings HTTP/1.0\r\n\r\n").find("\"state\":\"live\"") != std::string::npos);
}

TEST_CASE("plain HTTP that is not a simple GET is refused, whatever its size", "[recorder_node]") {
  Recorder r{[](node::Settings& s) { s.names = {"recorder-a"}; }};
  const auto status = [&](const std::string& request) { return http1(r, request).substr(9, 3); };
  CHECK(status("GET /postern/v1/recordings HTTP/1.1\r\nHost: evil.example\r\n\r\n") == "403");  // rebound name
  CHECK(status("GET /postern/v1/recordings HTTP/1.1\r\n\r\n") == "403");
  CHECK(status("GET /postern/v1/recordings HTTP/1.1\r\nHost: recorder-a:80\r\n\r\n") == "200");
  CHECK(status("GET /postern/v1/recordings HTTP/1.1\r\nHost: [::1]:80\r\n\r\n") == "200");
  CHECK(status("GET /postern/v1/recordings HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\n\r\n") == "400");
  CHECK(status("POST /postern/v1/recordings/x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") == "400");
  CHECK(status("GET /etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") == "404");
  CHECK(status("nonsense\r\n\r\n") == "400");
  CHECK(status("\r\n\r\n") == "400");
  CHECK(status("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + std::string(100'000, 'x')) == "413");
}

TEST_CASE("a list shows of a header what is bounded, and survives one that is not JSON", "[recorder_node]") {
  Recorder r;
  Relay relay{r, r.endpoint()};
  const Id hostile = Id::random(), broken = Id::random(), huge = Id::random();
  nlohmann::json header{{"version", 2}, {"command", std::string(5000, 'x')}, {"deep", {{"a", {{"b", 1}}}}}};
  for (int i = 0; i < 100; i++) header["k" + std::to_string(i)] = i;
  const std::string line = header.dump() + "\n";
  for (const auto& [id, bytes] : {std::pair{hostile, line}, {broken, std::string{"not json \xff\n"}}, {huge, std::string(40'000, 'x')}}) {
    auto u = relay.opened(id, 1);
    u->data(0, bytes);
    relay.ack(u, bytes.size());
  }
  const auto copy = relay.copy(hostile);
  CHECK(copy["header"].size() <= 24);
  CHECK(copy["header"]["command"] == std::string(256, 'x'));
  CHECK_FALSE(copy["header"].contains("deep"));
  CHECK_FALSE(relay.copy(broken).contains("header"));
  CHECK_FALSE(relay.copy(huge).contains("header"));
  const auto list = relay.ask("GET", "/postern/v1/recordings").body;
  CHECK(std::count(list.begin(), list.end(), '\n') == 3);
}

TEST_CASE("new rules take hold without a restart", "[recorder_node]") {
  Recorder r;
  Relay relay{r, r.endpoint()};
  auto u = relay.opened(Id::random(), 1);
  node::Settings rules = r.settings;
  rules.ingest = {};
  rules.read = {*Prefix::parse("127.0.0.1")};
  r.server->reload(rules);
  auto refused = relay.open(Id::random(), 1);
  r.until([&] { return refused->closed; });
  CHECK(refused->status == 403);
  rules.read = {};
  r.server->reload(rules);
  r.until([&] { return !relay.closed.empty(); });
}

TEST_CASE("a relay that answers no more has its recordings shown as stalled", "[recorder_node]") {
  Recorder r{[](node::Settings& s) {
    s.http2.ping_interval = milliseconds{20};
    s.http2.stall_timeout = milliseconds{60};
    s.http2.peer_timeout = milliseconds{60'000};
  }};
  // Its bytes are made by a real client session and then nothing answers any more: a proxy that stops to copy.
  tcp::acceptor acceptor{r.io, tcp::endpoint{asio::ip::address_v4::loopback(), 0}};
  tcp::socket near{r.io}, far{r.io};
  bool copying = true;
  std::array<char, 65536> up{}, down{};
  std::function<void(tcp::socket&, tcp::socket&, std::array<char, 65536>&)> copy = [&](tcp::socket& from, tcp::socket& to, std::array<char, 65536>& buffer) {
    from.async_read_some(asio::buffer(buffer), [&](boost::system::error_code ec, std::size_t n) {
      if (ec || !copying) return;
      asio::write(to, asio::buffer(buffer.data(), n));
      copy(from, to, buffer);
    });
  };
  acceptor.async_accept(near, [&](boost::system::error_code ec) {
    REQUIRE(!ec);
    far.connect(wire::to_asio(r.endpoint()));
    copy(near, far, up);
    copy(far, near, down);
  });
  Relay watcher{r, r.endpoint()};
  const Id id = Id::random();
  {
    Relay relay{r, wire::from_asio(acceptor.local_endpoint())};
    auto u = relay.opened(id, 1);
    CHECK(watcher.copy(id)["state"] == "live");
    copying = false;
    r.until([&] { return watcher.copy(id)["state"] == "stalled"; });
  }
  boost::system::error_code ignored;
  near.close(ignored);
  far.close(ignored);
  r.until([&] { return watcher.copy(id)["state"] == "cut"; });
}

TEST_CASE("a recorder killed in the middle comes back with every acked byte, and the recording goes on", "[recorder_node]") {
  TempDir dir;
  const auto config = dir.path / "recorder.toml";
  std::ofstream{config} << "[listen]\naddresses = [\"127.0.0.1:0\"]\n[ingest]\nallow = [\"127.0.0.0/8\"]\n[read]\nallow = [\"127.0.0.0/8\"]\n[store]\nmin_free = \"0B\"\ndir = \""
                        << (dir.path / "store").string() << "\"\n";
  const Id id = Id::random();
  std::string all = first;
  for (unsigned i = 0; all.size() < 30'000'000; i++) all += std::to_string(i * 2654435761U) + "\n";
  std::uint64_t acked = 0, epoch = 1;
  Loop loop;
  for (int kill = 0; kill < 4; kill++) {
    Process process{config};
    Relay relay{loop, *Endpoint::parse(process.endpoint, 0)};
    auto u = relay.opened(id, epoch++);
    REQUIRE(u->answer->have >= acked);
    REQUIRE(u->answer->head == head_of(id, std::string_view{all}.substr(0, u->answer->have)));
    for (std::size_t at = u->answer->have; at < all.size(); at += 500'000) u->data(at, std::string_view{all}.substr(at, 500'000));
    if (kill < 3) {
      const auto enough = u->answer->have + 4'000'000;
      loop.until([&] { return u->ack >= enough; });
      acked = u->ack;
      process.end(SIGKILL);
      loop.until([&] { return !relay.closed.empty(); });
    } else {
      u->end(id, all);
      loop.until([&] { return u->closed; }, 60000);
      CHECK(u->whole == head_of(id, all));
      CHECK(relay.ask("GET", "/postern/v1/recordings/" + id.text()).body == all);
      const int status = process.end(SIGTERM);
      CHECK(WIFEXITED(status));
      CHECK(WEXITSTATUS(status) == 0);
    }
  }
}

TEST_CASE("settings name the place of what is wrong", "[recorder_node]") {
  const auto error = [](const std::string& text) {
    const auto s = node::parse_settings(text, "r.toml");
    return s ? std::string{} : s.error().doing;
  };
  CHECK(error("").empty());
  CHECK(error("[ingest]\nallow = [\"100.64.0.0/10\", \"fd7a::/48\", \"127.0.0.2\"]\n").empty());
  CHECK(error("[ingest]\nallow = [\"127.0.0.2\",\n  \"everyone\"]\n").starts_with("r.toml:3:3: ingest.allow[1]: must be an address or a prefix"));
  CHECK(error("[ingest]\nalow = []\n").starts_with("r.toml:2:8: ingest.alow: is not a setting"));
  CHECK(error("[store]\nmin_free = 5\n").starts_with("r.toml:2:12: store.min_free"));
  CHECK(error("[limits]\nstreams = 0\n").starts_with("r.toml:2:11: limits.streams"));
  CHECK(error("[store]\nturn_bytes = \"1B\"\n").starts_with("r.toml:2:14: store.turn_bytes"));
  CHECK(error("[listen]\naddresses = []\n").starts_with("r.toml:2:13: listen.addresses"));
  CHECK(error("[nothing]\n").starts_with("r.toml:1:1: nothing: is not a setting"));
  const auto s = node::parse_settings("[store]\nmin_free = \"1GiB\"\nhealth_interval = \"50ms\"\n[listen]\naddresses = [\"127.0.2.1\"]\n", "r.toml");
  REQUIRE(s);
  CHECK(s->store.min_free == 1ULL << 30);
  CHECK(s->store.health_interval == milliseconds{50});
  CHECK(s->listen.at(0).text() == "127.0.2.1:80");
  CHECK(s->ingest.empty());  // nobody, until somebody is named
}
