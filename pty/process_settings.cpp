#include "pty/process_settings.h"

#include <sys/stat.h>

#include <cerrno>

namespace postern::pty {

ProcessSettings ProcessSettings::of_this_process() {
  ProcessSettings s;
  for (int i = 0; i < RLIM_NLIMITS; i++) ::getrlimit(static_cast<__rlimit_resource_t>(i), &s.limits[static_cast<std::size_t>(i)]);
  errno = 0;
  const int nice = ::getpriority(PRIO_PROCESS, 0);
  if (errno == 0) s.nice = nice;
  s.umask = ::umask(022);  // umask(2) cannot be read without setting it
  ::umask(s.umask);
  return s;
}

bool ProcessSettings::apply() const {
  bool all = true;
  for (int i = 0; i < RLIM_NLIMITS; i++) {
    const rlimit& wanted = limits[static_cast<std::size_t>(i)];
    rlimit now{};
    if (::getrlimit(static_cast<__rlimit_resource_t>(i), &now) != 0) continue;
    if (now.rlim_cur == wanted.rlim_cur && now.rlim_max == wanted.rlim_max) continue;
    if (::setrlimit(static_cast<__rlimit_resource_t>(i), &wanted) != 0) all = false;
  }
  if (::getpriority(PRIO_PROCESS, 0) != nice && ::setpriority(PRIO_PROCESS, 0, nice) != 0) all = false;
  ::umask(umask);
  return all;
}

}  // namespace postern::pty
