#include "recorder/relay/heads.h"

#include <boost/asio/post.hpp>

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

namespace postern::recorder::relay {

void Heads::head(const journal::Entry& entry, std::shared_ptr<Cache> cache, std::uint64_t n, std::function<void(Expected<cast::Digest>)> done) {
  if (n == 0) {
    boost::asio::post(owner_, [head = cache->start.head(), done = std::move(done)] { done(head); });
    return;
  }
  // A descriptor of its own, since the owner may drop the entry's bytes meanwhile. The cache is touched by the pool's one thread only.
  auto file = std::make_shared<UniqueFd>(entry.descriptor());
  boost::asio::post(pool_, [this, file, cache = std::move(cache), n, done = std::move(done)]() mutable {
    if (cache->chain.offset() > n) cache->chain = cache->start;
    std::vector<char> buffer(256 * 1024);
    std::optional<Error> error;
    while (cache->chain.offset() < n) {
      const auto want = static_cast<std::size_t>(std::min<std::uint64_t>(buffer.size(), n - cache->chain.offset()));
      const ssize_t have = ::pread(file->get(), buffer.data(), want, static_cast<off_t>(cache->chain.offset()));
      if (have < 0 && errno == EINTR) continue;
      if (have <= 0) {
        error = have < 0 ? system_error("read of the journal") : Error{EIO, "the journal is shorter than it should be"};
        break;
      }
      cache->chain.update(std::as_bytes(std::span{buffer.data(), static_cast<std::size_t>(have)}));
    }
    auto result = error ? Expected<cast::Digest>{Unexpected{*error}} : Expected<cast::Digest>{cache->chain.head()};
    boost::asio::post(owner_, [result = std::move(result), done = std::move(done)] { done(result); });
  });
}

}  // namespace postern::recorder::relay
