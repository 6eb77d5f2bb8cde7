#include "recorder/wire/http2.h"

#include <nghttp2/nghttp2.h>

#include <boost/asio/bind_executor.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/write.hpp>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <map>

namespace postern::recorder::wire {

namespace asio = boost::asio;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;

namespace {

constexpr std::size_t read_size = 128 * 1024;
constexpr std::size_t write_size = 256 * 1024;

struct Freed {
  void operator()(nghttp2_session* s) const { nghttp2_session_del(s); }
  void operator()(nghttp2_option* o) const { nghttp2_option_del(o); }
  void operator()(nghttp2_session_callbacks* c) const { nghttp2_session_callbacks_del(c); }
};

nghttp2_nv field(const std::string& name, const std::string& value) {
  // nghttp2 copies both (no NO_COPY flags).
  auto bytes = [](const std::string& s) { return reinterpret_cast<std::uint8_t*>(const_cast<char*>(s.data())); };
  return {bytes(name), bytes(value), name.size(), value.size(), NGHTTP2_NV_FLAG_NONE};
}

}  // namespace

struct Http2Connection::Impl {
  Impl(Socket s, const Http2Options& o, bool server) : socket{std::move(s)}, options{o}, is_server{server}, timer{socket.get_executor()} {}

  Socket socket;
  Http2Options options;
  bool is_server;
  std::unique_ptr<nghttp2_session, Freed> session;
  std::map<std::int32_t, std::shared_ptr<Http2Stream>> streams;
  std::vector<std::uint8_t> in = std::vector<std::uint8_t>(read_size);
  std::vector<std::uint8_t> out;
  std::vector<std::shared_ptr<Http2Stream>> drained;
  bool writing = false, flush_posted = false, settled = false;
  std::string why;
  asio::steady_timer timer;
  bool ping_out = false;
  Clock::time_point last_ping = Clock::now(), last_read = Clock::now();

  std::shared_ptr<Http2Stream> find(std::int32_t id) const {
    const auto it = streams.find(id);
    return it == streams.end() ? nullptr : it->second;
  }

  // ---- nghttp2's callbacks. `user` = the connection. They may submit and consume, never receive or send.
  static Http2Connection& of(void* user) { return *static_cast<Http2Connection*>(user); }

  static int on_begin_headers(nghttp2_session*, const nghttp2_frame* frame, void* user) {
    auto& c = of(user);
    if (!c.impl_->is_server || frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
    auto stream = std::make_shared<Http2Stream>();
    stream->connection_ = &c;
    stream->id_ = frame->hd.stream_id;
    c.impl_->streams.emplace(stream->id_, stream);
    return 0;
  }

  static int on_header(nghttp2_session*, const nghttp2_frame* frame, const std::uint8_t* name, std::size_t name_size, const std::uint8_t* value,
                       std::size_t value_size, std::uint8_t, void* user) {
    auto& c = of(user);
    const auto stream = c.impl_->find(frame->hd.stream_id);
    if (!stream || stream->headers_done_) return 0;  // trailers are of no use to us
    // What SETTINGS_MAX_HEADER_LIST_SIZE announces is advice (RFC 9113 section 6.5.2); this is the limit. 32 = its overhead a field.
    stream->header_bytes_ += name_size + value_size + 32;
    if (stream->header_bytes_ > c.impl_->options.max_header_list) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    const std::string_view key{reinterpret_cast<const char*>(name), name_size};
    std::string text{reinterpret_cast<const char*>(value), value_size};
    if (key == ":method") stream->method_ = std::move(text);
    else if (key == ":path") stream->path_ = std::move(text);
    else if (key == ":status") std::from_chars(text.data(), text.data() + text.size(), stream->status_);
    else stream->headers_.emplace_back(std::string{key}, std::move(text));
    return 0;
  }

  static int on_frame_recv(nghttp2_session*, const nghttp2_frame* frame, void* user) {
    auto& c = of(user);
    if (frame->hd.type == NGHTTP2_PING && (frame->hd.flags & NGHTTP2_FLAG_ACK)) {
      c.impl_->ping_out = false;
      if (std::exchange(c.stalled_, false) && c.handlers_.on_stalled) c.handlers_.on_stalled(false);
      return 0;
    }
    if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
    const auto stream = c.impl_->find(frame->hd.stream_id);
    if (!stream || c.closed_) return 0;
    if (frame->hd.type == NGHTTP2_HEADERS && !stream->headers_done_) {
      if (c.impl_->is_server) {
        stream->headers_done_ = true;
        stream->peer_ended_ = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
        if (c.handlers_.on_request) c.handlers_.on_request(stream);
      } else if (stream->status_ < 200) {  // an interim answer: the real one follows
        stream->headers_.clear();
        stream->header_bytes_ = 0;
        return 0;
      } else {
        stream->headers_done_ = true;
        if (stream->handlers_.on_headers) stream->handlers_.on_headers(stream->status_, stream->headers_);
      }
    }
    if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) {
      stream->peer_ended_ = true;
      if (!c.closed_ && stream->handlers_.on_end) stream->handlers_.on_end();
    }
    return 0;
  }

  static int on_data(nghttp2_session* session, std::uint8_t, std::int32_t id, const std::uint8_t* bytes, std::size_t size, void* user) {
    auto& c = of(user);
    const auto stream = c.impl_->find(id);
    if (!stream || c.closed_ || !stream->handlers_.on_data) {
      nghttp2_session_consume(session, id, size);
      return 0;
    }
    stream->unconsumed_ += size;
    stream->handlers_.on_data(std::as_bytes(std::span{bytes, size}));
    return 0;
  }

  static int on_frame_send(nghttp2_session* session, const nghttp2_frame* frame, void* user) {
    auto& c = of(user);
    if (!c.impl_->is_server || !(frame->hd.flags & NGHTTP2_FLAG_END_STREAM)) return 0;
    if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
    // The whole answer is out and the client still sends: tell it to stop (RFC 9113 section 8.1).
    if (const auto stream = c.impl_->find(frame->hd.stream_id); stream && !stream->peer_ended_)
      nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_NO_ERROR);
    return 0;
  }

  static int on_stream_close(nghttp2_session* session, std::int32_t id, std::uint32_t error, void* user) {
    auto& c = of(user);
    const auto it = c.impl_->streams.find(id);
    if (it == c.impl_->streams.end()) return 0;
    const auto stream = it->second;
    c.impl_->streams.erase(it);
    if (stream->unconsumed_ > 0) nghttp2_session_consume_connection(session, std::exchange(stream->unconsumed_, 0));
    close_stream(stream, error, error == NGHTTP2_REFUSED_STREAM);
    return 0;
  }

  static void close_stream(const std::shared_ptr<Http2Stream>& stream, std::uint32_t error, bool refused) {
    // Handlers often own their stream: they go, but later, because one of them may be running now.
    asio::post(stream->connection_->impl_->socket.get_executor(), [stream] { stream->handlers_ = {}; });
    stream->connection_ = nullptr;
    stream->out_.clear();
    stream->queued_ = 0;
    const auto on_close = stream->handlers_.on_close;
    if (on_close) on_close(error, refused);
  }

  static ssize_t read_body(nghttp2_session*, std::int32_t id, std::uint8_t* into, std::size_t room, std::uint32_t* flags, nghttp2_data_source*,
                           void* user) {
    auto& c = of(user);
    const auto stream = c.impl_->find(id);
    if (!stream) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    std::size_t done = 0;
    while (done < room && !stream->out_.empty()) {
      const std::string& front = stream->out_.front();
      const std::size_t n = std::min(room - done, front.size() - stream->out_at_);
      std::memcpy(into + done, front.data() + stream->out_at_, n);
      done += n;
      stream->out_at_ += n;
      if (stream->out_at_ == front.size()) {
        stream->out_.pop_front();
        stream->out_at_ = 0;
      }
    }
    stream->queued_ -= done;
    if (stream->waiting_drain_ && stream->queued_ <= Http2Stream::low_water) {
      stream->waiting_drain_ = false;
      c.impl_->drained.push_back(stream);
    }
    if (stream->queued_ == 0 && stream->finish_) *flags |= NGHTTP2_DATA_FLAG_EOF;
    else if (done == 0) return NGHTTP2_ERR_DEFERRED;
    return static_cast<ssize_t>(done);
  }

  static ssize_t body_length(nghttp2_session*, std::uint8_t, std::int32_t, std::int32_t session_window, std::int32_t stream_window,
                             std::uint32_t max_frame, void* user) {
    const auto most = std::min<std::uint32_t>(max_frame, of(user).impl_->options.max_frame_size);
    return std::min({session_window, stream_window, static_cast<std::int32_t>(most)});
  }

  nghttp2_data_provider body(bool none) const {
    nghttp2_data_provider p{};
    if (!none) p.read_callback = read_body;
    return p;
  }
};

// ---- stream

void Http2Stream::respond(int status, const HeaderList& headers, bool end) {
  if (!connection_ || responded_) return;
  responded_ = true;
  if (end) finish_ = true;
  const std::string name = ":status", text = std::to_string(status);
  std::vector<nghttp2_nv> fields{field(name, text)};
  for (const auto& [key, value] : headers) fields.push_back(field(key, value));
  const auto body = connection_->impl_->body(end);
  nghttp2_submit_response(connection_->impl_->session.get(), id_, fields.data(), fields.size(), end ? nullptr : &body);
  connection_->flush();
}

void Http2Stream::write(std::string bytes) {
  if (!connection_ || finish_ || bytes.empty()) return;
  queued_ += bytes.size();
  out_.push_back(std::move(bytes));
  if (queued_ > low_water) waiting_drain_ = true;
  nghttp2_session_resume_data(connection_->impl_->session.get(), id_);  // not deferred: an error that does not matter
  connection_->flush();
}

void Http2Stream::finish() {
  if (!connection_ || finish_) return;
  finish_ = true;
  nghttp2_session_resume_data(connection_->impl_->session.get(), id_);
  connection_->flush();
}

void Http2Stream::reset(std::uint32_t error) {
  if (!connection_) return;
  out_.clear();
  queued_ = 0;
  nghttp2_submit_rst_stream(connection_->impl_->session.get(), NGHTTP2_FLAG_NONE, id_, error);
  connection_->flush();
}

void Http2Stream::consume(std::size_t bytes) {
  if (!connection_) return;
  bytes = std::min(bytes, unconsumed_);
  if (bytes == 0) return;
  unconsumed_ -= bytes;
  nghttp2_session_consume(connection_->impl_->session.get(), id_, bytes);
  connection_->flush();
}

// ---- connection

Http2Connection::Http2Connection(Socket socket, const Http2Options& options, Handlers handlers, bool is_server)
    : impl_{std::make_unique<Impl>(std::move(socket), options, is_server)}, handlers_{std::move(handlers)} {
  error_code ec;
  const auto remote = impl_->socket.remote_endpoint(ec);
  if (!ec) peer_ = from_asio(remote);
  impl_->socket.set_option(asio::ip::tcp::no_delay{true}, ec);

  nghttp2_session_callbacks* raw = nullptr;
  if (nghttp2_session_callbacks_new(&raw) != 0) throw std::bad_alloc{};
  const std::unique_ptr<nghttp2_session_callbacks, Freed> callbacks{raw};
  nghttp2_session_callbacks_set_on_begin_headers_callback(raw, Impl::on_begin_headers);
  nghttp2_session_callbacks_set_on_header_callback(raw, Impl::on_header);
  nghttp2_session_callbacks_set_on_frame_recv_callback(raw, Impl::on_frame_recv);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(raw, Impl::on_data);
  nghttp2_session_callbacks_set_on_frame_send_callback(raw, Impl::on_frame_send);
  nghttp2_session_callbacks_set_on_stream_close_callback(raw, Impl::on_stream_close);
  nghttp2_session_callbacks_set_data_source_read_length_callback(raw, Impl::body_length);

  nghttp2_option* raw_option = nullptr;
  if (nghttp2_option_new(&raw_option) != 0) throw std::bad_alloc{};
  const std::unique_ptr<nghttp2_option, Freed> option{raw_option};
  nghttp2_option_set_no_auto_window_update(raw_option, 1);
  nghttp2_option_set_peer_max_concurrent_streams(raw_option, 4096);  // until its SETTINGS arrive
  nghttp2_option_set_stream_reset_rate_limit(raw_option, options.reset_burst, options.reset_rate);

  nghttp2_session* session = nullptr;
  const int rc = is_server ? nghttp2_session_server_new2(&session, raw, this, raw_option) : nghttp2_session_client_new2(&session, raw, this, raw_option);
  if (rc != 0) throw std::bad_alloc{};
  impl_->session.reset(session);

  std::vector<nghttp2_settings_entry> settings{{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, options.stream_window},
                                               {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, options.max_frame_size},
                                               {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, options.max_header_list}};
  if (is_server) settings.push_back({NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, options.max_concurrent_streams});
  else settings.push_back({NGHTTP2_SETTINGS_ENABLE_PUSH, 0});
  nghttp2_submit_settings(session, NGHTTP2_FLAG_NONE, settings.data(), settings.size());
  nghttp2_session_set_local_window_size(session, NGHTTP2_FLAG_NONE, 0, static_cast<std::int32_t>(options.connection_window));
}

Http2Connection::~Http2Connection() {
  for (auto& [id, stream] : impl_->streams) stream->connection_ = nullptr;
}

std::shared_ptr<Http2Connection> Http2Connection::server(Socket socket, const Http2Options& options, Handlers handlers, std::string_view received) {
  const std::shared_ptr<Http2Connection> c{new Http2Connection{std::move(socket), options, std::move(handlers), true}};
  c->start(received);
  return c;
}

std::shared_ptr<Http2Connection> Http2Connection::client(Socket socket, const Http2Options& options, Handlers handlers) {
  const std::shared_ptr<Http2Connection> c{new Http2Connection{std::move(socket), options, std::move(handlers), false}};
  c->start({});
  return c;
}

void Http2Connection::start(std::string_view received) {
  // From the event loop: whoever made us has not stored the pointer yet.
  asio::post(impl_->socket.get_executor(), [self = shared_from_this(), text = std::string{received}] {
    if (self->closed_) return;
    if (!text.empty()) self->receive({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
    if (self->closed_) return;
    self->read_some();
    self->tick();
  });
  flush();
}

std::shared_ptr<Http2Stream> Http2Connection::request(const std::string& method, const std::string& path, const HeaderList& headers, bool end,
                                                      Http2Stream::Handlers handlers) {
  if (closed_ || impl_->is_server || !nghttp2_session_check_request_allowed(impl_->session.get())) return nullptr;
  const std::pair<std::string, std::string> first[] = {
      {":method", method}, {":scheme", "http"}, {":authority", peer_.text()}, {":path", path}};
  std::vector<nghttp2_nv> fields;
  for (const auto& [key, value] : first) fields.push_back(field(key, value));
  for (const auto& [key, value] : headers) fields.push_back(field(key, value));
  const auto body = impl_->body(end);
  const auto id = nghttp2_submit_request(impl_->session.get(), nullptr, fields.data(), fields.size(), end ? nullptr : &body, nullptr);
  if (id < 0) return nullptr;
  auto stream = std::make_shared<Http2Stream>();
  stream->connection_ = this;
  stream->id_ = id;
  stream->method_ = method;
  stream->path_ = path;
  stream->finish_ = end;
  stream->handlers_ = std::move(handlers);
  impl_->streams.emplace(id, stream);
  flush();
  return stream;
}

void Http2Connection::shut_down() {
  if (closed_) return;
  nghttp2_submit_goaway(impl_->session.get(), NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(impl_->session.get()), NGHTTP2_NO_ERROR,
                        nullptr, 0);
  flush();
}

void Http2Connection::close(const std::string& why) {
  if (closed_) return;
  closed_ = true;
  impl_->why = why;
  error_code ignored;
  impl_->timer.cancel();
  impl_->socket.close(ignored);
  asio::post(impl_->socket.get_executor(), [self = shared_from_this()] { self->settle(); });
}

void Http2Connection::settle() {
  if (std::exchange(impl_->settled, true)) return;
  auto streams = std::exchange(impl_->streams, {});
  for (auto& [id, stream] : streams) Impl::close_stream(stream, NGHTTP2_CANCEL, false);
  const auto handlers = std::exchange(handlers_, {});
  if (handlers.on_close) handlers.on_close(impl_->why);
}

std::size_t Http2Connection::streams() const noexcept { return impl_->streams.size(); }

void Http2Connection::receive(std::span<const std::uint8_t> bytes) {
  const ssize_t n = nghttp2_session_mem_recv(impl_->session.get(), bytes.data(), bytes.size());
  if (closed_) return;
  if (n < 0) {
    close(std::string{"protocol error: "} + nghttp2_strerror(static_cast<int>(n)));
    return;
  }
  flush();
}

void Http2Connection::read_some() {
  impl_->socket.async_read_some(asio::buffer(impl_->in), [self = shared_from_this()](const error_code& ec, std::size_t n) {
    if (self->closed_) return;
    if (ec) {
      self->close(ec == asio::error::eof ? "closed by the peer" : ec.message());
      return;
    }
    self->impl_->last_read = Clock::now();
    self->receive({self->impl_->in.data(), n});
    if (!self->closed_) self->read_some();
  });
}

void Http2Connection::flush() {
  if (closed_ || impl_->writing || impl_->flush_posted) return;
  impl_->flush_posted = true;
  asio::post(impl_->socket.get_executor(), [self = shared_from_this()] {
    self->impl_->flush_posted = false;
    self->write_some();
  });
}

void Http2Connection::write_some() {
  if (closed_ || impl_->writing) return;
  auto* session = impl_->session.get();
  impl_->out.clear();
  while (impl_->out.size() < write_size) {
    const std::uint8_t* bytes = nullptr;
    const ssize_t n = nghttp2_session_mem_send(session, &bytes);
    if (n < 0) return close(std::string{"sending: "} + nghttp2_strerror(static_cast<int>(n)));
    if (n == 0 || closed_) break;
    impl_->out.insert(impl_->out.end(), bytes, bytes + n);
  }
  // Handlers of who waited for room; they may write, so not from within nghttp2.
  for (const auto& stream : std::exchange(impl_->drained, {}))
    if (!closed_ && !stream->closed() && stream->handlers_.on_drain) stream->handlers_.on_drain();
  if (closed_) return;
  if (impl_->out.empty()) {
    if (!nghttp2_session_want_read(session) && !nghttp2_session_want_write(session)) close("done");
    return;
  }
  impl_->writing = true;
  asio::async_write(impl_->socket, asio::buffer(impl_->out), [self = shared_from_this()](const error_code& ec, std::size_t) {
    self->impl_->writing = false;
    if (self->closed_) return;
    if (ec) return self->close(ec.message());
    self->write_some();
  });
}

void Http2Connection::tick() {
  const auto& o = impl_->options;
  if (o.ping_interval.count() == 0 || closed_) return;
  const auto now = Clock::now();
  if (impl_->ping_out) {
    const auto silent = now - std::max(impl_->last_ping, impl_->last_read);
    if (silent >= o.peer_timeout) return close("no answer to PING");
    if (silent >= o.stall_timeout && !std::exchange(stalled_, true) && handlers_.on_stalled) handlers_.on_stalled(true);
    if (closed_) return;
  } else if (now - impl_->last_ping >= o.ping_interval) {
    impl_->ping_out = true;
    impl_->last_ping = now;
    nghttp2_submit_ping(impl_->session.get(), NGHTTP2_FLAG_NONE, nullptr);
    flush();
  }
  const auto period = std::max(std::chrono::milliseconds{10}, std::min({o.ping_interval, o.stall_timeout, o.peer_timeout}) / 2);
  impl_->timer.expires_after(period);
  impl_->timer.async_wait([self = shared_from_this()](const error_code& ec) {
    if (!ec) self->tick();
  });
}

// ---- TCP

asio::ip::tcp::endpoint to_asio(const Endpoint& e) {
  if (e.address.v4()) {
    asio::ip::address_v4::bytes_type bytes;
    std::copy_n(e.address.bytes().begin(), 4, bytes.begin());
    return {asio::ip::address_v4{bytes}, e.port};
  }
  asio::ip::address_v6::bytes_type bytes;
  std::copy_n(e.address.bytes().begin(), 16, bytes.begin());
  return {asio::ip::address_v6{bytes}, e.port};
}

Endpoint from_asio(const asio::ip::tcp::endpoint& e) {
  sockaddr_storage storage{};
  std::memcpy(&storage, e.data(), std::min<std::size_t>(e.size(), sizeof storage));
  return {Address::from(storage).value_or(Address{}), e.port()};
}

std::function<void()> connect_tcp(asio::io_context& io, const Endpoint& to, const std::optional<Address>& source,
                                  std::chrono::milliseconds timeout, std::function<void(Expected<asio::ip::tcp::socket>)> done) {
  struct Attempt {
    explicit Attempt(asio::io_context& context) : socket{context}, timer{context} {}
    asio::ip::tcp::socket socket;
    asio::steady_timer timer;
    std::function<void(Expected<asio::ip::tcp::socket>)> done;
    bool over = false;
    void finish(Expected<asio::ip::tcp::socket> result) {
      if (std::exchange(over, true)) return;
      timer.cancel();
      std::exchange(done, {})(std::move(result));
    }
  };
  auto attempt = std::make_shared<Attempt>(io);
  attempt->done = std::move(done);
  const std::string doing = "connect to " + to.text();
  const auto fail = [doing](const error_code& ec) { return Unexpected{Error{ec.value(), doing + ": " + ec.message()}}; };
  const auto target = to_asio(to);
  error_code ec;
  attempt->socket.open(target.protocol(), ec);
  if (!ec) attempt->socket.set_option(asio::ip::tcp::no_delay{true}, ec);
  if (!ec && source) attempt->socket.bind(to_asio(Endpoint{*source, 0}), ec);
  if (ec) {
    asio::post(io, [attempt, fail, ec] { attempt->finish(fail(ec)); });
  } else {
    attempt->timer.expires_after(timeout);
    attempt->timer.async_wait([attempt, doing](const error_code& e) {
      if (e || attempt->over) return;
      error_code ignored;
      attempt->socket.close(ignored);
      attempt->finish(Unexpected{Error{ETIMEDOUT, doing + ": no answer in time"}});
    });
    attempt->socket.async_connect(target, [attempt, fail](const error_code& e) {
      if (attempt->over) return;
      if (e) attempt->finish(fail(e));
      else attempt->finish(std::move(attempt->socket));
    });
  }
  return [attempt] {
    attempt->over = true;
    attempt->done = {};
    attempt->timer.cancel();
    error_code ignored;
    attempt->socket.close(ignored);
  };
}

}  // namespace postern::recorder::wire
