"""The client goes away: closed, silent, or without a network. What it left behind, and what becomes of it."""
import contextlib
import ctypes
import os
import pathlib
import re
import signal
import subprocess

import pytest

import harness
from harness import wait_until

needs_root = pytest.mark.needs_root


def sleepers(stack, pattern: str) -> list:
    return [p for p in stack.processes_of() if re.match(pattern, p.command)]


def sessions(stack) -> list:
    """postern-session processes of this stack that serve a connection: grandchildren of its posternd."""
    return [p for p in harness.descendants(stack.posternd.pid) if p.name == "postern-session"[:15] and p.parent != stack.posternd.pid and p.state != "Z"]


@contextlib.contextmanager
def own_network():
    """This thread, and what it starts, in a network namespace of its own with a loopback. Yields a function that cuts it off."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    if libc.unshare(0x40000000) != 0:  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "unshare")
    try:
        link = lambda state: subprocess.run(["ip", "link", "set", "lo", state], check=True)
        link("up")
        yield lambda: link("down")
    finally:
        assert libc.setns(home, 0x40000000) == 0
        os.close(home)


SCRIPT = "sleep 3001 & sleep 3002 >/dev/null 2>&1 </dev/null & setsid sleep 3003 >/dev/null 2>&1 </dev/null & (trap '' HUP; exec sleep 3004) >/dev/null 2>&1 </dev/null & echo up; wait"


@pytest.mark.parametrize("tty", [False, True], ids=["no terminal", "terminal"])
def test_hangup_ends_what_the_client_started_but_for_what_made_itself_independent(stack, tty):
    p = stack.popen(SCRIPT, bind=stack.plain_alice, tty=tty)
    assert p.stdout.readline().strip() == b"up"
    wait_until(lambda: len(sleepers(stack, r"sleep 300\d")) == 4, "all four run")
    p.kill()
    p.wait()
    try:
        wait_until(lambda: [x.command.split()[1] for x in sorted(sleepers(stack, r"sleep 300\d"), key=lambda x: x.command)] == ["3003", "3004"],
                   "setsid and the one that ignores HUP go on, the others are gone", 20)
        wait_until(lambda: not sessions(stack), "the session has ended all the same", 25)
        assert len(sleepers(stack, r"sleep 300\d")) == 2
    finally:
        for x in sleepers(stack, r"sleep 300\d"):
            os.kill(x.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_on_disconnect_kill_takes_them_too(make_stack, how):
    stack = make_stack(posternd={"session": {"on_disconnect": "kill"}}, start=("posternd",))
    stack.learn_host_key()
    p = stack.popen(SCRIPT if how == "killed" else SCRIPT.replace("wait", "exit 3").replace("sleep 3001 & ", ""), bind=stack.plain_alice)
    assert p.stdout.readline() == b"up\n"
    if how == "killed":
        wait_until(lambda: len(sleepers(stack, r"sleep 300\d")) == 4, "all four run")
        p.kill()
        p.wait()
    else:
        assert p.wait(20 * harness.SLACK) == 3
    wait_until(lambda: not sleepers(stack, r"sleep 300\d"), "nothing is left", 5)
    wait_until(lambda: not sessions(stack), "the session has ended", 5)


def test_a_program_has_kill_time_to_end_by_itself(make_stack):
    stack = make_stack(posternd={"session": {"on_disconnect": "kill", "kill_time": "50s"}}, start=("posternd",))
    stack.learn_host_key()
    # Twice the default: it would be killed at its sleep.
    p = stack.popen("f=$(mktemp); trap '' HUP PIPE; trap 'echo term >> $f; sleep 4; echo done >> $f; exit' TERM; echo $f; while :; do sleep 0.1; done", bind=stack.plain_alice)
    told = pathlib.Path(p.stdout.readline().decode().strip())
    p.kill()
    p.wait()
    try:
        wait_until(lambda: told.read_text() == "term\ndone\n", "it ended by itself", 20)
    finally:
        told.unlink()
    wait_until(lambda: not sessions(stack), "the session has ended", 5)


@contextlib.contextmanager
def left_behind(stack):
    """A program that ignores the end of its client; yields what finds it."""
    stack.learn_host_key()
    p = stack.popen("trap '' HUP TERM; echo up; exec sleep 3005", bind=stack.plain_alice)
    assert p.stdout.readline() == b"up\n"
    p.kill()
    p.wait()
    try:
        yield lambda: sleepers(stack, r"sleep 3005")
    finally:
        for x in sleepers(stack, r"sleep 3005"):
            os.kill(x.pid, signal.SIGKILL)


def test_on_disconnect_kill_ends_what_ignores_it_also_when_hang_up_time_is_shorter(make_stack):
    stack = make_stack(posternd={"session": {"on_disconnect": "kill", "kill_time": "1s", "hang_up_time": "0ms"}}, start=("posternd",))
    with left_behind(stack) as program:
        wait_until(lambda: not sessions(stack), "the session has ended", 15)
        assert not program()


def test_hang_up_time_is_how_long_a_program_that_stays_is_waited_for(make_stack):
    stack = make_stack(posternd={"session": {"hang_up_time": "0ms"}}, start=("posternd",))
    with left_behind(stack) as program:
        wait_until(lambda: not sessions(stack), "the session has ended", 5)
        assert len(program()) == 1


def test_on_disconnect_kill_leaves_a_second_connection_alone(make_stack):
    stack = make_stack(posternd={"session": {"on_disconnect": "kill"}}, start=("posternd",))
    stack.learn_host_key()
    other = stack.popen("echo up; read a; echo $a", bind=stack.plain_alice)
    assert other.stdout.readline() == b"up\n"
    assert stack.ssh("nohup sleep 3009 >/dev/null 2>&1 & echo up", bind=stack.plain_alice).text == "up\n"
    wait_until(lambda: not sleepers(stack, r"sleep 3009"), "what the first one left is gone", 5)
    assert other.communicate(b"fine\n", timeout=20 * harness.SLACK)[0] == b"fine\n"


@pytest.mark.parametrize("tty", [False, True], ids=["no terminal", "terminal"])
def test_a_client_that_no_longer_answers_is_let_go(make_stack, tty):
    """sshd's ClientAliveInterval: stopped, its kernel acknowledges everything, so TCP alone would never tell."""
    stack = make_stack(posternd={"ssh": {"client_alive_interval": "200ms", "client_alive_count_max": 3}}, start=("posternd",))
    stack.learn_host_key()
    p = stack.popen("echo up; sleep 3005", bind=stack.plain_alice, tty=tty)
    idle = stack.popen("echo up; read a; echo $a", bind=stack.plain_alice)
    assert p.stdout.readline().strip() == b"up" and idle.stdout.readline() == b"up\n"
    p.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: not sleepers(stack, "sleep 3005"), "the program of the stopped client is gone", 10)
    finally:
        p.send_signal(signal.SIGCONT)
    assert p.wait(20 * harness.SLACK) == 255
    # The other one has said nothing for longer, and is asked as often: its client answers.
    assert idle.communicate(b"here\n", timeout=20 * harness.SLACK)[0] == b"here\n"


@needs_root
@pytest.mark.parametrize("by", ["keepalive", "user_timeout"])
def test_a_network_that_is_gone_ends_the_session(accounts, by):
    settings = {"ssh": {"tcp_keepalive": "1s", "tcp_user_timeout": "0s"} if by == "keepalive" else {"tcp_keepalive": "0s", "tcp_user_timeout": "2s"}}
    with own_network() as cut:
        stack = harness.new_stack(accounts, posternd=settings, start=("posternd",))
        try:
            stack.start()
            stack.learn_host_key()
            # Of a silent session only the keepalive can tell; output that nobody acknowledges runs into the user time-out.
            p = stack.popen("echo up; " + ("sleep 3006" if by == "keepalive" else "trap 'exit 1' HUP; sleep 3006 & while :; do echo x; sleep 0.05; done"), bind=stack.plain_alice)
            assert p.stdout.readline() == b"up\n"
            cut()
            wait_until(lambda: not sessions(stack) and not sleepers(stack, "sleep 3006"), "the session has ended", 40)
            p.kill()
            p.wait()
        finally:
            stack.stop()


def test_no_more_sessions_is_obeyed(stack):
    """OpenSSH's client asks for it before its only session; a second one afterwards is an attack (OpenSSH PROTOCOL 2.2)."""
    import paramiko
    t = paramiko.Transport(stack.connect(stack.plain_alice))
    try:
        t.start_client(timeout=20 * harness.SLACK)
        t.auth_none(stack.user)
        first = t.open_session()
        t.global_request("no-more-sessions@openssh.com", wait=True)
        with pytest.raises((paramiko.SSHException, EOFError)):
            t.open_session()
        del first
    finally:
        t.close()
