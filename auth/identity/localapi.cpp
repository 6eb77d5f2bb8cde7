#include "auth/identity/localapi.h"

#include <boost/asio/buffer.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <sys/un.h>
#include <utility>

namespace postern::auth::identity {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

namespace {

constexpr std::uint32_t max_header_bytes = 8 * 1024;
constexpr std::size_t read_bytes = 64 * 1024;
/// What the parser may leave for the next read: a header or a chunk's size line, not yet whole.
constexpr std::size_t max_unparsed_bytes = 16 * 1024;

/// tailscaled refuses a foreign Host, and any Referer or Origin (ipn/localapi/localapi.go).
std::string head_of(const std::string& target) {
  return "GET " + target + " HTTP/1.1\r\nHost: local-tailscaled.sock\r\n\r\n";
}

Error away(const std::string& doing) {
  return Error{EAGAIN, doing};
}

/// http::string_body, but it takes no memory on the word of a Content-Length: Beast (1.74) would reserve that before it looks at the limit.
struct GrowingBody {
  using value_type = std::string;
  class reader {
   public:
    template <bool request, class Fields>
    explicit reader(http::header<request, Fields>&, value_type& body) : body_{body} {}
    void init(const boost::optional<std::uint64_t>&, error_code& ec) { ec = {}; }
    template <class Buffers>
    std::size_t put(const Buffers& buffers, error_code& ec) {
      ec = {};
      std::size_t taken = 0;
      for (auto it = asio::buffer_sequence_begin(buffers); it != asio::buffer_sequence_end(buffers); ++it) {
        const asio::const_buffer part{*it};
        body_.append(static_cast<const char*>(part.data()), part.size());
        taken += part.size();
      }
      return taken;
    }
    void finish(error_code& ec) { ec = {}; }

   private:
    value_type& body_;
  };
};

/// A response, fed as it comes.
class Response {
 public:
  explicit Response(std::optional<std::size_t> limit) : limit_{limit} {
    parser_.header_limit(max_header_bytes);
    if (limit) parser_.body_limit(*limit);
    else parser_.body_limit(boost::none);
    parser_.eager(true);
  }
  /// Nothing, or why this is no HTTP.
  std::string put(const char* data, std::size_t size) {
    rest_.append(data, size);
    while (!rest_.empty() && !parser_.is_done()) {
      error_code ec;
      const std::size_t used = parser_.put(asio::buffer(rest_), ec);
      rest_.erase(0, used);
      if (ec == http::error::need_more) break;
      // Beast's own limit lets through what came together with the header (1.74).
      too_long_ = ec == http::error::body_limit || (limit_ && body().size() > *limit_);
      if (too_long_) return "more than " + std::to_string(limit_.value_or(0)) + " bytes";
      if (ec) return ec.message();
      if (used == 0) break;
    }
    return rest_.size() > max_unparsed_bytes && !parser_.is_done() ? "a line without an end" : "";
  }
  /// The other end closed: true where that ends the body (RFC 9112, 6.3, number 8).
  bool put_end() {
    if (!parser_.got_some()) return false;
    error_code ec;
    parser_.put_eof(ec);
    return !ec && parser_.is_done();
  }
  bool too_long() const { return too_long_; }
  bool begun() const { return !rest_.empty() || parser_.got_some(); }
  bool has_header() const { return parser_.is_header_done(); }
  bool done() const { return parser_.is_done(); }
  bool may_follow() const { return rest_.empty() && parser_.keep_alive(); }
  unsigned status() const { return parser_.get().result_int(); }
  std::string& body() { return parser_.get().body(); }

 private:
  const std::optional<std::size_t> limit_;
  http::response_parser<GrowingBody> parser_;
  std::string rest_;
  bool too_long_ = false;
};

std::optional<uid_t> user_at_other_end(int socket) {
  ucred other{};
  socklen_t size = sizeof other;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &other, &size) != 0) return std::nullopt;
  return other.uid;
}

std::optional<asio::local::stream_protocol::endpoint> endpoint_of(const std::string& socket) {
  if (socket.empty() || socket.size() >= sizeof(sockaddr_un::sun_path)) return std::nullopt;
  return asio::local::stream_protocol::endpoint{socket};
}

}  // namespace

/// One question at a time. Lives by its handlers; `owner_` is null once nobody wants to hear of it.
class LocalApi::Connection : public std::enable_shared_from_this<LocalApi::Connection> {
 public:
  explicit Connection(LocalApi& owner) : owner_{&owner}, socket_{owner.io_}, timer_{owner.io_}, buffer_(read_bytes) {}

  bool busy() const { return question_.has_value(); }
  bool dead() const { return dead_; }
  void leave() {
    owner_ = nullptr;
    close();
  }

  void ask(Question question) {
    question_ = std::move(question);
    response_.emplace(question_->limit);
    timer_.expires_after(owner_->timeout_);
    timer_.async_wait([self = shared_from_this(), n = ++number_](error_code ec) {
      if (!ec && self->owner_ != nullptr && self->number_ == n && self->question_) self->fail("no answer within " + std::to_string(self->owner_->timeout_.count()) + " ms");
    });
    reused_ = connected_;
    if (!connected_) return connect();
    // Whatever is there already answers no question of ours, and at its end nothing will be answered.
    char c = 0;
    if (::recv(socket_.native_handle(), &c, 1, MSG_PEEK | MSG_DONTWAIT) >= 0 || errno != EAGAIN) return renew();
    send();
  }

 private:
  void connect() {
    const auto endpoint = endpoint_of(owner_->socket_);
    if (!endpoint) {
      return asio::post(owner_->io_, [self = shared_from_this(), n = number_] {
        if (self->owner_ != nullptr && self->number_ == n && self->question_) self->fail("its path is no socket's");
      });
    }
    socket_.async_connect(*endpoint, [self = shared_from_this(), n = number_](error_code ec) {
      if (self->owner_ == nullptr || self->number_ != n || !self->question_) return;
      if (ec) return self->fail(ec.message());
      self->connected_ = true;
      self->owner_->peer_user_ = user_at_other_end(self->socket_.native_handle());
      self->read();
      self->send();
    });
  }

  void send() {
    out_ = head_of(question_->target);
    asio::async_write(socket_, asio::buffer(out_), [self = shared_from_this(), n = number_](error_code ec, std::size_t) {
      // An answer may be there in spite of it; the reader sees the end if not.
      if (ec && self->owner_ != nullptr && self->number_ == n && self->question_ && !self->response_->begun()) self->lost(ec.message());
    });
  }

  /// One read is always pending: on a quiet connection it tells that tailscaled closed it, or talks without being asked.
  void read() {
    socket_.async_read_some(asio::buffer(buffer_), [self = shared_from_this(), g = generation_](error_code ec, std::size_t n) {
      if (self->owner_ == nullptr || self->generation_ != g) return;
      if (!self->question_) return self->drop();
      if (ec) return self->response_->put_end() ? self->complete() : self->lost(ec == asio::error::eof ? "it closed the connection" : ec.message());
      if (const std::string wrong = self->response_->put(self->buffer_.data(), n); !wrong.empty()) return self->fail("no answer of its kind: " + wrong, self->response_->too_long() ? E2BIG : EAGAIN);
      if (self->response_->done()) return self->complete();
      self->read();
    });
  }

  /// A kept connection that was closed as we wrote is no fault: once more, on a new one.
  void lost(const std::string& why) {
    if (!reused_ || response_->begun()) return fail(why);
    renew();
  }
  void renew() {
    close();
    dead_ = false;
    reused_ = false;
    socket_ = asio::local::stream_protocol::socket{owner_->io_};
    response_.emplace(question_->limit);
    connect();
  }

  void complete() {
    Answer answer{response_->status(), std::move(response_->body())};
    if (response_->may_follow()) read();
    else close();
    owner_->last_answer_ = Clock::now();
    finish(std::move(answer));
  }
  void fail(const std::string& why, int code = EAGAIN) {
    close();
    finish(Unexpected{Error{code, "asking tailscaled for " + question_->target.substr(0, question_->target.find('?')) + ": " + why}});
  }
  /// The callback may do anything, also destroy the owner: hence last, but for what the owner does then.
  void finish(Expected<Answer> answer) {
    const auto self = shared_from_this();
    LocalApi* const owner = owner_;
    const auto alive = owner_->alive_;
    timer_.cancel();
    number_++;
    auto call = std::move(question_->answer);
    question_.reset();
    if (dead_) drop();
    call(std::move(answer));
    if (*alive) owner->pump();
  }
  void close() {
    error_code ignored;
    socket_.close(ignored);
    generation_++;
    connected_ = false;
    dead_ = true;
  }
  /// Off the list.
  void drop() {
    const auto self = shared_from_this();
    if (!dead_) close();
    auto& all = owner_->connections_;
    all.erase(std::remove(all.begin(), all.end(), self), all.end());
    owner_ = nullptr;
  }

  LocalApi* owner_;
  asio::local::stream_protocol::socket socket_;
  asio::steady_timer timer_;
  std::vector<char> buffer_;
  std::string out_;
  std::optional<Question> question_;
  std::optional<Response> response_;
  std::uint64_t number_ = 0;      ///< of the question: late handlers of an earlier one do nothing
  std::uint64_t generation_ = 0;  ///< of the socket
  bool connected_ = false;
  bool reused_ = false;
  bool dead_ = false;
};

LocalApi::LocalApi(asio::io_context& io, std::string socket, std::chrono::milliseconds timeout)
    : io_{io}, socket_{std::move(socket)}, timeout_{timeout}, sweep_timer_{io} {}

LocalApi::~LocalApi() {
  *alive_ = false;
  for (const auto& c : connections_) c->leave();
}

void LocalApi::fail_later(Question question, std::string doing) {
  asio::post(io_, [alive = alive_, call = std::move(question.answer), error = away(doing)]() mutable {
    if (*alive) call(Unexpected{std::move(error)});
  });
}

void LocalApi::ask(Question question) {
  if (waiting_.size() >= max_localapi_waiting) return fail_later(std::move(question), "asking tailscaled: " + std::to_string(max_localapi_waiting) + " questions wait already");
  Waiting waiting{std::move(question), Clock::now()};
  if (waiting.question.first) waiting_.push_front(std::move(waiting));
  else waiting_.push_back(std::move(waiting));
  pump();
}

void LocalApi::pump() {
  while (!waiting_.empty()) {
    auto idle = std::find_if(connections_.begin(), connections_.end(), [](const auto& c) { return !c->busy() && !c->dead(); });
    if (idle == connections_.end()) {
      if (connections_.size() >= max_localapi_connections) break;
      connections_.push_back(std::make_shared<Connection>(*this));
      idle = std::prev(connections_.end());
    }
    Question question = std::move(waiting_.front().question);
    waiting_.pop_front();
    const auto connection = *idle;
    connection->ask(std::move(question));
  }
  arm_sweep();
}

LocalApi::Clock::time_point LocalApi::gives_up(const Waiting& waiting) const {
  return std::min(std::max(waiting.asked, last_answer_) + timeout_, waiting.asked + max_localapi_waits * timeout_);
}

void LocalApi::arm_sweep() {
  if (waiting_.empty()) return;
  // The one at the front need not be the next to give up; a quarter of the time-out is near enough.
  if (sweep_timer_.expiry() > Clock::now()) return;
  sweep_timer_.expires_after(std::max(timeout_ / 4, std::chrono::milliseconds{1}));
  sweep_timer_.async_wait([this, alive = alive_](error_code ec) {
    if (!ec && *alive) sweep();
  });
}

void LocalApi::sweep() {
  const auto now = Clock::now();
  std::vector<Question> failed;
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    if (gives_up(*it) > now) {
      ++it;
      continue;
    }
    failed.push_back(std::move(it->question));
    it = waiting_.erase(it);
  }
  for (auto& question : failed) fail_later(std::move(question), "asking tailscaled: it answers nothing");
  arm_sweep();
}

class LineStream::State : public std::enable_shared_from_this<LineStream::State> {
 public:
  State(asio::io_context& io, std::size_t max_line, std::chrono::milliseconds timeout, Handlers handlers)
      : io_{io}, socket_{io}, timer_{io}, max_line_{max_line}, timeout_{timeout}, handlers_{std::move(handlers)}, buffer_(read_bytes), response_{std::nullopt} {}

  void start(const std::string& socket, const std::string& target) {
    out_ = head_of(target);
    expect("no answer");
    const auto endpoint = endpoint_of(socket);
    if (!endpoint) return asio::post(io_, [self = shared_from_this()] { self->end("its path is no socket's"); });
    socket_.async_connect(*endpoint, [self = shared_from_this()](error_code ec) {
      if (self->closed_) return;
      if (ec) return self->end(ec.message());
      asio::async_write(self->socket_, asio::buffer(self->out_), [self](error_code failed, std::size_t) {
        if (failed) self->end(failed.message());
      });
      self->read();
    });
  }
  void close() {
    closed_ = true;
    error_code ignored;
    socket_.close(ignored);
    timer_.cancel();
  }

 private:
  void expect(const char* what) {
    timer_.expires_after(timeout_);
    timer_.async_wait([self = shared_from_this(), what, n = ++waits_](error_code ec) {
      if (!ec && self->waits_ == n) self->end(std::string{what} + " within " + std::to_string(self->timeout_.count()) + " ms");
    });
  }
  void settled() {
    waits_++;
    timer_.cancel();
  }
  void end(const std::string& why) {
    if (closed_) return;
    close();
    const auto call = std::move(handlers_.end);
    call(away(why));
  }
  void read() {
    socket_.async_read_some(asio::buffer(buffer_), [self = shared_from_this()](error_code ec, std::size_t n) {
      if (self->closed_) return;
      if (ec) return self->end(ec == asio::error::eof ? "it closed the connection" : ec.message());
      if (const std::string wrong = self->response_.put(self->buffer_.data(), n); !wrong.empty()) return self->end("no answer of its kind: " + wrong);
      self->take();
      if (!self->closed_) self->read();
    });
  }
  void take() {
    if (!open_) {
      if (!response_.has_header()) return;
      if (response_.status() != 200) return end("it answers with status " + std::to_string(response_.status()));
      open_ = true;
      settled();
      handlers_.open();
      if (closed_) return;
    }
    std::string& body = response_.body();
    std::size_t begin = 0;
    for (std::size_t stop; (stop = body.find('\n', std::max(begin, searched_))) != std::string::npos; begin = stop + 1) {
      if (half_) settled();
      half_ = false;
      const std::string_view line{body.data() + begin, stop - begin};
      if (line.size() > max_line_) return end("a line of more than " + std::to_string(max_line_) + " bytes");
      if (!line.empty()) handlers_.line(line);
      if (closed_) return;
    }
    body.erase(0, begin);
    searched_ = body.size();
    if (body.size() > max_line_) return end("a line of more than " + std::to_string(max_line_) + " bytes");
    if (body.empty()) body.shrink_to_fit();
    if (!body.empty() && !half_) {
      half_ = true;
      expect("half a line and not the rest");
    }
    if (response_.done()) end("it ended its answer");
  }

  asio::io_context& io_;
  asio::local::stream_protocol::socket socket_;
  asio::steady_timer timer_;
  const std::size_t max_line_;
  const std::chrono::milliseconds timeout_;
  Handlers handlers_;
  std::vector<char> buffer_;
  std::string out_;
  Response response_;
  std::size_t searched_ = 0;  ///< of the body, without having found a line's end
  std::uint64_t waits_ = 0;
  bool open_ = false;
  bool half_ = false;
  bool closed_ = false;
};

LineStream::LineStream(asio::io_context& io, const std::string& socket, const std::string& target, std::size_t max_line, std::chrono::milliseconds timeout,
                       Handlers handlers)
    : state_{std::make_shared<State>(io, max_line, timeout, std::move(handlers))} {
  state_->start(socket, target);
}

LineStream::~LineStream() {
  state_->close();
}

}  // namespace postern::auth::identity
