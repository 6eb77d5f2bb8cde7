"""The socket where sessions find a new broker: nobody gets another one's connection there."""
import array
import os
import pwd
import select
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest

from harness import SLACK, wait_until

REGISTER, REGISTERED = 34, 25


@pytest.fixture
def live(net):
    """A session that runs, its pid, and its sealed facts: what a thief with root's rights would hold."""
    w = net.worker().login(net.user)
    w.open(0)
    w.run("sleep 600")
    pid = net.sessions()[0]["session_pid"]
    facts = next(n for n in os.listdir(f"/proc/{pid}/fd") if "postern-facts" in os.readlink(f"/proc/{pid}/fd/{n}"))
    fd = os.open(f"/proc/{pid}/fd/{facts}", os.O_RDWR)
    yield w, pid, fd
    os.close(fd)


def register(net, body: bytes, fds, kind: int = REGISTER, version: int = 1):
    """What posternd answers: a message's type, or None when it closes the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect(str(net.stack.dir / "run/registration.sock"))
        s.sendmsg([struct.pack("<HHI", version, kind, len(body)) + body], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
        assert select.select([s], [], [], 5 * SLACK)[0], "posternd says nothing"
        try:
            data, got, _, _ = socket.recv_fds(s, 4096, 8)
        except ConnectionResetError:
            return None
        assert not got
        return struct.unpack_from("<HHI", data)[1] if data else None


def test_an_ordinary_user_cannot_even_connect(net):
    script = "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\ntry: s.connect(sys.argv[1])\nexcept PermissionError: sys.exit(42)"
    for name in ("registration.sock", "control.sock"):
        done = subprocess.run([sys.executable, "-c", script, str(net.stack.dir / "run" / name)], user=pwd.getpwnam(net.user).pw_uid,
                              group=pwd.getpwnam(net.user).pw_gid, extra_groups=[])
        assert done.returncode == 42


def test_nobody_takes_over_a_connection_that_is_known(net, live):
    w, session, facts = live
    mine, theirs, of_net = os.pidfd_open(os.getpid()), os.pidfd_open(session), os.pidfd_open(w.pid)
    writable = os.memfd_create("postern-facts")
    os.write(writable, os.pread(facts, 1 << 20, 0))
    null = os.open("/dev/null", os.O_RDWR)
    since = net.stack.posternd.log_size()
    me = struct.pack("<ii", os.getpid(), w.pid)
    try:
        for body, fds in ((me, [facts, mine, of_net]),                                          # my own pid, their connection
                          (struct.pack("<ii", session, w.pid), [facts, theirs, of_net]),       # their pid
                          (struct.pack("<ii", session, w.pid), [facts, mine, of_net]),
                          (me, [writable, mine, of_net]), (me, [null, mine, of_net]), (me, [mine, mine, mine]),  # facts that are not sealed
                          (me, [facts, null, of_net]), (me, [facts, mine, null]), (me, [facts, facts, facts]),
                          (me, []), (me, [facts]), (me, [facts] * 8), (b"", [facts, mine, of_net]), (me + b"x", [facts, mine, of_net])):
            assert register(net, body, fds) is None
        assert register(net, me, [facts, mine, of_net], kind=31) is None
        assert register(net, me, [facts, mine, of_net], version=9) is None
        log = net.stack.posternd.log(since)
        assert "session_registered" not in log and log.count("event=registration_refused") >= 12
        assert w.alive() and [s["session_pid"] for s in net.sessions()] == [session]
    finally:
        for fd in (mine, theirs, of_net, writable, null):
            os.close(fd)


def test_a_session_registers_with_the_next_broker_and_can_be_ended_there(net, live):
    w, session, _ = live
    posternd = net.stack.posternd
    posternd.kill()
    since = posternd.log_size()
    posternd.start()
    posternd.wait_log("event=session_registered", since)
    known = wait_until(net.sessions, "it is known again")
    assert (known[0]["session_pid"], known[0]["net_pid"]) == (session, w.pid)
    net.stack.postern("sessions", "kill", "--all")
    w.wait_killed()
    wait_until(lambda: not net.stack.processes_of(net.user), "its programs have ended", 5)
