#include "sshd/session/resolver.h"

#include <fcntl.h>
#include <netdb.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace postern::sshd::session {

struct Resolver::Shared {
  UniqueFd wake_read, wake_write;
  std::mutex mutex;  // protects: done
  std::vector<std::pair<unsigned long, Result>> done;
};

namespace {

Resolver::Result ask(const std::string& host, std::uint16_t port, int flags) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | flags;
  addrinfo* list = nullptr;
  Resolver::Result result;
  const int rc = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list);
  if (rc != 0) {
    result.error = rc == EAI_SYSTEM ? std::strerror(errno) : ::gai_strerror(rc);
    return result;
  }
  for (const addrinfo* a = list; a != nullptr; a = a->ai_next) {
    if (a->ai_addrlen > sizeof(sockaddr_storage)) continue;
    sockaddr_storage address{};
    std::memcpy(&address, a->ai_addr, a->ai_addrlen);
    result.addresses.push_back(address);
  }
  ::freeaddrinfo(list);
  if (result.addresses.empty()) result.error = "no address";
  return result;
}

}  // namespace

Resolver::Resolver(Poller& poller) : poller_{poller}, shared_{std::make_shared<Shared>()} {
  int fds[2];
  if (::pipe2(fds, O_CLOEXEC | O_NONBLOCK) != 0) return;  // then every name fails
  shared_->wake_read.reset(fds[0]);
  shared_->wake_write.reset(fds[1]);
  poller_.watch(fds[0], POLLIN, [this](short) { collect(); });
}

void Resolver::look_up(const std::string& host, std::uint16_t port, Handler handler) {
  if (host.empty() || host.find('\0') != std::string::npos) return handler({{}, "not a name"});
  if (auto numeric = ask(host, port, AI_NUMERICHOST); !numeric.addresses.empty()) return handler(std::move(numeric));
  if (!shared_->wake_write) return handler({{}, "names cannot be looked up now"});
  const Question question{host, port, next_id_++};
  handlers_.emplace_back(question.id, std::move(handler));
  if (running_ < most_threads)
    begin(question);
  else
    waiting_.push_back(question);
}

void Resolver::begin(Question question) {
  running_++;
  const auto finish = [shared = shared_](unsigned long id, Result result) {
    const std::lock_guard lock{shared->mutex};
    shared->done.emplace_back(id, std::move(result));
    // A full pipe wakes as well.
    [[maybe_unused]] const auto n = ::write(shared->wake_write.get(), "", 1);
  };
  try {
    std::thread{[question, finish] { finish(question.id, ask(question.host, question.port, 0)); }}.detach();
  } catch (const std::system_error& e) {  // the user has no process left (RLIMIT_NPROC)
    finish(question.id, {{}, e.code().message()});
  }
}

void Resolver::collect() {
  char bytes[64];
  while (::read(shared_->wake_read.get(), bytes, sizeof bytes) > 0) {
  }
  std::vector<std::pair<unsigned long, Result>> done;
  {
    const std::lock_guard lock{shared_->mutex};
    done.swap(shared_->done);
  }
  running_ -= static_cast<unsigned>(done.size());
  while (running_ < most_threads && !waiting_.empty()) {
    Question next = std::move(waiting_.front());
    waiting_.pop_front();
    begin(std::move(next));
  }
  for (auto& [id, result] : done) {
    const auto it = std::find_if(handlers_.begin(), handlers_.end(), [id = id](const auto& h) { return h.first == id; });
    if (it == handlers_.end()) continue;
    const Handler handler = std::move(it->second);
    handlers_.erase(it);
    handler(std::move(result));
  }
}

}  // namespace postern::sshd::session
