#pragma once

#include "base/address.h"
#include "recorder/relay/settings.h"
#include "recorder/relay/upload.h"

#include <boost/asio/io_context.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace postern::recorder::relay {

/// One recorder as the relay sees it: one HTTP/2 connection that is kept warm, its health lines, and the streams on it.
///
/// Connects by itself while it is wanted, with growing pauses; attempt() connects at once. Reports each change of health once.
class RecorderClient {
 public:
  using Clock = std::chrono::steady_clock;
  struct Handlers {
    std::function<void()> answering;      ///< healthy, takes recordings
    std::function<void()> not_accepting;  ///< healthy, takes no new ones
    /// The attempt failed, or the connection is over, or its disk is full. All uploads on it are dead; the client lets go of them
    /// without a word.
    std::function<void(const std::string& why)> lost;
  };

  RecorderClient(boost::asio::io_context& io, const Settings& settings, Endpoint endpoint, Handlers handlers);
  ~RecorderClient();
  RecorderClient(const RecorderClient&) = delete;
  RecorderClient& operator=(const RecorderClient&) = delete;

  enum class Wanted : std::uint8_t {
    no,      ///< nothing needs it: the connection is given up
    seldom,  ///< only a notice waits for it
    now,     ///< recordings may go there
  };
  void want(Wanted wanted);
  /// Connects now, unless it is connected or connecting. answering(), not_accepting() or lost() follows.
  void attempt();
  bool up() const;

  /// Opens a stream for it. Only while up().
  void upload(const std::shared_ptr<Upload>& upload);
  struct MovedAnswer {
    int status = 0;  ///< 0: no answer
    std::string code;
    std::uint64_t epoch = 0;
  };
  void moved(const Id& recording, const std::string& to, std::uint64_t epoch, std::function<void(const MovedAnswer&)> done);
  /// What an upload was told: its disk is full. The same as lost, but the connection stays, and its health lines tell when it has
  /// room again.
  void disk_full(const std::string& why);
  /// Bytes have waited for too long: lost, and not tried again for `penalty`.
  void hangs(const std::string& why);
  /// Every quarter of a second or so: looks whether health lines still come.
  void tick(Clock::time_point now);

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace postern::recorder::relay
