"""A user who means harm to the server's side of forwardings, with a postern-net that was taken over to help. See docs/SECURITY/TRUST.md."""
import array
import contextlib
import os
import pathlib
import pwd
import signal
import socket
import struct
import tempfile
import time

import pytest

import harness
from harness import SLACK, wait_until
from puppet import (AGENT, CONNECT, ENV, FAILED, INCOMING, LISTEN, LISTENING, NO, OK, OPEN, READY, Puppet, env, forward, ref)


@pytest.fixture(scope="module")
def one(accounts):
    """Allows one forwarding a connection, and gives up on a connect soon."""
    if not harness.IS_ROOT:
        pytest.skip("needs root: the programs' own identities are the point")
    made = Puppet(accounts, posternd={"limits": {"forwards_per_connection": 1, "unauthenticated_connections_per_source": 100},
                                      "forwarding": {"connect_timeout": "1s"}, "recorder": {"grace": "1s"}})
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def w(one):
    yield one.worker().login(one.user)
    one.release()
    one.settled()


@pytest.fixture
def folder(one):
    made = pathlib.Path(tempfile.mkdtemp(prefix="pthf-", dir="/tmp"))
    os.chown(made, pwd.getpwnam(one.user).pw_uid, -1)
    yield made
    for p in made.iterdir():
        p.unlink()
    made.rmdir()


def helpers(net) -> list[int]:
    return [p.pid for p in net.stack.processes_of(net.user) if "forwards of" in p.command]


def listen(w, path) -> None:
    w.say(LISTEN, forward(1, str(path).encode(), 0, 1))
    said = w.answer()
    assert said.type == LISTENING and struct.unpack_from("<2I", said.body) == (1, 1), said


@contextlib.contextmanager
def lingering(seconds=60):
    """A TCP socket whose last close(2) waits for so long: its queue is full, and nobody reads."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()) as made, listener.accept()[0]:
            made.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    made.send(b"x" * 65536)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
            yield made  # to be closed by the test while somebody else has it: here, too, it would wait


def leave_in(path, what) -> None:
    """Connects, leaves a descriptor in the queue, and is gone."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [what.fileno()]))])


def answers_soon(w, channel=0) -> None:
    begin = time.monotonic()
    w.say(OPEN, ref(channel))
    w.expect(OK, channel, 10)
    assert time.monotonic() - begin < 5 * SLACK


def test_a_connection_that_lingers_and_that_nobody_wants_does_not_stop_the_session(one, w, folder):
    """close(2) of what it drops would wait inside of postern-session, which is root, keeps the time limits, and hangs up."""
    listen(w, folder / "s")
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(f"{folder}/s")  # the only one that is allowed
        said = w.answer()
        assert said.type == INCOMING and len(said.fds) == 1
        session = one.sessions()[0]["session_pid"]
        os.kill(session, signal.SIGSTOP)  # else it is chance who closes last, the helper or the session
        with lingering() as sock:
            leave_in(folder / "s", sock)
            os.close(sock.detach())
            time.sleep(0.5)  # the helper has passed it on
            os.kill(session, signal.SIGCONT)
            answers_soon(w)


def test_a_worker_that_dies_with_such_a_connection_on_its_way_leaves_a_session_that_ends(one, folder):
    w = one.worker().login(one.user)
    listen(w, folder / "s")
    session = one.sessions()[0]["session_pid"]
    os.kill(session, signal.SIGSTOP)
    with lingering() as sock:
        leave_in(folder / "s", sock)
        os.close(sock.detach())
        time.sleep(0.5)  # the helper has passed it on
        w.order("exit 0")
        one.release()
        os.kill(session, signal.SIGCONT)
        one.settled()


def test_a_helper_that_is_stopped_is_replaced(one, w):
    """What it is asked for would pile up: its own limit is over, so it is not the network that is slow."""
    w.say(CONNECT, forward(1, b"127.0.0.1", 1))
    assert w.answer().type == FAILED
    helper, = helpers(one)
    os.kill(helper, signal.SIGSTOP)
    w.say(CONNECT, forward(2, b"127.0.0.1", 1))
    said = w.answer(12)
    assert said.type == FAILED and struct.unpack_from("<2I", said.body) == (2, 2)
    wait_until(lambda: helper not in helpers(one), "it is gone", 3)
    begin = time.monotonic()
    w.say(CONNECT, forward(3, b"127.0.0.1", 1))
    assert struct.unpack_from("<2I", w.answer().body) == (3, 2)  # refused by the port, so by a new one
    assert time.monotonic() - begin < 3 * SLACK


def test_a_user_who_kills_helpers_gets_few(one, w):
    gone, refused = 0, False
    for number in range(1, 20):
        w.say(CONNECT, forward(number, b"127.0.0.1", 1))
        said = w.answer()
        if said.type == FAILED and struct.unpack_from("<2I", said.body)[1] == 4 and not helpers(one):
            refused = True
            break
        for pid in helpers(one):
            os.kill(pid, signal.SIGKILL)
            gone += 1
            wait_until(lambda: pid not in helpers(one), "it is gone", 3)
            time.sleep(0.05)
    assert refused and 4 <= gone <= 10
    time.sleep(1.2)
    w.say(CONNECT, forward(50, b"127.0.0.1", 1))
    assert struct.unpack_from("<2I", w.answer().body) == (50, 2)


def test_what_waits_for_a_helper_that_dies_is_told_and_does_not_start_one_in_between(one, w, folder):
    listen(w, folder / "s")
    helper, = helpers(one)
    os.kill(helper, signal.SIGSTOP)
    w.open(0)
    w.say(AGENT, ref(0))
    w.say(AGENT, ref(0))  # waits behind the first one
    time.sleep(0.3)
    session = one.sessions()[0]["session_pid"]
    os.kill(session, signal.SIGSTOP)  # so that it hears of the helper's death and of its socket's end at once
    os.kill(helper, signal.SIGKILL)
    wait_until(lambda: helper not in helpers(one), "it is gone", 3)
    os.kill(session, signal.SIGCONT)
    w.expect(NO, 0)
    w.expect(NO, 0)
    time.sleep(0.3)
    assert not helpers(one)
    w.say(AGENT, ref(0))
    w.expect(OK, 0)
    new, = helpers(one)
    time.sleep(2)  # longer than the one before had to end
    assert helpers(one) == [new]


def test_requests_that_wait_for_a_stopped_helper_are_counted_by_their_bytes(one, w, folder):
    listen(w, folder / "s")
    helper, = helpers(one)
    os.kill(helper, signal.SIGSTOP)
    w.open(0)
    w.say(AGENT, ref(0))
    sent, deadline = 0, time.monotonic() + 20 * SLACK
    while w.alive() and time.monotonic() < deadline and sent < 200:
        if w.say(ENV, env(0, b"LANG", b"x" * 190_000)):
            sent += 1
        else:
            time.sleep(0.01)
    w.wait_killed()
    assert sent < 40, f"{sent} of them were kept"  # 4 MiB, and what the socket holds


def test_a_worker_that_keeps_a_forwarding_after_the_recorders_are_gone_is_killed(one):
    one.stack.recorder_a.start()
    one.stack.recorder_b.start()
    with one.stack.capabilities(alice=[{"localForward": ["*:*"]}]), socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        w = one.worker(one.stack.alice).login(one.user)
        w.open(0)
        w.run("echo started; sleep 100")
        w.say(CONNECT, forward(1, b"127.0.0.1", server.getsockname()[1]))
        said = w.answer()
        assert said.type == READY and len(said.fds) == 1, said
        one.stack.recorder_a.kill()
        one.stack.recorder_b.kill()
        w.wait_killed(15)
    one.release()
    one.settled()
