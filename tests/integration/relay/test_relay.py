"""postern-relay between sessions in the test's hand (tests/tools/relay_feed.cpp) and two real postern-recorders. No ssh, no root."""
import os
import pathlib
import signal
import subprocess
import tempfile
import threading
import time

import pytest

import harness
from harness import SLACK, Daemon, Recording, wait_until

LOST = 0.5


class Feed:
    """A session: what is written to it is recorded. Notes what the relay says of it, and when."""

    def __init__(self, scene, *arguments, recorders=None):
        self.process = subprocess.Popen([str(harness.BIN / "relay_feed"), str(scene.socket), recorders or scene.list, *arguments],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        scene.feeds.append(self)
        self.fed = bytearray()
        self.said: list[tuple[float, str]] = []
        self._lock = threading.Condition()
        self._queue, self._closed = [], False
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._write, daemon=True).start()
        self.id = self.wait("id ").split()[1]

    def _read(self):
        for line in self.process.stdout:
            with self._lock:
                self.said.append((time.monotonic(), line.decode().rstrip("\n")))
                self._lock.notify_all()
        with self._lock:
            self.said.append((time.monotonic(), "over"))
            self._lock.notify_all()

    def _write(self):
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    break
                piece = self._queue.pop(0)
            try:
                self.process.stdin.write(piece)
                self.process.stdin.flush()
            except BrokenPipeError:
                return
        self.process.stdin.close()

    def feed(self, data: bytes) -> None:
        with self._lock:
            self.fed += data
            self._queue.append(data)
            self._lock.notify_all()

    def end(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    def last(self, word: str) -> int:
        with self._lock:
            return next((int(line.split()[1]) for _, line in reversed(self.said) if line.startswith(word + " ")), 0)

    def wait(self, start: str, seconds: float = 15, since: float = 0) -> str:
        def found():
            return next((line for at, line in self.said if line.startswith(start) and at >= since), None)
        with self._lock:
            self._lock.wait_for(lambda: found() or self.said and self.said[-1][1] == "over", seconds * SLACK)
            assert found(), f"{start!r} was not said: {self.said[-12:]}"
            return found()

    def wait_number(self, word: str, least: int, seconds: float = 15) -> None:
        wait_until(lambda: self.last(word) >= least, f"{word} reaches {least}", seconds)

    def finish(self, seconds: float = 30) -> None:
        self.end()
        self.wait("ended", seconds)
        assert self.process.wait(10) == 0

    def longest_wait(self, since: float, until: float) -> float:
        """Longest time in which `written` stood still: for so long a user would have seen nothing."""
        times = [since] + [at for at, line in self.said if line.startswith("written ") and since <= at <= until] + [until]
        return max(b - a for a, b in zip(times, times[1:]))


class Scene:
    def __init__(self):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="postern-relay-"))
        net = harness._claim_network()
        self.addresses = {"a": f"{net}.21", "b": f"{net}.22"}
        self.source = f"{net}.2"
        port = harness._free_port(*self.addresses.values())
        self.list = ",".join(f"{a}:{port}" for a in self.addresses.values())
        self.socket, self.control, self.journal = self.dir / "relay.sock", self.dir / "control.sock", self.dir / "journal"
        self.feeds: list[Feed] = []
        self.relay = self._daemon("relay", "postern-relay", {
            "sessions": {"socket": self.socket, "liveness_interval": "100ms"}, "control": {"socket": self.control}, "journal": {"dir": self.journal},
            "dial": {"source": self.source, "name": "here"},
            "recorders": {"lost_timeout": f"{int(LOST * 1000)}ms", "moved_retry": "200ms"}, "log": {"level": "debug"}})
        self.recorders = {letter: self._daemon(f"recorder-{letter}", "postern-recorder", {
            "listen": {"addresses": [f"{address}:{port}"]}, "store": {"dir": self.dir / f"store-{letter}", "health_interval": "100ms", "min_free": "1MiB"},
            "ingest": {"allow": [self.source]}, "read": {"allow": ["127.0.0.0/8"]}, "log": {"level": "debug"}})
            for letter, address in self.addresses.items()}
        self.names = dict(zip("ab", self.list.split(",")))

    def _daemon(self, name, program, tables):
        config = self.dir / f"{name}.toml"
        config.write_text(harness.toml(tables))
        return Daemon(name, program, config, self.dir / f"{name}.log")

    def start(self, which="abr"):
        for letter in which:
            (self.relay if letter == "r" else self.recorders[letter]).start()
        return self

    def stop(self):
        for feed in self.feeds:
            feed.process.kill()
            feed.process.wait()
        for daemon in [self.relay, *self.recorders.values()]:
            if daemon.running:
                daemon.stop()
        problems = [harness.SANITIZER.search(p.read_text(errors="replace")) for p in self.dir.glob("*.log")]
        assert not any(problems), problems

    def files(self, letter, identifier):
        return [p for p in (self.dir / f"store-{letter}").rglob(f"{identifier}.cast*")]

    def listing(self, relay=True, recorders="ab") -> dict[str, dict]:
        import json
        arguments = [str(harness.BIN / "postern"), "recordings", "ls", "--json"]
        for letter in recorders:
            arguments += ["--recorder", self.names[letter]]
        if relay:
            arguments += ["--relay", str(self.control)]
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
        assert done.returncode == 0, done
        return {entry["id"]: entry for entry in map(json.loads, done.stdout.splitlines())}

    def whole(self, feed, letter=None, seconds=20):
        """The one whole copy, checked; which recorder has it."""
        def look():
            return [(at, p) for at in "ab" for p in self.files(at, feed.id) if p.suffix == ".cast"]
        found = wait_until(look, f"a whole copy of {feed.id}", seconds)
        assert len(found) == 1, found
        at, path = found[0]
        recording = Recording.load(path)
        assert recording.stream("o") == bytes(feed.fed)
        assert recording.last_exit() == "0"
        wait_until(lambda: not list(self.journal.glob(f"{feed.id}.cast")), "the journal drops it")
        assert letter is None or at == letter
        return at


@pytest.fixture
def scene():
    made = Scene()
    yield made
    made.stop()
    import shutil
    shutil.rmtree(made.dir)


def text(kib: int, mark: int = 0) -> bytes:
    return b"".join(b"%06d line %07d of some output of a program\n" % (mark, n) for n in range(kib * 1024 // 48))


def test_recording_arrives_at_the_first_recorder_and_leaves_the_journal(scene):
    scene.start()
    feed = Feed(scene, "--command", "make coffee")
    feed.feed(text(300) + b"\xff\x00bin" + "käse €".encode())
    feed.wait("state recording " + scene.names["a"])
    assert scene.listing()[feed.id]["state"] == "live"
    feed.finish()
    assert scene.whole(feed) == "a"
    entry = scene.listing()[feed.id]
    assert entry["state"] == "whole" and entry["header"]["command"] == "make coffee" and "gap" not in entry
    wait_until(lambda: not list(scene.journal.iterdir()), "nothing of it stays")
    played = subprocess.run([str(harness.BIN / "postern"), "play", "--raw", f"http://{scene.names['a']}/postern/v1/recordings/{feed.id}"], stdout=subprocess.PIPE)
    assert played.stdout == bytes(feed.fed)


def test_a_session_may_go_when_its_end_is_in_the_journal_and_the_relay_does_the_rest(scene):
    scene.start("r")
    feed = Feed(scene, "--enforce")
    feed.feed(b"x\n")
    feed.wait("state none")
    feed.finish()
    scene.start("b")
    assert scene.whole(feed) == "b"


@pytest.mark.parametrize("number", range(6))
def test_recorder_that_dies_in_mid_stream_is_replaced_and_nobody_waits(scene, number):
    random = harness.rng(f"relay-dies-{number}")
    scene.start()
    first, second = "ab"
    for round_ in range(2):  # A dies; A comes back; then B dies
        feed = Feed(scene, *random.choice([[], ["--enforce"]]))
        feed.wait("state recording " + scene.names[first])
        data = [text(64, n) for n in range(60)]
        kill_at = random.randrange(60)
        begin = time.monotonic()
        for n, piece in enumerate(data):
            feed.feed(piece)
            if n == kill_at:
                feed.wait_number("written", random.randrange(1, 60_000))
                scene.recorders[first].kill()
        feed.wait("state recording " + scene.names[second])
        feed.wait_number("written", len(feed.fed))
        assert feed.longest_wait(begin, time.monotonic()) < 2.0 * SLACK
        feed.finish()
        assert scene.whole(feed) == second
        scene.recorders[first].start()
        if any(scene.files(first, feed.id)):
            wait_until(lambda: scene.listing()[feed.id]["copies"] and {c["state"] for c in scene.listing()[feed.id]["copies"]} == {"whole", "moved"},
                       f"the part is told that it moved: {scene.listing()}")
        wait_until(lambda: not list(scene.journal.iterdir()), "nothing of it stays")
        if round_ == 0:
            # B is next: recordings go to it only while A is away.
            scene.recorders["a"].kill()
            scene.relay.wait_log(r"event=recorder_lost recorder=" + scene.names["a"])
            first, second = "b", "a"
            keeper = Feed(scene)
            keeper.wait("state recording " + scene.names["b"])
            keeper.finish()
            feed_b = Feed(scene)
            feed_b.wait("state recording " + scene.names["b"])
            scene.recorders["a"].start()
            feed_b.feed(text(100))
            feed_b.wait_number("committed", 100)
            wait_until(lambda: scene.relay.log().rfind("event=recorder_healthy recorder=" + scene.names["a"])
                       > scene.relay.log().rfind("event=recorder_lost recorder=" + scene.names["a"]), "A is known to be back")
            assert not any(line == "state recording " + scene.names["a"] for _, line in feed_b.said), "none moves back"
            scene.recorders["b"].kill()
            feed_b.wait("state recording " + scene.names["a"])
            feed_b.feed(text(10))
            feed_b.finish()
            assert scene.whole(feed_b) == "a"
            return


def test_recorder_that_stops_is_left_while_the_session_is_idle(scene):
    scene.start()
    feed = Feed(scene)
    feed.feed(b"before\n")
    feed.wait("state recording " + scene.names["a"])
    feed.wait_number("committed", 100)
    since = time.monotonic()
    scene.recorders["a"].pause()
    feed.wait("state recording " + scene.names["b"], since=since)
    assert time.monotonic() - since < (LOST + 1.0) * SLACK
    feed.feed(b"after\n")
    feed.finish()
    assert scene.whole(feed) == "b"
    scene.recorders["a"].resume()
    wait_until(lambda: {c["state"] for c in scene.listing()[feed.id]["copies"]} == {"whole", "moved"}, "A knows that it moved")
    assert not [p for p in scene.files("a", feed.id) if p.suffix == ".cast"]


def test_slow_is_not_lost(scene):
    scene.start()
    feed = Feed(scene)
    feed.wait("state recording " + scene.names["a"])
    for _ in range(4):
        scene.recorders["a"].pause()
        time.sleep(LOST * 0.6)
        scene.recorders["a"].resume()
        feed.feed(text(50))
        feed.wait_number("committed", len(feed.fed))
    feed.finish()
    assert scene.whole(feed) == "a"
    assert "event=recorder_lost" not in scene.relay.log()


@pytest.mark.parametrize("number", range(4))
def test_relay_that_dies_costs_nothing(scene, number):
    random = harness.rng(f"relay-{number}")
    scene.start()
    feed = Feed(scene, *random.choice([[], ["--enforce"]]))
    for n in range(40):
        feed.feed(text(64, n))
        if n % 10 == random.randrange(10):
            feed.wait_number("written", random.randrange(1, max(2, len(feed.fed))))
            scene.relay.kill()
            if random.random() < 0.3:
                scene.recorders["a"].kill()
                scene.recorders["a"].start()
            scene.relay.start()
    feed.finish()
    scene.whole(feed)
    assert not any(line.startswith("journal_failed") for _, line in feed.said)


def test_without_any_recorder_the_journal_keeps_it_and_uploads_later(scene):
    scene.start("r")
    feed = Feed(scene)
    feed.feed(text(200))
    feed.wait("state none")
    feed.finish()
    entry = scene.listing(recorders="")[feed.id]
    assert entry["state"] == "not on a recorder yet" and "gap" not in entry, entry
    scene.relay.kill()
    scene.start("r")
    assert scene.listing(recorders="")[feed.id]["state"] == "not on a recorder yet"
    scene.start("b")
    assert scene.whole(feed) == "b"


def test_session_that_dies_without_an_end_is_uploaded_as_cut(scene):
    scene.start()
    feed = Feed(scene)
    feed.feed(b"shown\n")
    feed.wait_number("committed", 100)
    feed.process.kill()
    feed.process.wait()
    wait_until(lambda: scene.listing()[feed.id]["state"] == "cut", f"it is cut: {scene.listing()}")
    entry = wait_until(lambda: (lambda e: e if "journal" not in e else None)(scene.listing()[feed.id]), "the journal drops it")
    assert entry["copies"][0]["reason"] == "session_died"
    assert [Recording.load(p).stream() for p in scene.files("a", feed.id)] == [b"shown\n"]


def test_session_that_dies_while_the_relay_is_away_is_uploaded_as_cut(scene):
    scene.start()
    feed = Feed(scene)
    feed.feed(b"shown\n")
    feed.wait_number("written", 100)
    scene.relay.kill()
    feed.process.kill()
    feed.process.wait()
    scene.start("r")
    wait_until(lambda: scene.listing()[feed.id]["state"] == "cut" and "journal" not in scene.listing()[feed.id], "it is cut and stored")


def test_all_recordings_of_a_lost_recorder_move(scene):
    scene.start()
    feeds = [Feed(scene, *(["--enforce"] if n % 2 else [])) for n in range(40)]
    for n, feed in enumerate(feeds):
        feed.feed(text(20, n))
        feed.wait("state recording " + scene.names["a"])
    since = time.monotonic()
    scene.recorders["a"].kill()
    for n, feed in enumerate(feeds):
        feed.feed(text(20, 1000 + n))
        feed.wait("state recording " + scene.names["b"])
    assert time.monotonic() - since < 3 * SLACK
    for feed in feeds:
        feed.finish()
    for feed in feeds:
        scene.whole(feed, "b")


def test_full_journal_is_told_as_a_gap(scene):
    config = scene.relay.config.read_text()
    scene.relay.config.write_text(config.replace("[journal]", '[journal]\nrecording_quota = "500KiB"'))
    scene.start("r")
    feed = Feed(scene)
    feed.feed(text(2000))
    feed.wait("journal_failed")
    entry = scene.listing(recorders="")[feed.id]
    assert entry["gap"]["from"] > 0, entry
    assert "event=recording_gap" in scene.relay.log()
    scene.start("a")
    entry = wait_until(lambda: (lambda e: e if e["state"] == "cut" else None)(scene.listing()[feed.id]), "what there is arrives")
    assert entry["gap"]["from"] > 0
    assert entry["copies"][0]["reason"] == "journal_failed"
    kept = Recording.load(scene.files("a", feed.id)[0])
    assert len(kept.stream()) > 50 * 1024 and bytes(feed.fed).startswith(kept.stream())
    scene.relay.kill()
    scene.start("r")
    assert scene.listing()[feed.id]["gap"]["from"] > 0


def test_other_users_get_nothing_from_the_relay(scene):
    if os.geteuid() != 0:
        pytest.skip("needs root to be somebody else")
    import socket
    scene.start("r")
    os.chmod(scene.dir, 0o755)
    for path in (scene.socket, scene.control):
        assert os.stat(path).st_mode & 0o077 == 0
        os.chmod(path, 0o666)
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            s = socket.socket(socket.AF_UNIX)
            s.connect(str(path))
            s.settimeout(5)
            try:
                got = s.recv(10)
            except ConnectionError:
                got = b""
            os._exit(0 if got == b"" else 1)
        assert os.waitpid(child, 0)[1] == 0
    wait_until(lambda: "event=connection_refused uid=65534" in scene.relay.log(), "it is logged")


def test_sigterm_ends_the_relay_and_the_journal_stays(scene):
    scene.start("r")
    feed = Feed(scene)
    feed.feed(text(100))
    feed.wait_number("written", 100_000)
    assert scene.relay.stop() == 0
    assert list(scene.journal.glob(f"{feed.id}.cast"))
    scene.start("r")
    feed.finish()


def test_a_wrong_setting_is_named_with_its_place(scene):
    scene.relay.config.write_text("[recorders]\nlost_timeout = 2\n")
    done = subprocess.run([str(harness.BIN / "postern-relay"), "--config", str(scene.relay.config), "--check-config"], stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"relay.toml:2:16: recorders.lost_timeout: must be a duration" in done.stderr
    assert subprocess.run([str(harness.BIN / "postern-relay"), "--nonsense"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 2


def settings_of(daemon, table, line):
    text = daemon.config.read_text()
    assert f"[{table}]\n" in text
    daemon.config.write_text(text.replace(f"[{table}]\n", f"[{table}]\n{line}\n"))


def test_host_that_lost_the_end_of_its_journal_with_its_power_is_no_conflict(scene):
    """The recorder committed bytes that this host's disk never got; the session is dead. The longer copy stays, as cut."""
    scene.start("ar")
    feed = Feed(scene)
    feed.feed(b"shown\n")
    feed.wait_number("committed", 100)
    scene.relay.kill()
    feed.process.kill()
    feed.process.wait()
    journal = scene.journal / f"{feed.id}.cast"
    os.truncate(journal, journal.stat().st_size - 10)
    scene.start("r")
    entry = wait_until(lambda: (lambda e: e if "journal" not in e else None)(scene.listing(recorders="a")[feed.id]), "the journal drops it")
    assert entry["state"] == "cut", entry
    assert [Recording.load(p).stream() for p in scene.files("a", feed.id)] == [b"shown\n"]
    assert "code=conflict" not in scene.recorders["a"].log()


def test_session_that_must_be_recorded_does_not_wait_behind_replays(scene):
    """Its user waits: by the time that a gigabyte of others has been replayed it would have been refused."""
    settings_of(scene.relay, "recorders", "replays = 1")
    # So the one replay lasts: its first turn takes at most the window of 1 MiB, the next one comes 6 s later.
    settings_of(scene.recorders["a"], "store", 'commit_interval = "6s"\nturn_bytes = "16MiB"')
    scene.start("r")
    replay = Feed(scene, recorders=scene.names["a"])
    replay.feed(text(6000))
    replay.wait_number("journaled", 6000 * 1024)
    scene.start("a")
    replay.wait("state recording")
    since = time.monotonic()
    urgent = Feed(scene, "--enforce", recorders=scene.names["a"])
    urgent.wait("state recording")
    assert time.monotonic() - since < 3
    urgent.finish()
    replay.finish()


def test_relay_that_stood_still_does_not_blame_the_recorder(scene):
    settings_of(scene.relay, "recorders", 'commit_timeout = "3s"')
    config = scene.relay.config.read_text()
    scene.relay.config.write_text(config.replace(f'lost_timeout = "{int(LOST * 1000)}ms"', 'lost_timeout = "10s"'))
    scene.start("ar")
    feed = Feed(scene)
    feed.wait("state recording")
    scene.recorders["a"].pause()
    feed.feed(b"waits for a commit\n")
    feed.wait_number("written", 100)
    scene.relay.pause()
    time.sleep(4)
    scene.relay.resume()
    time.sleep(0.4)  # of its ticks, in which nothing has come from the recorder yet
    scene.recorders["a"].resume()
    feed.finish()
    scene.whole(feed, "a")
    assert "event=recorder_lost" not in scene.relay.log()


def test_recording_of_which_no_journal_took_anything_is_told_once_and_forgotten_in_time(scene):
    settings_of(scene.relay, "journal", 'recording_quota = "1KiB"\ngap_keep = "2s"')
    scene.start("r")
    feed = Feed(scene, "--command", "x" * 2000)
    feed.wait("journal_failed")
    assert scene.listing(recorders="")[feed.id]["state"] == "gap"
    feed.process.kill()
    feed.process.wait()
    wait_until(lambda: feed.id not in scene.listing(recorders=""), "it is forgotten")
    assert not list(scene.journal.glob(f"{feed.id}*"))
    assert scene.relay.log().count("event=recording_empty") == 1
