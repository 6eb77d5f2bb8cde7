# The one place that names the bundled libssh. A new libssh = these three lines, a build, the start-up self-test and the suite.
# Security updates of libssh are ours (static link): see docs/SECURITY/TRUST.md. The three values are read by scripts/fetch-libssh.
set(POSTERN_LIBSSH_VERSION 0.12.2-1)   # Debian source package, suite forky (the same in sid); first seen 2026-07-28
set(POSTERN_LIBSSH_SHA256 49560f677d96e3706a904ac2de1116e25f3680937d51e5c92198fcba4a1c1e9f)   # libssh_0.12.2.orig.tar.xz
set(POSTERN_LIBSSH_SERIES 0.12)        # what may stand in when the exact version is gone from the mirror
