#include "sshd/session/tee.h"

#include "base/processes.h"

#include <spdlog/spdlog.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <ctime>
#include <iterator>

namespace postern::sshd::session {
namespace {

using recorder::wire::RecorderState;
using recorder::wire::RecordingOpen;
using recorder::wire::RelayLink;

constexpr std::chrono::milliseconds check_interval{200};
constexpr std::chrono::milliseconds mark_every{100};

/// CLOCK_BOOTTIME: goes on while the machine sleeps, so that a player shows the pause (DESIGN section 4).
std::uint64_t boot_ns() {
  timespec t{};
  ::clock_gettime(CLOCK_BOOTTIME, &t);
  return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000'000U + static_cast<std::uint64_t>(t.tv_nsec);
}

}  // namespace

void Tee::Lag::update(std::uint64_t reached, std::uint64_t goal, Clock::time_point now) {
  const bool lags = reached < goal;
  if (lags && (!lagging || reached != seen)) since = now;
  lagging = lags;
  seen = reached;
}

Tee::Tee(Poller& poller, const ConnectionFacts& facts, const recorder::cast::Header& header, const Id& recording, Handlers handlers)
    : poller_{poller},
      enforce_{facts.enforce_recorder != 0},
      grace_{facts.recorder_grace_ms},
      start_wait_{facts.recorder_start_ms},
      recording_{recording},
      handlers_{std::move(handlers)},
      start_ns_{boot_ns()},
      encoder_{start_ns_},
      state_since_{Clock::now()} {
  RecordingOpen open;
  open.recording = recording;
  for (std::uint32_t i = 0; i < facts.recorder_count && i < facts.recorders.size(); i++)
    open.recorders.emplace_back(facts.recorders[i].get());
  open.enforce = enforce_;
  open.boot_id = boot_id();
  open.pid = ::getpid();
  open.start_time = stat_of(::getpid()).value_or(ProcessStat{}).start_time;
  RelayLink::Handlers h;
  h.written = [this](std::uint64_t) { link_moved(); };
  h.journaled = [this](std::uint64_t) { link_moved(); };
  h.committed = [this](std::uint64_t) { link_moved(); };
  h.state = [this](RecorderState state, const std::string& recorder) {
    state_since_ = Clock::now();
    if (started_ && state != RecorderState::recording) handlers_.event("recorder_lost", "recording=" + recording_.text());
    if (started_ && state == RecorderState::recording)
      handlers_.event("recorder_found", "recording=" + recording_.text() + " recorder=" + recorder);
    arm_check();
  };
  h.connection = [this](bool connected) {
    spdlog::info("event=relay_{} recording={}", connected ? "connected" : "away", recording_.text());
    arm_check();
    if (connected) link_moved();
  };
  h.journal_failed = [this](const std::string& why) {
    journal_failed_ = true;  // for good: what a journal refused once is not offered to it again (DESIGN section 4 "Journal")
    handlers_.event("journal_failed", "recording=" + recording_.text());
    spdlog::warn("event=journal_failed recording={} why=\"{}\"", recording_.text(), why);
    if (!enforce_) begin_gap("the journal takes no more");
    arm_check();
  };
  h.ended = [this] { finish_end(); };
  link_ = std::make_unique<RelayLink>(poller_, std::string{facts.relay_socket.get()}, std::move(open), std::move(h));

  link_->append(recorder::cast::encode_header(header));
  header_end_ = link_->appended();
  if (enforce_) {
    // A local journal is not enough: the header must stand on a recorder's disk before anything runs.
    check_timer_ = poller_.after(start_wait_, [this] {
      check_timer_ = 0;
      if (started_ || lost_ || ending_) return;
      lost_ = true;
      handlers_.lost();
    });
  } else {
    // Not from within the constructor: the caller does not have this object yet.
    check_timer_ = poller_.after(Clock::duration::zero(), [this] {
      check_timer_ = 0;
      started_ = true;
      arm_check();
      handlers_.started();
    });
  }
}

Tee::~Tee() {
  if (check_timer_ != 0) poller_.cancel(check_timer_);
  if (end_timer_ != 0) poller_.cancel(end_timer_);
  for (Outlet* o : {&output_, &error_})
    if (o->fd) poller_.forget(o->fd.get());
}

void Tee::attach(char stream, UniqueFd to_net) {
  Outlet& o = outlet(stream);
  o.fd = std::move(to_net);
  poller_.watch(o.fd.get(), 0, [this, &o](short events) {
    if ((events & POLLERR) != 0) {  // net closed its end, pipe(7)
      close_outlet(o);
      handlers_.progress();
      return;
    }
    o.full = false;
    poller_.set_events(o.fd.get(), 0);
    release();
  });
}

bool Tee::outlet_open(char stream) const { return static_cast<bool>(outlet(stream).fd); }

std::size_t Tee::may_read(char stream) const {
  const Outlet& o = outlet(stream);
  if (lost_ || ending_) return 0;
  if (o.bytes >= most_unreleased) return 0;
  if (gap_) return largest_read;
  const std::size_t room = link_->room();
  return room < least_room ? 0 : std::min(room, largest_read);
}

void Tee::append(std::string_view encoded) {
  link_->append(encoded);
  arm_check();
}

void Tee::put(char stream, std::span<const std::byte> bytes) {
  Outlet& o = outlet(stream);
  if (!o.fd || bytes.empty()) return;
  Chunk c;
  if (gap_) {
    gap_bytes_ += bytes.size();
    c.end = 0;
  } else {
    write_resize();
    encoded_.clear();
    encoder_.output(stream, bytes, boot_ns(), encoded_);
    append(encoded_);
    c.end = link_->appended();
  }
  c.bytes.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  o.bytes += bytes.size();
  o.waiting.push_back(std::move(c));
  release();
}

void Tee::resize(std::uint32_t cols, std::uint32_t rows) {
  if (gap_ || ending_ || lost_) return;
  resize_waits_.emplace(cols, rows);
  write_resize();
}

void Tee::write_resize() {
  if (!resize_waits_ || gap_ || link_->room() < least_room) return;
  encoded_.clear();
  encoder_.resize(resize_waits_->first, resize_waits_->second, boot_ns(), encoded_);
  resize_waits_.reset();
  append(encoded_);
}

bool Tee::may_take_input() {
  if (lost_ || ending_) return false;
  if (gap_) return true;
  if (journal_failed_) return false;  // fail closed: what nobody records does not get to the program
  for (; !typed_.empty() && typed_.front().first <= link_->written(); typed_.pop_front()) typed_waiting_ -= typed_.front().second;
  return typed_waiting_ < most_input_waiting;
}

void Tee::input(std::span<const std::byte> bytes) {
  if (bytes.empty() || lost_ || ending_) return;
  if (gap_) {
    gap_bytes_ += bytes.size();
    return;
  }
  encoded_.clear();
  encoder_.input(bytes, boot_ns(), encoded_);
  append(encoded_);
  typed_.emplace_back(link_->appended(), encoded_.size());
  typed_waiting_ += encoded_.size();
}

void Tee::mark(std::string_view text) {
  if (gap_ || lost_ || ending_) return;
  marker(text);
  arm_check();
}

void Tee::marker(std::string_view text) {
  const std::uint64_t micros = (boot_ns() - start_ns_) / 1000;
  char line[256];
  const int n = std::snprintf(line, sizeof line, "[%llu.%06llu,\"m\",\"%.*s\"]\n", static_cast<unsigned long long>(micros / 1'000'000),
                              static_cast<unsigned long long>(micros % 1'000'000), static_cast<int>(std::min<std::size_t>(text.size(), 180)),
                              text.data());
  link_->append({line, static_cast<std::size_t>(n)});
}

bool Tee::drained(char stream) const {
  const Outlet& o = outlet(stream);
  return !o.fd || o.waiting.empty();
}

void Tee::finish(char stream) {
  Outlet& o = outlet(stream);
  o.finishing = true;
  if (o.fd && o.waiting.empty()) close_outlet(o);
}

void Tee::close_outlet(Outlet& o) {
  if (!o.fd) return;
  poller_.forget(o.fd.get());
  o.fd.reset();
  o.waiting.clear();
  o.bytes = 0;
}

void Tee::cut_off(char stream, std::string_view line) {
  lost_ = true;
  Outlet& o = outlet(stream);
  // Non-blocking, and the pipe holds 1 MiB: when not even this line fits the user reads nothing anyway.
  if (o.fd && ::write(o.fd.get(), line.data(), line.size()) < 0) spdlog::debug("event=message_not_shown recording={}", recording_.text());
  close_outlet(output_);
  close_outlet(error_);
}

void Tee::end(std::string_view exit_text) {
  if (ending_) return;
  if (gap_) end_gap();
  encoded_.clear();
  encoder_.exit(exit_text, boot_ns(), encoded_);
  link_->append(encoded_);
  ending_ = true;
  finish('o');
  finish('e');
  end_timer_ = poller_.after(journal_failed_ ? Clock::duration::zero() : Clock::duration{recording_end_wait}, [this] {
    end_timer_ = 0;
    finish_end();
  });
  link_->end();
}

void Tee::finish_end() {
  if (ended_ || !ending_) return;
  ended_ = true;
  if (end_timer_ != 0) poller_.cancel(end_timer_);
  end_timer_ = 0;
  if (check_timer_ != 0) poller_.cancel(check_timer_);
  check_timer_ = 0;
  const std::uint64_t left = link_->appended() > link_->written() ? link_->appended() - link_->written() : 0;
  if (left > 0)
    handlers_.event("recording_gap", "recording=" + recording_.text() + " encoded_bytes=" + std::to_string(left) + " at=end");
  handlers_.ended();
}

std::uint64_t Tee::durable() const { return enforce_ ? link_->committed() : link_->journaled(); }

bool Tee::window_open(std::uint64_t end, Clock::time_point now) const {
  const std::uint64_t safe = durable();
  if (end > safe && end - safe > recording_window_bytes) return false;
  return marks_.empty() || now - marks_.front().time <= recording_window_time;
}

void Tee::link_moved() {
  if (!link_) return;
  const auto now = Clock::now();
  const std::uint64_t safe = durable();
  while (!marks_.empty() && marks_.front().offset <= safe) marks_.pop_front();
  written_lag_.update(link_->written(), link_->appended(), now);
  durable_lag_.update(safe, link_->appended(), now);
  if (!started_ && !lost_ && !ending_ && enforce_ && header_end_ > 0 && link_->committed() >= header_end_) {
    started_ = true;
    if (check_timer_ != 0) poller_.cancel(check_timer_);
    check_timer_ = 0;
    arm_check();
    handlers_.started();
    return;
  }
  if (gap_ && !journal_failed_ && link_->written() >= gap_mark_end_) end_gap();
  if (!ending_) write_resize();
  release();
}

void Tee::release() {
  if (releasing_) return;  // progress() may put() more
  releasing_ = true;
  release(output_);
  release(error_);
  releasing_ = false;
  handlers_.progress();
}

void Tee::release(Outlet& o) {
  constexpr std::size_t most_at_once = 16;
  const auto now = Clock::now();
  while (o.fd && !o.full && !o.waiting.empty() && !lost_) {
    std::array<iovec, most_at_once> parts;
    std::size_t n = 0;
    std::size_t total = 0;
    std::uint64_t end = 0;
    for (auto& c : o.waiting) {
      if (n == parts.size()) break;
      if (!gap_ && !unheld_ && c.end > 0 && (c.end > link_->written() || !window_open(c.end, now))) break;
      parts[n++] = {c.bytes.data() + c.shown, c.bytes.size() - c.shown};
      total += c.bytes.size() - c.shown;
      end = std::max(end, c.end);
    }
    if (n == 0) return;
    const ssize_t written = ::writev(o.fd.get(), parts.data(), static_cast<int>(n));
    if (written < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN) {
        o.full = true;
        poller_.set_events(o.fd.get(), POLLOUT);
        return;
      }
      close_outlet(o);  // EPIPE: net is gone or has closed it
      return;
    }
    auto left = static_cast<std::size_t>(written);
    o.bytes -= left;
    while (!o.waiting.empty()) {
      Chunk& c = o.waiting.front();
      const std::size_t rest = c.bytes.size() - c.shown;
      if (left < rest) {
        c.shown += left;
        if (left > 0) shown_ = std::max(shown_, c.end);
        break;
      }
      left -= rest;
      shown_ = std::max(shown_, c.end);
      o.waiting.pop_front();
      if (left == 0) break;
    }
    if (shown_ > durable()) {
      if (marks_.empty() || now - marks_.back().time > mark_every)
        marks_.push_back({shown_, now});
      else
        marks_.back().offset = shown_;
    }
    if (static_cast<std::size_t>(written) < total) {
      o.full = true;
      poller_.set_events(o.fd.get(), POLLOUT);
      return;
    }
  }
  if (o.finishing && o.fd && o.waiting.empty()) close_outlet(o);
}

void Tee::arm_check() {
  if (!link_ || check_timer_ != 0 || !started_ || lost_ || ended_) return;
  const bool quiet = link_->connected() && !gap_ && !journal_failed_ && !bad_since_ && durable() == link_->appended() &&
                     (!enforce_ || link_->state() == RecorderState::recording);
  if (quiet) return;  // no timer in an idle session: a thousand of them are to cost nothing
  check_timer_ = poller_.after(check_interval, [this] {
    check_timer_ = 0;
    check();
    arm_check();
  });
}

bool Tee::healthy(Clock::time_point now) {
  std::optional<Clock::time_point> since;
  const auto earliest = [&since](Clock::time_point t) { since = since ? std::min(*since, t) : t; };
  written_lag_.update(link_->written(), link_->appended(), now);
  durable_lag_.update(durable(), link_->appended(), now);
  if (!link_->connected()) earliest(std::max(link_->away_since(), state_since_));
  if (journal_failed_) earliest(now);
  if (written_lag_.lagging && now - written_lag_.since > written_stall) earliest(written_lag_.since);
  if (enforce_ && link_->state() != RecorderState::recording) earliest(state_since_);
  if (durable_lag_.lagging && now - durable_lag_.since > durable_stall) earliest(now);
  if (!since) {
    bad_since_.reset();
    return true;
  }
  bad_since_ = bad_since_ ? std::min(*bad_since_, *since) : *since;
  return false;
}

void Tee::check() {
  const auto now = Clock::now();
  if (healthy(now)) {
    release();
    return;
  }
  if (now - *bad_since_ < grace_) {
    release();
    return;
  }
  if (enforce_) {
    if (lost_ || (ending_ && drained('o') && drained('e'))) return;
    lost_ = true;
    handlers_.lost();
    return;
  }
  if (!ending_) return begin_gap("no journal");
  unheld_ = true;  // nothing may follow the end: finish_end() tells it if the relay never takes these bytes
  release();
}

void Tee::begin_gap(const std::string& why) {
  if (gap_ || ending_) return;
  gap_ = true;
  gap_bytes_ = 0;
  gap_begun_ns_ = boot_ns();
  marker("gap: recording stopped");  // waits in the link; when the relay has it, the recording can go on
  gap_mark_end_ = link_->appended();
  handlers_.event("recording_gap", "recording=" + recording_.text() + " state=begun");
  spdlog::warn("event=recording_gap recording={} state=begun why=\"{}\"", recording_.text(), why);
  release();
}

void Tee::end_gap() {
  gap_ = false;
  gap_total_ += gap_bytes_;
  const std::uint64_t ms = (boot_ns() - gap_begun_ns_) / 1'000'000;
  marker("gap: " + std::to_string(gap_bytes_) + " bytes in " + std::to_string(ms) + " ms were not recorded");
  handlers_.event("recording_gap", "recording=" + recording_.text() + " state=over bytes=" + std::to_string(gap_bytes_));
}

}  // namespace postern::sshd::session
