#include "base/file_watch.h"

#include "base/log.h"

#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <deque>
#include <filesystem>
#include <utility>

namespace postern {
namespace {

constexpr auto settle_time = std::chrono::milliseconds{50};
constexpr int most_links = 40;  // as the kernel (path_resolution(7))

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
  later();  // it may have changed before it was watched
}

/// The folder of each link on the way to the file, wherever it is on that way, and at its end the folder of the file: whatever happens to the file happens
/// in one of them. And the folder that each is in, for it may be replaced as a whole.
void FileWatch::watch() {
  namespace fs = std::filesystem;
  int error = 0;
  const auto add = [&](const fs::path& folder) {
    if (::inotify_add_watch(events_.native_handle(), folder.c_str(), IN_CLOSE_WRITE | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_ONLYDIR) < 0) error = errno;
  };
  std::error_code ec;
  const fs::path whole = fs::absolute(file_, ec).lexically_normal();
  std::deque<fs::path> rest{whole.begin(), whole.end()};
  fs::path at;
  for (int links = 0; !rest.empty();) {
    const fs::path next = at / rest.front();  // the first one is "/"
    rest.pop_front();
    if (!next.has_filename() && next != next.root_path()) continue;  // a "/" at the end
    const fs::path target = links < most_links ? fs::read_symlink(next, ec) : fs::path{};
    if (target.empty()) {
      at = next.lexically_normal();
      continue;
    }
    links++;
    add(at.parent_path());
    add(at);
    rest.insert(rest.begin(), target.begin(), target.end());  // an absolute one begins with "/", which starts anew
  }
  add(at.parent_path().parent_path());
  error = 0;  // those may be another user's
  add(at.parent_path());
  if (error != 0 && !std::exchange(warned_, true))
    spdlog::warn("event=file_not_watched file={} folder={} why={}", safe_quoted(file_), safe_quoted(at.parent_path().string()), safe_quoted(std::strerror(error)));
  if (error == 0) warned_ = false;
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
