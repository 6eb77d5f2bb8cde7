#pragma once

#include "base/unique_fd.h"

namespace postern::sshd::net {

/// postern-net before it has a client: reads ZygoteHello from `control`, proves libssh (self_test.h), enters the sandbox, says
/// ZygoteReady, then forks a worker for each fork_worker and reports the death of each. Returns the exit code: 0 when the broker
/// closed `control`. Workers live on. Nothing of a client's ever comes into this process.
int run_zygote(UniqueFd control);

}  // namespace postern::sshd::net
