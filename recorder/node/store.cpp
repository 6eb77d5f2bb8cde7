#include "recorder/node/store.h"

#include "base/log.h"
#include "recorder/cast/chain.h"

#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <ctime>
#include <deque>
#include <future>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

namespace postern::recorder::node {

namespace fs = std::filesystem;
using cast::Chain;
using nlohmann::json;
using wire::Code;
using wire::ErrorLine;
using Clock = std::chrono::steady_clock;

namespace {

constexpr std::size_t header_limit = 16 * 1024;  // of a first line that a list may show
constexpr std::size_t meta_limit = 1 << 20;      // read from the end of a .meta
constexpr std::uint64_t space_check = 16 << 20;  // bytes written between two looks at the free space
constexpr std::chrono::seconds full_pause{5};    // after ENOSPC, whatever statvfs(3) says (quotas do not show there)

std::int64_t now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::string reason_of(int error) { return std::strerror(error); }  // storage thread or start-up only

/// What is in the last line of a .meta.
enum class Kept : std::uint8_t { part, moved, cut, ended, conflict };
constexpr std::array kept_names{"part", "moved", "cut", "ended", "conflict"};

std::string bounded_header(std::string_view line) {
  const json in = json::parse(line, nullptr, false);
  if (!in.is_object()) return {};
  const auto text = [](const json& v) { return v.get_ref<const std::string&>().substr(0, 256); };
  json out = json::object();
  for (const auto& [key, value] : in.items()) {
    if (out.size() >= 24 || key.size() > 64) continue;
    if (value.is_number() || value.is_boolean()) {
      out[key] = value;
    } else if (value.is_string()) {
      out[key] = text(value);
    } else if (value.is_array() || (value.is_object() && key == "env")) {
      json part = value.is_array() ? json::array() : json::object();
      for (const auto& [name, member] : value.items()) {
        if (!member.is_string() || part.size() >= 16 || name.size() > 64) continue;
        if (value.is_array()) part.push_back(text(member));
        else part[name] = text(member);
      }
      out[key] = std::move(part);
    }
  }
  return out.dump(-1, ' ', false, json::error_handler_t::replace);
}

bool full(int error) { return error == ENOSPC || error == EDQUOT; }

int sync_folder(const fs::path& path) {
  const UniqueFd fd{::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  return fd && ::fsync(fd.get()) == 0 ? 0 : errno;
}

}  // namespace

std::string_view name(CopyState state) {
  constexpr std::array<std::string_view, 6> names{"live", "stalled", "cut", "moved", "whole", "conflict"};
  return names[static_cast<std::size_t>(state)];
}

std::string Copy::line() const {
  json out{{"id", id.text()}, {"state", name(state)}, {"length", length}, {"head", head}, {"epoch", epoch}, {"source", source},
           {"relay", relay}, {"path", path}, {"created_ms", created_ms}, {"updated_ms", updated_ms}, {"moved_to", moved_to},
           {"reason", reason}, {"error", error}};
  if (!header.empty()) out["header"] = json::parse(header, nullptr, false);
  return out.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
}

struct Store::Impl {
  struct PendingOpen {
    UploadId upload = 0;
    std::shared_ptr<UploadSink> sink;
    wire::OpenLine open;
  };
  struct Recording {
    Id id;
    fs::path folder;  // absolute
    Copy info;        // changed by the storage thread under mutex_; it may read without
    Kept kept = Kept::part;
    std::string signature;
    UniqueFd cast, meta;
    std::optional<Chain> chain, durable;  // of the bytes written, and of those synced
    std::uint64_t length = 0, committed = 0;
    std::optional<std::pair<std::uint64_t, Chain>> proven;
    bool failed = false;
    bool meta_torn = false;
    // of the open upload
    UploadId upload = 0;
    std::shared_ptr<UploadSink> sink;
    bool answered = false, got_data = false, is_stalled = false, ending = false;
    std::uint64_t acked = 0;
    std::size_t taken = 0;  // bytes written since the last UploadSink::written
    std::optional<PendingOpen> pending;
    bool hashing = false;
    // of the turn
    bool dirty = false, cast_dirty = false, meta_dirty = false, synced_cast = false, folder_dirty = false, to_rename = false;
    std::vector<std::function<void(const ErrorLine*)>> replies;  // after the turn's syncs; null = they succeeded
    std::string first_line;
    bool header_done = false;

    fs::path part_path() const { return folder / (id.text() + ".cast.part"); }
    fs::path whole_path() const { return folder / (id.text() + ".cast"); }
    fs::path meta_path() const { return folder / (id.text() + ".meta"); }
    bool whole() const { return info.state == CopyState::whole; }
  };
  using Ptr = std::shared_ptr<Recording>;

  Impl(StoreSettings s, std::function<void(std::function<void()>)> p, std::function<void(const wire::HealthLine&)> h)
      : settings{std::move(s)}, post{std::move(p)}, on_health{std::move(h)} {
    if (!settings.sync) settings.sync = [](int fd) { return ::fdatasync(fd); };
  }

  StoreSettings settings;
  std::function<void(std::function<void()>)> post;
  std::function<void(const wire::HealthLine&)> on_health;
  UniqueFd lock;
  std::thread storage, hasher;
  std::atomic<UploadId> next_upload{1};
  std::atomic<bool> abandon{false};

  // Protects queue, hash_queue, stopping, stopped. Taken alone.
  std::mutex queue_mutex;
  std::condition_variable wake, hash_wake;
  std::deque<std::function<void()>> queue;
  std::deque<std::function<void()>> hash_queue;
  bool stopping = false, started = false;
  std::function<void()> stopped;

  // Protects `recordings` (the map) and each Recording::info against list(). Taken alone, never around a system call.
  mutable std::mutex catalog_mutex;
  std::map<Id, Ptr> recordings;

  // Storage thread only.
  std::map<UploadId, Ptr> uploads, waiting;  // waiting: for the hasher
  std::vector<Ptr> dirty, took;
  std::set<fs::path> new_folders;  // to fsync: a folder was made in them
  std::vector<std::function<void()>> outbox;
  boost::asio::thread_pool syncers{16};
  bool urgent = false, closing = false, was_accepting = true;
  std::uint64_t free = 0, since_check = 0;
  Clock::time_point next_health{}, last_turn{}, full_until{};
  std::optional<Clock::time_point> last_commit;

  // ---- queue and loop

  void push(std::function<void()> command) {
    {
      const std::lock_guard guard{queue_mutex};
      queue.push_back(std::move(command));
    }
    wake.notify_one();
  }

  void run() {
    while (true) {
      std::deque<std::function<void()>> batch;
      bool stop = false;
      {
        std::unique_lock guard{queue_mutex};
        auto until = next_health;
        if (!dirty.empty()) until = std::min(until, last_turn + settings.commit_interval);
        wake.wait_until(guard, until, [&] { return !queue.empty() || stopping; });
        batch.swap(queue);
        stop = stopping;
      }
      health();
      for (auto& command : batch) {
        command();
        command = {};
        health();
      }
      report_taken();
      if (!dirty.empty() && (urgent || stop || Clock::now() >= last_turn + settings.commit_interval)) turn();
      deliver();
      if (!stop) continue;
      // What was in the queue is done; nothing that comes now is heard.
      closing = true;
      while (!uploads.empty()) fail(uploads.begin()->second, {"this recorder is shutting down", Code::not_accepting, 0});
      while (!waiting.empty()) refuse_pending(Ptr{waiting.begin()->second}, {"this recorder is shutting down", Code::not_accepting, 0});
      if (!dirty.empty()) turn();
      deliver();
      break;
    }
    std::function<void()> done;
    {
      const std::lock_guard guard{queue_mutex};
      done = std::move(stopped);
    }
    if (done) post(std::move(done));
  }

  void deliver() {
    if (outbox.empty()) return;
    post([events = std::exchange(outbox, {})] {
      for (const auto& e : events) e();
    });
  }

  void report_taken() {
    for (const auto& r : std::exchange(took, {}))
      if (const auto bytes = std::exchange(r->taken, 0); bytes > 0 && r->sink) outbox.push_back([sink = r->sink, bytes] { sink->written(bytes); });
  }

  // ---- space and health

  void look_at_space() {
    since_check = 0;
    struct statvfs vfs {};
    if (::statvfs(settings.dir.c_str(), &vfs) == 0) free = std::min<std::uint64_t>(wire::max_number, std::uint64_t{vfs.f_bavail} * vfs.f_frsize);
    else free = 0;
    if (!has_space()) fail_all_full();
  }
  bool has_space() const { return free >= settings.min_free && Clock::now() >= full_until; }
  ErrorLine full_error() const {
    return {"free space " + std::to_string(free >> 20) + " MiB, min_free " + std::to_string(settings.min_free >> 20) + " MiB", Code::disk_full, 0};
  }
  void fail_all_full() {
    if (uploads.empty()) return;
    spdlog::error("event=disk_full free={} min_free={} uploads={}", free, settings.min_free, uploads.size());
    std::vector<Ptr> open;
    for (const auto& [upload, r] : uploads)
      if (!r->ending) open.push_back(r);  // an end has all its bytes: it may still succeed
    for (const auto& r : open) fail(r, full_error());
  }

  void health() {
    const auto now = Clock::now();
    if (now < next_health) return;
    next_health = now + settings.health_interval;
    look_at_space();
    wire::HealthLine line;
    line.free = free;
    line.min_free = settings.min_free;
    line.accepting = !closing && has_space() && uploads.size() < settings.streams;
    if (!line.accepting) line.reason = std::string{wire::name(!has_space() ? Code::disk_full : Code::not_accepting)};
    if (last_commit) line.last_commit_age_ms = static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(now - *last_commit).count());
    line.live = uploads.size();
    line.time_ms = static_cast<std::uint64_t>(now_ms());
    line.name = settings.name;
    if (std::exchange(was_accepting, line.accepting) != line.accepting)
      spdlog::warn("event=accepting value={} reason={} free={}", line.accepting, line.reason, free);
    deliver();
    post([handler = on_health, line] { handler(line); });
  }

  // ---- the catalog

  template <class F>
  void change(Recording& r, F&& f) {
    const std::lock_guard guard{catalog_mutex};
    f(r.info);
  }

  CopyState state_of(const Recording& r) const {
    if (r.kept == Kept::conflict) return CopyState::conflict;
    if (r.whole()) return CopyState::whole;
    if (r.upload != 0) return r.is_stalled ? CopyState::stalled : CopyState::live;
    if (r.kept == Kept::moved) return CopyState::moved;
    return CopyState::cut;
  }

  void publish(Recording& r) {
    const CopyState state = state_of(r);
    std::string head = r.durable ? cast::hex(r.durable->head()) : r.info.head;
    std::string header;
    if (!r.header_done && r.committed > 0) {
      if (const auto end = r.first_line.find('\n'); end != std::string::npos) {
        if (r.committed > end) {
          header = bounded_header(std::string_view{r.first_line}.substr(0, end));
          r.header_done = true;
          r.first_line = {};
        }
      } else if (r.first_line.size() >= header_limit) {
        r.header_done = true;
        r.first_line = {};
      }
    }
    change(r, [&](Copy& c) {
      if (c.length != r.committed || c.state != state) c.updated_ms = now_ms();
      c.state = state;
      c.length = r.committed;
      c.head = std::move(head);
      if (!header.empty()) c.header = std::move(header);
    });
  }

  Ptr find(const Id& id) const {
    const auto it = recordings.find(id);  // the map is changed by this thread only
    return it == recordings.end() ? nullptr : it->second;
  }
  Ptr of(UploadId upload) const {
    const auto it = uploads.find(upload);
    return it == uploads.end() ? nullptr : it->second;
  }

  void mark(const Ptr& r) {
    if (!std::exchange(r->dirty, true)) dirty.push_back(r);
  }

  /// Descriptors are held only while something goes on.
  void release(Recording& r) {
    if (r.upload != 0 || r.dirty || r.hashing || r.pending) return;
    r.cast.reset();
    r.meta.reset();
    if (r.whole()) r.chain.reset();
  }

  // ---- ends of an upload

  /// The upload is over; the copy stays as it is.
  void let_go(const Ptr& r) {
    uploads.erase(r->upload);
    r->upload = 0;
    r->sink = nullptr;
    r->answered = r->got_data = r->is_stalled = r->ending = false;
    r->taken = 0;
  }

  void fail(Ptr r, ErrorLine error) {  // by value: the caller's may be the one in `uploads`
    spdlog::warn("event=upload_failed recording={} code={} length={} reason={}", r->id.text(), wire::name(error.code), r->length, postern::safe_quoted(error.error));
    outbox.push_back([sink = r->sink, error = std::move(error)] { sink->failed(error); });
    let_go(r);
    publish(*r);
    release(*r);
  }

  void refuse_pending(const Ptr& r, ErrorLine error) {
    outbox.push_back([sink = r->pending->sink, error = std::move(error)] { sink->failed(error); });
    waiting.erase(r->pending->upload);
    r->pending.reset();
  }

  /// Storage of this file is not to be trusted any more: for good.
  void fail_storage(const Ptr& r, const std::string& doing, int error) {
    const std::string text = doing + ": " + reason_of(error);
    spdlog::error("event=storage_failed recording={} reason=\"{}\"", r->id.text(), text);
    r->failed = true;
    change(*r, [&](Copy& c) { c.error = text; });
    if (r->meta && write_meta(*r)) (void)!settings.sync(r->meta.get());  // so that a later start knows too, if the disk takes it
    for (const auto& reply : std::exchange(r->replies, {})) {
      const ErrorLine line{text, Code::io_error, 0};
      reply(&line);
    }
    if (r->upload != 0) fail(r, {text, Code::io_error, 0});
    publish(*r);
    release(*r);
  }

  // ---- meta

  /// Appends what is known as one line: the last whole one counts. A cut line harms nothing.
  bool write_meta(Recording& r) {
    const json line{{"v", 1}, {"id", r.id.text()}, {"epoch", r.info.epoch}, {"source", r.info.source}, {"relay", r.info.relay},
                    {"created_ms", r.info.created_ms}, {"updated_ms", now_ms()}, {"kept", kept_names[static_cast<std::size_t>(r.kept)]},
                    {"moved_to", r.info.moved_to}, {"reason", r.info.reason}, {"error", r.info.error}, {"length", r.length},
                    {"head", r.chain ? cast::hex(r.chain->head()) : r.info.head}, {"signature", r.signature}};
    std::string text = line.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
    if (r.meta_torn) text.insert(0, "\n");
    const ssize_t n = ::write(r.meta.get(), text.data(), text.size());
    if (n == static_cast<ssize_t>(text.size())) {
      r.meta_torn = false;
      r.meta_dirty = true;
      return true;
    }
    if (n >= 0) {
      r.meta_torn = true;
      errno = ENOSPC;
    }
    return false;
  }

  bool open_files(Recording& r, bool create) {
    const int flags = O_CLOEXEC | O_NOFOLLOW | (create ? O_CREAT | O_EXCL : 0);
    if (!r.meta) r.meta.reset(::open(r.meta_path().c_str(), O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0640));
    if (!r.meta) return false;
    if (!r.cast) r.cast.reset(::open(r.whole() ? r.whole_path().c_str() : r.part_path().c_str(), (r.whole() ? O_RDONLY : O_RDWR) | flags, 0640));
    return static_cast<bool>(r.cast);
  }

  // ---- opening

  void open(const wire::OpenLine& line, const Address& source, UploadId upload, const std::shared_ptr<UploadSink>& sink) {
    const auto refuse = [&](ErrorLine error) {
      spdlog::info("event=open_refused recording={} source={} epoch={} code={}", line.id.text(), source.text(), line.epoch, wire::name(error.code));
      outbox.push_back([sink, error = std::move(error)] { sink->failed(error); });
    };
    Ptr r = find(line.id);
    if (r && r->ending) turn();
    if (r) {
      if (r->info.source != source.text()) return refuse({"this recording belongs to another address", Code::not_yours, 0});
      if (r->kept == Kept::conflict) return refuse({"this recording is in conflict", Code::conflict, 0});
      if (r->failed) return refuse({r->info.error, Code::io_error, 0});
      const auto stored = std::max(r->info.epoch, r->pending ? r->pending->open.epoch : 0);
      if (line.epoch <= stored) return refuse({"epoch " + std::to_string(line.epoch) + " is not above " + std::to_string(stored), Code::stale_epoch, stored});
    }
    if (!r || !r->whole()) {
      if (!has_space()) return refuse(full_error());
      if (uploads.size() >= settings.streams) return refuse({"too many uploads", Code::not_accepting, 0});
    }
    if (r && r->upload != 0) fail(r, {"a higher epoch has opened this recording", Code::superseded, 0});
    if (r && r->pending) refuse_pending(r, {"a higher epoch has opened this recording", Code::superseded, 0});
    if (!r) {
      r = make(line, source);
      if (!r->cast) {
        const int error = errno;
        if (full(error)) full_until = Clock::now() + full_pause;
        if (error != EEXIST) ::unlink(r->meta_path().c_str());  // EEXIST: a file that we do not know; it is not ours to touch
        return refuse({"create: " + reason_of(error), full(error) ? Code::disk_full : Code::io_error, 0});
      }
      const std::lock_guard guard{catalog_mutex};
      recordings.emplace(r->id, r);
    }
    if (!r->whole() && !r->chain) {  // found at the start: who knows what is in it
      r->pending = PendingOpen{upload, sink, line};
      waiting.emplace(upload, r);
      if (!std::exchange(r->hashing, true)) hash(r);
      return;
    }
    accept(r, line, upload, sink);
  }

  Ptr make(const wire::OpenLine& line, const Address& source) {
    auto r = std::make_shared<Recording>();
    r->id = line.id;
    const std::time_t seconds = std::time(nullptr);
    std::tm day{};
    ::gmtime_r(&seconds, &day);
    std::array<char, 32> text{};
    fs::path folder = settings.dir;
    for (const char* part : {"%Y", "%m", "%d"}) {
      std::strftime(text.data(), text.size(), part, &day);
      const fs::path parent = folder;
      folder /= text.data();
      if (::mkdir(folder.c_str(), 0750) == 0) new_folders.insert(parent);
    }
    r->folder = folder;
    r->info.id = line.id;
    r->info.source = source.text();
    r->info.created_ms = r->info.updated_ms = now_ms();
    r->chain.emplace(line.id.bytes);
    r->durable = r->chain;
    r->folder_dirty = true;
    r->info.path = fs::relative(r->part_path(), settings.dir).string();
    (void)open_files(*r, true);
    return r;
  }

  void accept(const Ptr& r, const wire::OpenLine& line, UploadId upload, const std::shared_ptr<UploadSink>& sink) {
    if (!open_files(*r, false)) {
      const int error = errno;
      fail_storage(r, "open", error);
      outbox.push_back([sink, text = r->info.error] { sink->failed({text, Code::io_error, 0}); });
      return;
    }
    r->upload = upload;
    r->sink = sink;
    r->answered = r->got_data = r->ending = false;
    if (!r->whole()) r->kept = Kept::part;
    uploads.emplace(upload, r);
    change(*r, [&](Copy& c) {
      c.epoch = line.epoch;
      c.relay = line.relay;
      if (!r->whole()) c.moved_to = c.reason = "";
    });
    mark(r);
    urgent = true;
    if (!write_meta(*r)) return write_failed(r, "meta", errno);
    r->replies.push_back([this, r, upload](const ErrorLine* error) {
      if (error || r->upload != upload) return;
      wire::AnswerLine answer;
      answer.have = r->committed;
      answer.head = r->durable ? cast::hex(r->durable->head()) : r->info.head;
      if (r->whole()) answer.state = "whole";
      if (r->proven && r->proven->first < answer.have) answer.proven = wire::Proven{r->proven->first, cast::hex(r->proven->second.head())};
      r->answered = true;
      r->acked = answer.have;
      spdlog::info("event=recording_opened recording={} source={} relay={} epoch={} have={} state={}", r->id.text(), r->info.source, postern::safe_quoted(r->info.relay),
                   r->info.epoch, answer.have, answer.state);
      outbox.push_back([sink = r->sink, answer] { sink->opened(answer); });
    });
  }

  // ---- hashing what was found

  struct Hashed {
    int error = 0;
    std::optional<Chain> chain;
    std::optional<std::pair<std::uint64_t, Chain>> proven;
    std::string first_line;
  };

  Hashed hash_file(const fs::path& path, const Id& id) {
    Hashed out;
    const UniqueFd fd{::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW)};
    struct stat st {};
    // What is in the page cache only must not be called committed.
    if (!fd || settings.sync(fd.get()) != 0 || ::fstat(fd.get(), &st) != 0) {
      out.error = errno;
      return out;
    }
    const auto size = static_cast<std::uint64_t>(st.st_size);
    // Written and not yet synced were at most turn_bytes, so below this border nothing can have been torn by a power loss.
    const std::uint64_t border = size > settings.turn_bytes ? (size - settings.turn_bytes) / Chain::block_size * Chain::block_size : 0;
    Chain chain{id.bytes};
    std::vector<std::byte> buffer(1 << 20);
    while (chain.offset() < size) {
      if (chain.offset() == border) out.proven.emplace(border, chain);
      std::uint64_t want = std::min<std::uint64_t>(buffer.size(), size - chain.offset());
      if (chain.offset() < border) want = std::min(want, border - chain.offset());
      const ssize_t n = ::pread(fd.get(), buffer.data(), want, static_cast<off_t>(chain.offset()));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0 || abandon) {
        out.error = abandon ? ECANCELED : n < 0 ? errno : EIO;
        return out;
      }
      if (out.first_line.size() < header_limit && out.first_line.size() == chain.offset())
        out.first_line.append(reinterpret_cast<const char*>(buffer.data()), std::min<std::size_t>(static_cast<std::size_t>(n), header_limit));
      chain.update({buffer.data(), static_cast<std::size_t>(n)});
    }
    out.chain = chain;
    return out;
  }

  void hash(const Ptr& r) {
    {
      const std::lock_guard guard{queue_mutex};
      hash_queue.push_back([this, r, path = r->part_path()] {
        auto result = std::make_shared<Hashed>(hash_file(path, r->id));
        push([this, r, result] { hashed(r, *result); });
      });
    }
    hash_wake.notify_one();
  }

  void run_hasher() {
    while (true) {
      std::function<void()> job;
      {
        std::unique_lock guard{queue_mutex};
        hash_wake.wait(guard, [&] { return !hash_queue.empty() || abandon; });
        if (abandon) return;
        job = std::move(hash_queue.front());
        hash_queue.pop_front();
      }
      job();
    }
  }

  void hashed(const Ptr& r, Hashed& result) {
    r->hashing = false;
    if (result.error != 0) {
      fail_storage(r, "read back", result.error);
      if (r->pending) refuse_pending(r, {r->info.error, Code::io_error, 0});
      return;
    }
    r->chain = result.chain;
    r->durable = result.chain;
    r->proven = result.proven;
    r->length = r->committed = result.chain->offset();
    if (!r->header_done) r->first_line = result.first_line;
    if (!r->pending) return publish(*r);
    const auto pending = *std::exchange(r->pending, std::nullopt);
    waiting.erase(pending.upload);
    if (r->info.state == CopyState::conflict || pending.open.epoch <= r->info.epoch)
      outbox.push_back([sink = pending.sink, e = r->info.epoch] { sink->failed({"another open came first", Code::stale_epoch, e}); });
    else
      accept(r, pending.open, pending.upload, pending.sink);
  }

  // ---- bytes

  void append(UploadId upload, std::uint64_t offset, const std::string& bytes) {
    const Ptr r = of(upload);
    if (!r) return;  // over: superseded, failed, ended
    if (!r->answered || r->ending || r->whole()) return fail(r, {"data that nobody asked for", Code::bad_frame, 0});
    if (!r->got_data && r->proven && offset == r->proven->first && offset < r->length) {
      if (!rewind(r)) return;
    }
    if (offset != r->length) return fail(r, {"data at offset " + std::to_string(offset) + ", expected " + std::to_string(r->length), Code::bad_frame, 0});
    if (r->length + bytes.size() > settings.max_recording) return fail(r, {"longer than limits.max_recording", Code::too_large, 0});
    if (r->length > r->committed && r->length - r->committed + bytes.size() > settings.turn_bytes) {
      turn();
      if (of(upload) != r) return;
    }
    if (!std::exchange(r->got_data, true)) {
      urgent = true;  // a header that a login may be waiting for
      r->proven.reset();
    }
    std::size_t done = 0;
    while (done < bytes.size()) {
      const ssize_t n = ::pwrite(r->cast.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(r->length + done));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return write_failed(r, "write", n < 0 ? errno : EIO);
      done += static_cast<std::size_t>(n);
    }
    r->chain->update(std::as_bytes(std::span{bytes.data(), bytes.size()}));
    if (!r->header_done && r->first_line.size() < header_limit && r->first_line.size() == r->length)
      r->first_line.append(bytes, 0, header_limit - r->first_line.size());
    r->length += bytes.size();
    r->cast_dirty = true;
    mark(r);
    if (r->taken == 0) took.push_back(r);
    r->taken += bytes.size();
    since_check += bytes.size();
    if (since_check >= space_check) look_at_space();
  }

  bool rewind(const Ptr& r) {
    const auto& [offset, chain] = *r->proven;
    if (::ftruncate(r->cast.get(), static_cast<off_t>(offset)) != 0) {
      fail_storage(r, "ftruncate", errno);
      return false;
    }
    spdlog::warn("event=recording_rewound recording={} from={} to={}", r->id.text(), r->length, offset);
    r->length = r->committed = offset;
    r->chain = r->durable = chain;
    if (r->acked > offset) r->acked = offset;
    if (r->first_line.size() > offset) r->first_line.resize(offset);
    if (offset == 0) r->header_done = false;
    r->cast_dirty = true;
    mark(r);
    publish(*r);
    return true;
  }

  /// A write(2) failed: the file goes back to what was committed. Want of space passes; anything else is for good.
  void write_failed(const Ptr& r, const char* doing, int error) {
    if (!full(error) && error != EFBIG) return fail_storage(r, doing, error);
    if (!r->whole() && r->durable) {
      if (::ftruncate(r->cast.get(), static_cast<off_t>(r->committed)) != 0) return fail_storage(r, "ftruncate", errno);
      r->length = r->committed;
      r->chain = r->durable;
      r->cast_dirty = true;
      mark(r);
    }
    const ErrorLine line{std::string{doing} + ": " + reason_of(error), Code::disk_full, 0};
    for (const auto& reply : std::exchange(r->replies, {})) reply(&line);
    if (r->upload != 0) fail(r, line);
    if (full(error)) {  // EFBIG is a limit of that one file
      full_until = Clock::now() + full_pause;
      fail_all_full();
    }
  }

  // ---- ends

  void set_conflict(const Ptr& r, const std::string& what) {
    spdlog::critical("event=recording_conflict recording={} source={} length={} reason=\"{}\"", r->id.text(), r->info.source, r->length, what);
    r->kept = Kept::conflict;
    r->ending = true;
    change(*r, [&](Copy& c) { c.reason = what; });
    mark(r);
    urgent = true;
    if (!write_meta(*r)) return write_failed(r, "meta", errno);
    const auto upload = r->upload;
    r->replies.push_back([this, r, upload, what](const ErrorLine* error) {
      if (!error && r->upload == upload) fail(r, {what, Code::conflict, 0});
    });
  }

  void end(UploadId upload, const wire::EndFrame& frame) {
    const Ptr r = of(upload);
    if (!r) return;
    if (!r->answered || r->ending) return fail(r, {"end at this place", Code::bad_frame, 0});
    const std::string head = r->chain ? cast::hex(r->chain->head()) : r->info.head;
    const auto length = r->whole() ? r->info.length : r->length;
    if (frame.length > length) return fail(r, {"end beyond what was sent", Code::bad_frame, 0});
    if (frame.length != length || frame.head != head) return set_conflict(r, "the end's length or head differs");
    r->ending = true;
    urgent = true;
    mark(r);
    if (!r->whole()) {
      r->kept = Kept::ended;
      r->signature = frame.signature;
      if (!write_meta(*r)) {
        r->kept = Kept::part;
        return write_failed(r, "meta", errno);
      }
      r->to_rename = true;
    }
    r->replies.push_back([this, r, upload, head](const ErrorLine* error) {
      if (error || r->upload != upload) return;
      spdlog::info("event=recording_whole recording={} length={} head={}", r->id.text(), r->committed, head);
      outbox.push_back([sink = r->sink, head] { sink->whole(head); });
      let_go(r);
    });
  }

  void cut(UploadId upload, const wire::EndFrame& frame) {
    const Ptr r = of(upload);
    if (!r) return;
    if (!r->answered || r->ending) return fail(r, {"cut at this place", Code::bad_frame, 0});
    if (!r->whole()) {
      if (frame.length > r->length) return fail(r, {"cut beyond what was sent", Code::bad_frame, 0});
      if (frame.length == r->length && frame.head != cast::hex(r->chain->head())) return set_conflict(r, "the cut's head differs");
    }
    r->ending = true;
    urgent = true;
    mark(r);
    if (!r->whole()) {
      r->kept = Kept::cut;
      r->signature = frame.signature;
      change(*r, [&](Copy& c) { c.reason = frame.reason; });
      if (!write_meta(*r)) return write_failed(r, "meta", errno);
    }
    r->replies.push_back([this, r, upload](const ErrorLine* error) {
      if (error || r->upload != upload) return;
      const auto head = r->durable ? cast::hex(r->durable->head()) : r->info.head;
      spdlog::info("event=recording_cut recording={} length={} reason={}", r->id.text(), r->committed, postern::safe_quoted(r->info.reason));
      outbox.push_back([sink = r->sink, head, length = r->committed] { sink->cut(head, length); });
      let_go(r);
    });
  }

  void close(UploadId upload) {
    if (const Ptr r = of(upload)) {
      if (!r->ending) spdlog::info("event=upload_closed recording={} length={}", r->id.text(), r->length);
      if (r->ending) return;  // an end is on its way to the disk and stays valid
      let_go(r);
      publish(*r);
      release(*r);
      return;
    }
    if (const auto it = waiting.find(upload); it != waiting.end()) {
      it->second->pending.reset();
      waiting.erase(it);
    }
  }

  void moved(const Id& id, const wire::MovedNotice& notice, const Address& source, const std::function<void(Expected<wire::MovedAnswer, ErrorLine>)>& done) {
    using Result = Expected<wire::MovedAnswer, ErrorLine>;
    const auto answer = [&](Result result) { outbox.push_back([done, result = std::move(result)] { done(result); }); };
    const auto refuse = [&](ErrorLine error) { answer(Result{Unexpected<ErrorLine>{std::move(error)}}); };
    const Ptr r = find(id);
    if (r && r->ending) turn();
    if (!r) return refuse({"no such recording", Code::not_found, 0});
    if (r->info.source != source.text()) return refuse({"this recording belongs to another address", Code::not_yours, 0});
    if (r->failed) return refuse({r->info.error, Code::io_error, 0});
    const auto now = [](const Recording& rec) { return wire::MovedAnswer{std::string{name(rec.info.state)}, rec.info.length, rec.info.head}; };
    if (r->whole() || r->kept == Kept::conflict) return answer(Result{now(*r)});
    const auto stored = std::max(r->info.epoch, r->pending ? r->pending->open.epoch : 0);
    if (notice.epoch <= stored) return refuse({"epoch is not above " + std::to_string(stored), Code::stale_epoch, stored});
    if (r->upload != 0) fail(r, {"this recording has moved", Code::superseded, 0});
    if (r->pending) refuse_pending(r, {"this recording has moved", Code::superseded, 0});
    if (!r->meta) r->meta.reset(::open(r->meta_path().c_str(), O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0640));
    r->kept = Kept::moved;
    change(*r, [&](Copy& c) {
      c.epoch = notice.epoch;
      c.moved_to = notice.to;
    });
    mark(r);
    urgent = true;
    r->replies.push_back([this, r, now, done](const ErrorLine* error) {
      if (error) return outbox.push_back([done, e = *error] { done(Result{Unexpected<ErrorLine>{e}}); });
      spdlog::info("event=recording_moved recording={} to={} length={}", r->id.text(), postern::safe_quoted(r->info.moved_to), r->committed);
      outbox.push_back([done, result = now(*r)] { done(Result{result}); });
    });
    if (!r->meta || !write_meta(*r)) write_failed(r, "meta", errno);
  }

  // ---- one turn

  void turn() {
    urgent = false;
    last_turn = Clock::now();
    report_taken();
    const auto work = std::exchange(dirty, {});
    // Starts the writeback of all, so that waiting for each costs about one flush together.
    for (const auto& r : work)
      if (r->cast_dirty) ::sync_file_range(r->cast.get(), 0, 0, SYNC_FILE_RANGE_WRITE);
    std::vector<Ptr> wait_for_folder;
    // Folders with new names are synced beside the files: a login waits for both, and a journaling file system makes one commit of them.
    std::set<fs::path> early = std::exchange(new_folders, {}), folders;
    for (const auto& r : work)
      if (r->folder_dirty && !r->to_rename) early.insert(r->folder);
    std::vector<std::future<int>> early_results;
    for (const auto& folder : early) {
      auto task = std::make_shared<std::packaged_task<int()>>([folder] { return sync_folder(folder); });
      early_results.push_back(task->get_future());
      boost::asio::post(syncers, [task] { (*task)(); });
    }
    sync_all(work, [&](const Ptr& r, const Synced& result) {
      health();
      const bool synced = take_synced(r, result);
      r->dirty = false;  // not before: release() would close its files
      if (!synced) return release(*r);
      if (std::exchange(r->to_rename, false)) {
        if (::rename(r->part_path().c_str(), r->whole_path().c_str()) != 0) return fail_storage(r, "rename", errno);
        change(*r, [&](Copy& c) {
          c.state = CopyState::whole;
          c.path = fs::relative(r->whole_path(), settings.dir).string();
        });
        r->folder_dirty = true;
      }
      last_commit = Clock::now();
      if (std::exchange(r->folder_dirty, false)) {
        if (r->whole()) folders.insert(r->folder);  // its new name; a part's was there before
        wait_for_folder.push_back(r);
      } else {
        committed(r);
      }
    });
    int error = 0;
    for (auto& result : early_results) {
      health();
      if (const int e = result.get(); e != 0) error = e;
    }
    for (const auto& folder : folders) {
      health();
      if (const int e = sync_folder(folder); e != 0) error = e;
    }
    for (const auto& r : wait_for_folder) {
      if (error != 0) fail_storage(r, "fsync of the folder", error);
      else committed(r);
    }
    if (!wait_for_folder.empty()) last_commit = Clock::now();
  }

  struct Synced {
    int cast = 0, meta = 0;  // errno, or 0
  };
  Synced sync_files(int cast, int meta) const {
    Synced out;
    if (cast >= 0 && settings.sync(cast) != 0) out.cast = errno;
    if (out.cast == 0 && meta >= 0 && settings.sync(meta) != 0) out.meta = errno;
    return out;
  }

  /// Syncs what is dirty of each and hands the results on as they come. Many at a time: a journaling file system then makes one
  /// commit of them (jbd2), and a thousand recordings that move here do not stand in line for a thousand flushes. The storage
  /// thread waits for each: when none comes back, it stands still, and so do the health lines.
  template <class F>
  void sync_all(const std::vector<Ptr>& work, const F& done) {
    const auto files = [](Recording& r) {
      const int cast = std::exchange(r.cast_dirty, false) && !r.failed ? r.cast.get() : -1;
      const int meta = std::exchange(r.meta_dirty, false) && !r.failed ? r.meta.get() : -1;
      return std::pair{cast, meta};
    };
    if (work.size() <= 2) {
      for (const auto& r : work) {
        const auto [cast, meta] = files(*r);
        r->synced_cast = cast >= 0;
        done(r, sync_files(cast, meta));
      }
      return;
    }
    std::mutex mutex;  // of `results`
    std::condition_variable more;
    std::vector<std::pair<Ptr, Synced>> results;
    for (const auto& r : work) {
      const auto [cast, meta] = files(*r);
      r->synced_cast = cast >= 0;
      boost::asio::post(syncers, [&, r, cast, meta] {
        const Synced result = sync_files(cast, meta);
        // Notified under the lock: the waiter's variables are gone when it has the last one.
        const std::lock_guard guard{mutex};
        results.emplace_back(r, result);
        more.notify_one();
      });
    }
    for (std::size_t left = work.size(); left > 0;) {
      std::vector<std::pair<Ptr, Synced>> ready;
      {
        std::unique_lock guard{mutex};
        more.wait(guard, [&] { return !results.empty(); });
        ready.swap(results);
      }
      left -= ready.size();
      for (const auto& [r, result] : ready) done(r, result);
    }
  }

  bool take_synced(const Ptr& r, const Synced& result) {
    if (r->failed) return false;
    if (result.cast != 0) {
      fail_storage(r, "fdatasync", result.cast);
      return false;
    }
    if (r->synced_cast) {
      r->committed = r->length;
      r->durable = r->chain;
    }
    if (result.meta != 0) {
      fail_storage(r, "fdatasync of the meta file", result.meta);
      return false;
    }
    return true;
  }

  void committed(const Ptr& r) {
    publish(*r);
    for (const auto& reply : std::exchange(r->replies, {})) reply(nullptr);
    if (r->upload != 0 && r->answered && r->committed > r->acked) {
      r->acked = r->committed;
      outbox.push_back([sink = r->sink, n = r->acked] { sink->committed(n); });
    }
    publish(*r);  // a reply may have ended the upload
    release(*r);
    deliver();
  }

  // ---- start

  Expected<Done> scan() {
    std::error_code ec;
    std::uint64_t count = 0;
    const auto digits = [](const std::string& s, std::size_t n) { return s.size() == n && s.find_first_not_of("0123456789") == std::string::npos; };
    for (const auto& year : fs::directory_iterator{settings.dir, ec}) {
      if (!digits(year.path().filename(), 4)) continue;
      for (const auto& month : fs::directory_iterator{year.path(), ec}) {
        if (!digits(month.path().filename(), 2)) continue;
        for (const auto& day : fs::directory_iterator{month.path(), ec}) {
          if (!digits(day.path().filename(), 2)) continue;
          std::error_code inner;
          for (const auto& file : fs::directory_iterator{day.path(), inner}) {
            const std::string text = file.path().filename();
            const auto dot = text.find('.');
            const auto id = Id::parse(std::string_view{text}.substr(0, dot));
            if (!id || dot == std::string::npos) continue;
            const auto rest = text.substr(dot);
            if (rest != ".cast" && rest != ".cast.part") continue;
            found(*id, day.path(), rest == ".cast");
            count++;
          }
          if (inner) return Unexpected{Error{inner.value(), day.path().string() + ": " + inner.message()}};
        }
      }
    }
    if (ec) return Unexpected{Error{ec.value(), settings.dir.string() + ": " + ec.message()}};
    spdlog::info("event=store_scanned dir={} recordings={}", settings.dir.string(), count);
    return Done{};
  }

  void found(const Id& id, const fs::path& folder, bool whole) {
    if (recordings.contains(id)) return;
    auto r = std::make_shared<Recording>();
    r->id = id;
    r->folder = folder;
    r->info.id = id;
    const fs::path path = whole ? r->whole_path() : r->part_path();
    struct stat st {};
    if (::lstat(path.c_str(), &st) != 0 || !S_ISREG(st.st_mode)) return;
    const auto size = static_cast<std::uint64_t>(st.st_size);
    r->length = r->committed = size;
    r->info.length = size;
    r->info.path = fs::relative(path, settings.dir).string();
    r->info.created_ms = r->info.updated_ms = std::int64_t{st.st_mtim.tv_sec} * 1000;
    const json meta = read_meta(*r);
    const auto text = [&](const char* key) { return meta.contains(key) && meta[key].is_string() ? meta[key].get<std::string>() : std::string{}; };
    const auto number = [&](const char* key) { return meta.contains(key) && meta[key].is_number_unsigned() ? meta[key].get<std::uint64_t>() : 0; };
    if (meta.is_object()) {
      r->info.epoch = number("epoch");
      r->info.source = text("source");
      r->info.relay = text("relay");
      r->info.moved_to = text("moved_to");
      r->info.reason = text("reason");
      r->info.error = text("error");
      r->signature = text("signature");
      if (const auto t = number("created_ms")) r->info.created_ms = static_cast<std::int64_t>(t);
      if (const auto t = number("updated_ms")) r->info.updated_ms = static_cast<std::int64_t>(t);
      for (std::size_t i = 0; i < kept_names.size(); i++)
        if (text("kept") == kept_names[i]) r->kept = static_cast<Kept>(i);
      r->failed = !r->info.error.empty();
    } else {
      // A crash between making it and the first line of its meta: nobody was told that it is here, and nothing is in it. Left there it
      // would refuse that recording for good.
      if (!whole && size == 0) {
        ::unlink(path.c_str());
        ::unlink(r->meta_path().c_str());
        return;
      }
      // Somebody removed the file: nobody may append to it.
      r->info.error = "no meta file";
      r->failed = true;
    }
    read_first_line(*r, path);
    const auto length = number("length");
    const auto head = text("head");
    if (whole) {
      r->info.head = head;
      if (meta.is_object() && size != length) {
        r->info.error = "file has " + std::to_string(size) + " bytes, not " + std::to_string(length);
        r->failed = true;
      }
      if (!r->failed) r->info.state = CopyState::whole;
    } else if (r->kept == Kept::ended && !r->failed) {  // after a failed fdatasync the page cache says more than the disk
      // Between the meta's end and the rename; both are redone if the bytes are those.
      auto result = hash_file(path, id);
      if (result.error == 0 && size == length && cast::hex(result.chain->head()) == head && ::rename(path.c_str(), r->whole_path().c_str()) == 0 &&
          sync_folder(folder) == 0) {
        r->info.state = CopyState::whole;
        r->info.head = head;
        r->info.path = fs::relative(r->whole_path(), settings.dir).string();
        spdlog::info("event=recording_whole recording={} length={} at=start", id.text(), size);
      } else {
        r->kept = Kept::part;
      }
    }
    r->info.state = state_of(*r);
    recordings.emplace(id, r);
  }

  json read_meta(Recording& r) {
    const UniqueFd fd{::open(r.meta_path().c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW)};
    struct stat st {};
    if (!fd || ::fstat(fd.get(), &st) != 0) return {};
    const auto size = static_cast<std::size_t>(st.st_size);
    std::string text(std::min(size, meta_limit), '\0');
    const ssize_t n = ::pread(fd.get(), text.data(), text.size(), static_cast<off_t>(size - text.size()));
    text.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
    r.meta_torn = !text.empty() && text.back() != '\n';
    while (!text.empty()) {
      const auto end = text.find_last_not_of('\n');
      if (end == std::string::npos) break;
      const bool whole_line = end + 1 < text.size();
      text.resize(end + 1);
      const auto begin = text.rfind('\n');
      const auto line = begin == std::string::npos ? text : text.substr(begin + 1);
      if (whole_line)
        if (json value = json::parse(line, nullptr, false); value.is_object() && value.value("id", json{}) == r.id.text()) return value;
      text.resize(begin == std::string::npos ? 0 : begin + 1);
    }
    return {};
  }

  void read_first_line(Recording& r, const fs::path& path) {
    const UniqueFd fd{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW)};
    std::string text(header_limit, '\0');
    const ssize_t n = fd ? ::pread(fd.get(), text.data(), text.size(), 0) : -1;
    text.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
    const auto end = text.find('\n');
    if (end != std::string::npos) {
      r.info.header = bounded_header(std::string_view{text}.substr(0, end));
      r.header_done = true;
    }
  }
};

// ---- the owner's side

Store::Store(StoreSettings settings, std::function<void(std::function<void()>)> post, std::function<void(const wire::HealthLine&)> on_health)
    : impl_{std::make_unique<Impl>(std::move(settings), std::move(post), std::move(on_health))} {}

Store::~Store() {
  stop({});
  if (impl_->storage.joinable()) impl_->storage.join();
  {
    const std::lock_guard guard{impl_->queue_mutex};
    impl_->abandon = true;
  }
  impl_->hash_wake.notify_all();
  if (impl_->hasher.joinable()) impl_->hasher.join();
}

Expected<Done> Store::start() {
  auto& s = impl_->settings;
  std::error_code ec;
  fs::create_directories(s.dir, ec);
  if (ec) return Unexpected{Error{ec.value(), "store.dir " + s.dir.string() + ": " + ec.message()}};
  impl_->lock.reset(::open((s.dir / ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0640));
  if (!impl_->lock) return Unexpected{system_error("store.dir " + s.dir.string())};
  if (::flock(impl_->lock.get(), LOCK_EX | LOCK_NB) != 0) return Unexpected{system_error("store.dir " + s.dir.string() + ": another recorder uses it")};
  if (auto scanned = impl_->scan(); !scanned) return scanned;
  impl_->next_health = Clock::now();
  impl_->storage = std::thread{[this] { impl_->run(); }};
  impl_->hasher = std::thread{[this] { impl_->run_hasher(); }};
  return Done{};
}

void Store::stop(std::function<void()> stopped) {
  {
    const std::lock_guard guard{impl_->queue_mutex};
    if (!impl_->stopping) impl_->stopped = std::move(stopped);
    impl_->stopping = true;
  }
  impl_->wake.notify_all();
}

Store::UploadId Store::open(const wire::OpenLine& line, const Address& source, std::shared_ptr<UploadSink> sink) {
  const UploadId id = impl_->next_upload++;
  impl_->push([i = impl_.get(), line, source, id, sink = std::move(sink)] { i->open(line, source, id, sink); });
  return id;
}
void Store::append(UploadId upload, std::uint64_t offset, std::string bytes) {
  impl_->push([i = impl_.get(), upload, offset, bytes = std::move(bytes)] { i->append(upload, offset, bytes); });
}
void Store::end(UploadId upload, const wire::EndFrame& end) {
  impl_->push([i = impl_.get(), upload, end] { i->end(upload, end); });
}
void Store::cut(UploadId upload, const wire::EndFrame& cut) {
  impl_->push([i = impl_.get(), upload, cut] { i->cut(upload, cut); });
}
void Store::conflict(UploadId upload, const wire::ConflictFrame& conflict) {
  impl_->push([i = impl_.get(), upload, conflict] {
    if (const auto r = i->of(upload)) {
      if (r->ending) return;
      i->set_conflict(r, "the relay's head differs at offset " + std::to_string(conflict.offset));
    }
  });
}
void Store::close(UploadId upload) {
  impl_->push([i = impl_.get(), upload] { i->close(upload); });
}
void Store::stalled(UploadId upload, bool stalled) {
  impl_->push([i = impl_.get(), upload, stalled] {
    if (const auto r = i->of(upload)) {
      r->is_stalled = stalled;
      i->publish(*r);
    }
  });
}
void Store::moved(const Id& id, const wire::MovedNotice& notice, const Address& source,
                  std::function<void(Expected<wire::MovedAnswer, wire::ErrorLine>)> done) {
  impl_->push([i = impl_.get(), id, notice, source, done = std::move(done)] { i->moved(id, notice, source, done); });
}

void Store::health_soon() {
  impl_->push([i = impl_.get()] {
    // At most every 10 ms, however many ask.
    i->next_health = std::min(i->next_health, i->next_health - i->settings.health_interval + std::chrono::milliseconds{10});
  });
}

std::vector<Copy> Store::list() const {
  std::vector<Copy> out;
  {
    const std::lock_guard guard{impl_->catalog_mutex};
    out.reserve(impl_->recordings.size());
    for (const auto& [id, r] : impl_->recordings) out.push_back(r->info);
  }
  std::sort(out.begin(), out.end(), [](const Copy& a, const Copy& b) { return std::tie(a.created_ms, a.id) < std::tie(b.created_ms, b.id); });
  return out;
}

std::optional<Copy> Store::find(const Id& id) const {
  const std::lock_guard guard{impl_->catalog_mutex};
  const auto it = impl_->recordings.find(id);
  if (it == impl_->recordings.end()) return std::nullopt;
  return it->second->info;
}

std::optional<Store::Bytes> Store::read(const Id& id) const {
  for (int attempt = 0; attempt < 2; attempt++) {  // a second time when it was renamed in between
    auto copy = find(id);
    if (!copy) return std::nullopt;
    UniqueFd file{::open((impl_->settings.dir / copy->path).c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW)};
    if (file) return Bytes{std::move(file), std::move(*copy)};
  }
  return std::nullopt;
}

}  // namespace postern::recorder::node
