"""A client's signals: with the user's rights, and to what the client has started."""
import os
import pathlib
import shutil
import struct

import pytest

import harness
from harness import wait_until
from test_wire import control
from wire import SUCCESS, FAILURE, Wire, string


@pytest.fixture
def root_python():
    """As sudo: set-user-ID root, and then root altogether."""
    folder = pathlib.Path("/tmp") / f"pt-suid-{os.getpid()}"
    folder.mkdir(mode=0o755)
    program = folder / "python"
    shutil.copy(os.path.realpath("/usr/bin/python3"), program)
    program.chmod(0o4755)
    yield program
    shutil.rmtree(folder)


class Helpers:
    """What a session has forked for itself."""

    def __init__(self, stack, w):
        self.stack, self.wire = stack, w
        self.session = next(c["session_pid"] for c in control(stack, "ls")["connections"] if c["peer"].endswith(f":{w.port}"))
        self.before = self.now()

    def now(self) -> set[int]:
        return {p.pid for p in harness.descendants(self.session) if p.name == "postern-session"[:15]}

    def settle(self, channel):
        """What the client sent before has been handled: the session has answered something later, and what it forked for it has ended."""
        self.wire.send(self.wire.request(channel, "break", True, struct.pack(">I", 0)))
        self.wire.expect(SUCCESS, FAILURE)
        wait_until(lambda: self.now() <= self.before, "its helpers have ended")


@pytest.mark.needs_root
def test_a_clients_signal_reaches_no_program_that_its_user_could_not_signal(stack, root_python):
    with Wire(stack) as w:
        w.login()
        channel = w.open()
        w.exec(channel, f"exec {root_python} -I -c 'import os, time; os.setresgid(0, 0, 0); os.setresuid(0, 0, 0); print(os.getpid(), flush=True); time.sleep(3600)'")
        pid = int(w.read_until(b"\n"))
        helpers = Helpers(stack, w)
        for name in ("USR1", "TERM", "KILL"):
            w.send(w.request(channel, "signal", False, string(name)))
        helpers.settle(channel)
        stat = pathlib.Path(f"/proc/{pid}/stat")
        assert stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "S"
        os.kill(pid, 9)


def test_a_forced_command_gets_no_signal_of_the_clients(stack):
    """As under sshd (session.c session_signal_req): the client did not choose what runs."""
    with stack.capabilities(plain_alice=[{"command": "trap 'echo HIT' USR1; echo up; for i in 1 2 3 4 5; do sleep 0.2; done; echo over"}]), Wire(stack, bind=stack.plain_alice) as w:
        w.login()
        channel = w.open()
        w.exec(channel, "id")
        w.read_until(b"up\n")
        helpers = Helpers(stack, w)
        w.send(w.request(channel, "signal", False, string("USR1")))
        helpers.settle(channel)
        assert b"HIT" not in w.read_until(b"over\n")
