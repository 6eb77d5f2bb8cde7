"""What an admin sees and ends, and a broker that dies with sessions running."""
import json
import os
import re
import signal
import time

import pytest

from harness import SLACK, processes, wait_until


def live(stack) -> list[dict]:
    return [json.loads(line) for line in stack.postern("sessions", "ls", "--json").text.splitlines()]


def live_when(stack, count: int, what: str, seconds: float = 15) -> list[dict]:
    def listed():
        found = live(stack)
        return found if len(found) == count else None
    return wait_until(listed, what, seconds)


def test_sessions_ls_shows_who_is_in_and_kill_ends_one(stack):
    with stack.terminal(bind=stack.alice) as first, stack.terminal(bind=stack.plain_alice) as second:
        first.read_until(r"[$#] $")
        second.read_until(r"[$#] $")
        listed = wait_until(lambda: (x := live(stack)) and len(x) == 2 and all(c["channels"] == 1 for c in x) and x, "two connections with one session each")
        by_user = {c["user"]: c for c in listed}
        alice, plain = by_user["alice@example.com"], by_user["plain@example.com"]
        assert alice["peer"].startswith(stack.alice + ":") and alice["local_user"] == stack.user
        assert (alice["recorded"], alice["enforced"]) == (True, True)
        assert (plain["recorded"], plain["enforced"]) == (False, False)
        table = stack.postern("sessions", "ls").text
        assert alice["connection"] in table and "alice@example.com" in table

        stack.postern("sessions", "kill", alice["connection"])
        first.read_until("ended by the administrator")
        assert first.wait() == 255
        wait_until(lambda: [c["connection"] for c in live(stack)] == [plain["connection"]], "only the other one is listed")
        second.send("exit 3\r")
        assert second.wait() == 3
    wait_until(lambda: not live(stack), "nobody is listed")


def test_killing_a_connection_that_does_not_exist_says_so(stack):
    assert stack.postern("sessions", "kill", "a" * 26, check=False).code != 0


@pytest.mark.parametrize("who", ["alice", "plain_alice"])
def test_kill_ends_the_whole_tree_also_what_ignores_hangups(stack, who):
    script = ("trap '' HUP TERM; nohup sleep 1001 >/dev/null 2>&1 & setsid sleep 1002 >/dev/null 2>&1 & "
              "(trap '' HUP; (sleep 1003 >/dev/null 2>&1 &) ); echo up; while :; do sleep 1; done")
    p = stack.popen(script, bind=getattr(stack, who))
    assert p.stdout.readline() == b"up\n"
    def sleepers():
        return [x for x in stack.processes_of() if re.match(r"sleep 100\d", x.command)]
    wait_until(lambda: len(sleepers()) == 3, "three children that outlive a hang-up")
    stack.postern("sessions", "kill", "--all")
    p.wait(10 * SLACK)
    assert p.returncode == 255
    wait_until(lambda: not stack.processes_of(), "nothing of the user is left", seconds=8)


def test_the_control_socket_is_for_root_only(stack):
    mode = os.stat(stack.control).st_mode & 0o777
    assert mode & 0o077 == 0, oct(mode)
    registration = os.stat(stack.control.parent / "registration.sock").st_mode & 0o777
    assert registration & 0o077 == 0, oct(registration)


@pytest.mark.parametrize("who", ["alice", "open_alice", "plain_alice"])
def test_a_session_outlives_kill_9_of_posternd_and_is_listed_and_killable_again(make_stack, who):
    stack = make_stack()
    source = getattr(stack, who)
    with stack.terminal(bind=source) as t, stack.terminal(bind=source) as other:
        t.read_until(r"[$#] $")
        other.read_until(r"[$#] $")
        before = {c["connection"] for c in live_when(stack, 2, "both are listed")}
        stack.posternd.kill()
        # Typed while there is no broker at all.
        t.send("echo alone-$((20 + 3))\r")
        t.read_until(r"alone-23\r\n")
        stack.posternd.start()
        after = live_when(stack, 2, "both are registered again")
        assert {c["connection"] for c in after} == before
        assert all(c["local_user"] == stack.user for c in after)
        t.send("echo again-$((20 + 4))\r")
        t.read_until(r"again-24\r\n")
        assert stack.ssh("echo new", bind=source).text == "new\n", "new logins work, with the same host key"
        mine = next(c["connection"] for c in after if c["peer"].endswith(f":{_port_of(t)}"))
        stack.postern("sessions", "kill", mine)
        t.read_until("ended by the administrator")
        assert t.wait() == 255
        other.send("exit 6\r")
        assert other.wait() == 6


def _port_of(terminal) -> int:
    """The local port of the ssh client behind a terminal."""
    inodes = set()
    for fd in os.listdir(f"/proc/{terminal.process.pid}/fd"):
        try:
            target = os.readlink(f"/proc/{terminal.process.pid}/fd/{fd}")
        except OSError:
            continue
        if m := re.fullmatch(r"socket:\[(\d+)\]", target):
            inodes.add(m[1])
    with open("/proc/net/tcp") as f:
        for line in f.readlines()[1:]:
            fields = line.split()
            if fields[9] in inodes:
                return int(fields[1].split(":")[1], 16)
    raise AssertionError("no TCP connection")


def test_a_policy_change_reaches_sessions_that_outlived_posternd(make_stack):
    """Revocable again: the new broker judges what registers by the policy of now."""
    stack = make_stack()
    with stack.terminal(bind=stack.alice) as t:
        t.read_until(r"[$#] $")
        stack.posternd.kill()
        document = json.loads(stack.policy_file.read_text().split("\n", 1)[1])
        document["ssh"] = [rule for rule in document["ssh"] if rule["src"] != ["alice@example.com"]]
        stack.policy_file.write_text(json.dumps(document))
        stack.posternd.start()
        t.read_until("Access revoked.", seconds=15)
        assert t.wait() == 255


def test_a_session_without_a_broker_for_longer_than_the_limit_ends(make_stack):
    stack = make_stack(posternd={"session": {"orphan_limit": "1s"}})
    with stack.terminal(bind=stack.plain_alice) as t:
        t.read_until(r"[$#] $")
        stack.posternd.kill()
        begin = time.monotonic()
        assert t.wait(15) == 255
        assert time.monotonic() - begin >= 0.8
        wait_until(lambda: not stack.processes_of(), "nothing of the user is left")


def test_a_connection_that_is_not_logged_in_dies_with_posternd(make_stack):
    stack = make_stack()
    with stack.connect() as sock:
        assert sock.recv(100).startswith(b"SSH-2.0-")
        stack.posternd.kill()
        data = b"x"
        try:
            while data:
                data = sock.recv(4096)
        except ConnectionResetError:
            data = b""
        assert data == b""


def test_posternd_ends_at_sigterm_and_sessions_stay(make_stack):
    stack = make_stack()
    with stack.terminal() as t:
        t.read_until(r"[$#] $")
        assert stack.posternd.stop() == 0
        t.send("echo still-$((1+1))\r")
        t.read_until("still-2")
        stack.posternd.start()
        wait_until(lambda: len(live(stack)) == 1, "it is registered with the new one", seconds=15)
        t.send("exit 5\r")
        assert t.wait() == 5


@pytest.mark.needs_root
def test_a_session_process_that_crashes_ends_its_connection_only(make_stack):
    stack = make_stack()
    with stack.terminal(bind=stack.plain_alice) as victim, stack.terminal(bind=stack.open_alice) as other:
        victim.read_until(r"[$#] $")
        other.read_until(r"[$#] $")
        by_user = {c["user"]: c for c in live_when(stack, 2, "both are listed")}
        os.kill(by_user["plain@example.com"]["session_pid"], signal.SIGKILL)
        assert victim.wait() == 255
        other.send("exit 2\r")
        assert other.wait() == 2
    assert stack.ssh("echo in").text == "in\n"
