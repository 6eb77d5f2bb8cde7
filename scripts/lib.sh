# Shared by scripts/demo and scripts/test (bash): packages, progress, build. Sourced, not run.
#
# Takes no question and is safe to run twice, also at the same time: package and build steps wait for each other on locks in build/.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$root/build"
# Paths below the tree count as relative, so that another clone on the same machine finds what this one compiled.
export CCACHE_BASEDIR="$root" CCACHE_NOHASHDIR=1

# Everything beyond a minimal Debian 12 (debootstrap --variant=minbase).
packages_build="ca-certificates ccache cmake g++ make ninja-build pkg-config xz-utils debian-archive-keyring
  catch2 libaudit-dev libboost-dev libcli11-dev libfmt-dev libnghttp2-dev libpam0g-dev libseccomp-dev libsodium-dev libspdlog-dev libssl-dev
  libtomlplusplus-dev nlohmann-json3-dev"
packages_system_static="libkrb5-dev libssh-dev patch zlib1g-dev"   # scripts/test --libssh system-static only
packages_fuzz="clang libclang-rt-14-dev"                             # scripts/fuzz only
packages_run="iproute2 libpam-modules libpam-runtime openssh-client openssh-sftp-server passwd procps util-linux"
packages_test="asciinema iptables libwrap0 nftables python3 python3-asyncssh python3-paramiko python3-pytest python3-pytest-timeout python3-pytest-xdist
  dropbear-bin libssh-4 libssh2-1 putty-tools
  ansible-core autossh curl git lftp mosh rsync sshfs"

if [ -t 2 ]; then
  say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
else
  say() { printf '==> %s\n' "$*" >&2; }
fi
warn() { printf 'warning: %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# install_packages NAME...: as root apt installs what is missing; anybody else is told the exact line.
install_packages() {
  local missing=() name state
  for name in "$@"; do
    # Literal dollar: dpkg-query's own format language. A virtual or unknown package has no status.
    # shellcheck disable=SC2016
    state=$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$name")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ]; then
    echo "Some packages are missing. Install them, then run this again:" >&2
    echo >&2
    echo "  sudo apt-get install -y --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  say "Installing ${#missing[@]} packages: ${missing[*]}"
  (
    flock 9
    export DEBIAN_FRONTEND=noninteractive
    apt() { apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "$@" </dev/null 9>&-; }
    # Lists may be absent or name versions that the mirror has replaced.
    apt -qq update >"$root/build/apt.log" 2>&1 || { tail -n 20 "$root/build/apt.log" >&2; warn "apt-get update failed; trying with the lists that are there"; }
    apt -y --no-install-recommends install "${missing[@]}" >>"$root/build/apt.log" 2>&1 || {
      tail -n 30 "$root/build/apt.log" >&2
      die "apt-get could not install what is missing (whole log: build/apt.log)"
    }
  ) 9>"$root/build/.apt.lock" || exit 1
}

# build PRESET [TARGET...]: configures when needed and builds; one at a time for all presets, because the machine is one.
build() {
  local preset=$1 begin=$SECONDS
  shift
  (
    flock 9
    cd "$root" || exit 1
    say "Building (preset $preset)"
    [ -f "build/$preset/build.ninja" ] || echo "    the first time this takes some minutes; the compiler cache makes later ones quick" >&2
    cmake --preset "$preset" >"build/$preset.configure.log" 2>&1 9>&- || {
      tail -n 40 "build/$preset.configure.log" >&2
      die "cmake could not configure (whole log: build/$preset.configure.log)"
    }
    targets=()
    [ $# -eq 0 ] || targets=(--target "$@")
    # ninja's lines: shown whole on a terminal, else a sign of life now and then; anything else (warnings, errors) always.
    set -o pipefail
    if [ -t 2 ]; then
      cmake --build --preset "$preset" "${targets[@]}" >&2 9>&-
    else
      cmake --build --preset "$preset" "${targets[@]}" 2>&1 9>&- | sed -u -E '/^\[[0-9]+\/[0-9]+\]/{0~25!d; s/^([^ ]+).*/    \1/}' >&2
    fi || die "the build failed"
    say "Built in $((SECONDS - begin)) s"
  ) 9>"$root/build/.build.lock" || exit 1
}

# fetch_sshd: Debian's sshd, unpacked into build/tools and never installed (the package would start it). Tests compare with it.
fetch_sshd() {
  local tools=$root/build/tools
  [ -x "$tools/openssh-server/usr/sbin/sshd" ] && return 0
  say "Fetching OpenSSH's sshd to compare with (unpacked in build/tools, not installed)"
  (
    flock 9
    [ -x "$tools/openssh-server/usr/sbin/sshd" ] && exit 0
    mkdir -p "$tools"
    cd "$tools" || exit 1
    for name in openssh-server libwrap0; do
      rm -f "${name}"_*.deb
      apt-get -qq -o APT::Sandbox::User=root download "$name" 9>&- || {
        [ "$(id -u)" = 0 ] && apt-get -qq update 9>&- && apt-get -qq -o APT::Sandbox::User=root download "$name" 9>&-
      } || exit 1
      rm -rf "unpacking-$name"
      dpkg -x "${name}"_*.deb "unpacking-$name" || exit 1
    done
    cp -a unpacking-libwrap0/. unpacking-openssh-server/
    rm -rf openssh-server unpacking-libwrap0
    mv unpacking-openssh-server openssh-server
  ) 9>"$root/build/.tools.lock"
}
