#include "recorder/relay/recorder_client.h"

#include "recorder/wire/http2.h"
#include "recorder/wire/messages.h"

#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <utility>

namespace postern::recorder::relay {

namespace asio = boost::asio;

namespace {

/// How long a recorder whose disk was full is not believed that it has room: its last health line may be older than the error.
constexpr auto full_hold = std::chrono::seconds{2};
constexpr auto seldom_backoff = std::chrono::seconds{30};
/// Our own loop stood still (a stopped process, a slow disk): that time is not the recorder's.
constexpr auto stood_still = std::chrono::milliseconds{300};

class StreamOfHttp2 final : public Upload::Stream {
 public:
  explicit StreamOfHttp2(std::shared_ptr<wire::Http2Stream> stream) : stream_{std::move(stream)} {}
  void send(std::string bytes) override { stream_->write(std::move(bytes)); }
  std::size_t unsent() const override { return stream_->queued(); }
  void finish() override { stream_->finish(); }
  void cancel() override {
    if (!stream_->closed()) stream_->reset();
  }

 private:
  std::shared_ptr<wire::Http2Stream> stream_;
};

std::string_view text(std::span<const std::byte> bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }

}  // namespace

struct RecorderClient::Impl : std::enable_shared_from_this<Impl> {
  Impl(asio::io_context& context, const Settings& s, Endpoint e, Handlers h)
      : io{context}, settings{s}, endpoint{e}, handlers{std::move(h)}, timer{context} {}

  enum class Told { nothing, up, closed, lost };

  asio::io_context& io;
  const Settings& settings;
  const Endpoint endpoint;
  Handlers handlers;
  asio::steady_timer timer;
  bool stopped = false;
  Wanted wanted = Wanted::now;
  std::function<void()> cancel_connect;
  std::shared_ptr<wire::Http2Connection> connection;
  std::shared_ptr<wire::Http2Stream> health;
  wire::LineReader lines;
  bool any_line = false;
  Clock::time_point last_line{}, last_tick = Clock::now(), hold_until{}, penalty_until{};
  bool accepting = false;
  Told told = Told::nothing;
  std::chrono::milliseconds backoff{0};
  bool waiting = false;  // the timer for the next connect runs

  bool up() const { return told == Told::up; }

  void drop() {
    if (cancel_connect) std::exchange(cancel_connect, {})();
    health.reset();
    if (connection) std::exchange(connection, nullptr)->close("given up");
    any_line = accepting = false;
  }

  void lost(const std::string& why) {
    const auto self = shared_from_this();
    drop();
    told = Told::lost;
    schedule();
    if (!stopped) handlers.lost(why);
  }

  void schedule() {
    if (stopped || wanted == Wanted::no || waiting) return;
    const auto longest = wanted == Wanted::seldom ? std::max<std::chrono::milliseconds>(settings.backoff_longest, seldom_backoff) : settings.backoff_longest;
    backoff = std::clamp(backoff * 2, settings.backoff_shortest, std::max(longest, settings.backoff_shortest));
    const auto now = Clock::now();
    timer.expires_at(std::max(now + backoff, penalty_until));
    waiting = true;
    timer.async_wait([self = shared_from_this()](boost::system::error_code ec) {
      if (ec || self->stopped) return;
      self->waiting = false;
      if (!self->connection && !self->cancel_connect) self->connect();
    });
  }

  void connect() {
    if (waiting) {
      waiting = false;
      timer.cancel();
    }
    cancel_connect = wire::connect_tcp(io, endpoint, settings.source, settings.connect_timeout,
                                       [self = shared_from_this()](Expected<asio::ip::tcp::socket> socket) {
                                         if (self->stopped) return;
                                         self->cancel_connect = {};
                                         if (!socket) return self->lost(socket.error().doing);
                                         self->connected(std::move(*socket));
                                       });
  }

  void connected(asio::ip::tcp::socket socket) {
    // Handlers hold the client weakly and look whether theirs is still the connection: what an older one says late is nothing.
    std::weak_ptr<Impl> weak = shared_from_this();
    auto mine = std::make_shared<std::weak_ptr<wire::Http2Connection>>();
    const auto current = [weak, mine]() -> std::shared_ptr<Impl> {
      const auto self = weak.lock();
      const auto c = mine->lock();
      return self && !self->stopped && c && self->connection == c ? self : nullptr;
    };
    connection = wire::Http2Connection::client(std::move(socket), {}, {{}, {}, [current](const std::string& why) {
                                                                         if (const auto self = current()) self->lost(why);
                                                                       }});
    *mine = connection;
    last_line = Clock::now();
    lines = {};  // not in drop(), which may run inside feed()
    wire::Http2Stream::Handlers h;
    h.on_headers = [current](int status, const wire::HeaderList&) {
      if (const auto self = current(); self && status != 200) self->lost("health: status " + std::to_string(status));
    };
    h.on_data = [current](std::span<const std::byte> bytes) {
      const auto self = current();
      if (!self) return;
      if (self->health) self->health->consume(bytes.size());
      const auto fed = self->lines.feed(text(bytes), [&](std::string_view line) {
        self->on_health(line);
        return static_cast<bool>(current());
      });
      if (!fed && current()) self->lost("health: " + fed.error().doing);
    };
    h.on_close = [current](std::uint32_t error, bool) {
      if (const auto self = current()) self->lost("its health stream ended (HTTP/2 error " + std::to_string(error) + ")");
    };
    health = connection->request("GET", "/postern/v1/health", {}, true, std::move(h));
    if (!health) lost("no stream for health");
  }

  void on_health(std::string_view line) {
    const auto parsed = wire::parse_health(line);
    if (!parsed) return lost("health: " + parsed.error().doing);
    last_line = Clock::now();
    any_line = true;
    accepting = parsed->accepting;
    if (accepting && last_line < hold_until) return;
    if (accepting) {
      backoff = {};
      if (told == Told::up) return;
      told = Told::up;
      handlers.answering();
    } else if (parsed->reason == "disk_full") {
      full("its disk is full");
    } else if (told != Told::closed) {
      told = Told::closed;
      handlers.not_accepting();
    }
  }

  /// Lost to all recordings, but the connection stays for its health lines.
  void full(const std::string& why) {
    accepting = false;
    hold_until = Clock::now() + full_hold;
    if (told == Told::lost) return;
    told = Told::lost;
    handlers.lost(why);
  }
};

RecorderClient::RecorderClient(asio::io_context& io, const Settings& settings, Endpoint endpoint, Handlers handlers)
    : impl_{std::make_shared<Impl>(io, settings, endpoint, std::move(handlers))} {}

RecorderClient::~RecorderClient() {
  impl_->stopped = true;
  impl_->timer.cancel();
  impl_->drop();
}

bool RecorderClient::up() const { return impl_->up(); }

void RecorderClient::want(Wanted wanted) {
  auto& i = *impl_;
  if (i.wanted == wanted) return;
  const bool more = i.wanted == Wanted::seldom && wanted == Wanted::now;
  i.wanted = wanted;
  if (wanted == Wanted::no) {
    i.timer.cancel();
    i.waiting = false;
    if (i.connection || i.cancel_connect) i.lost("not needed any more");
    return;
  }
  if (more && i.waiting) {  // it may be waiting for half a minute
    i.timer.cancel();
    i.waiting = false;
    i.backoff = {};
  }
  if (!i.connection && !i.cancel_connect) i.schedule();
}

void RecorderClient::attempt() {
  auto& i = *impl_;
  const auto later = [&](auto what) {
    asio::post(i.io, [weak = std::weak_ptr{impl_}, what] {
      if (const auto self = weak.lock(); self && !self->stopped) what(*self);
    });
  };
  if (i.wanted == Wanted::no) i.wanted = Wanted::now;
  if (i.cancel_connect || (i.connection && !i.any_line)) return;  // its answer is on the way
  if (i.connection) {
    // Connected and lost for its full disk: the last line says what there is to know.
    return later([](Impl& self) {
      if (self.told == Impl::Told::up)
        self.handlers.answering();
      else if (self.told == Impl::Told::closed)
        self.handlers.not_accepting();
      else
        self.handlers.lost("its disk is full");
    });
  }
  if (Clock::now() < i.penalty_until) return later([](Impl& self) { self.handlers.lost("it hung a moment ago"); });
  i.connect();
}

void RecorderClient::upload(const std::shared_ptr<Upload>& upload) {
  auto& i = *impl_;
  const auto& meta = upload->entry().meta();
  const std::string path = "/postern/v1/recordings/" + meta.recording.text() + "?epoch=" + std::to_string(upload->epoch());
  const auto failed = [&](const std::string& why) {
    asio::post(i.io, [weak = std::weak_ptr{upload}, why] {
      if (const auto self = weak.lock()) self->on_over(why, true);
    });
  };
  if (!i.connection) return failed("no connection");
  std::weak_ptr<Upload> weak = upload;
  std::weak_ptr<Impl> weak_client = impl_;
  auto stream = std::make_shared<std::weak_ptr<wire::Http2Stream>>();
  wire::Http2Stream::Handlers h;
  h.on_headers = [weak](int status, const wire::HeaderList&) {
    if (const auto self = weak.lock()) self->on_status(status);
  };
  h.on_data = [weak, stream](std::span<const std::byte> bytes) {
    if (const auto s = stream->lock()) s->consume(bytes.size());
    if (const auto self = weak.lock()) self->on_data(text(bytes), Clock::now());
  };
  h.on_drain = [weak] {
    if (const auto self = weak.lock()) self->writable();
  };
  h.on_close = [weak, weak_client, connection = std::weak_ptr{i.connection}](std::uint32_t error, bool refused) {
    const auto client = weak_client.lock();
    if (!client || client->stopped) return;
    // A moment later: when it is the whole connection that ends, all its streams end first, and then `lost` speaks for them.
    asio::post(client->io, [weak, weak_client, connection, error, refused] {
      const auto c = weak_client.lock();
      const auto self = weak.lock();
      const auto same = connection.lock();
      if (!c || !self || !same || c->stopped || same->closed() || c->connection != same) return;
      self->on_over("the stream ended (HTTP/2 error " + std::to_string(error) + ")", refused);
    });
  };
  auto opened = i.connection->request("POST", path, {{"content-type", "application/octet-stream"}}, false, std::move(h));
  if (!opened) return failed("no stream");
  *stream = opened;
  upload->start(std::make_unique<StreamOfHttp2>(std::move(opened)), Clock::now());
}

void RecorderClient::moved(const Id& recording, const std::string& to, std::uint64_t epoch, std::function<void(const MovedAnswer&)> done) {
  auto& i = *impl_;
  struct Exchange {
    MovedAnswer answer;
    std::string body;
    std::weak_ptr<wire::Http2Stream> stream;
  };
  auto exchange = std::make_shared<Exchange>();
  const auto finish = [exchange, done = std::move(done)] {
    if (exchange->answer.status != 0 && exchange->answer.status != 200) {
      const auto error = wire::parse_error_body(exchange->body, exchange->answer.status);
      exchange->answer.code = wire::name(error.code);
      exchange->answer.epoch = error.epoch;
    }
    done(exchange->answer);
  };
  wire::Http2Stream::Handlers h;
  h.on_headers = [exchange](int status, const wire::HeaderList&) { exchange->answer.status = status; };
  h.on_data = [exchange](std::span<const std::byte> bytes) {
    if (const auto s = exchange->stream.lock()) s->consume(bytes.size());
    if (exchange->body.size() < wire::max_line) exchange->body += text(bytes);
  };
  h.on_close = [finish, weak = std::weak_ptr{impl_}](std::uint32_t, bool) {
    if (const auto self = weak.lock(); self && !self->stopped) finish();
  };
  auto stream = i.connection ? i.connection->request("POST", "/postern/v1/recordings/" + recording.text() + "/moved",
                                                     {{"content-type", "application/json"}}, false, std::move(h))
                             : nullptr;
  if (!stream) return asio::post(i.io, finish);
  exchange->stream = stream;
  stream->write(wire::format(wire::MovedNotice{to, epoch, ""}));
  stream->finish();
}

void RecorderClient::disk_full(const std::string& why) { impl_->full(why); }

void RecorderClient::hangs(const std::string& why) {
  impl_->penalty_until = Clock::now() + impl_->settings.penalty;
  impl_->lost(why);
}

void RecorderClient::tick(Clock::time_point now) {
  auto& i = *impl_;
  const auto late = now - i.last_tick;
  i.last_tick = now;
  if (!i.connection) return;
  if (late > stood_still) i.last_line = std::min(now, i.last_line + late);
  if (now - i.last_line > i.settings.lost_timeout) i.lost("no health line for " + std::to_string(i.settings.lost_timeout.count()) + " ms");
}

}  // namespace postern::recorder::relay
