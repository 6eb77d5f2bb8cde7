#pragma once

#include "base/address.h"
#include "base/expected.h"
#include "base/id.h"
#include "base/unique_fd.h"
#include "recorder/wire/messages.h"

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace postern::recorder::node {

struct StoreSettings {
  std::filesystem::path dir = "/var/lib/postern-recorder";
  std::string name;                                      ///< in health lines
  std::uint64_t min_free = std::uint64_t{256} << 20;     ///< bytes of the file system that uploads must leave free
  std::uint64_t max_recording = std::uint64_t{64} << 30; ///< bytes of one recording
  std::uint64_t turn_bytes = 1 << 20;                    ///< most bytes of a recording that are written and not yet synced
  std::uint32_t streams = 4096;                          ///< uploads at a time
  std::chrono::milliseconds commit_interval{20};         ///< least time between two turns of fdatasync, while nothing is urgent
  std::chrono::milliseconds health_interval{500};
  /// fdatasync(2); tests put one here that hangs or fails.
  std::function<int(int fd)> sync;
};

enum class CopyState : std::uint8_t { live, stalled, cut, moved, whole, conflict };
std::string_view name(CopyState state);

/// What a list shows of one copy.
struct Copy {
  Id id;
  CopyState state = CopyState::cut;
  std::uint64_t length = 0;  ///< committed
  std::string head;          ///< of these bytes; empty when nobody has opened the part since the start
  std::uint64_t epoch = 0;
  std::string source;  ///< address of who opened it first
  std::string relay;   ///< what that one calls itself
  std::string path;    ///< below the store's folder
  std::int64_t created_ms = 0, updated_ms = 0;
  std::string moved_to, reason, error;
  std::string header;  ///< JSON object of known, bounded members of the first line; empty when there is none

  std::string line() const;  ///< JSON and "\n", as the protocol has it
};

/// Hears of one upload. Called in the owner's thread, never from within a call to the store. After failed(), whole() or cut()
/// nothing follows.
class UploadSink {
 public:
  virtual ~UploadSink() = default;
  virtual void opened(const wire::AnswerLine& answer) = 0;
  virtual void written(std::size_t bytes) = 0;  ///< so many bytes more were taken from append()
  virtual void committed(std::uint64_t offset) = 0;
  virtual void whole(const std::string& head) = 0;
  virtual void cut(const std::string& head, std::uint64_t length) = 0;
  virtual void failed(const wire::ErrorLine& error) = 0;
};

/// The recordings on disk, and the one thread that writes and syncs them.
///
/// Everything that changes a file is a command in one queue, so what a closed or superseded upload still had in it comes before
/// the next open or not at all. A turn: write(2) what has arrived, fdatasync(2) each file once, rename, fsync(2) the folders,
/// answer. The health line is made by the same thread, also between two syncs: when storage hangs, the lines stop. A part that
/// nobody has opened since the start is hashed by a second thread, so that a long one does not keep the others waiting.
///
/// Paths come from the id and the day alone. The folder is locked: two recorders cannot share it.
class Store {
 public:
  using UploadId = std::uint64_t;
  /// `post` runs a function in the owner's thread; it may be called from any thread.
  Store(StoreSettings settings, std::function<void(std::function<void()>)> post, std::function<void(const wire::HealthLine&)> on_health);
  /// Stops as stop() does, and waits.
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  /// Makes and locks the folder, looks at what is in it, starts the thread.
  Expected<Done> start();
  /// Commits what has arrived, ends every upload with not_accepting, ends the thread; then `stopped`.
  void stop(std::function<void()> stopped);

  UploadId open(const wire::OpenLine& open, const Address& source, std::shared_ptr<UploadSink> sink);
  /// Only after opened(). The first offset is what opened() named (`have`, or the proven one), later ones follow without a gap.
  void append(UploadId upload, std::uint64_t offset, std::string bytes);
  void end(UploadId upload, const wire::EndFrame& end);
  void cut(UploadId upload, const wire::EndFrame& cut);
  void conflict(UploadId upload, const wire::ConflictFrame& conflict);
  /// The stream is gone without an end. Nothing is heard of it any more.
  void close(UploadId upload);
  void stalled(UploadId upload, bool stalled);
  void moved(const Id& id, const wire::MovedNotice& notice, const Address& source,
             std::function<void(Expected<wire::MovedAnswer, wire::ErrorLine>)> done);

  /// A health line soon, for who has just asked; from the storage thread as all of them.
  void health_soon();

  std::vector<Copy> list() const;  ///< oldest first
  std::optional<Copy> find(const Id& id) const;
  /// The committed bytes [0, copy.length) of it. Blocks on the disk: not for the owner's thread.
  struct Bytes {
    UniqueFd file;
    Copy copy;
  };
  std::optional<Bytes> read(const Id& id) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace postern::recorder::node
