#pragma once

#include "base/expected.h"

#include <chrono>
#include <functional>
#include <map>
#include <string>
#include <string_view>

namespace postern::cli {

struct Url {
  std::string host, port = "80", target = "/";
  std::string origin() const { return host.find(':') == std::string::npos ? host + ":" + port : "[" + host + "]:" + port; }
};
/// "http://127.0.2.1:80/path", or "127.0.2.1:80" alone.
Expected<Url> parse_url(std::string_view text);

struct Answer {
  unsigned status = 0;
  std::map<std::string, std::string> headers;  ///< names in lower case
};

/// GET over HTTP/1.1. `head` hears the answer's head, `body` each piece of what follows as it comes; false from either ends it.
/// An error when the connection or the protocol fails, or nothing comes for `limit`.
Expected<Done> http_get(const Url& url, const std::string& bind_to, const std::function<bool(const Answer&)>& head,
                        const std::function<bool(std::string_view)>& body, std::chrono::seconds limit = std::chrono::seconds{10});

}  // namespace postern::cli
