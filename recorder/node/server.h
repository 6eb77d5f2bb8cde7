#pragma once

#include "base/expected.h"
#include "recorder/node/settings.h"

#include <boost/asio/io_context.hpp>

#include <functional>
#include <memory>
#include <vector>

namespace postern::recorder::node {

/// The recorder's sockets: HTTP/2 for relays and readers, plain HTTP/1.1 GET for browsers and curl on the same port
/// (docs/PROTOCOL.recorder.md). Who may do what follows from the kernel's peer address alone.
///
/// Never waits for the disk in its own thread: the store writes in its own, reads go to a small pool.
class Server {
 public:
  Server(boost::asio::io_context& io, Settings settings);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  /// Looks at the store, listens.
  Expected<Done> start();
  std::vector<Endpoint> listening() const;
  /// New rules for who may upload and read; connections of those who may neither are closed.
  void reload(const Settings& settings);
  /// Stops listening, commits what has arrived, tells the relays, closes; then `stopped`, at most shutdown_timeout after the commit.
  void stop(std::function<void()> stopped);
  Store& store();

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace postern::recorder::node
