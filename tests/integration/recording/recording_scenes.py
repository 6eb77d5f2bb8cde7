"""What the recording tests and bench/failover share: short settings, a client that watches the clock, the kill scene.

Settings are short so that the suite is quick; every deadline of a test is that setting plus slack, never the setting itself.
"""
from __future__ import annotations

import json
import os
import pathlib
import pwd
import random
import selectors
import subprocess
import threading
import time
from dataclasses import dataclass, field

import harness
from harness import SLACK, Recording, wait_until

LOST_TIMEOUT = 0.5  # what a relay waits for a health line
GRACE = 2.0         # what a session that must be recorded goes on without any recorder

POSTERND = {"recorder": {"start_timeout": "1s", "grace": f"{GRACE:g}s"}}
RELAY = {"recorders": {"lost_timeout": f"{int(LOST_TIMEOUT * 1000)}ms", "backoff_longest": "250ms"}}
RECORDER = {"store": {"health_interval": "100ms"}}

GAP = 2.0  # the issue: no gap over 2 s


def settings(posternd=None, relay=None, recorder=None) -> dict:
    """Keyword arguments of make_stack: the short settings and more."""
    return dict(posternd=harness.merge(POSTERND, posternd), relay=harness.merge(RELAY, relay), recorder=harness.merge(RECORDER, recorder))


# ------------------------------------------------------------------------------------------------ what the user sees

class Watched:
    """ssh with its output read at once and the time of every piece noted. `wait_for` and `wait` never lose the clock."""

    def __init__(self, stack, command: str, **kw):
        self.out, self.err = bytearray(), bytearray()
        self.begin = time.monotonic()
        self.pieces: list[tuple[float, int]] = []  # (when, bytes of stdout by then)
        self._at: list[tuple[int, object]] = []    # (bytes, what to do once that many were seen)
        self._lock = threading.Condition()
        self.process = stack.popen(command, **kw)
        self.ended: float | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        with selectors.DefaultSelector() as selector:
            for stream, where in ((self.process.stdout, self.out), (self.process.stderr, self.err)):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, where)
            while selector.get_map():
                for key, _ in selector.select():
                    piece = os.read(key.fd, 1 << 16)
                    if not piece:
                        selector.unregister(key.fileobj)
                        continue
                    due = []
                    with self._lock:
                        key.data.extend(piece)
                        if key.data is self.out:
                            self.pieces.append((time.monotonic(), len(self.out)))
                            due = [what for at, what in self._at if at <= len(self.out)]
                            self._at = [(at, what) for at, what in self._at if at > len(self.out)]
                        self._lock.notify_all()
                    for what in due:
                        what()
        self.process.wait()
        with self._lock:
            self.ended = time.monotonic()
            self._lock.notify_all()

    def at(self, count: int, what) -> None:
        """Calls `what` (in the reading thread) as soon as `count` bytes of stdout were seen."""
        with self._lock:
            if len(self.out) < count:
                self._at.append((count, what))
                return
        what()

    def send(self, text: bytes) -> None:
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def close_input(self) -> None:
        self.process.stdin.close()

    def wait_for(self, text: bytes, seconds: float = 10) -> None:
        with self._lock:
            ok = self._lock.wait_for(lambda: text in self.out or self.ended is not None, seconds * SLACK)
            assert ok and text in self.out, f"{text!r} not shown; stdout ends {bytes(self.out[-300:])!r}, stderr {bytes(self.err[-600:])!r}, exit {self.process.returncode}"

    def wait(self, seconds: float = 30) -> int:
        with self._lock:
            ok = self._lock.wait_for(lambda: self.ended is not None, seconds * SLACK)
        assert ok, f"ssh did not end within {seconds * SLACK:.0f} s; {len(self.out)} bytes so far, stderr {bytes(self.err[-600:])!r}"
        return self.process.returncode

    def longest_gap(self, since: float | None = None) -> float:
        """Longest time without anything new for the user, from `since` (default: the first byte) to the end of ssh."""
        times = [t for t, _ in self.pieces if since is None or t >= since]
        times = ([since] if since is not None else []) + times + ([self.ended] if self.ended else [])
        return max((b - a for a, b in zip(times, times[1:])), default=0.0)


def running(stack, user: str | None = None) -> list[harness.Process]:
    """The user's processes that come from this test process (it is the subreaper of all it started); uids are used again on a machine."""
    uid = pwd.getpwnam(user or stack.user).pw_uid
    return [p for p in harness.descendants(os.getpid()) if p.uid == uid and p.state != "Z"]


# ------------------------------------------------------------------------------------------------ what the recorders have

def cast_files(stack, letter: str, finished: bool | None = None) -> list[pathlib.Path]:
    found = []
    for path in stack.recorder_dirs[letter].rglob("*"):
        if path.name.endswith(".cast") and finished is not False or path.name.endswith(".cast.part") and finished is not True:
            found.append(path)
    return found


def header_of(path: pathlib.Path) -> dict:
    """The first line, {} while it is not there in full."""
    try:
        with open(path, "rb") as f:
            line = f.readline(1 << 20)
        return json.loads(line) if line.endswith(b"\n") else {}
    except (FileNotFoundError, ValueError):
        return {}


def copies(stack, marker: str, letter: str, finished: bool | None = None) -> list[pathlib.Path]:
    """Files of recorder `letter` whose command holds `marker`."""
    return [p for p in cast_files(stack, letter, finished) if marker in header_of(p).get("command", "")]


def wait_copy(stack, marker: str, letter: str, finished: bool | None = None, seconds: float = 15) -> pathlib.Path:
    what = {True: "a whole", False: "an unfinished", None: "a"}[finished]
    return wait_until(lambda: copies(stack, marker, letter, finished), f"{what} copy of {marker} at recorder {letter}", seconds)[0]


def wait_whole(stack, marker: str, seconds: float = 20) -> tuple[str, Recording]:
    """(letter, recording) of the one whole copy; fails when there are two."""
    def look():
        return [(letter, path) for letter in "ab" for path in copies(stack, marker, letter, True)]
    found = wait_until(look, f"a whole copy of {marker} at a recorder", seconds)
    assert len(found) == 1, f"{marker} is whole more than once: {found}"
    letter, path = found[0]
    return letter, Recording.load(path)


def wait_whole_or_cut(stack, marker: str, seconds: float = 20) -> tuple[str, Recording]:
    """The finished recording of a session that was ended by force: with an end of its own, or marked cut (no stream, growing no more)."""
    def look():
        for letter in "ab":
            for path in copies(stack, marker, letter):
                meta = path.with_name(path.name.split(".")[0] + ".meta")
                if path.suffix == ".cast" or meta.exists() and b'"cut"' in meta.read_bytes():
                    return letter, path
        return None
    letter, path = wait_until(look, f"a finished copy of {marker}", seconds)
    return letter, Recording.load(path)


def wait_journal_freed(stack, recording_id: str, seconds: float = 15) -> None:
    """The host's journal holds no byte of that recording any more (a line that says where it is may stay)."""
    journal = pathlib.Path(stack.relay_settings["journal"]["dir"])

    def held():
        return [p for p in journal.rglob("*") if p.is_file() and recording_id in p.name and p.stat().st_size > 4096]
    wait_until(lambda: not held(), f"the journal drops {recording_id}", seconds)


def check_recording(recording: Recording, shown: bytes, marker: str = "") -> None:
    """Everything that must hold of any finished recording."""
    assert recording.header.get("version") == 2, recording.raw[:200]
    assert marker in recording.header.get("command", "")
    got = recording.stream("o")
    if got != shown:
        at = next((i for i, (a, b) in enumerate(zip(got, shown)) if a != b), min(len(got), len(shown)))
        raise AssertionError(f"the recording is not what the user saw: {len(got)} bytes recorded, {len(shown)} seen, first difference at {at}: "
                             f"recorded {got[at:at + 60]!r}, seen {shown[at:at + 60]!r}")
    times = recording.times()
    assert all(a <= b for a, b in zip(times, times[1:])), "times go backwards"


def choose(stack, letter: str, seconds: float = 15, **kw) -> None:
    """Waits until new recordings go to recorder `letter`, by trying: the relay alone knows when it has seen a recorder come back."""
    def try_one():
        marker = f"probe-{os.urandom(6).hex()}"
        done = stack.ssh(f": {marker}", tty=False, **kw)
        assert done.code == 0, f"probe: {done}"
        found, _ = wait_whole(stack, marker)
        return found == letter
    wait_until(try_one, f"new recordings go to recorder {letter}", seconds, every=0.1)


# ------------------------------------------------------------------------------------------------ the kill scene

LINES = 2_000_000
_expected: dict[int, bytes] = {}


def numbers(lines: int) -> bytes:
    if lines not in _expected:
        _expected[lines] = "".join(f"{i}\n" for i in range(1, lines + 1)).encode()
    return _expected[lines]


@dataclass
class Outcome:
    """What one kill did to one session."""
    killed: str
    other: str
    pty: bool
    at: int             # bytes that the user had seen; -1: before the first
    gap: float          # longest time without anything new, seconds
    whole_after: float  # from the kill to the whole copy, seconds
    lost: int = 0       # bytes that the user saw or should have seen and the recording has not
    twice: int = 0      # bytes that the recording has too many
    problems: list[str] = field(default_factory=list)

    def __str__(self):
        where = "while idle" if self.at < 0 else f"at byte {self.at}"
        return (f"{self.killed} killed {where}, {'pty' if self.pty else 'no pty'}: gap {self.gap:.3f} s, whole at {self.other} after "
                f"{self.whole_after:.3f} s, lost {self.lost}, twice {self.twice}" + "".join(f"; {p}" for p in self.problems))


def gated(marker: str, command: str) -> str:
    """`command` begins when a line comes in; says go-MARKER before. In a pty nothing is echoed or changed, so bytes compare."""
    return f"[ -t 0 ] && stty -echo -onlcr; echo go-{marker}; read line; {command}"


def kill_in_the_middle(stack, killed: str, random_source: random.Random, before=None, lines: int = LINES, **kw) -> Outcome:
    """One session; its recorder `killed` (it must be the one that is chosen) gets kill -9 at a random point of `seq 1 lines`.

    `before()` runs when the session has begun and is idle. Returns the outcome; the killed recorder stays dead.
    """
    other = "b" if killed == "a" else "a"
    pty = random_source.random() < 0.4
    at = -1 if random_source.random() < 0.1 else random_source.randrange(len(numbers(lines)))
    marker = f"kill-{os.urandom(6).hex()}"
    prefix = f"go-{marker}\n".encode()
    client = Watched(stack, gated(marker, f"exec seq 1 {lines}"), tty=pty, **kw)
    client.wait_for(prefix)
    where = [letter for letter in "ab" if copies(stack, marker, letter)]
    assert where == [killed], f"the session is recorded at {where}, not at {killed}"
    if before:
        before()
    when = []

    def kill():
        when.append(time.time())
        stack.recorder(killed).process.kill()
    if at < 0:
        kill()
    else:
        client.at(len(prefix) + at, kill)
    started = time.monotonic()
    client.send(b"\n")
    code = client.wait(60)
    stack.recorder(killed).process.wait()
    gap = client.longest_gap(since=started)
    shown = bytes(client.out)
    outcome = Outcome(killed, other, pty, at, gap, 0.0)
    expected = prefix + numbers(lines)
    if code != 0:
        outcome.problems.append(f"ssh exits {code}: {bytes(client.err[-300:])!r}")
    if shown != expected:
        outcome.problems.append(f"the user saw {len(shown)} bytes instead of {len(expected)}")
    try:
        wait_until(lambda: copies(stack, marker, other, True) or copies(stack, marker, killed, True), f"a whole copy of {marker}", 20)
    except AssertionError as e:
        outcome.problems.append(str(e))
        outcome.lost = len(expected)
        return outcome
    whole = {letter: copies(stack, marker, letter, True) for letter in "ab"}
    if whole[killed] and at < len(numbers(lines)) // 2:
        outcome.problems.append(f"whole at {killed}, which was dead")
    if whole[killed] and whole[other] and whole[killed][0].read_bytes() != whole[other][0].read_bytes():
        outcome.problems.append(f"two whole copies that differ: {whole}")  # (the same twice: its last answer died with it)
    if len(whole["a"]) > 1 or len(whole["b"]) > 1:
        outcome.problems.append(f"whole more than once at one recorder: {whole}")
    path = (whole[other] or whole[killed])[0]
    recording = Recording.load(path)
    outcome.whole_after = max(0.0, path.stat().st_ctime - when[0])
    got = recording.stream("o")
    if got != shown:
        same = next((i for i, (x, y) in enumerate(zip(got, shown)) if x != y), min(len(got), len(shown)))
        outcome.lost, outcome.twice = (len(shown) - len(got), 0) if len(got) <= len(shown) else (0, len(got) - len(shown))
        outcome.lost = outcome.lost or (0 if got[:same] == shown else len(shown) - same if not outcome.twice else 0)
        try:
            check_recording(recording, shown, marker)
        except AssertionError as e:
            outcome.problems.append(str(e))
    if recording.last_exit() != "0":
        outcome.problems.append(f"the recording ends with {recording.last_exit()!r}")
    if gap > GAP * SLACK:
        outcome.problems.append(f"a gap of {gap:.3f} s")
    return outcome


def failover_round(stack, random_source: random.Random, lines: int = LINES) -> list[Outcome]:
    """A dies under a session, B goes on; A comes back and B dies under the next one. Both are up at the start and at the end."""
    choose(stack, "a")
    first = kill_in_the_middle(stack, "a", random_source, lines=lines)
    second = kill_in_the_middle(stack, "b", random_source, before=lambda: stack.recorder_a.start(), lines=lines)
    stack.recorder_b.start()
    return [first, second]
