#pragma once

#include "base/expected.h"

#include <sys/types.h>

#include <string>
#include <vector>

namespace postern::pty {

/// An account as NSS gave it, with the groups that PAM left.
struct LocalUser {
  std::string name;
  uid_t uid = 0;
  gid_t gid = 0;
  std::string home;
  std::string shell;
  std::vector<gid_t> groups;  ///< supplementary
};

/// Makes this process the user's for good, and then proves it: real, effective and saved ids, the groups, no capability left, and that
/// there is no way back (every earlier server that lost this read only the calls' results: GHSA-vfgq-g5x8-g595, CVE-2023-28436).
/// Both outcomes: the process is exactly `user`, or an error, after which the caller must exit without running anything.
///
/// As an ordinary user nothing can be changed: the process must be that user already.
///
/// Re-test: as root `build/dev/bin/pty_test "[become_user]"`.
Expected<Done> become_user(const LocalUser& user);

/// The proof alone.
Expected<Done> prove_user(const LocalUser& user, bool check_groups);

}  // namespace postern::pty
