"""The recording holds exactly the bytes that the user saw, with the right header and times, and players can load it."""
import json
import os
import pwd
import shutil
import subprocess
import time

import pytest

import harness
import recording_scenes as scenes
from harness import SLACK, wait_until


@pytest.fixture(scope="module")
def net(accounts):
    with harness.new_stack(accounts, **scenes.settings()) as made:
        yield made


def recorded(net, marker, command, **kw):
    """Runs it and gives (Result, its recording)."""
    done = net.ssh(f"{command}; : {marker}", **kw)
    _, recording = scenes.wait_whole(net, marker)
    return done, recording


@pytest.fixture
def noise(net):
    """A file of random bytes, some of them lone halves of characters."""
    path = net.dir / "noise"
    path.write_bytes(harness.rng("noise").randbytes(300_000) + "grüße\n".encode() * 1000)
    path.chmod(0o644)
    return path


def test_binary_output_without_a_pty_is_recorded_byte_by_byte(net, noise):
    done, recording = recorded(net, "binary-pipe", f"cat {noise}", tty=False)
    assert done.out == noise.read_bytes()
    scenes.check_recording(recording, done.out, "binary-pipe")


def test_binary_output_in_a_pty_is_recorded_byte_by_byte(net, noise):
    done, recording = recorded(net, "binary-pty", f"stty raw; cat {noise}", tty=True)
    assert noise.read_bytes() in done.out
    scenes.check_recording(recording, done.out, "binary-pty")


def test_characters_cut_by_reads_are_whole_in_the_recording(net):
    """Every byte in a write of its own, with a pause, so that reads cut the characters."""
    text = "grüße € 𝄞 end\n"
    steps = "; ".join(f"printf '\\{byte:03o}'; sleep 0.02" for byte in text.encode())
    done, recording = recorded(net, "cut-characters", steps, tty=False)
    assert done.out == text.encode()
    scenes.check_recording(recording, done.out, "cut-characters")
    shown = "".join(data for _, code, data in recording.events if code == "o")
    assert shown == text, "a player shows the characters, not replacement signs"


def test_stderr_is_apart_from_stdout(net):
    done, recording = recorded(net, "two-streams", "echo out1; echo err1 >&2; echo out2; printf '\\377\\n' >&2", tty=False)
    assert done.out == b"out1\nout2\n" and done.err == b"err1\n\xff\n"
    scenes.check_recording(recording, done.out, "two-streams")
    assert recording.stream("e") == done.err


def test_output_of_a_login_shell_is_what_the_screen_showed(net):
    with net.terminal(rows=30, cols=100, env={"TERM": "xterm"}) as terminal:
        terminal.read_until(rb"[$#] ")
        terminal.send("echo mark-$((20+2))-shell; stty size\n")
        terminal.read_until(rb"mark-22-shell\r\n30 100\r\n")
        terminal.resize(40, 120)
        # ssh may send what was typed before it sends the new size.
        terminal.send("until [ \"$(stty size)\" != '30 100' ]; do sleep 0.05; done; stty size; exit 5\n")
        terminal.read_until(rb"40 120\r\n")
        assert terminal.wait() == 5
    recording = net.find_recording("mark-22-shell")
    got = recording.stream("o")
    # ssh's own last words ("Connection to … closed.") are not the session's.
    assert terminal.screen.startswith(got), f"recorded {got[-200:]!r}, screen {terminal.screen[-200:]!r}"
    assert terminal.screen[len(got):].startswith(b"Connection to ") or terminal.screen == got
    assert recording.header["width"] == 100 and recording.header["height"] == 30
    assert recording.header.get("pty") is True and recording.header["env"]["TERM"] == "xterm"
    assert [e[2] for e in recording.events if e[1] == "r"][-1:] == ["120x40"]
    assert recording.last_exit() == "5"
    assert "i" not in recording.codes(), "what is typed is not recorded unless a rule says so"


def test_header_says_who_came_from_where_and_ran_what(net):
    before = time.time()
    done, recording = recorded(net, "header-fields", "exit 3", tty=False)
    header = recording.header
    assert done.code == 3
    assert header["version"] == 2
    assert header["command"] == "exit 3; : header-fields"
    assert before - 1 <= header["timestamp"] <= time.time() + 1
    assert (header["width"], header["height"], header["pty"]) == (80, 24, False)
    assert header["srcNode"] == "alice" and header["srcNodeUser"] == "alice@example.com"
    assert header["srcAddress"].startswith(net.alice)
    assert header["dstAddress"].startswith(net.server)
    assert header["sshUser"] == net.user and header["localUser"] == net.user
    assert header["kind"] == "session"
    assert len(header["recordingID"]) == 26 and header["recordingID"] in str(recording.path)
    assert header["connectionID"]
    assert "policy.hujson:" in header["rule"], "the place of the rule"
    assert recording.last_exit() == "3"


def test_signal_that_ended_the_program_is_the_last_event(net):
    done, recording = recorded(net, "by-signal", "kill -TERM $$", tty=False)
    assert done.code == 255
    assert recording.last_exit() == "TERM"


def test_times_are_those_of_the_session(net):
    begin = time.monotonic()
    done, recording = recorded(net, "times", "echo one; sleep 0.4; echo two", tty=False)
    whole = time.monotonic() - begin
    times = {e[2]: e[0] for e in recording.events if e[1] == "o"}
    assert 0 <= times["one\n"] < whole
    assert 0.35 < times["two\n"] - times["one\n"] < whole, times
    assert recording.times()[-1] < whole
    raw_times = [line.split(b",", 1)[0].decode() for line in recording.raw.splitlines()[1:]]
    assert all(len(t.partition(".")[2]) == 6 for t in raw_times), "6 decimals"


def test_asciinema_plays_the_file(net):
    """The player's own parser (asciinema of Debian); it knows nothing of our additions."""
    asciinema = shutil.which("asciinema")
    assert asciinema, "scripts/test installs asciinema"
    done, recording = recorded(net, "plays", "for i in 1 2 3; do echo grüße $i; done; printf '\\377x\\n'; echo to-stderr >&2", tty=False)
    # It wants a terminal of its own (/dev/tty).
    with harness.Terminal([asciinema, "cat", str(recording.path)], env={"PATH": "/usr/bin:/bin", "HOME": str(net.dir), "LANG": "C.UTF-8"}) as played:
        assert played.wait() == 0, played.screen
        assert played.screen.decode().replace("\r", "") == done.out.decode(errors="replace")


def test_nothing_is_shown_that_the_relay_has_not_written(net):
    """With the relay stopped the program's output waits; when it goes on, it is there at once."""
    marker = "not-before-written"
    client = scenes.Watched(net, scenes.gated(marker, "echo secret-of-the-session"), tty=False)
    client.wait_for(f"go-{marker}\n".encode())
    net.relay.pause()
    try:
        client.send(b"\n")
        time.sleep(0.5)  # there is nothing to wait for: the point is that nothing comes
        assert b"secret" not in client.out
    finally:
        net.relay.resume()
    assert client.wait() == 0
    assert bytes(client.out).endswith(b"secret-of-the-session\n")
    _, recording = scenes.wait_whole(net, marker)
    scenes.check_recording(recording, bytes(client.out), marker)


def test_the_host_keeps_nothing_of_what_is_whole_at_a_recorder(net):
    _, recording = recorded(net, "freed", "seq 1 100000", tty=False)
    scenes.wait_journal_freed(net, recording.id)


def test_sessions_of_one_connection_are_recorded_apart(net, tmp_path):
    """Two channels over one connection (ControlMaster): two recordings with one connection id."""
    import asyncio

    async def both():
        async with await net.asyncssh() as connection:
            return await asyncio.gather(*(connection.run(f"echo channel-{n}; : apart-{n}") for n in (1, 2)))
    results = asyncio.run(both())
    found = [scenes.wait_whole(net, f"apart-{n}")[1] for n in (1, 2)]
    assert [r.stdout for r in results] == ["channel-1\n", "channel-2\n"]
    assert [r.stream() for r in found] == [b"channel-1\n", b"channel-2\n"]
    assert found[0].id != found[1].id
    assert found[0].header["connectionID"] == found[1].header["connectionID"]


def test_many_sessions_at_once_are_all_recorded(net):
    clients = [scenes.Watched(net, f"seq {n}00000 {n}09999; : many-{n}-", tty=False) for n in range(1, 16)]
    for n, client in enumerate(clients, 1):
        assert client.wait(60) == 0, bytes(client.err)
        _, recording = scenes.wait_whole(net, f"many-{n}-")
        scenes.check_recording(recording, bytes(client.out))


def test_postern_play_shows_what_was_seen(net):
    done, recording = recorded(net, "play-cli", "echo one; echo two", tty=False)
    played = net.postern("play", "--speed", "1000", str(recording.path))
    assert played.out.replace(b"\r", b"") == done.out
