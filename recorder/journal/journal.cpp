#include "recorder/journal/journal.h"

#include "base/file.h"

#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

namespace postern::recorder::journal {
namespace {

using Json = nlohmann::json;
constexpr std::size_t largest_meta = 3500;
constexpr std::size_t largest_meta_file = 64 * 1024 * 1024;  // a line is added at each change
constexpr auto lock_patience = std::chrono::seconds{3};  // a predecessor that was just killed

constexpr const char* ending_names[] = {"none", "ended", "cut"};

/// Empty when it cannot be read: what there is of it is nothing then, and that is an error in the log.
std::string text_of(const std::string& path) {
  auto text = read_whole_file(path, largest_meta_file);
  return text ? std::move(*text) : std::string{};
}

template <class T>
void get(const Json& json, const char* name, T& into) {
  if (const auto it = json.find(name); it != json.end()) into = it->get<T>();
}

/// Of the descriptor; -1 and errno on failure.
int sync_file(int fd) {
  int result;
  do result = ::fdatasync(fd);
  while (result != 0 && errno == EINTR);
  return result;
}

}  // namespace

std::string Meta::line() const {
  const Json json{{"version", 1},
                  {"id", recording.text()},
                  {"recorders", recorders},
                  {"enforce", enforce},
                  {"boot_id", boot_id},
                  {"pid", pid},
                  {"start_time", start_time},
                  {"created_ms", created_ms},
                  {"epoch", epoch},
                  {"ending", ending_names[static_cast<int>(ending)]},
                  {"length", length},
                  {"head", head},
                  {"reason", reason},
                  {"signature", signature},
                  {"recorder", recorder},
                  {"committed", committed},
                  {"stored", stored},
                  {"parts", parts},
                  {"gap", gap},
                  {"gap_from", gap_from},
                  {"gap_reason", gap_reason}};
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::optional<Meta> Meta::parse(std::string_view line) {
  const Json json = Json::parse(line.begin(), line.end(), nullptr, false);
  if (!json.is_object()) return std::nullopt;
  Meta m;
  try {
    const auto id = Id::parse(json.at("id").get<std::string>());
    if (!id || json.at("version") != 1) return std::nullopt;
    m.recording = *id;
    get(json, "recorders", m.recorders);
    get(json, "enforce", m.enforce);
    get(json, "boot_id", m.boot_id);
    get(json, "pid", m.pid);
    get(json, "start_time", m.start_time);
    get(json, "created_ms", m.created_ms);
    get(json, "epoch", m.epoch);
    get(json, "length", m.length);
    get(json, "head", m.head);
    get(json, "reason", m.reason);
    get(json, "signature", m.signature);
    get(json, "recorder", m.recorder);
    get(json, "committed", m.committed);
    get(json, "stored", m.stored);
    get(json, "parts", m.parts);
    get(json, "gap", m.gap);
    get(json, "gap_from", m.gap_from);
    get(json, "gap_reason", m.gap_reason);
    std::string ending;
    get(json, "ending", ending);
    for (int i = 0; i < 3; i++)
      if (ending == ending_names[i]) m.ending = static_cast<Ending>(i);
  } catch (const Json::exception&) {
    return std::nullopt;
  }
  return m;
}

// --- Entry ------------------------------------------------------------------------------------------------------------------

std::filesystem::path Entry::path(const char* extension) const { return journal_->settings_.dir / (meta_.recording.text() + extension); }

void Entry::fail(std::string why) {
  if (!failure_.empty()) return;
  failure_ = std::move(why);
  spdlog::error("event=journal_failed recording={} length={} journaled={} reason=\"{}\"", meta_.recording.text(), length_, journaled_, failure_);
}

bool Entry::room_for(std::uint64_t bytes) {
  const auto& s = journal_->settings_;
  if (length_ + bytes > s.recording_quota)
    fail("the quota of this recording is used up");
  else if (journal_->total_ + bytes > s.total_quota)
    fail("the quota of the journal is used up");
  else if (journal_->room() < bytes)
    fail("free space is below min_free");
  return failure_.empty();
}

Expected<Done> Entry::append(std::string_view bytes) {
  if (!failure_.empty()) return Unexpected{Error{EIO, failure_}};
  if (!room_for(bytes.size())) return Unexpected{Error{EDQUOT, failure_}};
  if (!cast_) {
    fail("the bytes are gone");
    return Unexpected{Error{EBADF, failure_}};
  }
  bool moved = false;
  while (!bytes.empty()) {
    const ssize_t n = ::write(cast_.get(), bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      fail(std::string{"write: "} + std::strerror(errno));
      break;
    }
    moved = true;
    length_ += static_cast<std::size_t>(n);
    journal_->total_ += static_cast<std::size_t>(n);
    journal_->used(static_cast<std::size_t>(n));
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
  if (moved) {
    const std::lock_guard lock{journal_->mutex_};
    cast_dirty_ = true;
    journal_->queue(*this);
  }
  if (!failure_.empty()) return Unexpected{Error{EIO, failure_}};
  return Done{};
}

Expected<std::size_t> Entry::read(std::uint64_t offset, std::span<char> into) const {
  std::size_t have = 0;
  while (have < into.size()) {
    const ssize_t n = ::pread(cast_.get(), into.data() + have, into.size() - have, static_cast<off_t>(offset + have));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Unexpected{system_error("read of the journal of " + meta_.recording.text())};
    if (n == 0) break;
    have += static_cast<std::size_t>(n);
  }
  return have;
}

UniqueFd Entry::descriptor() const { return UniqueFd{cast_ ? ::fcntl(cast_.get(), F_DUPFD_CLOEXEC, 0) : -1}; }

Expected<Done> Entry::update(const std::function<void(Meta&)>& change) {
  change(meta_);
  const std::string line = meta_.line();
  if (meta_size_ + line.size() > largest_meta && meta_size_ > 0) {
    // Old lines are dropped by a new file. Its bytes must be on the disk before its name is (rename(2) alone may leave an empty
    // file after a power loss), so this one line in ten waits here.
    const auto fresh = path(".meta.new");
    UniqueFd file{::open(fresh.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600)};
    if (file && ::write(file.get(), line.data(), line.size()) == static_cast<ssize_t>(line.size()) && sync_file(file.get()) == 0 &&
        ::rename(fresh.c_str(), path(".meta").c_str()) == 0) {
      const std::lock_guard lock{journal_->mutex_};
      old_files_.push_back(std::move(meta_file_));  // the thread may be syncing it
      meta_file_ = std::move(file);
      meta_size_ = line.size();
      meta_dirty_ = new_ = true;
      journal_->queue(*this);
      return Done{};
    }
    ::unlink(fresh.c_str());
  }
  const ssize_t n = ::write(meta_file_.get(), line.data(), line.size());
  if (n != static_cast<ssize_t>(line.size())) {
    auto error = system_error("write of the journal's meta of " + meta_.recording.text(), n < 0 ? errno : ENOSPC);
    // A line that is cut must not spoil the next one.
    if (n > 0) (void)!::write(meta_file_.get(), "\n", 1);
    spdlog::error("event=journal_meta_failed recording={} reason=\"{}\"", meta_.recording.text(), error.doing);
    return Unexpected{std::move(error)};
  }
  meta_size_ += line.size();
  const std::lock_guard lock{journal_->mutex_};
  meta_dirty_ = true;
  // A new entry waits for what comes next, in the same moment: the epoch of its first open, or its header. So a login waits for one
  // turn of the disk where it would wait for two and the rest between them (15 of 40 ms on a busy disk).
  if (!being_made_) journal_->queue(*this);
  return Done{};
}

void Entry::sync(std::function<void(Expected<Done>)> done) {
  const std::lock_guard lock{journal_->mutex_};
  waiting_.push_back(std::move(done));
  journal_->queue(*this);
}

void Entry::drop_bytes() {
  if (!cast_ || dropped_) return;
  dropped_ = true;
  ::unlink(path(".cast").c_str());
  journal_->total_ -= length_;
  const std::lock_guard lock{journal_->mutex_};  // the thread may be about to take the descriptor
  cast_dirty_ = false;
  if (!queued_) cast_.reset();  // else after its turn: an open file keeps its blocks
}

void Entry::remove() {
  drop_bytes();
  ::unlink(path(".meta").c_str());
}

// --- Journal ----------------------------------------------------------------------------------------------------------------

Journal::Journal(Settings settings, std::function<void(std::function<void()>)> post) : settings_{std::move(settings)}, post_{std::move(post)} {
  thread_ = std::thread{[this] { run(); }};
}

Journal::~Journal() {
  {
    const std::lock_guard lock{mutex_};
    stop_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

Expected<std::vector<std::shared_ptr<Entry>>> Journal::load() {
  std::error_code ec;
  std::filesystem::create_directories(settings_.dir, ec);
  folder_.reset(::open(settings_.dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder_) return Unexpected{system_error("open of the journal's folder " + settings_.dir.string())};
  if (::fchmod(folder_.get(), 0700) != 0) return Unexpected{system_error("chmod of " + settings_.dir.string())};
  const auto until = std::chrono::steady_clock::now() + lock_patience;
  while (::flock(folder_.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK || std::chrono::steady_clock::now() > until)
      return Unexpected{system_error("lock of the journal's folder " + settings_.dir.string() + " (does another relay use it?)")};
    std::this_thread::sleep_for(std::chrono::milliseconds{20});
  }
  std::vector<std::shared_ptr<Entry>> entries;
  for (std::filesystem::directory_iterator it{settings_.dir, ec}, end; !ec && it != end; it.increment(ec)) {
    if (it->path().extension() != ".meta") continue;
    const std::string text = text_of(it->path());
    std::optional<Meta> meta;
    for (std::size_t at = 0; at < text.size();) {
      const auto stop = text.find('\n', at);
      if (stop == std::string::npos) break;
      if (auto m = Meta::parse(std::string_view{text}.substr(at, stop - at))) meta = std::move(m);
      at = stop + 1;
    }
    const auto id = Id::parse(it->path().stem().string());
    if (!meta || !id || meta->recording != *id) {
      // Never deleted: a person may find bytes of use beside it.
      spdlog::error("event=journal_unreadable file={}", it->path().filename().string());
      continue;
    }
    auto entry = std::shared_ptr<Entry>(new Entry{*this, std::move(*meta)});
    entry->meta_file_.reset(::open(it->path().c_str(), O_WRONLY | O_APPEND | O_CLOEXEC));
    if (!entry->meta_file_) return Unexpected{system_error("open of " + it->path().string())};
    if (!text.empty() && text.back() != '\n') (void)!::write(entry->meta_file_.get(), "\n", 1);
    if (!entry->meta_.stored) {
      entry->cast_.reset(::open(entry->path(".cast").c_str(), O_RDWR | O_APPEND | O_CLOEXEC));
      if (!entry->cast_ && !entry->meta_.gap) {
        spdlog::error("event=journal_unreadable file={}", entry->path(".cast").filename().string());
        continue;
      }
    } else {
      ::unlink(entry->path(".cast").c_str());
    }
    struct stat status{};
    entry->meta_size_ = text.size();
    if (entry->cast_ && ::fstat(entry->cast_.get(), &status) == 0) entry->length_ = static_cast<std::uint64_t>(status.st_size);
    total_ += entry->length_;
    // What the predecessor wrote may be in the page cache only.
    const std::lock_guard lock{mutex_};
    entry->cast_dirty_ = static_cast<bool>(entry->cast_);
    entry->meta_dirty_ = entry->new_ = true;
    queue(*entry);
    entries.push_back(std::move(entry));
  }
  if (ec) return Unexpected{system_error("read of the journal's folder " + settings_.dir.string(), ec.value())};
  return entries;
}

Expected<std::shared_ptr<Entry>> Journal::create(Meta meta) {
  auto entry = std::shared_ptr<Entry>(new Entry{*this, std::move(meta)});
  const auto open = [&](const char* extension) {
    return UniqueFd{::open(entry->path(extension).c_str(), O_RDWR | O_APPEND | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600)};
  };
  entry->cast_ = open(".cast");
  if (!entry->cast_) return Unexpected{system_error("making " + entry->path(".cast").string())};
  entry->meta_file_ = open(".meta");
  if (!entry->meta_file_) {
    auto error = system_error("making " + entry->path(".meta").string());
    ::unlink(entry->path(".cast").c_str());
    return Unexpected{std::move(error)};
  }
  {
    const std::lock_guard lock{mutex_};
    entry->new_ = true;
  }
  entry->being_made_ = true;
  if (auto written = entry->update([](Meta&) {}); !written) {
    entry->remove();
    return Unexpected{std::move(written.error())};
  }
  entry->being_made_ = false;
  return entry;
}

std::uint64_t Journal::room() {
  // statvfs(3) for each small write would cost more than the write; a second or a sixteenth of what was free is near enough.
  const auto now = std::chrono::steady_clock::now();
  if (now - room_time_ < std::chrono::seconds{1} && room_ > room_asked_ - room_asked_ / 16) return room_;
  struct statvfs status{};
  if (::fstatvfs(folder_.get(), &status) != 0) return UINT64_MAX;  // write(2) will say
  const std::uint64_t free = static_cast<std::uint64_t>(status.f_bavail) * status.f_frsize;
  room_ = room_asked_ = free > settings_.min_free ? free - settings_.min_free : 0;
  room_time_ = now;
  return room_;
}

void Journal::queue(Entry& entry) {
  if (entry.queued_) return;
  entry.queued_ = true;
  queue_.push_back(entry.shared_from_this());
  wake_.notify_one();
}

void Journal::turn(std::vector<Work>& work) const {
  for (const auto& w : work)
    if (w.cast >= 0) ::sync_file_range(w.cast, 0, 0, SYNC_FILE_RANGE_WRITE);  // starts, does not wait; a hint, errors come below
  bool any_new = false;
  for (auto& w : work) {
    any_new |= w.is_new;
    for (const int fd : {w.cast, w.meta})
      if (fd >= 0 && w.failure.empty() && sync_file(fd) != 0) w.failure = std::string{"fdatasync: "} + std::strerror(errno);
  }
  if (any_new && ::fsync(folder_.get()) != 0)
    for (auto& w : work)
      if (w.is_new && w.failure.empty()) w.failure = std::string{"fsync of the folder: "} + std::strerror(errno);
}

void Journal::run() {
  sigset_t all;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
  using Clock = std::chrono::steady_clock;
  auto next = Clock::now();
  std::unique_lock lock{mutex_};
  for (;;) {
    wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return;
    if (!stop_) wake_.wait_until(lock, next, [this] { return stop_; });
    std::vector<Work> work;
    work.reserve(queue_.size());
    for (auto& entry : queue_) {
      Work w{entry, -1, -1, 0, entry->new_, std::move(entry->waiting_), {}};
      entry->waiting_.clear();
      if (entry->cast_dirty_ && entry->cast_) w.cast = entry->cast_.get();
      if (entry->meta_dirty_) w.meta = entry->meta_file_.get();
      if (w.cast >= 0)
        if (struct stat status{}; ::fstat(w.cast, &status) == 0) w.length = static_cast<std::uint64_t>(status.st_size);
      entry->cast_dirty_ = entry->meta_dirty_ = entry->new_ = false;
      work.push_back(std::move(w));
    }
    queue_.clear();
    lock.unlock();
    const auto begin = Clock::now();
    turn(work);
    // As long a rest as the turn took: what arrives meanwhile shares the next one, and on a fast disk a single login waits for
    // nothing.
    next = Clock::now() + std::min<Clock::duration>(Clock::now() - begin, settings_.sync_interval);
    lock.lock();
    for (auto& w : work) {
      w.entry->old_files_.clear();
      w.entry->queued_ = w.entry->cast_dirty_ || w.entry->meta_dirty_ || !w.entry->waiting_.empty();
      if (w.entry->queued_) queue_.push_back(w.entry);
    }
    const bool stopping = stop_;
    lock.unlock();
    if (!stopping)
      post_([done = std::move(work)]() mutable {
        for (auto& w : done) {
          Entry& e = *w.entry;
          const bool failed_now = !w.failure.empty() && e.failure_.empty();
          if (failed_now) e.fail(w.failure);
          const bool moved = w.failure.empty() && w.cast >= 0 && w.length > e.journaled_ && e.failure_.rfind("fdatasync", 0) != 0;
          if (moved) e.journaled_ = w.length;
          if (moved && e.on_journaled) e.on_journaled(e.journaled_);
          for (auto& callback : w.waiting) {
            if (w.failure.empty())
              callback(Done{});
            else
              callback(Unexpected{Error{EIO, w.failure}});
          }
          if (failed_now && e.on_failed) e.on_failed(w.failure);
          if (e.dropped_) {
            const std::lock_guard guard{e.journal_->mutex_};
            if (!e.queued_) e.cast_.reset();
          }
        }
      });
    lock.lock();
  }
}

}  // namespace postern::recorder::journal
