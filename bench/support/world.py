"""A private world for a bench: own mount, pid and network namespaces, an own /etc, a throw-away user.

The bench re-executes itself in new namespaces (unshare(1)), so that nothing of the host changes whatever happens: /etc is a copy in
a tmpfs (with the bench's user, the `sshd` user and the PAM service files), wtmp, lastlog and btmp are copies, the network is a fresh
loopback (so ports 22 and 80 are free and no stranger is there), and when the bench ends, the kernel kills every process in it.
/run is the host's: pam_systemd finds logind there, or does not, as on the host.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "POSTERN_BENCH_INSIDE"
USER = "postern-bench"
UID = 61234

# Both servers run the same modules in the same order. Debian 12's /etc/pam.d/sshd without pam_motd and pam_mail (they would cost
# sshd about 6 ms a login, and Postern shows the message of the day itself) and without pam_selinux (no SELinux here).
SAME_STACK = """\
@include common-auth
account    required     pam_nologin.so
@include common-account
session    required     pam_loginuid.so
session    optional     pam_keyinit.so force revoke
@include common-session
session    required     pam_limits.so
session    required     pam_env.so
session    required     pam_env.so user_readenv=1 envfile=/etc/default/locale
@include common-password
"""


def die(text):
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    raise SystemExit(2)


def enter():
    """Returns inside the private world; outside it, execs into one."""
    if os.environ.get(INSIDE) == "1":
        if os.getpid() != 1:
            die(f"unset {INSIDE} and start again")
        return
    if os.geteuid() != 0:
        die("needs root: it logs in as a throw-away user, and sshd and posternd must be able to become that user.\n"
            f"  sudo {' '.join(sys.argv)}")
    os.environ[INSIDE] = "1"
    # The bench's own python, not one of pyenv: python3-* packages of apt are there.
    os.execvp("unshare", ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc",
                          "--propagation", "private", "/usr/bin/python3", *sys.argv])


def run(*argv, **kwargs):
    return subprocess.run([str(a) for a in argv], check=True, **kwargs)


def _overmount(source, target):
    run("mount", "--bind", source, target)


class World:
    """Set up once, inside enter(). `memory` is a tmpfs, `disk` a folder on the build folder's disk; both are removed at the end."""

    def __init__(self, name, shell="/bin/sh"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        base = ROOT / "build" / "bench"
        base.mkdir(parents=True, exist_ok=True)
        mount_point = base / "memory"
        mount_point.mkdir(exist_ok=True)
        run("mount", "-t", "tmpfs", "-o", "mode=0755,size=4g", "tmpfs", mount_point)
        self.memory = mount_point
        for old in base.glob("disk-*"):  # what a killed bench left
            if not _in_use(old):
                shutil.rmtree(old, ignore_errors=True)
        self.disk = base / f"disk-{name}-{os.urandom(4).hex()}"
        self.disk.mkdir(mode=0o755)
        self.lock = open(self.disk / "lock", "w")
        import fcntl
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        run("ip", "link", "set", "lo", "up") if shutil.which("ip") else _loopback_up()

        etc = self.memory / "etc"
        run("cp", "-a", "/etc", etc)
        (self.memory / "home").mkdir(mode=0o755)
        self.home = self.memory / "home" / USER
        self.home.mkdir(mode=0o755)
        os.chown(self.home, UID, UID)
        _append(etc / "passwd", f"{USER}:x:{UID}:{UID}:bench:{self.home}:{shell}\n")
        _append(etc / "group", f"{USER}:x:{UID}:\n")
        _append(etc / "shadow", f"{USER}:*:19000:0:99999:7:::\n")
        if not any(l.startswith("sshd:") for l in (etc / "passwd").read_text().splitlines()):
            _append(etc / "passwd", "sshd:x:61233:65534::/run/sshd:/usr/sbin/nologin\n")
        _overmount(etc, "/etc")
        for log in ("/var/log/wtmp", "/var/log/lastlog", "/var/log/btmp", "/run/utmp"):
            if os.path.exists(log):
                copy = self.memory / Path(log).name
                shutil.copy2(log, copy)
                st = os.stat(log)
                os.chown(copy, st.st_uid, st.st_gid)
                _overmount(copy, log)
        # Whatever is made in /tmp from here on (the stack's folder with journal and recordings) lies on the real disk and goes with it.
        (self.disk / "tmp").mkdir()
        (self.disk / "tmp").chmod(0o1777)
        _overmount(self.disk / "tmp", "/tmp")
        self.shell = shell

    def pam_service(self, name, content):
        Path("/etc/pam.d", name).write_text(content)

    def ldconfig(self, folder):
        """Makes libraries in `folder` found, in the private /etc only (-i: not the host's auxiliary cache)."""
        Path("/etc/ld.so.conf.d").mkdir(exist_ok=True)
        Path("/etc/ld.so.conf.d/zz-postern-bench.conf").write_text(f"{folder}\n")
        run("/sbin/ldconfig", "-i", "-X")

    def close(self):
        shutil.rmtree(self.disk, ignore_errors=True)


def _append(path, text):
    with open(path, "a") as file:
        file.write(text)


def _in_use(folder):
    import fcntl
    try:
        with open(folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _loopback_up():
    """`ip link set lo up` for machines without iproute2 (netdevice(7))."""
    import fcntl
    import socket
    import struct
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(s, 0x8913, request))[1]
        fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", flags | 0x1 | 0x40))


# What the machine was like.

def loadavg():
    return Path("/proc/loadavg").read_text().split()[:3]


def steal_and_idle():
    """(idle, steal, total) in clock ticks, of all CPUs."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return fields[3] + fields[4], fields[7], sum(fields[:8])


def logind():
    """Says whether pam_systemd can have made a session: the library's own test is that the folder exists (sd_booted(3)) and logind answers."""
    if not os.path.exists("/run/dbus/system_bus_socket"):
        return "no (no system bus)"
    answer = subprocess.run(["busctl", "--timeout=2", "call", "org.freedesktop.login1", "/org/freedesktop/login1",
                             "org.freedesktop.DBus.Peer", "Ping"], capture_output=True)
    return "yes" if answer.returncode == 0 else "no (it does not answer)"


def tree(root_pid):
    """pids of root_pid and its descendants."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rsplit(")", 1)[1].split()[1]), []).append(int(entry))
    found, todo = [], [root_pid]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += parents.get(pid, [])
    return found


def exe(pid):
    try:
        return os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except OSError:
        return ""


def pss_kib(pid):
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def cpu_seconds(pid):
    """CPU time of a process and of its children that are gone and were waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return sum(int(f) for f in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def pipe_kib(pids):
    """KiB that the kernel keeps for the pipes of these processes: what lies in them, by whole pages (pipe(7)); each pipe once."""
    import array
    import fcntl
    pipes = {}
    for pid in pids:
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                link = os.readlink(f"/proc/{pid}/fd/{fd}")
                if link.startswith("pipe:"):
                    pipes.setdefault(link, f"/proc/{pid}/fd/{fd}")
        except OSError:
            pass
    total = 0
    for path in pipes.values():
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue
        held = array.array("i", [0])
        fcntl.ioctl(fd, 0x541B, held)  # FIONREAD
        slots = fcntl.fcntl(fd, 1032) // 4096  # F_GETPIPE_SZ: one struct pipe_buffer (40 bytes) a page, whether used or not
        os.close(fd)
        total += (held[0] + 4095) // 4096 * 4 + (slots * 40 + 1023) // 1024
    return total
