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
from puppet import (AGENT, ASK_LOGIN, BREAK, CANCEL, CHANNEL_SIGNATURE, CLOSED, CONNECT, DISCONNECT, ENV, EXEC, EXITED, FAILED, FORWARD_CLOSED, INCOMING,
                    LISTEN, LISTENING, MESSAGE, NO, OK, OPEN, PTY, READY, SHELL, SIGN, SIGNAL, START, STARTED, SUBSYSTEM, WINDOW, X11, ask_login, ask_sign,
                    env, forward, forward_closed, pty, ref, send_signal, start, window, x11)

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
    **{f"a forwarding message, type {t}, of {n} bytes": [(t, bytes(n))] for t in (CONNECT, LISTEN, CANCEL, FORWARD_CLOSED, AGENT, X11) for n in (0, 3, 271, 273, 9000)},
    **{f"a forwarding answer from the wrong side, {t}": [(t, bytes(8))] for t in (READY, FAILED, LISTENING, INCOMING, 32)},
    "a forwarding's number that is session's": [(CONNECT, forward(0x80000000, b"127.0.0.1", 1))],
    "a forwarding's number that is too large": [(CONNECT, forward(65536, b"127.0.0.1", 1))],
    "a forwarding twice": [(CONNECT, forward(1, b"192.0.2.1", 1)), (CONNECT, forward(1, b"192.0.2.1", 1))],
    "a target longer than its field": [(CONNECT, forward(1, b"x", 1, length=257))],
    "a port that is none": [(CONNECT, forward(1, b"127.0.0.1", 65536))],
    "a kind of forwarding that there is not": [(CONNECT, forward(1, b"x", 1, kind=4))],
    "a connect to the agent": [(CONNECT, forward(1, b"x", 1, kind=2))],
    "a unix socket with a port": [(CONNECT, forward(1, b"/tmp/x", 1, kind=1))],
    "a listener on a port that is none": [(LISTEN, forward(1, b"", 0xFFFFFFFF))],
    "a listen address longer than its field": [(LISTEN, forward(1, b"", 0, length=0xFFFFFFFF))],
    "a cancel longer than its field": [(CANCEL, forward(1, b"", 0, length=300))],
    "the end of a forwarding that was not": [(FORWARD_CLOSED, forward_closed(7))],
    "the end of one that came in and did not": [(FORWARD_CLOSED, forward_closed(0x80000001))],
    "the end of one that is being connected": [(CONNECT, forward(1, b"192.0.2.1", 1)), (FORWARD_CLOSED, forward_closed(1))],
    "an agent for no channel": [(AGENT, ref(5))],
    "X11 for no channel": [(X11, x11(5))],
    "an X11 cookie longer than its field": [(OPEN, ref(0)), (X11, x11(0, cookie_length=257))],
    "an X11 protocol longer than its field": [(OPEN, ref(0)), (X11, x11(0, protocol_length=65))],
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
                (AGENT, ref(c)), (X11, x11(c)), (CONNECT, forward(random.choice([0, 1, 2, 65535]), random.choice([b"127.0.0.1", b"localhost", random.randbytes(9)]), random.choice([0, 1, 80]))),
                (CONNECT, forward(3, random.choice([b"/tmp/nothing", b"", b"/" + random.randbytes(150)]), 0, 1)), (LISTEN, forward(c, random.choice([b"", b"::1", b"*"]), 0)),
                (LISTEN, forward(c, b"/nowhere/x", 0, 1)), (CANCEL, forward(c, b"", random.choice([0, 8080]))), (FORWARD_CLOSED, forward_closed(c)),
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
    no += [(ENV, env(0, b"LANG", b"a\0b")), (ENV, env(0, b"LANG", b"x" * (128 * 1024 + 1))), (START, start(0, EXEC, b"x" * (128 * 1024 + 1))),
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
    inside.say(SIGN, ask_sign(HASH, key=inside.key_ids[0]))
    first = inside.answer()
    assert first.type == CHANNEL_SIGNATURE and struct.unpack_from("<I", first.body)[0] > 0
    for i in range(200):
        if not inside.say(SIGN, ask_sign(bytes([i]) * 32, key=inside.key_ids[0])):
            break
    signed = sum(1 for s in inside.answers(1.0) if s.type == CHANNEL_SIGNATURE and struct.unpack_from("<I", s.body)[0] > 0)
    assert signed <= 9 + 2 * (time.monotonic() - begin) + 1, f"{signed} signatures"


@pytest.mark.parametrize("data", [b"", b"x" * 31, b"x" * 33, b"SSHSIG".ljust(32, b"x")])
def test_what_is_no_exchange_hash_is_not_signed_later_either(net, inside, data):
    inside.say(SIGN, ask_sign(data, key=inside.key_ids[0]))
    said = inside.answer()
    assert said is None or (said.type == CHANNEL_SIGNATURE and struct.unpack_from("<I", said.body)[0] == 0)


@pytest.mark.parametrize("data,good", [(b"", True), (b"x" * 32, False), (b"SSHSIG", False)])
def test_a_proof_of_a_key_is_posternds_own_text(net, inside, data, good):
    inside.say(SIGN, ask_sign(data, key=inside.key_ids[0], purpose=1))
    said = inside.answer()
    assert said.type == CHANNEL_SIGNATURE and (struct.unpack_from("<I", said.body)[0] > 0) == good


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


def test_targets_that_are_none_are_refused_and_the_connection_lives(net, inside):
    """Whatever bytes net passes on as a name: they reach the log as \\xNN, getaddrinfo(3) or nothing, and no path of root's."""
    for i, (target, port, kind) in enumerate([(b"", 1, 0), (b"a\0b", 1, 0), (b"\n\x1b[31m event=forged", 1, 0), (b"x" * 256, 1, 0), (b"127.0.0.1", 0, 0),
                                              (b"", 0, 1), (b"/tmp/a\0b", 0, 1), (b"/" + b"y" * 255, 0, 1), (b"/etc/shadow", 0, 1), (b"/run/nothing.sock", 0, 1)]):
        inside.say(CONNECT, forward(i, target, port, kind))
        said = inside.answer(40)
        assert said.type == FAILED and struct.unpack_from("<I", said.body)[0] == i, said
        assert struct.unpack_from("<I", said.body, 4)[0] in (1, 2, 4)
    with __import__("socket").create_server(("127.0.0.1", 0)) as server:  # what C's functions would read is there
        server.setblocking(False)
        inside.say(CONNECT, forward(20, b"127.0.0.1\0.example", server.getsockname()[1]))
        said = inside.answer()
        assert said.type == FAILED and struct.unpack_from("<II", said.body) == (20, 2), said
        with pytest.raises(BlockingIOError):
            server.accept()
    for i, (target, kind) in enumerate([(b"\0", 1), (b"relative", 1), (b"/root/postern-test", 1), (b"/" + b"y" * 255, 1)]):
        inside.say(LISTEN, forward(i, target, 0, kind))
        said = inside.answer()
        assert said.type == LISTENING and struct.unpack_from("<II", said.body) == (i, 0), said
    assert not os.path.lexists("/root/postern-test")
    assert "event=forged" not in net.stack.posternd.log().replace("\\x0a\\x1b[31m event=forged", "")
    inside.open(0)


def test_what_is_connected_is_a_socket_of_the_users_and_what_it_moved_is_net_to_say(net, inside):
    import socket as s
    with s.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        inside.say(CONNECT, forward(9, b"127.0.0.1", listener.getsockname()[1]))
        said = inside.answer()
        assert said.type == READY and len(said.fds) == 1
        with s.socket(fileno=os.dup(said.fds[0])) as mine:
            assert mine.getpeername() == listener.getsockname()
            assert fcntl.fcntl(mine.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
        inside.say(FORWARD_CLOSED, forward_closed(9, 2**64 - 1, 2**63))
        inside.say(FORWARD_CLOSED, forward_closed(9))  # twice is a lie
        inside.wait_killed()


def test_more_listeners_than_a_connection_may_have_are_refused(net, inside):
    granted = 0
    for i in range(300):
        inside.say(LISTEN, forward(i, b"", 0))
        granted += struct.unpack_from("<I", inside.answer().body, 4)[0]
    assert granted == 256


def test_requests_behind_one_for_the_agent_are_answered_in_their_order(net, inside):
    inside.open(0)
    inside.open(1)
    for kind, body in ((AGENT, ref(0)), (ENV, env(0, b"LANG", b"C")), (ENV, env(0, b"PATH", b"x")), (AGENT, ref(0)), (START, start(0, EXEC, b"echo $SSH_AUTH_SOCK"))):
        inside.say(kind, body)
    answers = [inside.answer() for _ in range(5)]
    assert [a.type for a in answers] == [OK, OK, NO, NO, STARTED]
    assert select.select([answers[4].fds[1]], [], [], 10 * SLACK)[0]
    assert os.read(answers[4].fds[1], 200).startswith(b"/tmp/ssh-")
    inside.expect(EXITED, 0)
