#include "base/file_watch.h"

#include "base/log.h"

#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

namespace postern {
namespace {

constexpr auto settle_time = std::chrono::milliseconds{50};

}  // namespace

FileWatch::FileWatch(boost::asio::io_context& io, std::string file, std::function<void()> changed)
    : events_{io}, settle_{io}, file_{std::move(file)}, changed_{std::move(changed)}, last_{state()} {
  const int fd = ::inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
  if (fd < 0) {
    spdlog::warn("event=file_not_watched file={} why={}", safe_quoted(file_), safe_quoted(std::strerror(errno)));
    return;
  }
  events_.assign(fd);
  watch();
  wait();
}

/// The folder of the file, and of each link on the way to what it names: whatever happens to the file happens in one of them. And the folder that each
/// is in, for it may be replaced as a whole.
void FileWatch::watch() {
  namespace fs = std::filesystem;
  const auto add = [this](const fs::path& folder) {
    return ::inotify_add_watch(events_.native_handle(), folder.c_str(), IN_CLOSE_WRITE | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_ONLYDIR) >= 0;
  };
  fs::path at{file_};
  bool all = true;
  for (int links = 0; links < 8; links++) {
    const fs::path folder = at.has_parent_path() ? at.parent_path() : fs::path{"."};
    all = add(folder) && all;
    const int error = errno;
    if (!all && !std::exchange(warned_, true))
      spdlog::warn("event=file_not_watched file={} folder={} why={}", safe_quoted(file_), safe_quoted(folder.string()), safe_quoted(std::strerror(error)));
    std::error_code ec;
    add(fs::absolute(folder, ec).lexically_normal().parent_path());
    // The folder itself may be a link, too (..data).
    const auto real = fs::weakly_canonical(folder, ec);
    if (!ec && real != folder) {
      add(real);
      add(real.parent_path());
    }
    const auto target = fs::read_symlink(at, ec);
    if (ec) break;
    at = target.is_absolute() ? target : at.parent_path() / target;
  }
  if (all) warned_ = false;
}

void FileWatch::wait() {
  events_.async_wait(boost::asio::posix::descriptor_base::wait_read, [this, alive = alive_](boost::system::error_code ec) {
    if (ec || !*alive) return;
    std::array<char, 16 * 1024> ignored;  // anything in those folders: what it was, whoever asks again will see
    while (::read(events_.native_handle(), ignored.data(), ignored.size()) > 0) {}
    later();
    wait();
  });
}

std::string FileWatch::state() const {
  struct stat st {};
  if (::stat(file_.c_str(), &st) != 0) return {};
  return std::to_string(st.st_dev) + " " + std::to_string(st.st_ino) + " " + std::to_string(st.st_size) + " " + std::to_string(st.st_mtim.tv_sec) + "." +
         std::to_string(st.st_mtim.tv_nsec) + " " + std::to_string(st.st_ctim.tv_sec) + "." + std::to_string(st.st_ctim.tv_nsec);  // rsync sets the first one back
}

void FileWatch::later() {
  if (std::exchange(settling_, true)) return;
  settle_.expires_after(settle_time);
  settle_.async_wait([this, alive = alive_](boost::system::error_code ec) {
    if (ec || !*alive) return;  // it may have run out before it was cancelled
    settling_ = false;
    watch();  // a link may lead elsewhere by now
    if (auto now = state(); std::exchange(last_, now) != now) changed_();
  });
}

}  // namespace postern
