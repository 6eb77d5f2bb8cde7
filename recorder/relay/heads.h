#pragma once

#include "recorder/cast/chain.h"
#include "recorder/journal/journal.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/thread_pool.hpp>

#include <functional>
#include <memory>

namespace postern::recorder::relay {

/// Chain heads of journal files, computed in a thread of their own: a gigabyte takes a second, in which the relay's own thread has
/// sessions to serve.
class Heads {
 public:
  explicit Heads(boost::asio::io_context& owner) : owner_{owner} {}
  ~Heads() { pool_.join(); }

  /// One recording's chain as far as it was computed; continues from there.
  struct Cache {
    explicit Cache(const std::array<std::uint8_t, 16>& id) : start{id}, chain{id} {}
    const cast::Chain start;
    cast::Chain chain;
  };
  /// head(n) of the entry's bytes, in the owner's thread; an error when they cannot be read.
  void head(const journal::Entry& entry, std::shared_ptr<Cache> cache, std::uint64_t n, std::function<void(Expected<cast::Digest>)> done);

 private:
  boost::asio::io_context& owner_;
  boost::asio::thread_pool pool_{1};
};

}  // namespace postern::recorder::relay
