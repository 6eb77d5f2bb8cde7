"""The recording of a login is what the user saw, byte for byte, and players read it."""
import os
import subprocess
import time

import pytest

from harness import BIN, Recording, Terminal, rng, wait_until

QUIET = ["LogLevel=ERROR"]  # ssh's own "Connection closed." would be on the screen, too


def only_new(stack, before: set, letters="ab") -> Recording:
    def look():
        new = [r for letter in letters for r in stack.recordings(letter) if r.finished and r.id not in before]
        return new[0] if new else None
    return wait_until(look, "the recording is whole", 15)


def ids(stack) -> set:
    return {r.id for letter in "ab" for r in stack.recordings(letter)}


@pytest.mark.parametrize("who", ["alice", "open_alice"])
def test_the_recording_of_a_pty_session_holds_exactly_the_bytes_on_the_screen(stack, who):
    before = ids(stack)
    # Every byte there is, characters cut anywhere, escape sequences: a terminal gets all of it.
    junk = os.path.join(stack.ssh("pwd", bind=stack.plain_alice).text.strip(), "junk")
    with open(junk, "wb") as f:
        f.write(rng("junk").randbytes(300_000) + "na\u00efve \u65e5\u672c\u8a9e \U0001f600".encode() * 500 + bytes(range(256)))
    with stack.terminal(bind=getattr(stack, who), options=QUIET, rows=30, cols=100) as t:
        t.read_until(r"[$#] $")
        for command in ("ls -la /", "printf 'caf\\303'; sleep 0.1; printf '\\251\\n'", f"stty -opost; cat {junk}; stty opost"):
            t.send(command + "\r")
            t.read_until(r"[$#] (\x1b\[K)?$", 20)
        t.send("echo in-$((1+1)); exit 3\r")
        assert t.wait() == 3
        screen = t.screen
    os.unlink(junk)
    recording = only_new(stack, before)
    assert recording.stream("o") == screen
    assert recording.stream("e") == b""
    assert recording.last_exit() == "3"


def test_the_recording_of_a_command_keeps_stdout_and_stderr_apart(stack):
    before = ids(stack)
    r = stack.ssh("head -c 400000 /dev/urandom; head -c 100000 /dev/urandom >&2; echo end; exit 9")
    assert r.code == 9
    recording = only_new(stack, before)
    assert recording.stream("o") == r.out
    assert recording.stream("e") == r.err
    assert recording.last_exit() == "9"


def test_a_signal_is_recorded_by_its_name(stack):
    before = ids(stack)
    stack.ssh("kill -TERM $$")
    assert only_new(stack, before).last_exit() == "TERM"


def test_what_is_typed_is_not_recorded_by_itself(stack):
    before = ids(stack)
    assert stack.ssh("stty -echo 2>/dev/null; read secret; echo got ${#secret}", input=b"hunter2\n").out == b"got 7\n"
    recording = only_new(stack, before)
    assert b"hunter2" not in recording.raw
    assert "i" not in recording.codes()


def test_header_and_times_are_right(stack):
    before = ids(stack)
    begin = time.time()
    command = "echo one; sleep 1; echo two"
    with stack.terminal(command, tty=True, rows=33, cols=111, options=QUIET) as t:
        t.wait()
    end = time.time()
    recording = only_new(stack, before)
    h = recording.header
    assert h["version"] == 2
    assert (h["width"], h["height"]) == (111, 33)
    assert int(begin) - 1 <= h["timestamp"] <= end + 1
    assert h["command"] == command
    assert h["env"] == {"TERM": "xterm-256color"}
    assert h["sshUser"] == h["localUser"] == stack.user
    assert h["srcNode"] == "alice" and h["srcNodeUser"] == "alice@example.com"
    assert h["pty"] is True
    assert len(h["recordingID"]) == 26 and len(h["connectionID"]) == 26
    times = recording.times()
    assert times == sorted(times) and times[0] >= 0
    assert times[-1] <= end - begin + 0.5
    at = {e[2].strip(): e[0] for e in recording.events if e[1] == "o"}
    assert 0.9 <= at["two"] - at["one"] <= end - begin


def test_a_resize_is_in_the_recording(stack):
    before = ids(stack)
    with stack.terminal(rows=24, cols=80, options=QUIET) as t:
        t.read_until(r"[$#] $")
        t.resize(50, 132)
        def shown():
            t.send("stty size\r")
            t.pump(0.2)
            return b"50 132\r\n" in t.screen
        wait_until(shown, "the program sees the new size", every=0.05)
        t.send("exit\r")
        t.wait()
        screen = t.screen
    recording = only_new(stack, before)
    assert [e[2] for e in recording.events if e[1] == "r"] == ["132x50"]
    assert recording.stream("o") == screen


def test_asciinema_plays_the_recording(stack):
    before = ids(stack)
    r = stack.ssh("for i in 1 2 3; do echo line-$i; done; printf 'caf\\303\\251\\n'")
    recording = only_new(stack, before)
    # It wants a terminal, and sets it to raw.
    with Terminal(["/usr/bin/asciinema", "cat", str(recording.path)], env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(stack.dir), "TERM": "xterm"}) as t:
        assert t.wait() == 0, t.screen
        assert t.screen == r.out


def test_postern_play_shows_it_too(stack):
    before = ids(stack)
    r = stack.ssh("seq 1 500; echo to-stderr >&2")
    recording = only_new(stack, before)
    shown = subprocess.run([str(BIN / "postern"), "play", "--speed", "1000", str(recording.path)], capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert r.out in shown.stdout.replace(b"\r\n", b"\n") or r.out in shown.stdout


def test_a_session_that_is_not_to_be_recorded_leaves_no_recording(stack):
    before = ids(stack)
    assert stack.ssh("echo unseen-$((1+1))", bind=stack.plain_alice).text == "unseen-2\n"
    # A recorded one after it: when that is there, the other would have been.
    stack.ssh("echo seen")
    only_new(stack, before)
    assert not any(b"unseen-2" in r.raw for letter in "ab" for r in stack.recordings(letter))


def test_every_session_of_a_connection_has_its_own_recording(stack):
    import asyncio
    before = ids(stack)

    async def run():
        async with await stack.asyncssh() as connection:
            return [(await connection.run(f"echo session {i}")).stdout for i in range(3)]
    assert asyncio.run(run()) == [f"session {i}\n" for i in range(3)]
    def all_there():
        new = [r for letter in "ab" for r in stack.recordings(letter) if r.finished and r.id not in before]
        return new if len(new) == 3 else None
    new = wait_until(all_there, "three recordings", 15)
    assert {r.stream("o") for r in new} == {b"session %d\n" % i for i in range(3)}
    assert len({r.header["connectionID"] for r in new}) == 1 and len({r.id for r in new}) == 3


def test_the_first_recorder_in_order_takes_it_and_the_other_has_nothing(make_stack):
    stack = make_stack()
    assert stack.ssh("echo here").text == "here\n"
    recording = stack.find_recording("here")
    assert str(recording.path).startswith(str(stack.recorder_dirs["a"]))
    assert stack.recordings("b") == []
