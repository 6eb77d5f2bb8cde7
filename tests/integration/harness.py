"""Runs the real programs for the integration tests: a network of 127.x addresses with its own users, policy, broker, relay and recorders.

What a test gets (fixtures in conftest.py):

    stack        one running network a test module (posternd, postern-relay, recorder-a, recorder-b), all healthy
    make_stack   a function that starts another one with other settings; stopped at the end of the test

    stack.ssh("id", bind=stack.alice)        real OpenSSH client -> Result(code, out, err, seconds), bytes
    stack.terminal("…", bind=stack.alice)    the same client on a pty of ours -> Terminal (read_until, send, resize, wait)
    await stack.asyncssh(bind=…)             asyncssh connection, for what OpenSSH's client does not tell (signal names)
    stack.posternd/.relay/.recorder_a/.recorder_b   Daemon: .pid .kill() .stop() .pause() .resume() .start() .log()
    stack.recordings("a")                    Recording objects decoded from recorder A's folder by our own decoder
    wait_until(f, "what", seconds)           polls; never sleep to synchronise

Who is who (identity is the source address alone; every stack has its own 127.x.y.0/24):

    alice    recorded, fail closed (enforceRecorder)    open_alice  recorded, fail open     plain_alice  not recorded
    bob      in the network, no rule for him            stranger    not in the network
    server   where posternd listens                     rec_a, rec_b   recorder nodes, same port

Everything is made in one temporary folder and with throw-away users, and all of it is gone afterwards: the test process is a
subreaper (prctl(2)), so whatever any daemon leaves behind becomes its child and `leftovers()` sees it. Never by name: other
work on this machine runs the same programs.

Deadlines are generous and multiplied by POSTERN_SLACK (scripts/test --asan sets it). Random choices come from `rng()`, whose seed
is printed in pytest's header and taken from POSTERN_SEED when set.
"""
from __future__ import annotations

import atexit
import base64
import contextlib
import ctypes
import fcntl
import grp
import json
import os
import pathlib
import pty as pty_module
import pwd
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import termios
import time
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILT = pathlib.Path(os.environ.get("POSTERN_BIN", ROOT / "build/dev/bin"))


def _reachable(built: pathlib.Path) -> pathlib.Path:
    """The programs where the daemons' own users can run them: a clone in /root (mode 0700) is closed to them, so there they are copied."""
    if os.geteuid() != 0 or all(d.stat().st_mode & 0o001 for d in [built, *built.parents] if d.exists()):
        return built
    place = pathlib.Path(tempfile.mkdtemp(prefix="pt-bin-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    place.chmod(0o755)
    for program in built.iterdir():
        if program.is_file() and not program.name.endswith("_test"):
            shutil.copy2(program, place / program.name)
    return place


BIN = _reachable(BUILT)
SLACK = float(os.environ.get("POSTERN_SLACK", "1"))
# Under AddressSanitizer what is freed stays for a while (its quarantine_size_mb, 256): there only what grows far beyond that is seen.
QUARANTINE = 280 << 20 if b"__asan_init" in (BIN / "postern-net").read_bytes() else 0
IS_ROOT = os.geteuid() == 0
SEED = int(os.environ.get("POSTERN_SEED") or random.SystemRandom().randrange(2**32))
os.environ["POSTERN_SEED"] = str(SEED)  # the xdist workers use the same one
SANITIZER = re.compile(r"ERROR: AddressSanitizer|ERROR: LeakSanitizer|WARNING: ThreadSanitizer|runtime error: ")
ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def rng(name: str) -> random.Random:
    """Random choices that a rerun with the printed POSTERN_SEED repeats; `name` keeps tests independent of their order."""
    return random.Random(f"{SEED}:{name}")


def wait_until(condition, what: str, seconds: float = 10.0, every: float = 0.02):
    """Polls `condition` until it returns something true, and returns that. AssertionError with `what` after the deadline."""
    deadline = time.monotonic() + seconds * SLACK
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds * SLACK:.1f} s: {what} (last: {value!r})")
        time.sleep(every)


# ---------------------------------------------------------------------------------------------------- processes

def become_subreaper() -> None:
    """Orphans of what we start become our children (PR_SET_CHILD_SUBREAPER), so nothing can be left behind unseen."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(36, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


@dataclass
class Process:
    pid: int
    parent: int
    state: str
    name: str
    session: int
    uid: int
    command: str

    def __str__(self):
        return f"{self.pid} (parent {self.parent}, uid {self.uid}, {self.state}) {self.name}: {self.command[:120]}"


def processes() -> dict[int, Process]:
    """Every process of the machine, from /proc."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):
            base = pathlib.Path("/proc") / entry
            stat = (base / "stat").read_text(errors="replace")
            name = stat[stat.index("(") + 1 : stat.rindex(")")]
            rest = stat[stat.rindex(")") + 2 :].split()
            command = (base / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            found[int(entry)] = Process(int(entry), int(rest[1]), rest[0], name, int(rest[3]), base.stat().st_uid, command)
    return found


def descendants(of: int, table: dict[int, Process] | None = None) -> list[Process]:
    table = table or processes()
    children: dict[int, list[Process]] = {}
    for p in table.values():
        children.setdefault(p.parent, []).append(p)
    found, todo = [], [of]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child.pid)
    return found


def _reap_orphans(ours: set[int]) -> None:
    """Collects dead processes that were handed to us; those of subprocess.Popen are left to it."""
    for p in descendants(os.getpid()):
        if p.parent == os.getpid() and p.state == "Z" and p.pid not in ours:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(p.pid, os.WNOHANG)


# ---------------------------------------------------------------------------------------------------- users

@contextlib.contextmanager
def _account_lock():
    with open("/run/postern-tests-accounts.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _run(*command, **kw):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **kw)


def _mark() -> str:
    return f"postern tests pid {os.getpid()}"


class Accounts:
    """Throw-away users and groups of one test process; as an ordinary user there is only ourselves."""

    def __init__(self):
        self.users: list[str] = []
        self.groups: list[str] = []
        self.homes: list[pathlib.Path] = []
        self._sweep_daemons()
        if IS_ROOT:
            self._sweep()
        tag = "".join(random.SystemRandom().choice(ALPHABET) for _ in range(5))
        if not IS_ROOT:
            me = pwd.getpwuid(os.geteuid()).pw_name
            self.user = self.other = self.net = self.relay = self.recorder = me
            return
        self.group = self._group(f"ptg{tag}")
        self.group2 = self._group(f"pth{tag}")
        self.user = self._user(f"ptu{tag}", groups=[self.group, self.group2])
        self.other = self._user(f"pto{tag}")
        self.net = self._user(f"ptn{tag}", system=True)
        self.relay = self._user(f"ptr{tag}", system=True)
        self.recorder = self._user(f"ptc{tag}", system=True)

    def _group(self, name: str) -> str:
        with _account_lock():
            _run("groupadd", name)
        self.groups.append(name)
        return name

    def _user(self, name: str, groups=(), system=False, shell="/bin/bash") -> str:
        command = ["useradd", "--comment", _mark(), "--shell", "/usr/sbin/nologin" if system else shell]
        if system:
            command += ["--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
        else:
            home = pathlib.Path("/tmp") / f"postern-home-{name}"
            command += ["--user-group", "--no-create-home", "--home-dir", str(home)]
        if groups:
            command += ["--groups", ",".join(groups)]
        with _account_lock():
            _run(*command, name)
        self.users.append(name)
        if not system:
            entry = pwd.getpwnam(name)
            home.mkdir(mode=0o755)
            os.chown(home, entry.pw_uid, entry.pw_gid)
            self.homes.append(home)
        return name

    def new_user(self, name: str | None = None, **kw) -> str:
        """One more login user, for a test that changes it."""
        return self._user(name or "ptx" + "".join(random.SystemRandom().choice(ALPHABET) for _ in range(6)), **kw)

    def uids(self) -> set[int]:
        return {pwd.getpwnam(u).pw_uid for u in self.users} - {0} if IS_ROOT else set()

    @staticmethod
    def _sweep():
        """Users that a killed test run left behind, and what still runs as one of them."""
        with _account_lock():
            for entry in pwd.getpwall():
                m = re.fullmatch(r"postern tests pid (\d+)", entry.pw_gecos.split(",")[0])
                if m and not os.path.exists(f"/proc/{m[1]}"):
                    # What made itself independent of its session would be taken for a program of the next user, who gets the same uid.
                    for victim in [p for p in processes().values() if p.uid == entry.pw_uid]:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(victim.pid, signal.SIGKILL)
                    subprocess.run(["userdel", "-f", entry.pw_name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    if entry.pw_dir.startswith("/tmp/postern-home-"):
                        shutil.rmtree(entry.pw_dir, ignore_errors=True)

    @staticmethod
    def _sweep_daemons():
        """Daemons of a killed test run: their settings lie in a folder whose owner is dead."""
        for folder in pathlib.Path("/tmp").glob("pt-*"):
            with contextlib.suppress(OSError, ValueError):
                if folder.stat().st_uid != os.geteuid() or os.path.exists(f"/proc/{int((folder / 'owner').read_text())}"):
                    continue
                table = processes()
                for p in table.values():
                    if f"--config {folder}/" in p.command:
                        for victim in [p, *descendants(p.pid, table)]:
                            with contextlib.suppress(ProcessLookupError):
                                os.kill(victim.pid, signal.SIGKILL)
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self):
        if not IS_ROOT:
            return
        with _account_lock():
            for name in reversed(self.users):
                subprocess.run(["userdel", "-f", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for name in reversed(self.groups):
                subprocess.run(["groupdel", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for home in self.homes:
            shutil.rmtree(home, ignore_errors=True)
        self.users, self.groups, self.homes = [], [], []


# ---------------------------------------------------------------------------------------------------- daemons

class Daemon:
    """One of our daemons. Nothing restarts it but the test. `ready` is the JSON line that it wrote when it served."""

    def __init__(self, name: str, program: str, config: pathlib.Path, log: pathlib.Path, user: str | None = None, env=None, prefix=()):
        self.name, self.program, self.config, self.log_file, self.user = name, program, config, log, user
        self.prefix = list(prefix)  # words before the program: "ip netns exec …"
        self.env = env or {}
        self.process: subprocess.Popen | None = None
        self.ready: dict = {}
        self.started: list[subprocess.Popen] = []

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, seconds: float = 15) -> "Daemon":
        """Starts it and waits until it says that it serves."""
        assert not self.running, f"{self.name} runs already"
        read_end, write_end = os.pipe()
        extra = {}
        if IS_ROOT and self.user:
            entry = pwd.getpwnam(self.user)
            extra = dict(user=entry.pw_uid, group=entry.pw_gid, extra_groups=[])
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, str(BIN / self.program), "--config", str(self.config), "--ready-fd", str(write_end)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[write_end], start_new_session=True,
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                     **{k: v for k, v in os.environ.items() if k.endswith("SAN_OPTIONS")}, **self.env}, **extra)
        self.started.append(self.process)
        os.close(write_end)
        line, deadline = b"", time.monotonic() + seconds * SLACK
        try:
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([read_end], [], [], left)[0]:
                    raise AssertionError(f"{self.name} was not ready within {seconds * SLACK:.0f} s:\n{self.tail()}")
                piece = os.read(read_end, 4096)
                if not piece:
                    raise AssertionError(f"{self.name} ended before it was ready (status {self.process.wait()}):\n{self.tail()}")
                line += piece
        finally:
            os.close(read_end)
        self.ready = json.loads(line)
        return self

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and waits until the kernel has buried it."""
        self.process.kill()
        self.process.wait(10)

    def stop(self, seconds: float = 10) -> int:
        """SIGTERM; returns the exit status."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(seconds * SLACK)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
                raise AssertionError(f"{self.name} did not end within {seconds * SLACK:.0f} s of SIGTERM:\n{self.tail()}") from None
        return self.process.returncode

    def restart(self) -> "Daemon":
        self.stop()
        return self.start()

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def reload(self) -> None:
        self.signal(signal.SIGHUP)

    def log(self, since: int = 0) -> str:
        with open(self.log_file, "rb") as f:
            f.seek(since)
            return f.read().decode(errors="replace")

    def log_size(self) -> int:
        return self.log_file.stat().st_size if self.log_file.exists() else 0

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def wait_log(self, pattern: str, since: int = 0, seconds: float = 10) -> re.Match:
        return wait_until(lambda: re.search(pattern, self.log(since)), f"{self.name}'s log says {pattern!r}", seconds)


# ---------------------------------------------------------------------------------------------------- recordings

@dataclass
class Recording:
    """A .cast file read by our own decoder (asciicast v2 with the exact-bytes rule of recorder/cast/encoder.h)."""
    path: pathlib.Path
    raw: bytes
    header: dict = field(default_factory=dict)
    events: list = field(default_factory=list)

    @classmethod
    def load(cls, path) -> "Recording":
        raw = pathlib.Path(path).read_bytes()
        # While a recording grows its last line may be there in part only.
        lines = raw[: raw.rfind(b"\n") + 1].splitlines() if b"\n" in raw else []
        recording = cls(pathlib.Path(path), raw)
        if lines:
            recording.header = json.loads(lines[0])
            recording.events = [json.loads(line) for line in lines[1:]]
        return recording

    @property
    def id(self) -> str:
        for key in ("recordingID", "recording_id", "recordingId"):
            if key in self.header:
                return self.header[key]
        return ""

    @property
    def finished(self) -> bool:
        """Whole: under its final name."""
        return self.path.suffix == ".cast"

    def stream(self, which: str = "o") -> bytes:
        """The exact bytes: of each event its "b" if one stands just before it, else its text."""
        out, exact = [], {}
        for _, code, data in self.events:
            if code == "b":
                target, _, encoded = data.partition(" ")
                assert target in ("o", "e", "i"), f"bytes for an unknown stream: {data[:20]!r}"
                assert target not in exact, "two sets of exact bytes for one event"
                exact[target] = base64.b64decode(encoded, validate=True)
            elif code in ("o", "e", "i"):
                bytes_ = exact.pop(code, None)
                if bytes_ is None:
                    bytes_ = data.encode()
                if code == which:
                    out.append(bytes_)
        assert not exact, "exact bytes without their event"
        return b"".join(out)

    def codes(self) -> list[str]:
        return [e[1] for e in self.events]

    def times(self) -> list[float]:
        return [e[0] for e in self.events]

    def last_exit(self):
        return next((e[2] for e in reversed(self.events) if e[1] == "x"), None)


# ---------------------------------------------------------------------------------------------------- clients

@dataclass
class Result:
    code: int
    out: bytes
    err: bytes
    seconds: float

    @property
    def text(self) -> str:
        return self.out.decode(errors="replace")

    @property
    def errors(self) -> str:
        return self.err.decode(errors="replace")


class Terminal:
    """A program on a pty of ours, driven like a person would. `screen` is every byte it has shown so far."""

    def __init__(self, command: list[str], rows: int = 24, cols: int = 80, env: dict | None = None):
        leader, follower = pty_module.openpty()
        self.leader = leader
        self.resize(rows, cols, follower)
        self.process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=env, close_fds=True,
                                        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(follower)
        os.set_blocking(leader, False)
        self.screen = b""
        self.eof = False
        self._read = 0  # how far read_until has consumed
        self.times: list[tuple[float, int]] = []  # when bytes came, and how many were there then

    def pump(self, seconds: float = 0.05) -> bool:
        """Takes what is there; False when nothing came within `seconds` or at the end."""
        if self.eof or not select.select([self.leader], [], [], seconds)[0]:
            return False
        try:
            piece = os.read(self.leader, 1 << 16)
        except BlockingIOError:
            return False
        except OSError:  # EIO: the other end is gone
            piece = b""
        if not piece:
            self.eof = True
            return False
        self.screen += piece
        self.times.append((time.monotonic(), len(self.screen)))
        return True

    def read_until(self, pattern: bytes | str, seconds: float = 10) -> re.Match:
        """Reads until `pattern` (regular expression) appears after the last match; returns the match."""
        pattern = pattern.encode() if isinstance(pattern, str) else pattern
        deadline = time.monotonic() + seconds * SLACK
        while True:
            match = re.compile(pattern, re.S).search(self.screen, self._read)
            if match:
                self._read = match.end()
                return match
            if self.eof or time.monotonic() > deadline:
                raise AssertionError(f"{'ended' if self.eof else 'not shown in time'} before {pattern!r}; screen: {self.screen[-2000:]!r}")
            self.pump()

    def read_all(self, seconds: float = 20) -> bytes:
        """Reads to the end of the program's output."""
        deadline = time.monotonic() + seconds * SLACK
        while not self.eof:
            assert time.monotonic() < deadline, f"no end within {seconds * SLACK:.0f} s; screen: {self.screen[-2000:]!r}"
            self.pump()
        return self.screen

    def send(self, text: bytes | str) -> None:
        data = text.encode() if isinstance(text, str) else text
        while data:
            select.select([], [self.leader], [])
            data = data[os.write(self.leader, data):]

    def resize(self, rows: int, cols: int, fd: int | None = None) -> None:
        fcntl.ioctl(self.leader if fd is None else fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def wait(self, seconds: float = 10) -> int:
        """Drains the output, waits for the end, returns the exit status."""
        self.read_all(seconds)
        return self.process.wait(seconds * SLACK)

    def longest_gap(self) -> float:
        return max((b[0] - a[0] for a, b in zip(self.times, self.times[1:])), default=0.0)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if self.leader >= 0:
            os.close(self.leader)
            self.leader = -1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# ---------------------------------------------------------------------------------------------------- the stack

_claimed: list[socket.socket] = []


def _claim_network() -> str:
    """A /24 of 127.0.0.0/8 that no other test process uses: an abstract socket of that name is the claim."""
    pick = random.SystemRandom()
    while True:
        net = f"127.{pick.randrange(16, 240)}.{pick.randrange(1, 250)}"
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0postern-tests-{net}")
        except OSError:
            claim.close()
            continue
        _claimed.append(claim)
        return net


def _free_port(*addresses: str) -> int:
    """A port that is free on all of them (the recorders share one port)."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind((addresses[0], 0))
            port = first.getsockname()[1]
            try:
                for address in addresses[1:]:
                    stack.enter_context(socket.socket()).bind((address, port))
            except OSError:
                continue
            return port


def toml(tables: dict) -> str:
    """The little TOML that our settings need."""
    def value(v):
        if isinstance(v, bool):
            return "true" if v else "false"
        if isinstance(v, (int, float)):
            return str(v)
        if isinstance(v, (list, tuple)):
            return "[" + ", ".join(value(x) for x in v) + "]"
        return json.dumps(str(v))
    lines = []
    for table, entries in tables.items():
        if table:
            lines.append(f"[{table}]")
        lines += [f"{key} = {value(v)}" for key, v in entries.items()]
    return "\n".join(lines) + "\n"


def merge(base: dict, more: dict | None) -> dict:
    result = {table: dict(entries) for table, entries in base.items()}
    for table, entries in (more or {}).items():
        result.setdefault(table, {}).update(entries)
    return result


PAM_STACK = """\
# As packaging/pam/postern, self-contained (pam_start_confdir(3)) and with marks that a test can see.
auth     required  pam_deny.so
account  required  pam_unix.so
session  required  pam_limits.so
session  required  pam_unix.so
session  required  pam_env.so conffile={folder}/pam_env.conf
session  optional  pam_umask.so umask=0027
"""


class Stack:
    """posternd, relay and two recorders with their own users, addresses and folder. Use as a context manager or by the fixtures.

    posternd=, relay=, recorder= : settings to add, {"table": {"key": value}}
    policy=   : text of the policy, or a function of the stack that returns it; default: default_policy()
    start=    : names of the daemons to start ("recorder_a", "recorder_b", "relay", "posternd")
    """

    NAMES = ("recorder_a", "recorder_b", "relay", "posternd")

    def __init__(self, accounts: Accounts, posternd=None, relay=None, recorder=None, policy=None, start=NAMES, pam=None, env=None):
        self.accounts = accounts
        self.user, self.other = accounts.user, accounts.other
        self.net = _claim_network()
        host = lambda n: f"{self.net}.{n}"
        self.alice, self.open_alice, self.plain_alice, self.bob, self.stranger = host(1), host(2), host(3), host(4), host(9)
        self.server, self.rec_a, self.rec_b = host(100), host(201), host(202)
        self.recorder_port = _free_port(self.rec_a, self.rec_b)
        self.wanted_port = _free_port(self.server)  # the same after a restart, as on a real server
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="pt-", dir="/tmp"))  # short: sun_path has 108 bytes
        self.dir.chmod(0o755)
        (self.dir / "owner").write_text(str(os.getpid()))
        self.terminals: list[Terminal] = []
        self.clients: list[subprocess.Popen] = []
        self.policy_file = self.dir / "policy.hujson"
        self.nodes_file = self.dir / "nodes.toml"
        self.known_hosts = self.dir / "known_hosts"
        self.control = self.dir / "run/control.sock"
        for name, owner in (("run", None), ("host-keys", None), ("pam", None), ("relay", accounts.relay),
                            ("recorder-a", accounts.recorder), ("recorder-b", accounts.recorder)):
            folder = self.dir / name
            folder.mkdir(mode=0o700 if name == "host-keys" else 0o755)
            if IS_ROOT and owner:
                entry = pwd.getpwnam(owner)
                os.chown(folder, entry.pw_uid, entry.pw_gid)
        self.recorder_dirs = {"a": self.dir / "recorder-a", "b": self.dir / "recorder-b"}
        (self.dir / "pam/pam_env.conf").write_text("POSTERN_PAM_MARK DEFAULT=from-pam\n")
        stack_text = pam or PAM_STACK.format(folder=self.dir / "pam")
        (self.dir / "pam/postern").write_text(stack_text)
        (self.dir / "pam/other").write_text("auth required pam_deny.so\naccount required pam_deny.so\nsession required pam_deny.so\n")
        self.write_nodes()
        self.policy_file.write_text(policy(self) if callable(policy) else policy or self.default_policy())
        self.posternd_settings = merge(self._posternd_defaults(), posternd)
        self.relay_settings = merge(self._relay_defaults(), relay)
        self._write("posternd.toml", self.posternd_settings)
        self._write("relay.toml", self.relay_settings)
        for letter in "ab":
            self._write(f"recorder-{letter}.toml", merge(self._recorder_defaults(letter), recorder))
        daemon = lambda name, program, user=None: Daemon(name, program, self.dir / f"{name.replace('_', '-')}.toml", self.dir / f"{name.replace('_', '-')}.log", user, env)
        self.recorder_a = daemon("recorder_a", "postern-recorder", accounts.recorder)
        self.recorder_b = daemon("recorder_b", "postern-recorder", accounts.recorder)
        self.relay = daemon("relay", "postern-relay", accounts.relay)
        self.posternd = daemon("posternd", "posternd")
        self._start = start

    # ---- settings (the one place that knows the keys)

    def _write(self, name: str, tables: dict) -> None:
        (self.dir / name).write_text(toml(tables))

    def _posternd_defaults(self) -> dict:
        return {
            "listen": {"addresses": [f"{self.server}:{self.wanted_port}"]},
            "policy": {"file": self.policy_file, "require_network_rule": True},
            "identity": {"provider": "static", "file": self.nodes_file},
            "host_keys": {"dir": self.dir / "host-keys"},
            "programs": {"dir": BIN},
            "control": {"socket": self.control, "registration_socket": self.dir / "run/registration.sock"},
            "relay": {"socket": self.dir / "relay/relay.sock"},
            # A disk that is busy with what builds left may stand still for a second; tests of the refusal itself set their own.
            "recorder": {"port": self.recorder_port, "start_timeout": "5s"},
            "sandbox": {"user": self.accounts.net, "empty_root": self.dir / "run/empty"},
            "pam": {"service": "postern", "confdir": self.dir / "pam"},
            # One address does here in a minute what many do in a month; the tests of the penalties themselves say [].
            "limits": {"penalty_exempt": ["127.0.0.0/8"]},
            "log": {"level": "debug"},
        }

    def _relay_defaults(self) -> dict:
        return {
            "sessions": {"socket": self.dir / "relay/relay.sock"},
            "control": {"socket": self.dir / "relay/control.sock"},
            "journal": {"dir": self.dir / "relay/journal"},
            "dial": {"source": self.server},
            # As start_timeout above: which recorder has a recording is not to depend on the disk.
            "recorders": {"first_commit_timeout": "10s"},
            "log": {"level": "debug"},
        }

    def _recorder_defaults(self, letter: str) -> dict:
        return {
            "listen": {"addresses": [f"{self.rec_a if letter == 'a' else self.rec_b}:{self.recorder_port}"]},
            "ingest": {"allow": [self.server]},
            "read": {"allow": ["127.0.0.0/8"]},
            "store": {"dir": self.recorder_dirs[letter] / "recordings"},
            "log": {"level": "debug"},
        }

    def write_nodes(self, extra: str = "", more: dict[str, str] | None = None) -> None:
        """`more`: lines for a node, by its name."""
        node = lambda name, address, who: f'[[node]]\nname = "{name}"\naddresses = ["{address}"]\n{who}\n{(more or {}).get(name, "")}\n'
        self.nodes_file.write_text(
            node("alice", self.alice, 'user = "alice@example.com"')
            + node("open-alice", self.open_alice, 'user = "open@example.com"')
            + node("plain-alice", self.plain_alice, 'user = "plain@example.com"')
            + node("bob", self.bob, 'user = "bob@example.com"')
            + node("server", self.server, 'tags = ["tag:server"]')
            + node("recorder-a", self.rec_a, 'tags = ["tag:recorder"]')
            + node("recorder-b", self.rec_b, 'tags = ["tag:recorder"]') + extra)

    def default_policy(self, users: list[str] | None = None, accept_env=("POSTERN_TEST_*", "LANG"), extra_rules=()) -> str:
        """alice: recorded, fail closed; open: recorded, fail open; plain: not recorded; bob: reaches port 22, no rule."""
        users = users or sorted({self.user, self.other})
        rule = lambda who, **more: {"action": "accept", "src": [who], "dst": ["tag:server"], "users": users, "acceptEnv": list(accept_env), **more}
        return "// generated by tests/integration/harness.py\n" + json.dumps({
            "tagOwners": {"tag:server": ["alice@example.com"], "tag:recorder": ["alice@example.com"]},
            "acls": [{"action": "accept", "src": ["*"], "dst": ["tag:server:22"]}],
            "ssh": list(extra_rules) + [
                rule("alice@example.com", recorder=["tag:recorder"], enforceRecorder=True),
                rule("open@example.com", recorder=["tag:recorder"]),
                rule("plain@example.com"),
            ]}, indent=2) + "\n"

    def set_policy(self, text: str) -> None:
        """Writes a policy and has posternd load it; returns when it has said so (either way)."""
        self.policy_file.write_text(text)
        self.reload()

    def reload(self) -> str:
        """posternd reads policy and nodes again; its log of that, up to the policy."""
        since = self.posternd.log_size()
        self.posternd.reload()
        self.posternd.wait_log(r"event=policy_(loaded|kept)", since)
        return self.posternd.log(since)

    @contextlib.contextmanager
    def capabilities(self, **of):
        """Nodes with session rules: capabilities(alice=[{"pty": False}]); a text is taken as it is. Ends with none."""
        text = lambda rules: rules if isinstance(rules, str) else json.dumps(rules)
        self.write_nodes(more={name.replace("_", "-"): f"capabilities = {{\"postern.internal/cap/ssh\" = '''{text(rules)}'''}}\n" for name, rules in of.items()})
        assert "identity_problem" not in self.reload()
        try:
            yield self
        finally:
            self.write_nodes()
            self.reload()

    # ---- life

    def start(self) -> "Stack":
        try:
            for name in self.NAMES:
                if name in self._start:
                    getattr(self, name).start()
            if "posternd" in self._start:
                self.learn_host_key()
        except BaseException:
            with contextlib.suppress(Exception):
                self.stop()
            raise
        return self

    @property
    def port(self) -> int:
        return int(self.posternd.ready["listening"][0].rsplit(":", 1)[1])

    def daemons(self) -> list[Daemon]:
        return [self.recorder_a, self.recorder_b, self.relay, self.posternd]

    def recorder(self, letter: str) -> Daemon:
        return self.recorder_a if letter == "a" else self.recorder_b

    def leftovers(self) -> list[Process]:
        """Processes of this test process that are neither a running daemon of a stack nor a client we still hold."""
        ours = {d.process.pid for s in _stacks for d in s.daemons() if d.process and d.process.returncode is None}
        ours |= {p.pid for s in _stacks for p in [t.process for t in s.terminals] + s.clients if p.returncode is None}
        _reap_orphans({p.pid for s in _stacks for d in s.daemons() for p in d.started} | ours)
        table = processes()
        expected = set(ours)
        for pid in ours:
            expected |= {p.pid for p in descendants(pid, table)}
        names = {n[:15] for n in ("postern-net", "postern-session", "posternd", "postern-relay", "postern-recorder")}
        uids = self.accounts.uids()
        left = []
        # Of our own children, also adopted ones; other tests' stand-ins, with what they run, have another program at the top.
        for child in table.values():
            if child.parent == os.getpid() and child.pid not in expected and (child.name in names or child.uid in uids):
                left += [child, *(p for p in descendants(child.pid, table) if p.pid not in expected)]
        return left

    def end_sessions(self) -> None:
        """What a careful admin does before stopping the server: ends every session."""
        if self.posternd.running:
            self.postern("sessions", "kill", "--all", check=False)

    def stop(self) -> None:
        """Ends clients, sessions and daemons, and fails when any process of ours is left."""
        for terminal in self.terminals:
            terminal.close()
        for client in self.clients:
            if client.poll() is None:
                client.kill()
            client.wait(10)
        problems = []
        for d in self.daemons():
            if d.running:  # a test may have left it stopped
                d.resume()
        try:
            self.end_sessions()
        except Exception as e:  # noqa: BLE001 - reported below, after everything has been stopped
            problems.append(str(e))
        for d in (self.posternd, self.relay, self.recorder_a, self.recorder_b):
            try:
                d.stop()
            except AssertionError as e:
                problems.append(str(e))
            if d is self.posternd and self.relay.running:
                # A session ends when the relay has the end of its recording: it waits for a relay that is away.
                with contextlib.suppress(AssertionError):
                    wait_until(lambda: not [p for p in self.leftovers() if p.name.startswith("postern-session"[:15]) and p.state != "Z"], "sessions end", 5)
        left = []
        deadline = time.monotonic() + 5 * SLACK
        while True:
            left = [p for p in self.leftovers() if p.state != "Z"]
            if not left or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for p in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(p.pid, signal.SIGKILL)
        if left:
            problems.append("processes left behind:\n  " + "\n  ".join(map(str, left)))
        if self in _stacks:
            _stacks.remove(self)
        for d in self.daemons():
            if d.log_file.exists() and (complaint := SANITIZER.search(d.log())):
                problems.append(f"{d.name}: {d.log()[complaint.start():][:4000]}")
        if problems:
            raise AssertionError("\n".join(problems) + "\n" + self.logs())
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    # ---- clients

    def learn_host_key(self) -> None:
        """Takes the host key as a first connection does. As bob, who gets nothing: no session comes of it."""
        self.known_hosts.unlink(missing_ok=True)
        subprocess.run(self.ssh_command(None, bind=self.bob, user=self.user, options=["StrictHostKeyChecking=accept-new", "LogLevel=ERROR"]) + ["true"],
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30 * SLACK)
        assert self.known_hosts.exists(), "no host key was learned:\n" + self.posternd.tail()

    def ssh_command(self, command: str | None = None, *, user: str | None = None, bind: str | None = None, tty: bool | None = None,
                    options=(), arguments=()) -> list[str]:
        """The ssh command line. tty: True = -tt, False = -T, None = ssh decides."""
        given = list(options) + ["StrictHostKeyChecking=yes", f"UserKnownHostsFile={self.known_hosts}", "GlobalKnownHostsFile=/dev/null",
                                 "UpdateHostKeys=no", "BatchMode=yes", "IdentityFile=none", "IdentityAgent=none", "LogLevel=INFO"]
        line = ["ssh", "-F", "/dev/null", "-b", bind or self.alice, "-p", str(self.port), "-l", user or self.user]
        for option in given:
            line += ["-o", option]
        line += {True: ["-tt"], False: ["-T"], None: []}[tty]
        return line + list(arguments) + [self.server] + ([command] if command is not None else [])

    def client_env(self, env: dict | None = None) -> dict:
        return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": str(self.dir), "TERM": "xterm-256color", **(env or {})}

    def ssh(self, command: str | None = None, *, input: bytes | None = None, timeout: float = 30, env=None, **kw) -> Result:
        """Runs OpenSSH's ssh to its end. input=None: stdin is /dev/null."""
        begin = time.monotonic()
        done = subprocess.run(self.ssh_command(command, **kw), input=input, stdin=subprocess.DEVNULL if input is None else None,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.client_env(env), timeout=timeout * SLACK)
        return Result(done.returncode, done.stdout, done.stderr, time.monotonic() - begin)

    def popen(self, command: str | None = None, *, env=None, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw) -> subprocess.Popen:
        """ssh in the background; ended with the stack."""
        process = subprocess.Popen(self.ssh_command(command, **kw), stdin=stdin, stdout=stdout, stderr=stderr, env=self.client_env(env))
        self.clients.append(process)
        return process

    def terminal(self, command: str | None = None, *, rows: int = 24, cols: int = 80, env=None, tty: bool | None = None, **kw) -> Terminal:
        """ssh on a pty of ours; with no command that is a login shell."""
        terminal = Terminal(self.ssh_command(command, tty=tty, **kw), rows, cols, self.client_env(env))
        self.terminals.append(terminal)
        return terminal

    async def asyncssh(self, *, bind: str | None = None, user: str | None = None, **kw):
        import asyncssh
        return await asyncssh.connect(self.server, self.port, local_addr=(bind or self.alice, 0), username=self.user if user is None else user, known_hosts=None,
                                      config=None, client_keys=None, agent_path=None, **kw)

    def connect(self, bind: str | None = None, timeout: float = 5) -> socket.socket:
        """A bare TCP connection from one of our addresses."""
        sock = socket.socket()
        sock.settimeout(timeout * SLACK)
        sock.bind((bind or self.alice, 0))
        sock.connect((self.server, self.port))
        return sock

    def postern(self, *arguments: str, check: bool = True, timeout: float = 20) -> Result:
        """The CLI, on this stack's control socket."""
        begin = time.monotonic()
        done = subprocess.run([str(BIN / "postern"), "--control", str(self.control), *map(str, arguments)], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout * SLACK)
        result = Result(done.returncode, done.stdout, done.stderr, time.monotonic() - begin)
        assert not check or result.code == 0, f"postern {arguments}: {result}"
        return result

    # ---- what is going on

    def processes_of(self, user: str | None = None) -> list[Process]:
        """Live processes of a local user: as root every one of the throw-away user, else what descends from us and is neither ours nor a client."""
        uid = pwd.getpwnam(user or self.user).pw_uid
        if IS_ROOT:
            return [p for p in processes().values() if p.uid == uid and p.state != "Z"]
        held = {p.pid for s in _stacks for p in [t.process for t in s.terminals] + s.clients}
        return [p for p in descendants(os.getpid()) if p.uid == uid and p.state != "Z" and p.pid not in held and not p.command.startswith(("postern", str(BIN), "ssh "))]

    def session_workers(self) -> list[Process]:
        """postern-session processes that serve a connection: forked from the zygote, which is posternd's own child."""
        return [p for p in descendants(os.getpid()) if p.name == "postern-session"[:15] and p.parent != self.posternd.pid and p.state != "Z"]

    def session_processes(self) -> list[Process]:
        """Every live postern-session, the zygote included."""
        return [p for p in descendants(os.getpid()) if p.name == "postern-session"[:15] and p.state != "Z"]

    def recordings(self, letter: str) -> list[Recording]:
        """All recordings in a recorder's folder, oldest first."""
        paths = [p for p in self.recorder_dirs[letter].rglob("*") if p.is_file() and (p.name.endswith(".cast") or p.name.endswith(".cast.part"))]
        loaded = []
        for p in paths:
            with contextlib.suppress(FileNotFoundError):  # renamed under our hands
                loaded.append((p.stat().st_mtime, Recording.load(p)))
        return [r for _, r in sorted(loaded, key=lambda x: x[0])]

    def find_recording(self, marker: bytes | str, letters: str = "ab", finished: bool = True, seconds: float = 15) -> Recording:
        """The recording (whole, unless finished=False) whose output or command holds `marker`; waits for it."""
        needle = marker.encode() if isinstance(marker, str) else marker

        def look():
            for letter in letters:
                for r in self.recordings(letter):
                    if finished and not r.finished:
                        continue
                    if needle in r.raw or needle in r.stream("o"):
                        return r
            return None
        return wait_until(look, f"a recording with {marker!r}", seconds)

    def recorder_url(self, letter: str) -> str:
        return f"http://{self.rec_a if letter == 'a' else self.rec_b}:{self.recorder_port}"

    def logs(self, since: dict[str, int] | None = None) -> str:
        since = since or {}
        return "\n".join(f"--- {d.name} ({'runs' if d.running else 'not running'})\n" + "\n".join(d.log(since.get(d.name, 0)).splitlines()[-150:])
                         for d in self.daemons() if d.log_file.exists())


_stacks: list[Stack] = []


def new_stack(accounts: Accounts, kind: type[Stack] = Stack, **kw) -> Stack:
    stack = kind(accounts, **kw)
    _stacks.append(stack)
    return stack


def running_stacks() -> list[Stack]:
    return list(_stacks)
