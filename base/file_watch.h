#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>

#include <functional>
#include <memory>
#include <string>

namespace postern {

/// Says when a file may have changed: written, replaced by a rename, alone or with the folder that it is in, or (behind a symbolic link, as Kubernetes
/// mounts its files) pointed to elsewhere. By inotify(7) on the folders, so the file need not be there. Several changes in 50 ms are one; other files in
/// those folders are none.
class FileWatch {
 public:
  FileWatch(boost::asio::io_context& io, std::string file, std::function<void()> changed);
  ~FileWatch() { *alive_ = false; }
  FileWatch(const FileWatch&) = delete;
  FileWatch& operator=(const FileWatch&) = delete;

 private:
  void watch();
  void wait();
  void later();
  /// What tells one state of the file from another: device, inode, size, times. Empty: not there.
  std::string state() const;

  boost::asio::posix::stream_descriptor events_;
  boost::asio::steady_timer settle_;
  std::string file_;
  std::function<void()> changed_;
  std::string last_;
  bool settling_ = false;
  bool warned_ = false;  // that a folder is not there
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace postern
