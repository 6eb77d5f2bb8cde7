"""A recorder that is there and does not do its work: stopped, silent, or with a full disk. It is treated as lost, also under an idle session."""
import os
import socket
import subprocess
import threading
import time

import pytest

import harness
import recording_scenes as scenes
from harness import SLACK, wait_until

# The setting, plus what a slow machine may need on top.
SOON = scenes.LOST_TIMEOUT + 2.0


@pytest.fixture(scope="module")
def net(accounts):
    with harness.new_stack(accounts, **scenes.settings()) as made:
        yield made


def begin(net, marker, command, bind=None):
    """A session that is recorded at A and waits for a line."""
    scenes.choose(net, "a", bind=bind)
    client = scenes.Watched(net, scenes.gated(marker, command), tty=False, bind=bind)
    client.wait_for(f"go-{marker}\n".encode())
    scenes.wait_copy(net, marker, "a", finished=False)
    return client


@pytest.mark.parametrize("who", ["alice", "open_alice"])
def test_idle_session_moves_away_from_a_recorder_that_is_stopped(net, who):
    marker = f"stopped-idle-{who}"
    client = begin(net, marker, "seq 1 1000", bind=getattr(net, who))
    net.recorder_a.pause()
    try:
        scenes.wait_copy(net, marker, "b", seconds=SOON)  # nobody has typed or printed anything since
        client.send(b"\n")
        assert client.wait() == 0
        letter, recording = scenes.wait_whole(net, marker)
        assert letter == "b"
        scenes.check_recording(recording, bytes(client.out), marker)
    finally:
        net.recorder_a.resume()


def test_output_goes_on_when_a_recorder_is_stopped(net):
    marker = "stopped-busy"
    client = begin(net, marker, "seq 1 1500000")
    since = time.monotonic()
    client.at(3_000_000, net.recorder_a.pause)
    try:
        client.send(b"\n")
        assert client.wait(40) == 0
        gap = client.longest_gap(since)
        assert gap <= scenes.GAP * SLACK, f"the user waited {gap:.2f} s"
        letter, recording = scenes.wait_whole(net, marker)
        assert letter == "b"
        scenes.check_recording(recording, bytes(client.out), marker)
    finally:
        net.recorder_a.resume()


def test_a_stopped_recorder_that_wakes_up_cannot_write_what_went_elsewhere(net):
    """Its upload is fenced off by the epoch: B is whole, A never becomes a second whole copy, and A takes new recordings again."""
    marker = "woken"
    client = begin(net, marker, "seq 1 300000")
    net.recorder_a.pause()
    try:
        client.send(b"\n")
        assert client.wait() == 0
        letter, recording = scenes.wait_whole(net, marker)
        assert letter == "b"
    finally:
        net.recorder_a.resume()
    scenes.choose(net, "a")  # it is healthy again and has answered for everything that was in its sockets
    assert not scenes.copies(net, marker, "a", finished=True)
    for part in scenes.copies(net, marker, "a", finished=False):
        assert recording.raw.startswith(part.read_bytes()), "A's copy is not a beginning of the recording"


def test_a_login_while_the_first_recorder_hangs_is_recorded_at_the_second(make_stack):
    net = make_stack(**scenes.settings(relay={"recorders": {"lost_timeout": "30s", "first_commit_timeout": "400ms"}}, posternd={"recorder": {"start_timeout": "5s"}}))
    scenes.choose(net, "a")
    net.recorder_a.pause()
    try:
        done = net.ssh("echo hangs-at-$((40 + 2))")
        assert done.code == 0 and done.out == b"hangs-at-42\n", done
        assert done.seconds < 3 * SLACK, "not as long as it may wait at all"
        letter, recording = scenes.wait_whole(net, "hangs-at-")
        assert letter == "b"
        scenes.check_recording(recording, done.out, "hangs-at-")
    finally:
        net.recorder_a.resume()


class Silent:
    """Accepts connections, reads what comes and never says a word."""

    def __init__(self, address, port):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wait_until(lambda: self._bind(address, port), "the recorder's port is free")
        self.socket.listen(64)
        self.accepted = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _bind(self, address, port):
        try:
            self.socket.bind((address, port))
            return True
        except OSError:
            return False

    def _accept(self):
        while True:
            try:
                self.accepted.append(self.socket.accept()[0])
            except OSError:
                return

    def close(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for one in self.accepted:
            one.close()


@pytest.fixture
def silent_a(net):
    net.recorder_a.stop()
    silent = Silent(net.rec_a, net.recorder_port)
    yield silent
    silent.close()
    net.recorder_a.start()


def test_new_session_starts_beside_a_recorder_that_accepts_and_says_nothing(net, silent_a):
    marker = "silent-start"
    done = net.ssh(f"echo here; : {marker}", tty=False)
    assert (done.code, done.out) == (0, b"here\n"), done
    assert done.seconds < 2.5 * SLACK, f"the login took {done.seconds:.2f} s"
    letter, _ = scenes.wait_whole(net, marker)
    assert letter == "b"
    wait_until(lambda: silent_a.accepted, "the relay tries the silent recorder")


def test_session_moves_to_the_other_when_the_only_alternative_was_silent_before(net, silent_a):
    """B dies while A only pretends: the session goes on from the journal until a recorder is back within the grace."""
    marker = "silent-then-lost"
    client = scenes.Watched(net, scenes.gated(marker, "seq 1 1000"), tty=False)
    client.wait_for(f"go-{marker}\n".encode())
    net.recorder_b.kill()
    net.recorder_b.start()  # within the grace
    client.send(b"\n")
    assert client.wait() == 0, bytes(client.err)
    letter, recording = scenes.wait_whole(net, marker)
    assert letter == "b"
    scenes.check_recording(recording, bytes(client.out), marker)


# ---------------------------------------------------------------------------------------------------- full disks

@pytest.fixture
def small_disk(accounts):
    """small_disk(folder, owner, MiB): a tmpfs there, as a disk that is soon full; gone after the test."""
    mounted = []

    def make(folder, owner, mib):
        import pwd
        entry = pwd.getpwnam(owner)
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,uid={entry.pw_uid},gid={entry.pw_gid},mode=0755", "tmpfs", folder], check=True)
        mounted.append(folder)
        return folder
    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def full_soon(accounts, small_disk):
    """A stack whose recorder A has 12 MiB, of which 1 MiB must stay free."""
    made = harness.new_stack(accounts, **scenes.settings(recorder={"store": {"min_free": "1MiB"}}))
    store = small_disk(made.recorder_dirs["a"] / "recordings", accounts.recorder, 12)
    try:
        made.start()
        yield made, store
    finally:
        made.stop()


@pytest.mark.needs_root
def test_full_disk_moves_the_recording_at_once(full_soon):
    net, store = full_soon
    marker = "disk-full-busy"
    client = begin(net, marker, "seq 1 2000000")
    since = time.monotonic()
    client.send(b"\n")
    assert client.wait(40) == 0, bytes(client.err)
    gap = client.longest_gap(since)
    assert gap <= scenes.GAP * SLACK, f"the user waited {gap:.2f} s"
    letter, recording = scenes.wait_whole(net, marker)
    assert letter == "b"
    scenes.check_recording(recording, bytes(client.out), marker)
    assert bytes(client.out).endswith(b"2000000\n")
    assert net.recorder_a.running, "a full disk must not end the recorder"


@pytest.mark.needs_root
def test_full_disk_moves_an_idle_session_and_takes_no_new_one(full_soon):
    net, store = full_soon
    marker = "disk-full-idle"
    client = begin(net, marker, "seq 1 100")
    filler = store / "somebody-elses-file"
    with open(filler, "wb") as f:
        try:
            while True:
                f.write(bytes(1 << 20))
                f.flush()
        except OSError:
            pass
    scenes.wait_copy(net, marker, "b", seconds=SOON)
    assert net.ssh(": new-while-a-is-full", tty=False).code == 0
    letter, _ = scenes.wait_whole(net, "new-while-a-is-full")
    assert letter == "b"
    client.send(b"\n")
    assert client.wait() == 0
    letter, recording = scenes.wait_whole(net, marker)
    assert letter == "b"
    scenes.check_recording(recording, bytes(client.out), marker)
    filler.unlink()
    scenes.choose(net, "a")  # with room again it is as good as before
