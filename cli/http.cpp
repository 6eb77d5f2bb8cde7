#include "cli/http.h"

#include "base/address.h"

#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http.hpp>

#include <algorithm>
#include <array>
#include <limits>

namespace postern::cli {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using boost::system::error_code;

Expected<Url> parse_url(std::string_view text) {
  const auto wrong = [&](const char* what) { return Unexpected{Error{EINVAL, std::string{text} + ": " + what}}; };
  Url url;
  std::string_view rest = text;
  if (rest.substr(0, 7) == "http://")
    rest.remove_prefix(7);
  else if (rest.find("://") != std::string_view::npos)
    return wrong("only http:// is spoken (inside the network's encryption)");
  if (const auto slash = rest.find('/'); slash != std::string_view::npos) {
    url.target = rest.substr(slash);
    rest = rest.substr(0, slash);
  }
  if (!rest.empty() && rest[0] == '[') {
    const auto end = rest.find(']');
    if (end == std::string_view::npos) return wrong("a '[' without ']'");
    url.host = rest.substr(1, end - 1);
    rest = rest.substr(end + 1);
    if (!rest.empty() && rest[0] == ':') url.port = rest.substr(1);
  } else if (const auto colon = rest.find(':'); colon != std::string_view::npos) {
    url.host = rest.substr(0, colon);
    url.port = rest.substr(colon + 1);
  } else {
    url.host = rest;
  }
  if (url.host.empty()) return wrong("no host");
  if (url.port.empty() || url.port.find_first_not_of("0123456789") != std::string::npos) return wrong("a port must be a number");
  for (const char c : url.target)
    if (c <= ' ' || c == 0x7f) return wrong("a path without blanks or control characters is needed");
  return url;
}

namespace {

/// Runs one asynchronous step to its end; Beast's time-outs work for those only.
template <class Start>
error_code step(asio::io_context& io, Start start) {
  error_code result = asio::error::would_block;
  start([&result](error_code ec) { result = ec; });
  io.restart();
  io.run();
  return result;
}

}  // namespace

Expected<Done> http_get(const Url& url, const std::string& bind_to, const std::function<bool(const Answer&)>& head,
                        const std::function<bool(std::string_view)>& body, std::chrono::seconds limit) {
  const auto failed = [&](const char* doing, error_code ec) { return Unexpected{Error{ec.value(), std::string{doing} + " " + url.origin() + ": " + ec.message()}}; };
  asio::io_context io;
  asio::ip::tcp::resolver resolver{io};
  error_code ec;
  const auto found = resolver.resolve(url.host, url.port, ec);
  if (ec) return failed("looking up", ec);
  beast::tcp_stream stream{io};
  for (const auto& entry : found) {
    stream.socket().close(ec);
    ec = {};
    if (!bind_to.empty()) {
      const auto source = asio::ip::make_address(bind_to, ec);
      if (!ec) stream.socket().open(entry.endpoint().protocol(), ec);
      if (!ec) stream.socket().bind({source, 0}, ec);
      if (ec) return failed("binding for", ec);
    }
    stream.expires_after(limit);
    ec = step(io, [&](auto done) { stream.async_connect(entry.endpoint(), [done](error_code e) { done(e); }); });
    if (!ec) break;
  }
  if (ec) return failed("connecting to", ec);

  http::request<http::empty_body> request{http::verb::get, url.target, 11};
  request.set(http::field::host, url.origin());
  request.set(http::field::user_agent, "postern/" POSTERN_VERSION);
  request.set(http::field::connection, "close");
  stream.expires_after(limit);
  ec = step(io, [&](auto done) { http::async_write(stream, request, [done](error_code e, std::size_t) { done(e); }); });
  if (ec) return failed("asking", ec);

  beast::flat_buffer buffer;
  http::response_parser<http::buffer_body> parser;
  parser.body_limit(std::numeric_limits<std::uint64_t>::max());  // boost::none reads as 0 in Boost 1.74
  stream.expires_after(limit);
  ec = step(io, [&](auto done) { http::async_read_header(stream, buffer, parser, [done](error_code e, std::size_t) { done(e); }); });
  if (ec) return failed("reading from", ec);
  Answer answer;
  answer.status = parser.get().result_int();
  for (const auto& field : parser.get()) {
    std::string name{field.name_string()};
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    answer.headers[name] = std::string{field.value()};
  }
  if (!head(answer)) return Done{};
  std::array<char, 64 * 1024> piece;
  while (!parser.is_done()) {
    parser.get().body().data = piece.data();
    parser.get().body().size = piece.size();
    stream.expires_after(limit);
    ec = step(io, [&](auto done) { http::async_read_some(stream, buffer, parser, [done](error_code e, std::size_t) { done(e); }); });
    if (ec == http::error::need_buffer) ec = {};
    if (ec) return failed("reading from", ec);
    const std::size_t n = piece.size() - parser.get().body().size;
    if (n > 0 && !body({piece.data(), n})) return Done{};
  }
  return Done{};
}

}  // namespace postern::cli
