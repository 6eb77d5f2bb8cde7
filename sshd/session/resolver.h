#pragma once

#include "base/poller.h"
#include "base/unique_fd.h"

#include <sys/socket.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace postern::sshd::session {

/// getaddrinfo(3) without waiting: numeric addresses at once, names in threads, some at a time. For the forward helper alone.
class Resolver {
 public:
  struct Result {
    std::vector<sockaddr_storage> addresses;  ///< in getaddrinfo's order, ports set
    std::string error;                        ///< when there are none
  };
  using Handler = std::function<void(Result)>;
  static constexpr unsigned most_threads = 16;  ///< more names wait

  explicit Resolver(Poller& poller);
  Resolver(const Resolver&) = delete;
  Resolver& operator=(const Resolver&) = delete;
  /// Runs `handler` once, perhaps before it returns.
  void look_up(const std::string& host, std::uint16_t port, Handler handler);

 private:
  struct Shared;
  struct Question {
    std::string host;
    std::uint16_t port;
    unsigned long id;
  };
  void begin(Question question);
  void collect();

  Poller& poller_;
  std::shared_ptr<Shared> shared_;  // with the threads, which may outlive us
  std::deque<Question> waiting_;
  std::deque<std::pair<unsigned long, Handler>> handlers_;
  unsigned running_ = 0;
  unsigned long next_id_ = 1;
};

}  // namespace postern::sshd::session
