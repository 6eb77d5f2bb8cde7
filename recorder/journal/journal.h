#pragma once

#include "base/expected.h"
#include "base/id.h"
#include "base/unique_fd.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

// The relay's copy on disk of every recording that no recorder has whole yet: a plain file per recording, "<id>.cast", and beside
// it "<id>.meta": JSON lines, the last whole one counts (so a change is one append and one fdatasync, and a cut line harms nothing).
// A write-ahead log that all recordings share comes with a later issue, behind the same interface.
namespace postern::recorder::journal {

/// What is known of a recording besides its bytes.
struct Meta {
  Id recording;
  std::vector<std::string> recorders;
  bool enforce = false;
  std::string boot_id;  ///< of the session's process, as are pid and start_time
  std::int32_t pid = 0;
  std::uint64_t start_time = 0;
  std::int64_t created_ms = 0;  ///< Unix time

  std::uint64_t epoch = 0;  ///< of the last open or moved notice
  enum class Ending : std::uint8_t { none, ended, cut };
  Ending ending = Ending::none;
  std::uint64_t length = 0;  ///< at the end
  std::string head;          ///< chain head at the end, hex
  std::string reason;        ///< of a cut: session_died | journal_failed
  std::string signature;     ///< of the end; empty for now
  std::string recorder;      ///< that has it, or takes it
  std::uint64_t committed = 0;  ///< known when this line was written
  bool stored = false;          ///< the recorder answered `whole` (or `cut`): the bytes are dropped here
  std::vector<std::string> parts;  ///< recorders with a part that will not grow; they want a `moved` notice
  bool gap = false;                ///< bytes from gap_from on were taken by no journal
  std::uint64_t gap_from = 0;
  std::string gap_reason;

  std::string line() const;  ///< JSON and "\n"
  static std::optional<Meta> parse(std::string_view line);
};

struct Settings {
  std::filesystem::path dir;
  std::uint64_t recording_quota = std::uint64_t{4} << 30;  ///< bytes of one recording
  std::uint64_t total_quota = std::uint64_t{16} << 30;     ///< bytes of all
  std::uint64_t min_free = std::uint64_t{64} << 20;        ///< bytes of the file system that are left to others
  std::chrono::milliseconds sync_interval{10};             ///< longest rest between two turns of fdatasync
};

class Journal;

/// One recording. Used by the owner's thread only.
class Entry : public std::enable_shared_from_this<Entry> {
 public:
  const Meta& meta() const noexcept { return meta_; }
  std::uint64_t length() const noexcept { return length_; }        ///< bytes that write(2) has taken
  std::uint64_t journaled() const noexcept { return journaled_; }  ///< bytes that fdatasync(2) has made durable
  /// Not empty: nothing is written or called durable any more.
  const std::string& failure() const noexcept { return failure_; }

  /// write(2). On an error as much as length() says was taken, and the entry has failed.
  Expected<Done> append(std::string_view bytes);
  /// pread(2); fewer bytes only at the end.
  Expected<std::size_t> read(std::uint64_t offset, std::span<char> into) const;
  /// Another descriptor of the bytes, for another thread; none when they were dropped.
  UniqueFd descriptor() const;
  /// Changes what is known; in the page cache when this returns, durable after the next sync().
  Expected<Done> update(const std::function<void(Meta&)>& change);
  /// Calls back once all of now, bytes and meta, is durable, or failed. Several wait for one turn.
  void sync(std::function<void(Expected<Done>)> done);
  /// The bytes are safe elsewhere: unlinks the .cast.
  void drop_bytes();
  /// Nothing is left to know: unlinks both.
  void remove();

  std::function<void(std::uint64_t)> on_journaled;    ///< journaled() has moved
  std::function<void(const std::string&)> on_failed;  ///< an fdatasync failed (final)

 private:
  friend class Journal;
  Entry(Journal& journal, Meta meta) : journal_{&journal}, meta_{std::move(meta)} {}
  std::filesystem::path path(const char* extension) const;
  void fail(std::string why);
  bool room_for(std::uint64_t bytes);

  Journal* journal_;  // outlives its entries' use
  Meta meta_;
  UniqueFd cast_, meta_file_;
  std::size_t meta_size_ = 0;
  std::uint64_t length_ = 0, journaled_ = 0;
  std::string failure_;
  bool dropped_ = false;
  std::vector<std::function<void(Expected<Done>)>> waiting_;  // for the next turn
  // Set by the owner, taken by the thread; under Journal::mutex_.
  std::vector<UniqueFd> old_files_;
  bool queued_ = false, cast_dirty_ = false, meta_dirty_ = false, new_ = false;
  bool being_made_ = false;  // owner's thread only
};

/// The folder, and the thread that makes it durable.
///
/// write(2) happens in the owner's thread ("written"); fdatasync in a thread of its own over all that has arrived since its last
/// turn ("journaled"): first the writeback of all files is started, then each is waited for, so that one turn costs about one
/// flush of the disk however many recordings there are. A failed fdatasync is final for that file: Linux reports an error once and
/// may have dropped the dirty pages (LSFMM 2018, "PostgreSQL's fsync() surprise").
class Journal {
 public:
  /// `post` runs a function in the owner's thread; it may be called from any.
  Journal(Settings settings, std::function<void(std::function<void()>)> post);
  /// Ends after a last turn.
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  /// Makes and locks the folder (two relays must not share one) and gives what is in it.
  Expected<std::vector<std::shared_ptr<Entry>>> load();
  Expected<std::shared_ptr<Entry>> create(Meta meta);
  std::uint64_t total() const noexcept { return total_; }
  /// Free bytes of the file system, minus min_free; looked up at most once for every `granularity` bytes that are written.
  std::uint64_t room();
  void used(std::uint64_t bytes) noexcept { room_ -= std::min(room_, bytes); }

 private:
  friend class Entry;
  struct Work {
    std::shared_ptr<Entry> entry;
    int cast, meta;  // descriptors to sync, or -1; `entry` keeps them open
    std::uint64_t length;
    bool is_new;
    std::vector<std::function<void(Expected<Done>)>> waiting;
    std::string failure;
  };
  void queue(Entry& entry);
  void run();
  void turn(std::vector<Work>& work) const;

  const Settings settings_;
  const std::function<void(std::function<void()>)> post_;
  UniqueFd folder_;
  std::uint64_t total_ = 0;
  std::uint64_t room_ = 0, room_asked_ = 0;
  std::chrono::steady_clock::time_point room_time_{};

  std::mutex mutex_;  // protects what follows and the dirty marks of entries
  std::condition_variable wake_;
  std::vector<std::shared_ptr<Entry>> queue_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace postern::recorder::journal
