"""A postern-net that was taken over once its client was in: it has what that client has, and nothing else."""
import errno
import fcntl
import os
import select
import signal
import stat
import struct
import termios
import time

import pytest

from harness import SLACK, rng, wait_until
from puppet import (ASK_LOGIN, BREAK, CHANNEL_SIGNATURE, CLOSED, DISCONNECT, ENV, EXEC, EXITED, MESSAGE, NO, OK, OPEN, PTY, SHELL, SIGN, SIGNAL, START,
                    STARTED, SUBSYSTEM, WINDOW, ask_login, ask_sign, env, pty, ref, send_signal, start, window)

HASH = b"\xa5" * 32
NULL = os.open("/dev/null", os.O_RDWR)


@pytest.fixture
def inside(net):
    """A worker whose client is in, unrecorded."""
    return net.worker().login(net.user)


VIOLATIONS = {
    **{f"type {t} of {n} bytes": [(t, bytes(n))] for t in (0, OK, NO, STARTED, EXITED, CHANNEL_SIGNATURE, DISCONNECT, MESSAGE, 255, 65535) for n in (0, 4, 56)},
    "a start before the open": [(START, start(0, SHELL))],
    "a terminal before the open": [(PTY, pty(0))],
    "an environment before the open": [(ENV, env(0, b"LANG", b"C"))],
    "a window before the open": [(WINDOW, window(0))],
    "a signal before the open": [(SIGNAL, send_signal(0, b"TERM"))],
    "a break before the open": [(BREAK, ref(0))],
    "a close before the open": [(CLOSED, ref(0))],
    "a channel twice": [(OPEN, ref(3)), (OPEN, ref(3))],
    "a channel that was closed": [(OPEN, ref(3)), (CLOSED, ref(3)), (START, start(3, SHELL))],
    "another channel": [(OPEN, ref(3)), (START, start(4, SHELL))],
    "channel 65536": [(OPEN, ref(65536))],
    "channel 4294967295": [(OPEN, ref(0xFFFFFFFF))],
    **{f"an open of {n} bytes": [(OPEN, bytes(n))] for n in (0, 3, 5, 8, 190_000)},
    "a terminal that is short": [(OPEN, ref(0)), (PTY, pty(0)[:-1])],
    "a terminal name longer than its field": [(OPEN, ref(0)), (PTY, pty(0, term_length=65))],
    "modes longer than their field": [(OPEN, ref(0)), (PTY, pty(0, modes_length=0xFFFFFFFF))],
    "an environment name longer than the message": [(OPEN, ref(0)), (ENV, env(0, b"LANG", b"C", name_length=6))],
    "an environment name of 4 GiB": [(OPEN, ref(0)), (ENV, env(0, b"LANG", b"C", name_length=0xFFFFFFFF))],
    "a start that is short": [(OPEN, ref(0)), (START, b"\0" * 7)],
    "a kind of start that there is not": [(OPEN, ref(0)), (START, start(0, 3))],
    "a shell with a command": [(OPEN, ref(0)), (START, start(0, SHELL, b"id"))],
    "a signal longer than its field": [(OPEN, ref(0)), (SIGNAL, send_signal(0, b"TERM", 17))],
    "a hash longer than its field": [(SIGN, ask_sign(HASH, length=65))],
    "a question for a signature that is short": [(SIGN, ask_sign(HASH)[:-1])],
    "more than a message may have": [(OPEN, bytes(192 * 1024 + 1))],
}


@pytest.mark.parametrize("what", VIOLATIONS)
def test_a_worker_that_breaks_the_protocol_is_killed(net, inside, what):
    for kind, body in VIOLATIONS[what]:
        inside.say(kind, body)
    inside.wait_killed()


@pytest.mark.parametrize("how", [dict(version=0), dict(version=2), dict(size=3), dict(size=5), dict(size=0xFFFFFFFF), dict(raw=b""), dict(raw=b"\1\0\1\0"),
                                 dict(fds=[NULL]), dict(fds=[NULL] * 8), dict(fds=[NULL] * 64)], ids=lambda h: f"{h}"[:40])
def test_a_frame_that_is_wrong_or_brings_descriptors_ends_it(net, inside, how):
    inside.say(OPEN, ref(0), **how)
    inside.wait_killed()


def test_the_brokers_socket_gives_nothing_after_the_verdict(net):
    for kind, body in ((ASK_LOGIN, ask_login(b"root")), (30, ask_sign(HASH)), (2, bytes(8)), (22, bytes(1032))):
        w = net.worker().login(net.user)
        w.tell(kind, body)
        w.wait_killed()


def test_random_messages_never_hurt_posternd_or_a_session(net):
    """Printed seed (POSTERN_SEED). Every message type with real, cut and random bodies, in any order."""
    random = rng("after the verdict")
    for _ in range(25):
        w = net.worker(random.choice([net.stack.plain_alice, net.stack.open_alice])).login(net.user)
        for _ in range(random.randrange(1, 40)):
            c = random.choice([0, 0, 0, 1, 2, 65535])
            kind, body = random.choice([
                (OPEN, ref(c)), (PTY, pty(c, random.randbytes(5), random.randbytes(random.randrange(200)), random.getrandbits(32), random.getrandbits(32))),
                (ENV, env(c, random.choice([b"LANG", b"LD_PRELOAD", b"A=B", b"", random.randbytes(6)]), random.randbytes(20))),
                (START, start(c, random.randrange(3), random.choice([b"", b"sftp", b"true", random.randbytes(30)]))),
                (WINDOW, window(c, random.getrandbits(32), random.getrandbits(32))), (SIGNAL, send_signal(c, random.choice([b"TERM", b"KILL", b"", b"-1", b"0"]))),
                (BREAK, ref(c)), (CLOSED, ref(c)), (SIGN, ask_sign(random.randbytes(random.choice([0, 16, 32]))))])
            if random.random() < 0.05:
                body = body[: random.randrange(len(body) + 1)]
            if random.random() < 0.02:
                kind = random.randrange(65536)
            w.say(kind, body)
        if random.random() < 0.5:
            w.answers(0.02)
        w.close()
    net.settled()


def test_more_channels_than_allowed_are_refused_and_numbers_come_back(net, inside):
    for c in range(10):
        inside.open(c)
    for c in range(10, 30):
        inside.say(OPEN, ref(c))
        inside.expect(NO, c)
    inside.say(CLOSED, ref(4))
    inside.open(4)
    _, out, _ = inside.run("echo again", 4)
    assert select.select([out], [], [], 10 * SLACK)[0] and os.read(out, 100) == b"again\n"


def test_odd_requests_are_refused_and_the_session_goes_on(net, inside):
    inside.open(0)
    no = [(ENV, env(0, name, b"x")) for name in (b"LD_PRELOAD", b"BASH_ENV", b"PATH", b"SSH_CONNECTION", b"", b"A B", b"A=B", b"\0", b"A" * 257)]
    no += [(ENV, env(0, b"LANG", b"a\0b")), (ENV, env(0, b"LANG", b"x" * (16 * 1024 + 1))), (START, start(0, EXEC, b"x" * (128 * 1024 + 1))),
           (START, start(0, EXEC, b"id\0id")), (START, start(0, SUBSYSTEM, b"netconf")), (START, start(0, SUBSYSTEM, b"/bin/sh")), (BREAK, ref(0))]
    for kind, body in no:
        inside.say(kind, body)
        inside.expect(NO, 0)
    granted = 0
    for i in range(300):
        inside.say(ENV, env(0, b"POSTERN_TEST_%d" % i, b"v" * 100))
        said = inside.answer()
        granted += said.type == OK
    assert 0 < granted <= 128
    _, out, _ = inside.run("id -u", 0)
    assert select.select([out], [], [], 10 * SLACK)[0]
    assert int(os.read(out, 100)) == __import__("pwd").getpwnam(net.user).pw_uid
    inside.expect(EXITED, 0)
    inside.say(START, start(0, SHELL))
    inside.expect(NO, 0)


def test_a_flood_for_signatures_gets_few(net, inside):
    begin = time.monotonic()
    for i in range(200):
        if not inside.say(SIGN, ask_sign(bytes([i]) * 32)):
            break
    signed = sum(1 for s in inside.answers(1.0) if s.type == CHANNEL_SIGNATURE and struct.unpack_from("<I", s.body)[0] > 0)
    assert signed <= 10 + 2 * (time.monotonic() - begin) + 1, f"{signed} signatures"


@pytest.mark.parametrize("data", [b"", b"x" * 31, b"x" * 33, b"SSHSIG".ljust(32, b"x")])
def test_what_is_no_exchange_hash_is_not_signed_later_either(net, inside, data):
    inside.say(SIGN, ask_sign(data))
    said = inside.answer()
    assert said is None or (said.type == CHANNEL_SIGNATURE and struct.unpack_from("<I", said.body)[0] == 0)


def test_one_connection_holds_nothing_of_another(net):
    a, b = net.worker().login(net.user), net.worker().login(net.user)
    b.open(5)
    theirs = b.run("cat", 5)
    a.open(0)
    ours = a.run("cat", 0)
    inode = lambda fd: (os.fstat(fd).st_dev, os.fstat(fd).st_ino)
    assert not {inode(f) for f in ours} & {inode(f) for f in theirs}
    os.write(theirs[0], b"for b\n")
    assert select.select([theirs[1]], [], [], 10 * SLACK)[0] and os.read(theirs[1], 100) == b"for b\n"
    assert not select.select([ours[1]], [], [], 0.1)[0]
    a.say(CLOSED, ref(5))  # b's number
    a.wait_killed()
    os.write(theirs[0], b"still\n")
    assert select.select([theirs[1]], [], [], 10 * SLACK)[0] and os.read(theirs[1], 100) == b"still\n"


# ------------------------------------------------------------------------------------------------------- recorded sessions

def refuses_terminal_calls(fd) -> bool:
    try:
        fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8)
    except OSError as e:
        return e.errno == errno.ENOTTY
    return False


@pytest.mark.parametrize("terminal", [True, False])
def test_of_a_recorded_session_only_pipes_come_and_no_byte_before_it_is_written(net, terminal):
    """The relay is stopped: whatever the program says cannot be recorded, so nothing may come out, by any descriptor that we hold."""
    w = net.worker(net.stack.open_alice).login(net.user)
    w.open(0)
    if terminal:
        w.say(PTY, pty(0))
        w.expect(OK, 0)
    net.stack.relay.pause()
    try:
        said_size = len(w.fds)
        fds = w.run("echo secret-$((6*7)); echo secret-$((6*7)) >&2; exec sleep 600")
        assert len(w.fds) == said_size + len(fds) and len(fds) == (2 if terminal else 3)
        for fd in fds:
            assert stat.S_ISFIFO(os.fstat(fd).st_mode), os.readlink(f"/proc/self/fd/{fd}")
            assert refuses_terminal_calls(fd)
        wait_until(lambda: [p for p in net.stack.processes_of(net.user) if p.name == "sleep"], "the program has said it")
        # None of ours is an end of what the program itself holds, but for its input.
        program = next(p for p in net.stack.processes_of(net.user) if p.name == "sleep")
        own = {os.stat(f"/proc/{program.pid}/fd/{n}").st_ino for n in ("1", "2")}
        assert not own & {os.fstat(f).st_ino for f in fds}
        readable = fds[1:]
        assert not select.select(readable, [], [], 1.5)[0], "a byte that is not recorded came out"
        w.say(WINDOW, window(0))
        w.say(SIGNAL, send_signal(0, b"CONT"))
        assert not select.select(readable, [], [], 0.3)[0]
    finally:
        net.stack.relay.resume()
    for fd in readable:
        got, deadline = b"", time.monotonic() + 10 * SLACK
        while b"secret-42" not in got:
            assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], f"recorded, and not shown: {got!r}"
            got += os.read(fd, 4096)
    w.say(CLOSED, ref(0))


def test_without_a_recorder_a_required_recording_starts_nothing(net):
    w = net.worker(net.stack.alice).login(net.user)
    w.open(0)
    mark = f"/tmp/postern-home-{net.user}/ran"
    fds = w.run(f"touch {mark}")
    said = w.expect(EXITED, 0)
    assert struct.unpack_from("<3I", said.body)[2] == 254
    assert all(stat.S_ISFIFO(os.fstat(f).st_mode) for f in fds)
    assert b"ecord" in os.read(fds[2], 1000)
    assert not os.path.exists(mark) and not net.stack.processes_of(net.user)


# ------------------------------------------------------------------------------------------------------- the end

def test_a_worker_that_ignores_a_revocation_is_killed_and_the_programs_with_it(net, inside):
    inside.open(0)
    inside.run("trap '' HUP TERM; nohup setsid sleep 600 & wait; sleep 600")
    wait_until(lambda: [p for p in net.stack.processes_of(net.user) if p.name == "sleep"], "the programs run")
    begin = time.monotonic()
    net.stack.postern("sessions", "kill", "--all")
    inside.wait_killed(1.5)
    wait_until(lambda: not net.stack.processes_of(net.user), "the whole process tree has ended", 4)
    assert time.monotonic() - begin < 4 * SLACK


def test_a_session_that_hangs_loses_its_programs_to_posternd(net, inside):
    inside.open(0)
    inside.run("trap '' HUP TERM; nohup setsid sleep 600 & wait; sleep 600")
    wait_until(lambda: [p for p in net.stack.processes_of(net.user) if p.name == "sleep"], "the programs run")
    session = net.sessions()[0]["session_pid"]
    os.kill(session, signal.SIGSTOP)
    net.stack.postern("sessions", "kill", "--all")
    wait_until(lambda: not net.stack.processes_of(net.user), "the whole process tree has ended", 6)
    wait_until(lambda: not net.sessions(), "the connection is over")


def test_a_worker_that_dies_ends_its_programs(net, inside):
    inside.open(0)
    inside.run("sleep 600")
    wait_until(lambda: net.stack.processes_of(net.user), "the program runs")
    inside.order("exit 0")
    inside.wait_killed()
    inside.close()
    wait_until(lambda: not net.stack.processes_of(net.user), "its programs were hung up")


def test_a_reload_during_a_login_counts(net):
    """What the policy says when the verdict is due, not what it said when the peer came."""
    stack = net.stack
    before = stack.policy_file.read_text()
    try:
        w = net.worker()
        w.sign()
        stack.set_policy(stack.default_policy(users=["nobody-at-all"]))
        w.tell(ASK_LOGIN, ask_login(net.user.encode()))
        accepted, why = w.verdict()
        assert not accepted and why
        stack.set_policy(before)
        nodes = stack.nodes_file.read_text()
        w = net.worker()
        w.sign()
        stack.nodes_file.write_text(nodes.replace(f'addresses = ["{stack.plain_alice}"]', 'addresses = ["127.250.250.250"]'))
        stack.set_policy(before)
        w.tell(ASK_LOGIN, ask_login(net.user.encode()))
        assert w.verdict()[0] is False, "a node that was removed is still let in"
        stack.nodes_file.write_text(nodes)
    finally:
        stack.nodes_file.write_text(nodes)
        stack.set_policy(before)
