#include "recorder/wire/relay_link.h"

#include "recorder/cast/chain.h"
#include "recorder/wire/local.h"

#include <spdlog/spdlog.h>

#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace postern::recorder::wire {
namespace {

constexpr auto shortest_backoff = std::chrono::milliseconds{50};
constexpr auto longest_backoff = std::chrono::seconds{1};
/// A relay that takes the connection and then says nothing is tried again after this long.
constexpr auto open_timeout = std::chrono::seconds{2};

}  // namespace

struct RelayLink::Impl {
  Impl(Poller& p, std::string path, RecordingOpen o, Handlers h)
      : poller{p}, socket_path{std::move(path)}, open{std::move(o)}, handlers{std::move(h)}, chain{open.recording.bytes} {}
  ~Impl() {
    *alive = false;
    drop_socket();
    poller.cancel(timer);
  }

  enum class Phase { away, opening, open };

  Poller& poller;
  const std::string socket_path;
  const RecordingOpen open;
  Handlers handlers;
  cast::Chain chain;
  std::shared_ptr<bool> alive = std::make_shared<bool>(true);  // a handler may destroy the link

  Phase phase = Phase::away;
  UniqueFd socket;
  Poller::TimerId timer = 0;
  std::chrono::milliseconds backoff{0};
  Poller::Clock::time_point away_since = Poller::Clock::now();
  bool connected = false;          // open, and everything from before has been written
  std::uint64_t catch_up_to = 0;   // what `connected` waits for
  bool failed = false;             // the journal cannot take it: nothing more is sent
  bool ending = false, end_sent = false, ended = false;

  // Bytes [base, base + kept.size() - skipped) of the recording; what was written is dropped from the front.
  std::string kept;
  std::size_t skipped = 0;
  std::uint64_t base = 0;
  std::uint64_t sent = 0;  // offset of the next byte that goes out
  local::Acks acks;
  local::State state;

  std::string control;      // whole control frames that go out before the next data frame
  std::size_t control_sent = 0;
  std::array<char, local::header_size + local::data_prefix_size> prefix{};
  std::size_t prefix_left = 0, data_left = 0;  // of the data frame that is going out
  local::FrameReader reader;

  std::uint64_t appended() const { return chain.offset(); }

  // --- connection ---------------------------------------------------------------------------------------------------------

  void drop_socket() {
    if (!socket) return;
    poller.forget(socket.get());
    socket.reset();
  }

  void schedule(std::chrono::milliseconds delay) {
    poller.cancel(timer);
    timer = poller.after(delay, [this] { connect(); });
  }

  void lost(const std::string& why) {
    drop_socket();
    if (ended) return;  // nothing is left to say
    control.clear();
    control_sent = prefix_left = data_left = 0;
    reader = {};
    end_sent = false;
    const bool told = connected;
    if (phase == Phase::open) {
      away_since = Poller::Clock::now();
      backoff = {};
      spdlog::warn("event=relay_lost recording={} written={} reason=\"{}\"", open.recording.text(), acks.written, why);
    }
    phase = Phase::away;
    connected = false;
    backoff = std::clamp<std::chrono::milliseconds>(backoff * 2, shortest_backoff, longest_backoff);
    schedule(backoff);
    if (told && handlers.connection) handlers.connection(false);
  }

  void connect() {
    timer = 0;
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (socket_path.size() >= sizeof address.sun_path) return lost("the socket's path is too long");
    std::memcpy(address.sun_path, socket_path.data(), socket_path.size());
    socket.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!socket) return lost(std::strerror(errno));
    // EAGAIN here means a full backlog, connect(2): nothing to wait for, so it is tried again like a refusal.
    if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) return lost(std::strerror(errno));
    phase = Phase::opening;
    local::append(local::Open{local::version, open}, control);
    timer = poller.after(open_timeout, [this] {
      timer = 0;
      lost("no answer to the open");
    });
    poller.watch(socket.get(), POLLIN, [this](short events) { on_socket(events); });
    send();
  }

  void on_socket(short events) {
    const auto still = alive;
    if ((events & (POLLIN | POLLHUP | POLLERR)) != 0) receive();
    if (!*still || !socket) return;
    if ((events & POLLOUT) != 0) send();
  }

  // --- sending ------------------------------------------------------------------------------------------------------------

  /// Sends as much as the socket takes. Never calls a handler.
  void send() {
    while (socket) {
      if (control_sent == control.size() && prefix_left + data_left == 0) {
        control.clear();
        control_sent = 0;
        if (phase != Phase::open || failed) break;
        if (sent < appended()) {
          data_left = static_cast<std::size_t>(std::min<std::uint64_t>(appended() - sent, local::largest_data));
          prefix = local::data_prefix(sent, data_left);
          prefix_left = prefix.size();
        } else if (ending && !end_sent && !ended) {
          local::append(local::End{appended(), chain.head(), ""}, control);
          end_sent = true;
        } else {
          break;
        }
      }
      std::array<iovec, 2> parts{};
      if (control_sent < control.size()) {
        parts[0] = {control.data() + control_sent, control.size() - control_sent};
      } else {
        parts[0] = {prefix.data() + prefix.size() - prefix_left, prefix_left};
        parts[1] = {kept.data() + skipped + (sent - base), data_left};
      }
      msghdr message{};
      message.msg_iov = parts.data();
      message.msg_iovlen = parts.size();
      const ssize_t n = ::sendmsg(socket.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0) {
        if (errno == EINTR) continue;
        if (errno == EAGAIN) {
          poller.set_events(socket.get(), POLLIN | POLLOUT);
          return;
        }
        // Told by the poller's next round (POLLHUP, or this timer), so that append() never calls back.
        poller.cancel(timer);
        timer = poller.after(std::chrono::milliseconds{0}, [this, why = errno] {
          timer = 0;
          lost(std::strerror(why));
        });
        break;
      }
      auto done = static_cast<std::size_t>(n);
      if (control_sent < control.size()) {
        control_sent += done;
        continue;
      }
      const std::size_t of_prefix = std::min(done, prefix_left);
      prefix_left -= of_prefix;
      done -= of_prefix;
      data_left -= done;
      sent += done;
    }
    if (socket) poller.set_events(socket.get(), POLLIN);
  }

  // --- receiving ----------------------------------------------------------------------------------------------------------

  void receive() {
    const auto still = alive;
    for (;;) {
      const auto space = reader.space();
      const ssize_t n = ::recv(socket.get(), space.data(), space.size(), MSG_DONTWAIT);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EAGAIN) break;
      if (n <= 0) return lost(n == 0 ? "closed" : std::strerror(errno));
      reader.filled(static_cast<std::size_t>(n));
      while (const auto frame = reader.next()) {
        const bool good = take(*frame);
        if (!*still || !socket) return;
        if (!good) return lost("a frame that makes no sense");
      }
      if (reader.broken()) return lost("a broken frame");
      if (static_cast<std::size_t>(n) < space.size()) break;
    }
    send();
  }

  /// False: the relay is not to be understood.
  bool take(const local::FrameReader::Frame& frame) {
    switch (frame.type) {
      case local::Type::opened: {
        const auto opened = local::parse_opened(frame.payload);
        if (!opened || phase != Phase::opening || opened->version < local::oldest_version || opened->version > local::version) return false;
        return on_opened(*opened);
      }
      case local::Type::acks: {
        const auto a = local::parse_acks(frame.payload);
        return a && phase == Phase::open && on_acks(*a);
      }
      case local::Type::state: {
        const auto s = local::parse_state(frame.payload);
        if (!s || phase != Phase::open) return false;
        on_state(*s);
        return true;
      }
      case local::Type::journal_failed:
        on_failure(std::string{frame.payload});
        return true;
      case local::Type::ended:
        if (!ending) return false;
        on_ended();
        return true;
      case local::Type::refused:
        spdlog::error("event=relay_refused recording={} reason=\"{}\"", open.recording.text(), frame.payload.substr(0, local::longest_text));
        return false;
      default:
        return false;
    }
  }

  bool on_opened(const local::Opened& opened) {
    poller.cancel(timer);
    timer = 0;
    if (opened.ended && !ending) return false;
    if (opened.acks.written > appended()) return false;
    phase = Phase::open;
    backoff = {};
    catch_up_to = appended();
    if (opened.ended) {
      sent = appended();
      const auto still = alive;
      on_acks({appended(), appended(), opened.acks.committed});
      if (*still) on_ended();
      return true;
    }
    if (opened.acks.written < base) {
      // It was told as written, so it stood in the page cache of this host at least; somebody took the journal away.
      on_failure("the relay's journal lost bytes that it had");
      return true;
    }
    sent = opened.acks.written;
    const auto still = alive;
    on_state(opened.state);
    if (*still) on_acks(opened.acks);
    return true;
  }

  void drop_written() {
    const auto n = static_cast<std::size_t>(acks.written - base);
    skipped += n;
    base = acks.written;
    if (skipped == kept.size()) {
      kept.clear();
      skipped = 0;
      // One large read must not keep its memory for the session's whole life.
      if (kept.capacity() > max_unwritten) kept.shrink_to_fit();
    } else if (skipped > kept.size() / 2 && skipped > 64 * 1024) {
      kept.erase(0, skipped);
      skipped = 0;
    }
  }

  bool on_acks(const local::Acks& a) {
    if (a.written > sent || a.journaled > a.written || a.committed > appended()) return false;
    const auto still = alive;
    const auto raise = [&](std::uint64_t local::Acks::*member, const std::function<void(std::uint64_t)>& handler) {
      if (!*still || a.*member <= acks.*member) return;
      acks.*member = a.*member;
      if (member == &local::Acks::written) drop_written();
      if (handler) handler(a.*member);
    };
    // A relay that came back may first know less than its predecessor said: nothing goes backwards here. Written comes last,
    // since its handler shows bytes and asks how much of them is durable.
    raise(&local::Acks::journaled, handlers.journaled);
    raise(&local::Acks::committed, handlers.committed);
    raise(&local::Acks::written, handlers.written);
    if (*still) check_connected();
    return true;
  }

  void check_connected() {
    if (connected || phase != Phase::open || (acks.written < catch_up_to && !failed)) return;
    connected = true;
    if (handlers.connection) handlers.connection(true);
  }

  void on_state(const local::State& s) {
    if (s == state) return;
    state = s;
    if (handlers.state) handlers.state(s.state, s.recorder);
  }

  void on_failure(const std::string& why) {
    if (failed) return;
    failed = true;
    prefix_left = data_left = 0;
    spdlog::error("event=journal_failed recording={} written={} appended={} reason=\"{}\"", open.recording.text(), acks.written, appended(), why);
    const auto still = alive;
    if (handlers.journal_failed) handlers.journal_failed(why);
    if (*still) check_connected();
  }

  void on_ended() {
    if (ended) return;
    ended = true;
    const auto still = alive;
    check_connected();
    if (*still && handlers.ended) handlers.ended();
  }
};

RelayLink::RelayLink(Poller& poller, std::string socket_path, RecordingOpen open, Handlers handlers)
    : impl_{std::make_unique<Impl>(poller, std::move(socket_path), std::move(open), std::move(handlers))} {
  impl_->schedule(std::chrono::milliseconds{0});
}

RelayLink::~RelayLink() = default;

std::size_t RelayLink::room() const noexcept {
  if (impl_->failed) return 0;
  const std::uint64_t waiting = impl_->appended() - impl_->acks.written;
  return waiting >= max_unwritten ? 0 : max_unwritten - static_cast<std::size_t>(waiting);
}

void RelayLink::append(std::string_view encoded) {
  if (impl_->failed || impl_->ending || encoded.empty()) return;
  impl_->chain.update(std::as_bytes(std::span{encoded.data(), encoded.size()}));
  impl_->kept += encoded;
  // Something is going out already: the poller continues it.
  if (impl_->phase == Impl::Phase::open && impl_->prefix_left + impl_->data_left == 0) impl_->send();
}

void RelayLink::end() {
  if (impl_->ending) return;
  impl_->ending = true;
  if (impl_->phase == Impl::Phase::open) impl_->send();
}

std::uint64_t RelayLink::appended() const noexcept { return impl_->appended(); }
std::uint64_t RelayLink::written() const noexcept { return impl_->acks.written; }
std::uint64_t RelayLink::journaled() const noexcept { return impl_->acks.journaled; }
std::uint64_t RelayLink::committed() const noexcept { return impl_->acks.committed; }
bool RelayLink::connected() const noexcept { return impl_->connected; }
RecorderState RelayLink::state() const noexcept { return impl_->state.state; }
Poller::Clock::time_point RelayLink::away_since() const noexcept { return impl_->away_since; }

}  // namespace postern::recorder::wire
