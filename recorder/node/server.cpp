#include "recorder/node/server.h"

#include "base/log.h"
#include "recorder/node/upload.h"

#include <boost/asio/buffer.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ip/v6_only.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/write.hpp>

#include <netinet/in.h>
#include <sys/random.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <map>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

namespace postern::recorder::node {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;
using wire::Code;
using wire::ErrorLine;
using wire::Http2Connection;
using wire::Http2Stream;

namespace {

constexpr std::string_view preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
constexpr std::size_t request_limit = 16 * 1024;  // of an HTTP/1.1 head
constexpr std::size_t piece = 64 * 1024;          // of a body
constexpr std::string_view root = "/postern/v1/recordings";

bool allowed(const std::vector<Prefix>& prefixes, const Address& a) {
  return std::any_of(prefixes.begin(), prefixes.end(), [&](const Prefix& p) { return p.contains(a); });
}

/// What a path names. Nothing is decoded: no path of ours needs an escape, so one that has it is not ours.
struct Target {
  enum class Kind : std::uint8_t { none, health, list, recording, moved } kind = Kind::none;
  Id id;
  std::string query;

  std::optional<std::string_view> parameter(std::string_view name) const {
    std::string_view rest = query;
    while (!rest.empty()) {
      const auto end = std::min(rest.find('&'), rest.size());
      const auto pair = rest.substr(0, end);
      rest.remove_prefix(std::min(end + 1, rest.size()));
      if (const auto eq = pair.find('='); eq != std::string_view::npos && pair.substr(0, eq) == name) return pair.substr(eq + 1);
    }
    return std::nullopt;
  }
};

Target parse_target(std::string_view text) {
  Target out;
  if (const auto q = text.find('?'); q != std::string_view::npos) {
    out.query = text.substr(q + 1);
    text = text.substr(0, q);
  }
  if (text == "/postern/v1/health") {
    out.kind = Target::Kind::health;
  } else if (text == root) {
    out.kind = Target::Kind::list;
  } else if (text.starts_with(root) && text.substr(root.size()).starts_with('/')) {
    auto rest = text.substr(root.size() + 1);
    auto kind = Target::Kind::recording;
    if (rest.ends_with("/moved")) {
      kind = Target::Kind::moved;
      rest.remove_suffix(6);
    }
    if (const auto id = Id::parse(rest)) {
      out.id = *id;
      out.kind = kind;
    }
  }
  return out;
}

std::optional<std::uint64_t> parse_number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (ec != std::errc{} || end != text.data() + text.size() || value > wire::max_number) return std::nullopt;
  return value;
}

/// Where an answer's body comes from, piece by piece; the next one when the last one has gone out.
struct Body {
  virtual ~Body() = default;
  /// Calls back in the server's thread: a piece, empty at the end, or an error (then the rest is not to be had).
  virtual void next(std::function<void(Expected<std::string>)> done) = 0;
};

/// What to answer to a GET or HEAD, whatever the HTTP version.
struct Answer {
  int status = 200;
  wire::HeaderList headers;
  std::optional<std::uint64_t> length;
  std::shared_ptr<Body> body;  // none: `text`
  std::string text;
};

Answer error_answer(const ErrorLine& error) {
  Answer out;
  out.status = wire::http_status(error.code);
  out.text = wire::format(error);
  out.headers = {{"content-type", "application/jsonl"}};
  out.length = out.text.size();
  return out;
}

struct ListBody : Body {
  ListBody(asio::io_context& context, std::vector<Copy> c) : io{context}, copies{std::move(c)} {}
  asio::io_context& io;
  std::vector<Copy> copies;
  std::size_t at = 0;
  void next(std::function<void(Expected<std::string>)> done) override {
    std::string out;
    while (at < copies.size() && out.size() < piece) out += copies[at++].line();
    asio::post(io, [done = std::move(done), out = std::move(out)]() mutable { done(std::move(out)); });
  }
};

struct FileBody : Body, std::enable_shared_from_this<FileBody> {
  FileBody(asio::io_context& context, asio::thread_pool& p, UniqueFd f, std::uint64_t n) : io{context}, pool{p}, file{std::move(f)}, length{n} {}
  asio::io_context& io;
  asio::thread_pool& pool;
  UniqueFd file;
  std::uint64_t length, at = 0;
  void next(std::function<void(Expected<std::string>)> done) override {
    asio::post(pool, [self = shared_from_this(), done = std::move(done)]() mutable {
      std::string out(static_cast<std::size_t>(std::min<std::uint64_t>(piece, self->length - self->at)), '\0');
      std::size_t have = 0;
      int error = 0;
      while (have < out.size()) {
        const ssize_t n = ::pread(self->file.get(), out.data() + have, out.size() - have, static_cast<off_t>(self->at + have));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
          error = n < 0 ? errno : EIO;
          break;
        }
        have += static_cast<std::size_t>(n);
      }
      self->at += have;
      asio::post(self->io, [done = std::move(done), out = std::move(out), error]() mutable {
        if (error != 0) done(Unexpected{system_error("read", error)});
        else done(std::move(out));
      });
    });
  }
};

}  // namespace

struct Server::Impl : std::enable_shared_from_this<Server::Impl> {
  /// A connection from accept to close.
  struct Client : std::enable_shared_from_this<Client> {
    Client(asio::io_context& io, tcp::socket s) : socket{std::move(s)}, timer{io} {}
    Endpoint peer;
    std::optional<tcp::socket> socket;  // until HTTP/2 takes it
    asio::steady_timer timer;
    std::string in, out;
    std::shared_ptr<Http2Connection> http2;
    std::string challenge;
    std::vector<std::weak_ptr<Upload>> uploads;
    bool gone = false;
  };
  using ClientPtr = std::shared_ptr<Client>;

  Impl(asio::io_context& i, Settings s)
      : io{i},
        settings{std::move(s)},
        store{settings.store, [&i](std::function<void()> f) { asio::post(i, std::move(f)); }, [this](const wire::HealthLine& line) { health(line); }},
        shutdown_timer{i},
        accept_timer{i} {}

  asio::io_context& io;
  Settings settings;
  Store store;
  asio::thread_pool readers{2};
  std::vector<std::unique_ptr<tcp::acceptor>> acceptors;
  std::set<ClientPtr> clients;
  std::map<Address, std::size_t> per_source;
  struct HealthStream {
    std::weak_ptr<Http2Stream> stream;
    std::string challenge;
  };
  std::vector<HealthStream> health_streams;
  asio::steady_timer shutdown_timer, accept_timer;
  std::function<void()> stopped;
  bool stopping = false;

  // ---- listening

  Expected<Done> listen() {
    for (const auto& endpoint : settings.listen) {
      auto acceptor = std::make_unique<tcp::acceptor>(io);
      const auto at = wire::to_asio(endpoint);
      error_code ec;
      acceptor->open(at.protocol(), ec);
      if (!ec) acceptor->set_option(tcp::acceptor::reuse_address{true}, ec);
      if (!ec && at.address().is_v6()) acceptor->set_option(asio::ip::v6_only{true}, ec);
      // An address that the network gives us later than systemd starts us (ip(7) IP_FREEBIND; IPV6_FREEBIND has the same effect).
      const int on = 1;
      if (!ec) ::setsockopt(acceptor->native_handle(), at.address().is_v6() ? IPPROTO_IPV6 : IPPROTO_IP, at.address().is_v6() ? IPV6_FREEBIND : IP_FREEBIND, &on, sizeof on);
      if (!ec) acceptor->bind(at, ec);
      if (!ec) acceptor->listen(1024, ec);
      if (ec) return Unexpected{Error{ec.value(), "listen on " + endpoint.text() + ": " + ec.message()}};
      acceptors.push_back(std::move(acceptor));
    }
    for (auto& acceptor : acceptors) accept(*acceptor);
    return Done{};
  }

  void accept(tcp::acceptor& acceptor) {
    acceptor.async_accept([self = shared_from_this(), &acceptor](const error_code& ec, tcp::socket socket) {
      if (self->stopping) return;
      if (ec) {
        spdlog::warn("event=accept_failed reason=\"{}\"", ec.message());
        // Out of descriptors: trying again at once would only spin.
        self->accept_timer.expires_after(std::chrono::milliseconds{100});
        self->accept_timer.async_wait([self, &acceptor](const error_code& e) {
          if (!e && !self->stopping) self->accept(acceptor);
        });
        return;
      }
      self->accepted(std::move(socket));
      self->accept(acceptor);
    });
  }

  void accepted(tcp::socket socket) {
    error_code ec;
    const auto remote = socket.remote_endpoint(ec);
    if (ec) return;
    const Endpoint peer = wire::from_asio(remote);
    auto& count = per_source[peer.address];
    if (clients.size() >= settings.connections || count >= settings.connections_per_source) {
      if (count == 0) per_source.erase(peer.address);
      spdlog::warn("event=connection_refused source={} connections={}", peer.text(), clients.size());
      return;
    }
    count++;
    socket.set_option(tcp::no_delay{true}, ec);
    auto client = std::make_shared<Client>(io, std::move(socket));
    client->peer = peer;
    clients.insert(client);
    client->timer.expires_after(settings.open_timeout);
    client->timer.async_wait([self = shared_from_this(), client](const error_code& e) {
      if (!e) self->drop(client);
    });
    sniff(client);
  }

  void drop(const ClientPtr& client) {
    if (std::exchange(client->gone, true)) return;
    client->timer.cancel();
    if (client->socket) {
      error_code ignored;
      client->socket->shutdown(tcp::socket::shutdown_both, ignored);
      client->socket->close(ignored);
    }
    if (client->http2) client->http2->close("dropped");
    clients.erase(client);
    if (const auto it = per_source.find(client->peer.address); it != per_source.end() && --it->second == 0) per_source.erase(it);
    if (stopping) look_done();
  }

  // ---- the first bytes: which HTTP

  void sniff(const ClientPtr& client) {
    const auto at = client->in.size();
    client->in.resize(at + 4096);
    client->socket->async_read_some(asio::buffer(client->in.data() + at, 4096), [self = shared_from_this(), client, at](const error_code& ec, std::size_t n) {
      client->in.resize(at + n);
      if (client->gone) return;
      if (ec) return self->drop(client);
      const std::string_view in = client->in;
      if (in.starts_with(preface)) return self->begin_http2(client);
      if (preface.starts_with(in)) return self->sniff(client);
      if (const auto end = in.find("\r\n\r\n"); end != std::string_view::npos) return self->http1(client, in.substr(0, end + 2));
      if (in.size() >= request_limit) return self->answer_http1(client, error_answer({"the request's head is too long", Code::too_large, 0}), false, true);
      self->sniff(client);
    });
  }

  // ---- HTTP/2

  void begin_http2(const ClientPtr& client) {
    client->timer.cancel();
    std::array<unsigned char, 32> random{};
    if (::getrandom(random.data(), random.size(), 0) != static_cast<ssize_t>(random.size())) return drop(client);
    constexpr char digits[] = "0123456789abcdef";
    for (const auto b : random) client->challenge += {digits[b >> 4], digits[b & 15]};
    auto socket = std::move(*client->socket);
    client->socket.reset();
    const std::weak_ptr<Client> weak = client;
    client->http2 = Http2Connection::server(std::move(socket), settings.http2,
                                            {.on_request =
                                                 [self = shared_from_this(), weak](const std::shared_ptr<Http2Stream>& stream) {
                                                   if (const auto c = weak.lock()) self->request(c, stream);
                                                 },
                                             .on_stalled =
                                                 [weak](bool stalled) {
                                                   const auto c = weak.lock();
                                                   if (!c) return;
                                                   spdlog::warn("event=relay_stalled source={} stalled={}", c->peer.text(), stalled);
                                                   for (const auto& u : c->uploads)
                                                     if (const auto upload = u.lock()) upload->stalled(stalled);
                                                 },
                                             .on_close =
                                                 [self = shared_from_this(), weak](const std::string& why) {
                                                   const auto c = weak.lock();
                                                   if (!c) return;
                                                   spdlog::debug("event=connection_closed source={} reason={}", c->peer.text(), postern::safe_quoted(why));
                                                   self->drop(c);
                                                 }},
                                            client->in);
    client->in = {};
  }

  void request(const ClientPtr& client, const std::shared_ptr<Http2Stream>& stream) {
    const Target target = parse_target(stream->path());
    const std::string& method = stream->method();
    const Address& source = client->peer.address;
    const bool may_upload = allowed(settings.ingest, source), may_read = allowed(settings.read, source);
    const auto refuse = [&](std::string text, Code code) {
      if (code == Code::not_allowed)
        spdlog::warn("event=not_allowed source={} method={} path={}", client->peer.text(), postern::safe_quoted(method, 16), postern::safe_quoted(stream->path(), 100));
      answer_error(*stream, {std::move(text), code, 0});
    };
    if (stopping) return refuse("this recorder is shutting down", Code::not_accepting);
    if (method == "GET" || method == "HEAD") {
      if (target.kind == Target::Kind::health) {
        if (!may_upload && !may_read) return refuse("not allowed", Code::not_allowed);
        stream->respond(200, {{"content-type", "application/jsonl"}}, method == "HEAD");
        if (method == "HEAD") return;
        health_streams.push_back({stream, client->challenge});
        return store.health_soon();
      }
      return get(client->peer, target, [self = shared_from_this(), stream, head = method == "HEAD"](Answer answer) {
        answer.headers.emplace_back("x-content-type-options", "nosniff");
        if (answer.length) answer.headers.emplace_back("content-length", std::to_string(*answer.length));
        stream->respond(answer.status, answer.headers, head);
        if (head) return;
        if (!answer.body) {
          stream->write(answer.text);
          return stream->finish();
        }
        self->pump(stream, answer.body);
      });
    }
    if (method != "POST" || (target.kind != Target::Kind::recording && target.kind != Target::Kind::moved)) return refuse("no such path or method", Code::not_found);
    if (!may_upload) return refuse("not allowed to upload", Code::not_allowed);
    if (target.kind == Target::Kind::moved) return moved(client, stream, target.id);
    const auto text = target.parameter("epoch");
    const auto epoch = text ? parse_number(*text) : std::nullopt;
    if (!epoch || *epoch == 0) return refuse("epoch: missing, or not a number above 0", Code::bad_request);
    std::erase_if(client->uploads, [](const auto& u) { return u.expired(); });
    client->uploads.push_back(Upload::begin(io, store, stream, target.id, *epoch, source, settings.open_timeout));
  }

  void moved(const ClientPtr& client, const std::shared_ptr<Http2Stream>& stream, const Id& id) {
    struct State {
      wire::LineReader lines;
      bool asked = false;
    };
    const auto state = std::make_shared<State>();
    const auto bad = [stream, state](const std::string& what) {
      if (!std::exchange(state->asked, true)) answer_error(*stream, {what, Code::bad_request, 0});
    };
    Http2Stream::Handlers handlers;
    handlers.on_data = [self = shared_from_this(), stream, state, bad, id, source = client->peer.address](std::span<const std::byte> bytes) {
      stream->consume(bytes.size());
      if (state->asked) return;
      const auto fed = state->lines.feed({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, [&](std::string_view line) {
        const auto notice = wire::parse_moved_notice(line);
        if (!notice) {
          bad(notice.error().doing);
          return false;
        }
        state->asked = true;
        self->store.moved(id, *notice, source, [stream](const Expected<wire::MovedAnswer, ErrorLine>& result) {
          if (!result) return answer_error(*stream, result.error());
          stream->respond(200, {{"content-type", "application/jsonl"}});
          stream->write(wire::format(*result));
          stream->finish();
        });
        return false;
      });
      if (!fed) bad(fed.error().doing);
    };
    handlers.on_end = [bad] { bad("no line"); };
    stream->set_handlers(std::move(handlers));
  }

  void pump(const std::shared_ptr<Http2Stream>& stream, const std::shared_ptr<Body>& body) {
    if (stream->closed()) return;
    body->next([self = shared_from_this(), stream, body](Expected<std::string> bytes) {
      if (stream->closed()) return;
      if (!bytes) return stream->reset(2);  // INTERNAL_ERROR: the reader must not take what it has for all
      if (bytes->empty()) return stream->finish();
      stream->write(std::move(*bytes));
      if (stream->queued() <= Http2Stream::low_water) return self->pump(stream, body);
      Http2Stream::Handlers handlers;
      handlers.on_drain = [self, weak = std::weak_ptr<Http2Stream>{stream}, body] {
        if (const auto s = weak.lock()) self->pump(s, body);
      };
      stream->set_handlers(std::move(handlers));
    });
  }

  void health(const wire::HealthLine& line) {
    std::erase_if(health_streams, [](const HealthStream& h) {
      const auto s = h.stream.lock();
      return !s || s->closed();
    });
    wire::HealthLine own = line;
    for (const auto& h : health_streams) {
      const auto stream = h.stream.lock();
      own.challenge = h.challenge;
      if (stream->queued() < Http2Stream::low_water) stream->write(wire::format(own));  // else it does not read them
    }
  }

  // ---- list and read, both HTTP versions

  void get(const Endpoint& peer, const Target& target, std::function<void(Answer)> done) {
    if (!allowed(settings.read, peer.address)) {
      spdlog::warn("event=not_allowed source={} method=GET", peer.text());
      return done(error_answer({"not allowed to read", Code::not_allowed, 0}));
    }
    if (target.kind == Target::Kind::list) {
      std::vector<Copy> copies;
      if (const auto id = target.parameter("id")) {
        const auto parsed = Id::parse(*id);
        if (!parsed) return done(error_answer({"id: not a recording id", Code::bad_request, 0}));
        if (auto copy = store.find(*parsed)) copies.push_back(std::move(*copy));
      } else {
        copies = store.list();
      }
      Answer answer;
      answer.headers = {{"content-type", "application/jsonl"}};
      answer.body = std::make_shared<ListBody>(io, std::move(copies));
      return done(std::move(answer));
    }
    if (target.kind != Target::Kind::recording) return done(error_answer({"no such path", Code::not_found, 0}));
    spdlog::info("event=recording_read recording={} source={}", target.id.text(), peer.text());
    asio::post(readers, [self = shared_from_this(), id = target.id, done = std::move(done)]() mutable {
      auto bytes = std::make_shared<std::optional<Store::Bytes>>(self->store.read(id));
      asio::post(self->io, [self, bytes, done = std::move(done)] {
        if (!*bytes) return done(error_answer({"no such recording", Code::not_found, 0}));
        const Copy& copy = (*bytes)->copy;
        Answer answer;
        answer.headers = {{"content-type", "application/x-asciicast"}, {"postern-state", std::string{name(copy.state)}}, {"postern-head", copy.head}};
        answer.length = copy.length;
        answer.body = std::make_shared<FileBody>(self->io, self->readers, std::move((*bytes)->file), copy.length);
        done(std::move(answer));
      });
    });
  }

  // ---- HTTP/1.1: one request a connection, GET and HEAD

  void http1(const ClientPtr& client, std::string_view head) {
    const auto refuse = [&](const std::string& what, Code code) { answer_http1(client, error_answer({what, code, 0}), false, true); };
    const auto line_end = head.find("\r\n");
    const std::string_view line = head.substr(0, line_end);
    const auto first = line.find(' '), second = line.rfind(' ');
    if (first == std::string_view::npos || first == second) return refuse("not an HTTP request", Code::bad_request);
    const std::string_view method = line.substr(0, first), target = line.substr(first + 1, second - first - 1), version = line.substr(second + 1);
    if (version != "HTTP/1.1" && version != "HTTP/1.0") return refuse("not an HTTP request", Code::bad_request);
    const bool one_one = version == "HTTP/1.1";
    std::optional<std::string> host;
    for (std::string_view rest = head.substr(line_end + 2); !rest.empty();) {
      const auto end = rest.find("\r\n");
      const std::string_view field = rest.substr(0, end);
      rest.remove_prefix(std::min(end + 2, rest.size()));
      const auto colon = field.find(':');
      if (colon == std::string_view::npos) return refuse("a header without a colon", Code::bad_request);
      std::string key{field.substr(0, colon)};
      std::transform(key.begin(), key.end(), key.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
      if (key != "host") continue;
      if (host) return refuse("two Host headers", Code::bad_request);
      std::string_view value = field.substr(colon + 1);
      while (!value.empty() && (value.front() == ' ' || value.front() == '\t')) value.remove_prefix(1);
      while (!value.empty() && (value.back() == ' ' || value.back() == '\t')) value.remove_suffix(1);
      host = std::string{value};
    }
    if (!host ? one_one : !good_host(*host)) return refuse("Host is not an address of this recorder (read.names)", Code::not_allowed);
    if (method != "GET" && method != "HEAD") return refuse("HTTP/2 only (with prior knowledge)", Code::bad_request);
    const Target parsed = parse_target(target);
    if (parsed.kind == Target::Kind::health) return refuse("HTTP/2 only (with prior knowledge)", Code::bad_request);
    get(client->peer, parsed, [self = shared_from_this(), client, is_head = method == "HEAD", one_one](Answer answer) {
      if (!client->gone) self->answer_http1(client, std::move(answer), is_head, one_one);
    });
  }

  /// A web page that rebinds its own name to our address sends that name here; a person who typed an address sends the address.
  bool good_host(std::string_view host) const {
    std::string_view name = host;
    if (name.starts_with('[')) {
      const auto end = name.find(']');
      return end != std::string_view::npos && Address::parse(name.substr(1, end - 1));
    }
    name = name.substr(0, name.rfind(':'));
    return Address::parse(name) || name == "localhost" || std::find(settings.names.begin(), settings.names.end(), name) != settings.names.end();
  }

  static std::string_view status_text(int status) {
    switch (status) {
      case 200: return "OK";
      case 400: return "Bad Request";
      case 403: return "Forbidden";
      case 404: return "Not Found";
      case 413: return "Content Too Large";
      case 503: return "Service Unavailable";
      default: return "Error";
    }
  }

  void answer_http1(const ClientPtr& client, Answer answer, bool head, bool chunks) {
    chunks = chunks && answer.body && !answer.length;
    std::string& out = client->out;
    out = "HTTP/1.1 " + std::to_string(answer.status) + " " + std::string{status_text(answer.status)} + "\r\n";
    for (const auto& [key, value] : answer.headers) out += key + ": " + value + "\r\n";
    out += "x-content-type-options: nosniff\r\ncontent-security-policy: default-src 'none'\r\ncross-origin-resource-policy: same-origin\r\n"
           "cache-control: no-store\r\nconnection: close\r\n";
    if (answer.length) out += "content-length: " + std::to_string(*answer.length) + "\r\n";
    if (chunks) out += "transfer-encoding: chunked\r\n";
    out += "\r\n";
    if (!head) out += answer.text;
    write_http1(client, head ? nullptr : answer.body, chunks);
  }

  void write_http1(const ClientPtr& client, const std::shared_ptr<Body>& body, bool chunks) {
    client->timer.expires_after(settings.http2.peer_timeout);  // one that does not read
    client->timer.async_wait([self = shared_from_this(), client](const error_code& e) {
      if (!e) self->drop(client);
    });
    asio::async_write(*client->socket, asio::buffer(client->out), [self = shared_from_this(), client, body, chunks](const error_code& ec, std::size_t) {
      if (client->gone) return;
      if (ec) return self->drop(client);
      if (!body) return self->linger(client);
      body->next([self, client, body, chunks](Expected<std::string> bytes) {
        if (client->gone) return;
        if (!bytes) return self->drop(client);  // cut short of its length, or without its last chunk
        const bool last = bytes->empty();
        if (last && !chunks) return self->linger(client);
        client->out = std::move(*bytes);
        if (chunks) {
          std::array<char, 20> size{};
          const auto end = std::to_chars(size.data(), size.data() + size.size(), client->out.size(), 16).ptr;
          client->out = std::string{size.data(), end} + "\r\n" + client->out + "\r\n";
        }
        self->write_http1(client, last ? nullptr : body, chunks);
      });
    });
  }

  /// Closing with unread bytes in the receive buffer would send a reset that can overtake the answer (RFC 9112 section 9.6).
  void linger(const ClientPtr& client) {
    error_code ignored;
    client->socket->shutdown(tcp::socket::shutdown_send, ignored);
    client->timer.expires_after(std::chrono::seconds{1});
    client->timer.async_wait([self = shared_from_this(), client](const error_code& e) {
      if (!e) self->drop(client);
    });
    drain(client);
  }
  void drain(const ClientPtr& client) {
    client->in.resize(4096);
    client->socket->async_read_some(asio::buffer(client->in), [self = shared_from_this(), client](const error_code& ec, std::size_t) {
      if (client->gone) return;
      if (ec) return self->drop(client);
      self->drain(client);
    });
  }

  // ---- the end

  void stop(std::function<void()> done) {
    if (std::exchange(stopping, true)) return;
    stopped = std::move(done);
    accept_timer.cancel();
    error_code ignored;
    for (auto& a : acceptors) a->close(ignored);
    store.stop([self = shared_from_this()] {
      // Every upload has had its last line; they may need a moment to be sent.
      for (const auto& c : std::set{self->clients})
        if (c->http2) {
          c->http2->shut_down();
          for (const auto& h : self->health_streams)
            if (const auto s = h.stream.lock()) s->finish();
        } else {
          self->drop(c);
        }
      self->shutdown_timer.expires_after(self->settings.shutdown_timeout);
      self->shutdown_timer.async_wait([self](const error_code& ec) {
        if (!ec) self->finish();
      });
      self->look_done();
    });
  }
  void look_done() {
    if (clients.empty()) finish();
  }
  void finish() {
    shutdown_timer.cancel();
    for (const auto& c : std::set{clients}) drop(c);
    if (auto done = std::exchange(stopped, {})) asio::post(io, std::move(done));
  }
};

Server::Server(boost::asio::io_context& io, Settings settings) : impl_{std::make_shared<Impl>(io, std::move(settings))} {}

Server::~Server() {
  impl_->stopping = true;
  impl_->accept_timer.cancel();
  error_code ignored;
  for (auto& a : impl_->acceptors) a->close(ignored);
  for (const auto& c : std::set{impl_->clients}) impl_->drop(c);
  impl_->readers.join();
}

Expected<Done> Server::start() {
  if (auto started = impl_->store.start(); !started) return started;
  return impl_->listen();
}

std::vector<Endpoint> Server::listening() const {
  std::vector<Endpoint> out;
  for (const auto& a : impl_->acceptors) {
    error_code ec;
    if (const auto at = a->local_endpoint(ec); !ec) out.push_back(wire::from_asio(at));
  }
  return out;
}

void Server::reload(const Settings& settings) {
  impl_->settings.ingest = settings.ingest;
  impl_->settings.read = settings.read;
  impl_->settings.names = settings.names;
  for (const auto& c : std::set{impl_->clients})
    if (!allowed(settings.ingest, c->peer.address) && !allowed(settings.read, c->peer.address)) impl_->drop(c);
}

void Server::stop(std::function<void()> stopped) { impl_->stop(std::move(stopped)); }
Store& Server::store() { return impl_->store; }

}  // namespace postern::recorder::node
