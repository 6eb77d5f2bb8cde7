#include "recorder/relay/relay.h"

#include "base/log.h"
#include "base/processes.h"

#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

namespace postern::recorder::relay {

namespace asio = boost::asio;
namespace local = wire::local;
using Ending = journal::Meta::Ending;
using wire::RecorderState;
using boost::system::error_code;

namespace {

constexpr auto tick_interval = std::chrono::milliseconds{100};
/// More than this between two ticks: this process was stopped or starved. That time is not the recorders'.
constexpr auto stood_still = std::chrono::seconds{1};
constexpr unsigned most_stale = 8;  // raises above a recorder's epoch, in a row, before the recording is tried elsewhere

std::int64_t unix_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

/// Whether the process that opened a recording is gone for good. What cannot be told (hidepid) counts as alive.
bool session_is_dead(const journal::Meta& meta) {
  static const std::string boot = boot_id();
  if (meta.boot_id != boot || meta.pid <= 0) return true;
  const auto stat = stat_of(meta.pid);
  if (!stat) return ::kill(meta.pid, 0) != 0 && errno == ESRCH;
  return !stat->living() || stat->start_time != meta.start_time;
}

const char* name_of(RecorderState state) {
  switch (state) {
    case RecorderState::searching: return "searching";
    case RecorderState::recording: return "recording";
    case RecorderState::none: return "none";
  }
  return "";
}

/// Only root and the relay's own user may speak for sessions, or see their list.
bool allowed(asio::local::stream_protocol::socket& socket, pid_t& pid) {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  if (::getsockopt(socket.native_handle(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return false;
  pid = credentials.pid;
  if (credentials.uid == 0 || credentials.uid == ::geteuid()) return true;
  spdlog::warn("event=connection_refused uid={} pid={}", credentials.uid, credentials.pid);
  return false;
}

}  // namespace

Relay::Relay(asio::io_context& io, Settings settings)
    : io_{io},
      settings_{std::move(settings)},
      journal_{settings_.journal, [&io](std::function<void()> f) { asio::post(io, std::move(f)); }},
      heads_{io},
      sessions_{io},
      control_{io},
      ticker_{io},
      attempt_timer_{io} {}

Relay::~Relay() { stop(); }

Expected<Done> Relay::listen(asio::local::stream_protocol::acceptor& acceptor, const std::string& path) const {
  sockaddr_un limit{};
  if (path.size() >= sizeof limit.sun_path) return Unexpected{Error{ENAMETOOLONG, "socket path is too long: " + path}};
  error_code ec;
  acceptor.open({}, ec);
  // The journal's lock says that no other relay lives here, so what stands there is a dead one's.
  struct stat status{};
  if (!ec && ::lstat(path.c_str(), &status) == 0 && S_ISSOCK(status.st_mode)) ::unlink(path.c_str());
  if (!ec) acceptor.bind({path}, ec);
  // Whoever connects is asked for its uid; a mode alone would not tell root from others of the relay's group.
  if (!ec) ::chmod(path.c_str(), 0600);
  if (!ec) acceptor.listen(SOMAXCONN, ec);
  if (ec) return Unexpected{Error{ec.value(), "listen on " + path + ": " + ec.message()}};
  return Done{};
}

Expected<Done> Relay::start() {
  auto entries = journal_.load();
  if (!entries) return Unexpected{std::move(entries.error())};
  if (auto done = listen(sessions_, settings_.session_socket); !done) return done;
  if (!settings_.control_socket.empty())
    if (auto done = listen(control_, settings_.control_socket); !done) return done;
  for (auto& entry : *entries) {
    const auto r = add(std::move(entry));
    const auto& meta = r->entry->meta();
    // Of a dead session first the cut, then a recorder (check_session): after a loss of power a recorder may have more of it than this
    // host kept, and only of a recording that is cut that is no conflict.
    if (meta.ending != Ending::none || !session_is_dead(meta)) seek_recorder(*r);
    spdlog::info("event=recording_resumed recording={} length={} ending={} stored={}", meta.recording.text(), r->entry->length(),
                 static_cast<int>(meta.ending), meta.stored);
    if (meta.stored) {
      r->committed = meta.length;
    } else if (meta.ending == Ending::ended) {
      r->entry->sync([r, this](Expected<Done> done) {
        r->end_durable = done.has_value();
        tell_ended(*r);
      });
    }
  }
  accept_session();
  if (control_.is_open()) accept_control();
  run_failover();
  tick();
  return Done{};
}

void Relay::stop() {
  if (stopped_) return;
  stopped_ = true;
  error_code ignored;
  sessions_.close(ignored);
  control_.close(ignored);
  ticker_.cancel();
  attempt_timer_.cancel();
  for (const auto& link : links_) link->close();
  links_.clear();
  for (auto& [id, r] : recordings_) {
    if (r->link) r->link->close();
    r->link.reset();
    if (r->upload) r->upload->cancel();
    r->upload.reset();
    r->entry->on_journaled = {};
    r->entry->on_failed = {};
  }
  nodes_.clear();
}

// --- sessions ---------------------------------------------------------------------------------------------------------------

void Relay::accept_session() {
  sessions_.async_accept([this](error_code ec, asio::local::stream_protocol::socket socket) {
    if (stopped_) return;
    if (ec) {
      // EMFILE and the like: the backlog keeps the connection, a moment later there may be room.
      spdlog::error("event=accept_failed reason=\"{}\"", ec.message());
      auto pause = std::make_shared<asio::steady_timer>(io_, std::chrono::milliseconds{100});
      pause->async_wait([this, pause](error_code) {
        if (!stopped_) accept_session();
      });
      return;
    }
    pid_t pid = 0;
    if (allowed(socket, pid)) {
      auto link = std::make_shared<SessionLink>(std::move(socket));
      if (links_.size() >= settings_.sessions) {
        spdlog::error("event=connection_refused reason=\"sessions.connections is reached\" limit={}", settings_.sessions);
        link->refuse("too many sessions");
      } else {
        links_.insert(link);
        std::weak_ptr<SessionLink> weak = link;
        link->start({[this, weak](const local::Open& open) {
                       if (auto l = weak.lock()) on_open(l, open);
                     },
                     [](std::uint64_t, std::string_view) {}, [](const local::End&) {}, [] {},
                     [this, weak](const std::string& why) {
                       if (auto l = weak.lock()) links_.erase(l);
                       spdlog::warn("event=session_link_closed reason=\"{}\"", why);
                     }});
      }
    }
    accept_session();
  });
}

Relay::RecordingPtr Relay::find(Key key) const {
  const auto it = by_key_.find(key);
  return it == by_key_.end() ? nullptr : it->second;
}

Relay::RecordingPtr Relay::add(std::shared_ptr<journal::Entry> entry) {
  auto r = std::make_shared<Recording>();
  r->key = next_key_++;
  r->entry = std::move(entry);
  const auto& meta = r->entry->meta();
  r->heads = std::make_shared<Heads::Cache>(meta.recording.bytes);
  recordings_[meta.recording] = r;
  by_key_[r->key] = r;
  std::weak_ptr<Recording> weak = r;
  r->entry->on_journaled = [this, weak](std::uint64_t) {
    if (const auto self = weak.lock(); self && !stopped_) {
      tell_acks(*self);
      tell_ended(*self);
    }
  };
  r->entry->on_failed = [this, weak](const std::string& why) {
    if (const auto self = weak.lock(); self && !stopped_) journal_failed(*self, why);
  };
  return r;
}

/// Once: from here on failover has it in hand.
void Relay::seek_recorder(Recording& r) {
  const auto& meta = r.entry->meta();
  if (r.sought || meta.stored) return;
  r.sought = true;
  std::vector<Failover::Recorder> list;
  for (const auto& name : meta.recorders) {
    const auto index = node(name).index;
    if (std::find(list.begin(), list.end(), index) == list.end()) list.push_back(index);
  }
  failover_.add(r.key, std::move(list));
}

void Relay::on_open(const std::shared_ptr<SessionLink>& link, const local::Open& open) {
  const auto& o = open.recording;
  RecordingPtr r;
  if (const auto it = recordings_.find(o.recording); it != recordings_.end()) {
    r = it->second;
    if (r->link) {
      r->link->close();
      links_.erase(r->link);
    }
  } else {
    journal::Meta meta;
    meta.recording = o.recording;
    meta.recorders = o.recorders;
    meta.enforce = o.enforce;
    meta.boot_id = o.boot_id;
    meta.pid = o.pid;
    meta.start_time = o.start_time;
    meta.created_ms = unix_ms();
    meta.epoch = 0;
    auto entry = journal_.create(meta);
    if (!entry) {
      const auto& why = entry.error().doing;
      spdlog::error("event=recording_gap recording={} from=0 enforce={} reason=\"{}\"", o.recording.text(), o.enforce, why);
      meta.gap = !o.enforce;
      meta.gap_reason = why;
      if (meta.gap && lost_at_start_.size() < settings_.sessions) lost_at_start_.push_back(std::move(meta));
      link->opened({});
      link->journal_failed(why);
      return;
    }
    r = add(std::move(*entry));
    spdlog::info("event=recording_opened recording={} pid={} enforce={} recorders={}", o.recording.text(), o.pid, o.enforce, o.recorders.size());
  }
  r->link = link;
  std::weak_ptr<Recording> weak = r;
  std::weak_ptr<SessionLink> weak_link = link;
  // From here on frames belong to this recording. (The open frame is being handed out right now: start() swaps the handlers.)
  link->rebind({[](const local::Open&) {},
                [this, weak](std::uint64_t offset, std::string_view bytes) {
                  if (const auto self = weak.lock()) on_data(*self, offset, bytes);
                },
                [this, weak](const local::End& end) {
                  if (const auto self = weak.lock()) on_end(*self, end);
                },
                [this, weak] {
                  if (const auto self = weak.lock()) {
                    tell_acks(*self);
                    poke(*self);
                  }
                },
                [this, weak, weak_link](const std::string& why) {
                  const auto self = weak.lock();
                  const auto l = weak_link.lock();
                  if (self && l) on_closed(self, l, why);
                }});
  const auto& meta = r->entry->meta();
  local::Opened opened;
  opened.acks = {r->entry->length(), r->entry->journaled(), r->committed};
  opened.state = r->state;
  opened.ended = meta.ending == Ending::ended && r->end_durable;
  if (meta.stored) {
    opened.ended = meta.ending == Ending::ended;
    opened.acks = {meta.length, meta.length, meta.length};
  }
  link->opened(opened);
  if (opened.ended) r->ended_link = true;
  if (!r->entry->failure().empty())
    link->journal_failed(r->entry->failure());
  else if (meta.ending == Ending::cut)
    link->journal_failed("this recording was taken for that of a dead session");
  seek_recorder(*r);
  run_failover();
  // It may be waiting behind replays since the time when no session was there.
  if (const auto* at = failover_.at(r->key)) run_queue(*by_index_[*at]);
}

void Relay::on_data(Recording& r, std::uint64_t offset, std::string_view bytes) {
  if (!r.entry->failure().empty()) return;  // it was told
  const auto& meta = r.entry->meta();
  if (offset != r.entry->length() || meta.ending != Ending::none) {
    if (r.link) r.link->refuse("data where none belongs");
    return;
  }
  if (auto done = r.entry->append(bytes); !done) journal_failed(r, done.error().doing);
}

void Relay::journal_failed(Recording& r, const std::string& why) {
  const auto& meta = r.entry->meta();
  const auto from = r.entry->length();
  spdlog::error("event=recording_gap recording={} from={} enforce={} reason=\"{}\"", meta.recording.text(), from, meta.enforce, why);
  // Under fail closed nothing was shown that is not in the journal, so nothing is missing.
  if (!meta.enforce)
    (void)r.entry->update([&](journal::Meta& m) {
      m.gap = true;
      m.gap_from = from;
      m.gap_reason = why;
    });
  if (r.link) r.link->journal_failed(why);
  poke(r);
}

void Relay::on_end(Recording& r, const local::End& end) {
  if (!r.entry->failure().empty()) return;
  const auto& meta = r.entry->meta();
  if (meta.ending == Ending::none) {
    if (end.length != r.entry->length()) {
      if (r.link) r.link->refuse("an end at another length");
      return;
    }
    (void)r.entry->update([&](journal::Meta& m) {
      m.ending = Ending::ended;
      m.length = end.length;
      m.head = cast::hex(end.head);
      m.signature = end.signature;
    });
    spdlog::info("event=recording_ended recording={} length={}", meta.recording.text(), end.length);
    r.entry->sync([this, weak = std::weak_ptr{find(r.key)}](Expected<Done> done) {
      const auto self = weak.lock();
      if (!self || stopped_) return;
      if (done) self->end_durable = true;
      tell_ended(*self);
    });
  }
  tell_ended(r);
  poke(r);
}

void Relay::tell_acks(Recording& r) {
  if (r.link && !r.entry->meta().stored) r.link->acks({r.entry->length(), r.entry->journaled(), std::min(r.committed, r.entry->length())});
}

void Relay::tell_ended(Recording& r) {
  const auto& meta = r.entry->meta();
  if (meta.ending != Ending::ended || !r.end_durable) return;
  if (!r.link) return;
  tell_acks(r);
  r.link->ended();
}

void Relay::on_closed(const RecordingPtr& r, const std::shared_ptr<SessionLink>& link, const std::string& why) {
  links_.erase(link);
  if (r->link != link) return;
  r->ended_link |= link->told_ended();
  r->link.reset();
  spdlog::info("event=session_away recording={} length={} reason=\"{}\"", r->entry->meta().recording.text(), r->entry->length(), why);
  check_session(r);
}

void Relay::poke(Recording& r) {
  if (r.upload) r.upload->poke(Clock::now());
}

/// A recording whose session is not connected: is there still one?
void Relay::check_session(const RecordingPtr& r) {
  if (r->link || stopped_) return;
  const auto& meta = r->entry->meta();
  if (meta.stored) return remove_if_done(r);
  // After a failure of the journal the process may live on with other recordings; of this one nothing comes any more.
  const bool failed = meta.gap || !r->entry->failure().empty();
  if (meta.ending != Ending::none || r->ending_asked || (!failed && !session_is_dead(meta))) return;
  if (r->entry->length() == 0) {
    // Not even a header: nothing was shown, or nothing was recorded of it, which stays known for a while.
    const bool known = meta.gap && unix_ms() - meta.created_ms < settings_.gap_keep.count();
    if (!r->empty_told) spdlog::info("event=recording_empty recording={}", meta.recording.text());
    r->empty_told = true;
    drop_upload(*r, false);
    failover_.remove(r->key);
    if (!known) {
      r->entry->remove();
      by_key_.erase(r->key);
      recordings_.erase(meta.recording);
    }
    return;
  }
  r->ending_asked = true;
  heads_.head(*r->entry, r->heads, r->entry->length(), [this, r, length = r->entry->length()](Expected<cast::Digest> head) {
    if (stopped_) return;
    r->ending_asked = false;
    if (!head || r->link || length != r->entry->length()) {
      if (!head) spdlog::error("event=journal_unreadable recording={} reason=\"{}\"", r->entry->meta().recording.text(), head.error().doing);
      return;
    }
    (void)r->entry->update([&](journal::Meta& m) {
      m.ending = Ending::cut;
      m.length = length;
      m.head = cast::hex(*head);
      m.reason = m.gap || !r->entry->failure().empty() ? "journal_failed" : "session_died";
    });
    spdlog::warn("event=recording_cut recording={} length={} reason={}", r->entry->meta().recording.text(), length, r->entry->meta().reason);
    r->entry->sync([](Expected<Done>) {});
    poke(*r);
    seek_recorder(*r);
    run_failover();
  });
}

void Relay::look_for_dead_sessions() {
  std::vector<RecordingPtr> away;
  for (const auto& [id, r] : recordings_)
    if (!r->link) away.push_back(r);
  for (const auto& r : away) check_session(r);
  std::erase_if(lost_at_start_, [&](const auto& m) { return unix_ms() - m.created_ms > settings_.gap_keep.count(); });
}

/// Nothing is left to do for it and nobody asks for it again.
void Relay::remove_if_done(const RecordingPtr& r) {
  const auto& meta = r->entry->meta();
  if (!meta.stored || r->storing || r->link || !meta.parts.empty()) return;
  if (!r->ended_link && !session_is_dead(meta)) return;
  if (meta.gap && unix_ms() - meta.created_ms < settings_.gap_keep.count()) return;
  r->entry->remove();
  by_key_.erase(r->key);
  recordings_.erase(Id{meta.recording});
}

// --- recorders --------------------------------------------------------------------------------------------------------------

Relay::Node& Relay::node(const std::string& name) {
  auto& slot = nodes_[name];
  if (slot) return *slot;
  slot = std::make_unique<Node>();
  Node& n = *slot;
  n.name = name;
  n.index = by_index_.size();
  by_index_.push_back(&n);
  n.last_wanted = Clock::now();
  const auto endpoint = Endpoint::parse(name, 80);
  if (!endpoint) {
    spdlog::error("event=recorder_unusable recorder={} reason=\"not a numeric address and port\"", postern::safe_quoted(name));
    return n;  // attempts at it fail at once
  }
  n.client = std::make_unique<RecorderClient>(io_, settings_, *endpoint,
                                              RecorderClient::Handlers{[this, &n] {
                                                                         spdlog::info("event=recorder_healthy recorder={}", n.name);
                                                                         failover_.answering(n.index);
                                                                         run_failover();
                                                                         run_queue(n);
                                                                         last_moved_ = {};
                                                                       },
                                                                       [this, &n] {
                                                                         spdlog::info("event=recorder_not_accepting recorder={}", n.name);
                                                                         failover_.not_accepting(n.index);
                                                                         run_failover();
                                                                       },
                                                                       [this, &n](const std::string& why) { on_lost(n, why); }});
  return n;
}

void Relay::on_lost(Node& n, const std::string& why) {
  unsigned moving = 0;
  for (auto& [key, r] : by_key_) {
    const auto* at = failover_.at(key);
    if (!at || *at != n.index) continue;
    moving++;
    drop_upload(*r, true);
  }
  n.queue.clear();
  if (failover_.up(n.index) || moving > 0)
    spdlog::warn("event=recorder_lost recorder={} recordings={} reason=\"{}\"", n.name, moving, why);
  else
    spdlog::debug("event=recorder_unreachable recorder={} reason=\"{}\"", n.name, why);
  failover_.lost(n.index);
  // The next attempt need not wait for the rest of its pause.
  if (attempts_running_) {
    attempt_timer_.cancel();
    attempts_running_ = false;
    run_attempts();
  }
  run_failover();
}

/// Lets go of the stream. `had_part`: the recorder may hold bytes, and is told later that they went elsewhere.
void Relay::drop_upload(Recording& r, bool had_part) {
  release_slot(r);
  r.attempt++;
  if (!r.upload) return;
  r.upload->cancel();
  r.upload.reset();
  const auto* at = failover_.at(r.key);
  if (!had_part || !at) return;
  const auto name = by_index_[*at]->name;
  // In the page cache only until the next open raises the epoch: that is one line and one fdatasync for both.
  if (std::find(r.entry->meta().parts.begin(), r.entry->meta().parts.end(), name) == r.entry->meta().parts.end())
    (void)r.entry->update([&](journal::Meta& m) { m.parts.push_back(name); });
}

void Relay::run_failover() {
  if (in_failover_ || stopped_) return;
  in_failover_ = true;
  for (;;) {
    const auto actions = failover_.take();
    if (actions.empty()) break;
    for (const auto& action : actions) {
      const auto r = find(action.recording);
      switch (action.kind) {
        case Failover::Action::Kind::attempt: attempts_.push_back(action.recorder); break;
        case Failover::Action::Kind::open:
          if (r) queue_open(*by_index_[action.recorder], *r);
          break;
        case Failover::Action::Kind::tell:
          if (r) {
            r->state = {action.state, action.state == RecorderState::recording ? by_index_[action.recorder]->name : ""};
            if (r->link) r->link->state(r->state);
            const auto id = r->entry->meta().recording.text();
            if (action.state == RecorderState::recording)
              spdlog::info("event=recording_at recording={} recorder={}", id, r->state.recorder);
            else if (action.state == RecorderState::none)
              spdlog::warn("event=no_recorder recording={} enforce={}", id, r->entry->meta().enforce);
          }
          break;
      }
    }
    run_attempts();
  }
  in_failover_ = false;
}

/// Starts attempts one after the other, attempt_stagger apart; a failed one lets the next begin at once.
void Relay::run_attempts() {
  while (!attempts_.empty() && !attempts_running_) {
    Node& n = *by_index_[attempts_.front()];
    attempts_.pop_front();
    n.last_wanted = Clock::now();
    if (!n.client) {
      failover_.lost(n.index);
      continue;
    }
    n.client->attempt();
    if (attempts_.empty()) break;
    attempts_running_ = true;
    attempt_timer_.expires_after(settings_.attempt_stagger);
    attempt_timer_.async_wait([this](error_code ec) {
      if (ec || stopped_) return;
      attempts_running_ = false;
      run_attempts();
      run_failover();
    });
  }
}

void Relay::queue_open(Node& n, Recording& r) {
  drop_upload(r, false);
  n.queue.emplace_back(r.key, ++r.attempt);
  run_queue(n);
}

void Relay::release_slot(Recording& r) {
  if (!r.slot) return;
  r.slot = false;
  // The place was the recorder's where the recording is; it is found before failover forgets it.
  if (const auto* at = failover_.at(r.key)) {
    Node& n = *by_index_[*at];
    if (n.slots > 0) n.slots--;
    asio::post(io_, [this, &n] {
      if (!stopped_) run_queue(n);
    });
  }
}

void Relay::run_queue(Node& n) {
  while (!n.queue.empty()) {
    // Those whose users wait for commits first, then those with a living session, then what is left of old ones.
    const auto rank = [&](const auto& waiting) {
      const auto r = find(waiting.first);
      if (!r) return 0;
      return r->link ? (r->entry->meta().enforce ? 1 : 2) : 3;
    };
    const auto best = std::min_element(n.queue.begin(), n.queue.end(), [&](const auto& x, const auto& y) { return rank(x) < rank(y); });
    // The number of replays is limited for the sake of those who use the recorder now, so they themselves are not: under fail closed
    // a session that waited here behind gigabytes of others would be refused or ended.
    if (n.slots >= settings_.replays && rank(*best) > 1) break;
    const auto [key, attempt] = *best;
    n.queue.erase(best);
    const auto r = find(key);
    if (!r || r->attempt != attempt) continue;
    n.slots++;
    r->slot = true;
    open_at(n, r, attempt);
  }
}

void Relay::raise_epoch(const RecordingPtr& r, std::uint64_t above, std::function<void(journal::Meta&)> change, std::function<void()> then) {
  const bool first = r->entry->meta().epoch == 0 && above == 0;
  auto written = r->entry->update([&](journal::Meta& m) {
    m.epoch = std::max(m.epoch, above) + 1;
    if (change) change(m);
  });
  // The first open of all need not wait for the disk, and a login waits for it: an epoch that a loss of power took from the meta was
  // used by nobody who is still alive, and a recorder that had stored it says so when it is used again (stale_epoch).
  if (written && first) {
    r->entry->sync([](Expected<Done>) {});
    return asio::post(io_, [this, then = std::move(then)] {
      if (!stopped_) then();
    });
  }
  // A full disk must not keep a recording from a recorder that has room. Should this epoch be used once more after a power loss,
  // the recorder refuses it and says which it has.
  if (!written) return asio::post(io_, std::move(then));
  r->entry->sync([this, then = std::move(then)](Expected<Done>) {
    if (!stopped_) then();
  });
}

void Relay::open_at(Node& n, const RecordingPtr& r, std::uint64_t attempt) {
  const auto name = n.name;
  const auto change = [&](journal::Meta& m) {
    m.recorder = name;
    std::erase(m.parts, name);
  };
  raise_epoch(r, 0, change, [this, &n, r, attempt] {
    if (r->attempt != attempt) return;  // lost meanwhile; failover has it in hand
    if (!n.client || !n.client->up()) return on_refused(r, n, {"not_accepting", 0, 0, "it stopped accepting"});
    std::weak_ptr<Recording> weak = r;
    const auto mine = [this, weak, attempt]() -> RecordingPtr {
      const auto self = weak.lock();
      return self && self->attempt == attempt && !stopped_ ? self : nullptr;
    };
    Upload::Handlers handlers;
    handlers.opened = [this, mine, &n] {
      if (const auto self = mine()) {
        self->stale = 0;
        failover_.opened(self->key, n.index);
        run_failover();
        last_moved_ = {};
      }
    };
    handlers.acked = [this, mine](std::uint64_t offset) {
      if (const auto self = mine()) {
        self->committed = std::max(self->committed, offset);
        tell_acks(*self);
        tell_ended(*self);
      }
    };
    handlers.caught_up = [this, mine] {
      if (const auto self = mine()) release_slot(*self);
    };
    handlers.stored = [this, mine, &n](bool cut) {
      if (const auto self = mine()) on_stored(self, n, cut);
    };
    handlers.refused = [this, mine, &n](const Upload::Refused& why) {
      if (const auto self = mine()) on_refused(self, n, why);
    };
    r->upload = std::make_shared<Upload>(
        r->entry, r->entry->meta().epoch, settings_.name,
        [this, weak](std::uint64_t offset, std::function<void(Expected<cast::Digest>)> done) {
          if (const auto self = weak.lock()) heads_.head(*self->entry, self->heads, offset, std::move(done));
        },
        std::move(handlers));
    n.client->upload(r->upload);
  });
}

void Relay::on_stored(const RecordingPtr& r, Node& n, bool cut) {
  const auto& meta = r->entry->meta();
  spdlog::info("event=recording_stored recording={} recorder={} length={} cut={}", meta.recording.text(), n.name, meta.length, cut);
  r->committed = std::max(r->committed, meta.length);
  tell_acks(*r);
  tell_ended(*r);
  release_slot(*r);
  r->attempt++;
  r->upload.reset();
  failover_.remove(r->key);
  r->storing = true;
  // Durable first: were the bytes gone and this line not, the next relay would take the recording for lost.
  auto written = r->entry->update([&](journal::Meta& m) {
    m.stored = true;
    m.recorder = n.name;
    m.committed = m.length;
  });
  const auto drop = [this, r](Expected<Done> done) {
    r->storing = false;
    if (done) r->entry->drop_bytes();
    if (stopped_) return;
    tell_moved(r);
    remove_if_done(r);
  };
  if (!written) {
    // Bytes that a recorder has are what a full disk can do without.
    r->entry->drop_bytes();
    return drop(Done{});
  }
  r->entry->sync(drop);
}

void Relay::on_refused(const RecordingPtr& r, Node& n, const Upload::Refused& why) {
  const auto id = r->entry->meta().recording.text();
  spdlog::warn("event=upload_refused recording={} recorder={} status={} code={} reason={}", id, n.name, why.status, postern::safe_quoted(why.code, 32), postern::safe_quoted(why.message));
  if (why.code == "disk_full") {
    // Not of this recording alone: all of them move.
    if (n.client) n.client->disk_full(why.message);
    return;
  }
  if (why.code == "stale_epoch" && why.epoch >= r->entry->meta().epoch && ++r->stale <= most_stale) {
    const auto attempt = ++r->attempt;
    r->upload.reset();
    (void)r->entry->update([&](journal::Meta& m) { m.epoch = why.epoch; });
    open_at(n, r, attempt);
    return;
  }
  const bool for_good = why.code == "conflict" || why.code == "io_error" || why.code == "not_yours" || why.code == "too_large" || (why.code == "bad_request" && why.status == 400);
  if (for_good) spdlog::error("event=recording_unwelcome recording={} recorder={} code={}", id, n.name, postern::safe_quoted(why.code, 32));
  drop_upload(*r, why.code != "conflict" && why.code != "not_yours");
  failover_.refused(r->key, n.index, for_good ? Failover::Refusal::for_good : Failover::Refusal::for_now);
  run_failover();
}

/// Tells recorders with a part that will not grow where the recording went.
void Relay::tell_moved(const RecordingPtr& r) {
  const auto& meta = r->entry->meta();
  const bool settled = meta.stored || (r->upload && r->upload->is_open());
  if (!settled || r->storing) return;
  for (const auto& name : std::vector<std::string>{meta.parts}) {
    if (name == meta.recorder) {
      (void)r->entry->update([&](journal::Meta& m) { std::erase(m.parts, name); });
      continue;
    }
    Node& n = node(name);
    if (!n.client || !n.client->up() || r->telling.contains(name)) continue;
    r->telling.insert(name);
    raise_epoch(r, 0, {}, [this, r, name, &n] {
      const auto& m = r->entry->meta();
      const auto over = [this, r, name](bool known) {
        r->telling.erase(name);
        if (!known || stopped_) return;
        (void)r->entry->update([&](journal::Meta& change) { std::erase(change.parts, name); });
        remove_if_done(r);
      };
      if (!n.client || !n.client->up() || std::find(m.parts.begin(), m.parts.end(), name) == m.parts.end()) return over(false);
      n.client->moved(m.recording, m.recorder, m.epoch, [this, r, name, over](const RecorderClient::MovedAnswer& answer) {
        if (answer.code == "stale_epoch" && answer.epoch >= r->entry->meta().epoch)
          (void)r->entry->update([&](journal::Meta& change) { change.epoch = answer.epoch; });
        else if (answer.status != 0)
          spdlog::info("event=moved_told recording={} recorder={} status={}", r->entry->meta().recording.text(), name, answer.status);
        over(answer.status == 200 || answer.status == 404);
      });
    });
  }
}

void Relay::tick() {
  ticker_.expires_after(tick_interval);
  ticker_.async_wait([this](error_code ec) {
    if (ec || stopped_) return;
    const auto now = Clock::now();
    if (now - last_tick_ > stood_still) awake_since_ = now;
    last_tick_ = now;
    // Who is needed?
    std::map<std::string, RecorderClient::Wanted> wanted;
    for (const auto& [id, r] : recordings_) {
      const auto& meta = r->entry->meta();
      if (!meta.stored)
        for (const auto& name : meta.recorders) wanted[name] = RecorderClient::Wanted::now;
      for (const auto& name : meta.parts) wanted.try_emplace(name, RecorderClient::Wanted::seldom);
    }
    for (auto& [name, n] : nodes_) {
      if (!n->client) continue;
      const auto it = wanted.find(name);
      auto want = it == wanted.end() ? RecorderClient::Wanted::no : it->second;
      if (want == RecorderClient::Wanted::now) n->last_wanted = now;
      if (now - n->last_wanted < settings_.keep_warm) want = RecorderClient::Wanted::now;
      n->client->want(want);
      n->client->tick(now);
    }
    // Bytes that wait for too long at a recorder whose health lines come: when it commits nothing at all it is lost, otherwise it is
    // that one recording.
    std::map<Node*, std::pair<unsigned, unsigned>> waiting;  // late, on time
    for (auto& [key, r] : by_key_) {
      const auto* at = failover_.at(key);
      if (!at || !r->upload) continue;
      const auto since = r->upload->waiting_since();
      auto& count = waiting[by_index_[*at]];
      (since && now - std::max(*since, awake_since_) > settings_.commit_timeout ? count.first : count.second)++;
    }
    for (auto& [n, count] : waiting) {
      if (count.first == 0) continue;
      if (count.second == 0) {
        n->client->hangs("nothing was committed for " + std::to_string(settings_.commit_timeout.count()) + " ms");
        continue;
      }
      for (auto& [key, r] : std::map{by_key_}) {
        const auto* at = failover_.at(key);
        if (!at || by_index_[*at] != n || !r->upload) continue;
        if (const auto since = r->upload->waiting_since(); since && now - std::max(*since, awake_since_) > settings_.commit_timeout) {
          r->upload->cancel();
          on_refused(r, *n, {"", 0, 0, "nothing of it was committed in time"});
        }
      }
    }
    // A program waits for the first line (enforce): one slow disk is not to refuse it while another recorder is there.
    std::vector<RecordingPtr> waits;
    for (auto& [key, r] : by_key_) {
      const auto& meta = r->entry->meta();
      if (!meta.enforce || meta.epoch > 1 || r->committed > 0 || !r->link || !r->upload) continue;
      const auto since = r->upload->waiting_since();
      if (since && now - std::max(*since, awake_since_) > settings_.first_commit_timeout && failover_.has_another(key)) waits.push_back(r);
    }
    for (const auto& r : waits) on_refused(r, *by_index_[*failover_.at(r->key)], {"", 0, 0, "its first line was not committed in time"});
    if (now - last_liveness_ >= settings_.liveness_interval) {
      last_liveness_ = now;
      look_for_dead_sessions();
      failover_.retry();
    }
    if (now - last_moved_ >= settings_.moved_retry) {
      last_moved_ = now;
      std::vector<RecordingPtr> some;
      for (const auto& [id, r] : recordings_)
        if (!r->entry->meta().parts.empty()) some.push_back(r);
      for (const auto& r : some) tell_moved(r);
    }
    run_failover();
    tick();
  });
}

// --- control ----------------------------------------------------------------------------------------------------------------

std::string Relay::listing() const {
  using Json = nlohmann::json;
  std::string out;
  const auto line = [&](const Json& json) { out += json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n"; };
  Json recorders = Json::array();
  for (const auto& [name, n] : nodes_) recorders.push_back({{"recorder", name}, {"up", failover_.up(n->index)}, {"waiting", n->queue.size()}});
  line({{"relay", 1}, {"recordings", recordings_.size()}, {"journal_bytes", journal_.total()}, {"recorders", recorders}});
  const auto describe = [](const journal::Meta& m) {
    Json json{{"id", m.recording.text()}, {"enforce", m.enforce}, {"created_ms", m.created_ms}, {"epoch", m.epoch}, {"recorders", m.recorders}, {"parts", m.parts}};
    if (m.gap) json["gap"] = {{"from", m.gap_from}, {"reason", m.gap_reason}};
    return json;
  };
  for (const auto& [id, r] : recordings_) {
    const auto& m = r->entry->meta();
    Json json = describe(m);
    json["length"] = m.stored ? m.length : r->entry->length();
    json["journaled"] = m.stored ? m.length : r->entry->journaled();
    json["committed"] = r->committed;
    json["stored"] = m.stored;
    json["recorder_state"] = m.stored ? "stored" : name_of(r->state.state);
    json["recorder"] = m.stored ? m.recorder : r->state.recorder;
    json["ending"] = m.ending == Ending::none ? "" : m.ending == Ending::ended ? "ended" : "cut";
    json["session"] = r->link ? "connected" : session_is_dead(m) ? "dead" : "away";
    // The first line as it is, for whoever asks; the relay does not look into it.
    if (!m.stored) {
      std::string first(std::min<std::uint64_t>(r->entry->length(), 64 * 1024), '\0');
      if (const auto have = r->entry->read(0, first); have) {
        first.resize(*have);
        if (const auto end = first.find('\n'); end != std::string::npos) json["header"] = first.substr(0, end);
      }
    }
    line(json);
  }
  for (const auto& m : lost_at_start_) {
    Json json = describe(m);
    json["length"] = 0;
    json["stored"] = false;
    json["recorder_state"] = "none";
    json["session"] = session_is_dead(m) ? "dead" : "away";
    line(json);
  }
  line({{"end", true}});
  return out;
}

void Relay::accept_control() {
  control_.async_accept([this](error_code ec, asio::local::stream_protocol::socket socket) {
    if (stopped_) return;
    pid_t pid = 0;
    if (!ec && allowed(socket, pid)) {
      auto held = std::make_shared<asio::local::stream_protocol::socket>(std::move(socket));
      auto text = std::make_shared<std::string>(listing());
      asio::async_write(*held, asio::buffer(*text), [held, text](error_code, std::size_t) {});
    }
    if (!ec) return accept_control();
    auto pause = std::make_shared<asio::steady_timer>(io_, std::chrono::milliseconds{100});
    pause->async_wait([this, pause](error_code) {
      if (!stopped_) accept_control();
    });
  });
}

}  // namespace postern::recorder::relay
