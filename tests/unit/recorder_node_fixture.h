#pragma once

// A recorder on 127.0.0.1 in this thread and a relay's end of its protocol, for the tests of recorder/node.

#include "base/log.h"
#include "catch.h"
#include "recorder/cast/chain.h"
#include "recorder/node/server.h"
#include "recorder/wire/http2.h"
#include "recorder/wire/messages.h"
#include "temp_dir.h"

#include <boost/asio/buffer.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/write.hpp>
#include <nlohmann/json.hpp>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace recorder_node_test {

using namespace postern;
using namespace postern::recorder;
namespace asio = boost::asio;
namespace fs = std::filesystem;
using asio::ip::tcp;
using std::chrono::milliseconds;
using wire::Code;

inline std::string head_of(const Id& id, std::string_view bytes) {
  cast::Chain chain{id.bytes};
  chain.update(std::as_bytes(std::span{bytes.data(), bytes.size()}));
  return cast::hex(chain.head());
}

inline std::string contents(const fs::path& path) {
  std::ifstream in{path, std::ios::binary};
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

/// What a relay has heard on one upload.
struct Upload {
  std::shared_ptr<wire::Http2Stream> stream;
  wire::LineReader lines;
  int status = 0;
  std::optional<wire::AnswerLine> answer;
  std::uint64_t ack = 0;
  std::string whole, cut;
  std::optional<wire::ErrorLine> error;
  bool closed = false;

  void data(std::uint64_t offset, std::string_view bytes) { stream->write(wire::data_frame_header(offset, bytes.size()) + std::string{bytes}); }
  void end(const Id& id, std::string_view all) {
    stream->write(wire::end_frame({all.size(), head_of(id, all), "", ""}));
    stream->finish();
  }
};

struct Loop {
  asio::io_context io{1};
  template <class F>
  void until(F&& f, int ms = 20000) {
    const auto limit = std::chrono::steady_clock::now() + milliseconds{ms};
    while (!f()) {
      REQUIRE(std::chrono::steady_clock::now() < limit);
      io.run_one_for(milliseconds{20});
      io.restart();
    }
  }
  void run_for(int ms) {
    io.run_for(milliseconds{ms});
    io.restart();
  }
};

/// One connection of a relay.
struct Relay {
  Relay(Loop& l, const Endpoint& to, const char* from = "127.0.0.1") : loop{l} {
    wire::connect_tcp(l.io, to, Address::parse(from), milliseconds{5000}, [this](Expected<tcp::socket> socket) {
      REQUIRE(socket);
      connection = wire::Http2Connection::client(std::move(*socket), {}, {.on_request = {}, .on_stalled = {}, .on_close = [this](const std::string& why) { closed = why; }});
    });
    loop.until([&] { return connection != nullptr; });
  }
  ~Relay() {
    connection->close("test over");
    loop.run_for(20);
  }
  std::shared_ptr<Upload> open(const Id& id, std::uint64_t epoch, std::uint64_t length = 0) {
    auto u = std::make_shared<Upload>();
    u->stream = connection->request("POST", "/postern/v1/recordings/" + id.text() + "?epoch=" + std::to_string(epoch), {}, false,
                                    {.on_headers = [u](int status, const wire::HeaderList&) { u->status = status; },
                                     .on_data =
                                         [u](std::span<const std::byte> b) {
                                           u->stream->consume(b.size());
                                           (void)u->lines.feed({reinterpret_cast<const char*>(b.data()), b.size()}, [&](std::string_view line) {
                                             if (u->status == 200 && !u->answer) {
                                               auto a = wire::parse_answer(line);
                                               if (a) {
                                                 u->answer = *a;
                                                 return true;
                                               }
                                             }
                                             const auto r = wire::parse_upload_reply(line);
                                             REQUIRE(r);
                                             using Kind = wire::UploadReply::Kind;
                                             if (r->kind == Kind::ack) {
                                               CHECK(r->offset > u->ack);
                                               u->ack = r->offset;
                                             }
                                             if (r->kind == Kind::whole) u->whole = r->head;
                                             if (r->kind == Kind::cut) u->cut = r->head;
                                             if (r->kind == Kind::error) u->error = r->error;
                                             return true;
                                           });
                                         },
                                     .on_end = {},
                                     .on_drain = {},
                                     .on_close = [u](std::uint32_t, bool) { u->closed = true; }});
    REQUIRE(u->stream);
    u->stream->write(wire::format(wire::OpenLine{id, epoch, "server", 0, length, ""}));
    return u;
  }
  std::shared_ptr<Upload> opened(const Id& id, std::uint64_t epoch) {
    auto u = open(id, epoch);
    loop.until([&] { return u->answer || u->error; });
    REQUIRE(u->answer);
    return u;
  }
  void ack(const std::shared_ptr<Upload>& u, std::uint64_t n) {
    loop.until([&] { return u->ack >= n || u->error; });
    CHECK(u->ack == n);
  }

  struct Reply {
    int status = 0;
    wire::HeaderList headers;
    std::string body;
    bool closed = false;
    std::uint32_t error = 0;
  };
  std::shared_ptr<Reply> start(const std::string& method, const std::string& path, const std::string& body = "") {
    auto r = std::make_shared<Reply>();
    auto stream = std::make_shared<std::shared_ptr<wire::Http2Stream>>();
    *stream = connection->request(method, path, {}, body.empty(),
                                  {.on_headers = [r](int s, const wire::HeaderList& h) { r->status = s; r->headers = h; },
                                   .on_data =
                                       [r, stream](std::span<const std::byte> b) {
                                         (*stream)->consume(b.size());
                                         r->body.append(reinterpret_cast<const char*>(b.data()), b.size());
                                       },
                                   .on_end = {},
                                   .on_drain = {},
                                   .on_close = [r](std::uint32_t e, bool) { r->closed = true; r->error = e; }});
    REQUIRE(*stream);
    if (!body.empty()) {
      (*stream)->write(body);
      (*stream)->finish();
    }
    return r;
  }
  Reply ask(const std::string& method, const std::string& path, const std::string& body = "") {
    const auto r = start(method, path, body);
    loop.until([&] { return r->closed; });
    return *r;
  }
  nlohmann::json copy(const Id& id) {
    const auto r = ask("GET", "/postern/v1/recordings?id=" + id.text());
    REQUIRE(r.status == 200);
    return r.body.empty() ? nlohmann::json{} : nlohmann::json::parse(r.body);
  }

  Loop& loop;
  std::shared_ptr<wire::Http2Connection> connection;
  std::string closed;
};

/// A recorder and its folder.
struct Recorder : Loop {
  TempDir dir;
  node::Settings settings;
  std::unique_ptr<node::Server> server;

  explicit Recorder(const std::function<void(node::Settings&)>& change = {}) {
    static const bool quiet = [] {
      set_up_log("test", "error");
      return true;
    }();
    (void)quiet;
    settings.listen = {*Endpoint::parse("127.0.0.1:0", 0)};
    settings.ingest = settings.read = {*Prefix::parse("127.0.0.0/8")};
    settings.store.dir = dir.path / "store";
    settings.store.min_free = 0;
    settings.store.name = "recorder-a";
    settings.shutdown_timeout = milliseconds{500};
    if (change) change(settings);
    start();
  }
  ~Recorder() { stop(); }
  void start() {
    server = std::make_unique<node::Server>(io, settings);
    const auto started = server->start();
    INFO((started ? "" : started.error().doing));
    REQUIRE(started);
  }
  void stop() {
    if (!server) return;
    bool stopped = false;
    server->stop([&] { stopped = true; });
    until([&] { return stopped; });
    server.reset();
    run_for(20);
  }
  void restart() {
    stop();
    start();
  }
  Endpoint endpoint() const { return server->listening().at(0); }
  fs::path file(const Id& id, const std::string& extension) const {
    for (const auto& e : fs::recursive_directory_iterator{settings.store.dir})
      if (e.path().filename() == id.text() + extension) return e.path();
    return {};
  }
};

}  // namespace recorder_node_test
