#include "catch.h"
#include "recorder/wire/http2.h"

#include <boost/asio/buffer.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/write.hpp>

#include <chrono>
#include <string>

using namespace postern;
using namespace postern::recorder::wire;
namespace asio = boost::asio;
using asio::ip::tcp;
using std::chrono::milliseconds;

namespace {

/// A server and a client in one thread on 127.0.0.1.
struct Pair {
  asio::io_context io{1};
  tcp::acceptor acceptor{io, tcp::endpoint{asio::ip::address_v4::loopback(), 0}};
  std::shared_ptr<Http2Connection> server, client;
  std::string server_closed, client_closed;
  bool stalled = false;
  std::function<void(const std::shared_ptr<Http2Stream>&)> on_request;

  explicit Pair(Http2Options options = {}, bool with_client = true) {
    acceptor.async_accept([this, options](boost::system::error_code ec, tcp::socket socket) {
      REQUIRE(!ec);
      server = Http2Connection::server(std::move(socket), options,
                                       {.on_request = [this](const auto& s) { on_request(s); },
                                        .on_stalled = [this](bool s) { stalled = s; },
                                        .on_close = [this](const std::string& why) { server_closed = why; }});
    });
    if (!with_client) return;
    connect_tcp(io, from_asio(acceptor.local_endpoint()), std::nullopt, milliseconds{2000}, [this](Expected<tcp::socket> socket) {
      REQUIRE(socket);
      client = Http2Connection::client(std::move(*socket), {}, {.on_request = {}, .on_stalled = {}, .on_close = [this](const std::string& why) { client_closed = why; }});
    });
    until([this] { return server && client; });
  }
  ~Pair() {
    if (server) server->close("test over");
    if (client) client->close("test over");
    io.run_for(milliseconds{50});
  }
  template <class F>
  void until(F&& f, int ms = 10000) {
    const auto limit = std::chrono::steady_clock::now() + milliseconds{ms};
    while (!f()) {
      REQUIRE(std::chrono::steady_clock::now() < limit);
      io.run_one_for(milliseconds{20});
      io.restart();
    }
  }
};

std::string text(std::span<const std::byte> bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }

}  // namespace

TEST_CASE("a request and its answer go both ways at once", "[recorder_wire][http2]") {
  Pair p;
  p.on_request = [](const std::shared_ptr<Http2Stream>& s) {
    CHECK(s->method() == "POST");
    CHECK(s->path() == "/x?y=1");
    s->respond(200, {{"content-type", "text/plain"}});
    Http2Stream::Handlers h;
    h.on_data = [s](std::span<const std::byte> b) {
      s->consume(b.size());
      s->write("got " + text(b) + ";");
    };
    h.on_end = [s] { s->finish(); };
    s->set_handlers(std::move(h));
  };
  int status = 0;
  std::string body;
  bool ended = false, closed = false;
  auto stream = p.client->request("POST", "/x?y=1", {}, false,
                                  {.on_headers = [&](int s, const HeaderList&) { status = s; },
                                   .on_data = [&](auto b) { body += text(b); },
                                   .on_end = [&] { ended = true; },
                                   .on_drain = {},
                                   .on_close = [&](std::uint32_t error, bool) { closed = true; CHECK(error == 0); }});
  REQUIRE(stream);
  stream->write("one");
  p.until([&] { return body == "got one;"; });
  CHECK(status == 200);
  stream->write("two");
  p.until([&] { return body == "got one;got two;"; });
  stream->finish();
  p.until([&] { return closed; });
  CHECK(ended);
}

TEST_CASE("a receiver that does not consume stops the sender at its window", "[recorder_wire][http2]") {
  Http2Options options;
  options.stream_window = 100'000;
  Pair p{options};
  std::shared_ptr<Http2Stream> in;
  std::size_t received = 0;
  p.on_request = [&](const std::shared_ptr<Http2Stream>& s) {
    in = s;
    Http2Stream::Handlers h;
    h.on_data = [&](std::span<const std::byte> b) { received += b.size(); };
    s->set_handlers(std::move(h));
    s->respond(200, {});
  };
  bool drained = false;
  auto out = p.client->request("POST", "/", {}, false, {.on_headers = {}, .on_data = {}, .on_end = {}, .on_drain = [&] { drained = true; }, .on_close = {}});
  out->write(std::string(1'000'000, 'x'));
  p.until([&] { return received == 100'000; });
  p.io.run_for(milliseconds{100});
  p.io.restart();
  CHECK(received == 100'000);
  CHECK(out->queued() == 900'000);
  CHECK_FALSE(drained);
  // Window that is given back lets exactly as much through.
  std::size_t consumed = 0;
  while (received < 1'000'000) {
    in->consume(received - consumed);
    consumed = received;
    const auto before = received;
    p.until([&] { return received > before; });
    REQUIRE(received - consumed <= 100'000);
  }
  CHECK(drained);
  out->reset();
  p.until([&] { return in->closed(); });
}

TEST_CASE("an early error answer stops an upload without breaking the connection", "[recorder_wire][http2]") {
  Pair p;
  p.on_request = [](const std::shared_ptr<Http2Stream>& s) {
    s->respond(507, {});
    s->write("full\n");
    s->finish();
  };
  for (int i = 0; i < 3; i++) {
    int status = 0;
    std::string body;
    bool closed = false;
    auto s = p.client->request("POST", "/", {}, false,
                               {.on_headers = [&](int n, const HeaderList&) { status = n; }, .on_data = [&](auto b) { body += text(b); }, .on_end = {}, .on_drain = {},
                                .on_close = [&](std::uint32_t error, bool) { closed = true; CHECK(error == 0); }});
    REQUIRE(s);
    s->write(std::string(5'000'000, 'x'));
    p.until([&] { return closed; });
    CHECK(status == 507);
    CHECK(body == "full\n");
  }
  CHECK_FALSE(p.client->closed());
}

TEST_CASE("a peer that goes away ends every stream once", "[recorder_wire][http2]") {
  Pair p;
  p.on_request = [](const std::shared_ptr<Http2Stream>& s) { s->respond(200, {}); };
  int closes = 0;
  for (int i = 0; i < 10; i++)
    p.client->request("POST", "/", {}, false, {.on_headers = {}, .on_data = {}, .on_end = {}, .on_drain = {}, .on_close = [&](std::uint32_t, bool) { closes++; }});
  p.until([&] { return p.server->streams() == 10; });
  p.server->close("gone");
  p.until([&] { return !p.client_closed.empty(); });
  CHECK(closes == 10);
  CHECK(p.server_closed == "gone");
  CHECK(p.client->request("GET", "/", {}, true, {}) == nullptr);
}

TEST_CASE("requests after a GOAWAY are refused, those before it go on", "[recorder_wire][http2]") {
  Pair p;
  std::shared_ptr<Http2Stream> first;
  p.on_request = [&](const std::shared_ptr<Http2Stream>& s) {
    first = s;
    s->respond(200, {});
  };
  std::string body;
  bool closed = false;
  p.client->request("GET", "/", {}, true,
                    {.on_headers = {}, .on_data = [&](auto b) { body += text(b); }, .on_end = {}, .on_drain = {}, .on_close = [&](std::uint32_t, bool) { closed = true; }});
  p.until([&] { return first != nullptr; });
  p.server->shut_down();
  p.until([&] { return p.client->request("GET", "/", {}, true, {}) == nullptr; });
  first->write("still here");
  first->finish();
  p.until([&] { return closed; });
  CHECK(body == "still here");
  p.until([&] { return !p.server_closed.empty() && !p.client_closed.empty(); });
}

TEST_CASE("a header list over the limit loses its stream only", "[recorder_wire][http2]") {
  Pair p;
  int requests = 0;
  p.on_request = [&](const std::shared_ptr<Http2Stream>& s) {
    requests++;
    s->respond(200, {}, true);
  };
  std::uint32_t error = 0;
  bool closed = false;
  p.client->request("GET", "/", {{"x-big", std::string(20'000, 'x')}}, true,
                    {.on_headers = {}, .on_data = {}, .on_end = {}, .on_drain = {}, .on_close = [&](std::uint32_t e, bool) { error = e; closed = true; }});
  p.until([&] { return closed; });
  CHECK(error != 0);
  closed = false;
  p.client->request("GET", "/", {}, true, {.on_headers = {}, .on_data = {}, .on_end = {}, .on_drain = {}, .on_close = [&](std::uint32_t e, bool) { error = e; closed = true; }});
  p.until([&] { return closed; });
  CHECK(error == 0);
  CHECK(requests == 1);
}

TEST_CASE("streams that are opened and reset without end cost the connection", "[recorder_wire][http2]") {
  Http2Options options;
  options.reset_burst = 50;
  options.reset_rate = 1;
  Pair p{options};
  p.on_request = [&](const std::shared_ptr<Http2Stream>& s) { s->respond(200, {}); };
  for (int i = 0; i < 2000 && p.server_closed.empty(); i++) {
    if (auto s = p.client->request("POST", "/", {}, false, {})) {
      p.io.run_one_for(milliseconds{5});
      p.io.restart();
      s->reset();
    }
    p.io.poll();
    p.io.restart();
  }
  p.until([&] { return !p.client_closed.empty(); });
}

TEST_CASE("a peer that answers no PING is called stalled, then disconnected", "[recorder_wire][http2]") {
  Http2Options options;
  options.ping_interval = milliseconds{20};
  options.stall_timeout = milliseconds{60};
  options.peer_timeout = milliseconds{300};
  Pair p{options, false};
  p.on_request = [](const auto&) {};
  tcp::socket mute{p.io};
  mute.connect(p.acceptor.local_endpoint());
  asio::write(mute, asio::buffer(std::string{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"} + std::string("\0\0\0\4\0\0\0\0\0", 9)));
  p.until([&] { return p.stalled; });
  CHECK(p.server_closed.empty());
  p.until([&] { return !p.server_closed.empty(); });
  CHECK(p.server_closed == "no answer to PING");
}

TEST_CASE("nobody listening is an error, no answer ends at the deadline", "[recorder_wire][http2]") {
  asio::io_context io;
  Endpoint closed;
  {
    tcp::acceptor a{io, tcp::endpoint{asio::ip::address_v4::loopback(), 0}};
    closed = from_asio(a.local_endpoint());
  }
  std::string error;
  connect_tcp(io, closed, Address::parse("127.0.0.1"), milliseconds{2000}, [&](Expected<tcp::socket> s) { error = s ? "connected" : s.error().doing; });
  io.run();
  CHECK(error.find("Connection refused") != std::string::npos);

  // A listener whose queue is full lets a SYN wait (tcp(7), tcp_abort_on_overflow).
  tcp::acceptor full{io};
  full.open(tcp::v4());
  full.bind({asio::ip::address_v4::loopback(), 0});
  full.listen(0);
  std::vector<tcp::socket> fill;
  for (int i = 0; i < 4; i++) {
    fill.emplace_back(io);
    fill.back().async_connect(full.local_endpoint(), [](auto) {});
  }
  error.clear();
  io.restart();
  connect_tcp(io, from_asio(full.local_endpoint()), std::nullopt, milliseconds{100}, [&](Expected<tcp::socket> s) { error = s ? "connected" : s.error().doing; });
  while (error.empty()) io.run_one();
  CHECK(error.find("no answer in time") != std::string::npos);
}
