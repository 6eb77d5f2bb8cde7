"""Who leaves first: the client, its program, or the program's output. As under OpenSSH's sshd, but for the hang-up (docs/DIFFERENCES.md)."""
import asyncio
import contextlib
import os
import pathlib
import pwd
import re
import signal
import struct
import uuid

import pytest

from harness import SLACK, wait_until
from login.test_shell import KINDS


@pytest.fixture(params=KINDS)
def who(stack, request):
    return getattr(stack, request.param)


@pytest.fixture
def file(stack):
    path = pathlib.Path(pwd.getpwnam(stack.user).pw_dir) / f"leaving-{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def paramiko_client(stack, who):
    import paramiko
    transport = paramiko.Transport(stack.connect(who))
    try:
        transport.start_client(timeout=20 * SLACK)
        transport.auth_none(stack.user)
        yield transport
    finally:
        transport.close()


def string(b: bytes) -> bytes:
    return struct.pack(">I", len(b)) + b


def send_request(channel, name: bytes, want_reply: bool, payload: bytes = b"") -> None:
    import paramiko
    m = paramiko.Message()
    m.add_byte(b"\x62")  # SSH_MSG_CHANNEL_REQUEST
    m.add_int(channel.remote_chanid)
    m.add_string(name)
    m.add_boolean(want_reply)
    m.add_bytes(payload)
    channel.transport._send_user_message(m)


def running(stack, pattern: str) -> list:
    return [p for p in stack.processes_of() if re.fullmatch(pattern, p.command)]


@contextlib.contextmanager
def ends_them(stack, pattern: str):
    try:
        yield
    finally:
        for p in running(stack, pattern):
            with contextlib.suppress(ProcessLookupError):
                os.kill(p.pid, signal.SIGKILL)


def size_of(path) -> int:
    return path.stat().st_size if path.exists() else -1


# ---- what the client had sent

READERS = [(5, "cat > {}"), (100_000, "cat > {}"), (1_900_000, "cat > {}"), (100_000, "sleep 0.3; cat > {}"), (1_900_000, "sleep 0.3; cat > {}"), (5, "sleep 1.5; cat > {}"),
           (1_900_000, "while head -c 65536 >> {0} && [ $(stat -c %s {0}) -lt 1900000 ]; do sleep 0.1; done")]


@pytest.mark.parametrize("size, command", READERS)
def test_bytes_eof_and_close_at_once_all_reach_the_program(stack, who, file, size, command):
    async def run():
        import asyncssh
        async with await stack.asyncssh(bind=who) as connection:
            channel, _ = await connection.create_session(asyncssh.SSHClientSession, command.format(file), encoding=None)
            channel.write(b"x" * size)
            channel.write_eof()
            channel.close()
            await channel.wait_closed()
            for _ in range(int(200 * SLACK)):
                if size_of(file) == size:
                    break
                await asyncio.sleep(0.05)
    asyncio.run(asyncio.wait_for(run(), 40 * SLACK))
    assert size_of(file) == size


@pytest.mark.parametrize("size", [5, 100_000, 1_900_000])
def test_bytes_and_close_reach_the_program_of_a_library_that_waits_for_nothing(stack, who, file, size):
    with paramiko_client(stack, who) as client:
        channel = client.open_session()
        channel.exec_command(f"cat > {file}; echo whole >> {file}")
        channel.sendall(b"x" * size)
        channel.shutdown_write()
        channel.close()
        wait_until(lambda: size_of(file) == size + len("whole\n"), "all has arrived, and its end")


def test_the_program_of_a_client_that_does_not_even_wait_for_the_answer_runs(stack, who, file):
    with paramiko_client(stack, who) as client:
        channel = client.open_session()
        send_request(channel, b"exec", False, string(f"cat > {file}; echo end >> {file}".encode()))
        channel.sendall(b"data ")
        channel.close()
        wait_until(lambda: size_of(file) == len("data end\n"), "it ran, with what was sent")


def test_close_is_answered_when_the_program_has_ended_without_reading(stack, who):
    async def run():
        import asyncssh
        async with await stack.asyncssh(bind=who) as connection:
            channel, _ = await connection.create_session(asyncssh.SSHClientSession, "sleep 0.5", encoding=None)
            channel.write(b"x" * 1_900_000)
            channel.write_eof()
            channel.close()
            await channel.wait_closed()
            return (await connection.run("echo lives")).stdout
    assert asyncio.run(asyncio.wait_for(run(), 20 * SLACK)) == "lives\n"


def test_a_client_that_is_killed_does_not_wait_for_a_program_that_does_not_read(stack, who):
    p = stack.popen("echo up; sleep 3020", bind=who)
    with ends_them(stack, "sleep 3020"):
        p.stdin.write(b"nobody reads this")
        p.stdin.close()
        assert p.stdout.readline() == b"up\n"
        wait_until(lambda: running(stack, "sleep 3020"), "it runs")
        p.kill()
        p.wait()
        wait_until(lambda: not running(stack, "sleep 3020"), "it is hung up", 20)


# ---- fire and forget

@pytest.mark.parametrize("command", ["nohup sleep {} >/dev/null 2>&1 &", "setsid sleep {} >/dev/null 2>&1 </dev/null &"], ids=["nohup", "setsid"])
@pytest.mark.parametrize("leaves", ["closes", "disconnects"])
def test_what_makes_itself_independent_has_the_time_for_it(stack, who, command, leaves):
    names = [f"{3030 + i}.5" for i in range(6)]
    with ends_them(stack, r"(nohup |setsid )?sleep 303\d\.5"):
        for name in names:
            with paramiko_client(stack, who) as client:
                channel = client.open_session()
                channel.exec_command(command.format(name))
                channel.close()
                if leaves == "closes":
                    client.global_request("nothing@example.com", wait=True)  # answered behind it
        wait_until(lambda: len(running(stack, r"sleep 303\d\.5")) == len(names), "all of them run")
        wait_until(lambda: not stack.session_workers(), "the sessions have ended", 30)
        assert [p.command.split()[1] for p in sorted(running(stack, r"sleep 303\d\.5"), key=lambda p: p.command)] == names


# ---- what is hung up

LEFT = {"the shell has ended": "sleep 3001 & echo up", "a group of its own, by timeout": "echo up; timeout 4000 sleep 3001; echo done",
        "a group of its own, by job control": "echo up; set -m; sleep 3001 & wait",
        "a group of its own, by setpgid": "echo up; python3 -c 'import os, subprocess; subprocess.run([\"sleep\", \"3001\"], preexec_fn=os.setpgrp)'",
        "a group of its own, stopped": "echo up; set -m; sleep 3001 & wait"}


# On a terminal the session ends with its shell.
@pytest.mark.parametrize("how, tty", [(how, tty) for how in LEFT for tty in (False, True) if not (tty and how == "the shell has ended")], ids=lambda v: v if isinstance(v, str) else ["no terminal", "terminal"][v])
def test_a_client_that_is_killed_leaves_nothing_of_its_session(stack, who, how, tty):
    with ends_them(stack, "(timeout 4000 )?sleep 3001"):
        p = stack.popen(LEFT[how], bind=who, tty=tty)
        assert p.stdout.readline().strip() == b"up"
        wait_until(lambda: running(stack, "sleep 3001"), "it runs")
        if how == "the shell has ended":
            wait_until(lambda: not [x for x in stack.processes_of() if "echo up" in x.command], "its shell has ended")
        if "stopped" in how:
            os.kill(running(stack, "sleep 3001")[0].pid, signal.SIGSTOP)
        p.kill()
        p.wait()
        wait_until(lambda: not running(stack, "(timeout 4000 )?sleep 3001"), "nothing is left")
        wait_until(lambda: not stack.session_workers(), "the session has ended", 20)


def test_a_job_in_the_background_of_a_command_that_ended_runs_on(stack, who):
    with ends_them(stack, "sleep 3002"):
        assert stack.ssh("sleep 3002 >/dev/null 2>&1 </dev/null & exit 3", bind=who).code == 3
        wait_until(lambda: not stack.session_workers(), "the session has ended", 20)
        assert running(stack, "sleep 3002")


# ---- the end of the output

def test_the_end_of_the_output_does_not_wait_for_the_programs_end(stack, who):
    async def run():
        async with await stack.asyncssh(bind=who) as connection:
            process = await connection.create_process("echo x; echo y >&2; exec >&- 2>&-; read a; test $a = go && exit 5")
            read = await asyncio.wait_for(process.stdout.read(), 10 * SLACK), await process.stderr.read()
            process.stdin.write("go\n")
            result = await process.wait()
            return *read, result.exit_status
    assert asyncio.run(asyncio.wait_for(run(), 40 * SLACK)) == ("x\n", "y\n", 5)


@pytest.mark.parametrize("tty", [False, True], ids=["no terminal", "terminal"])
def test_the_status_comes_long_after_the_end_of_the_output(stack, who, tty):
    """OpenSSH's client answers EOF by CLOSE at once where its own input is over, and waits for the status."""
    r = stack.ssh("echo x; exec <&- >&- 2>&-; sleep 1.5; exit 5", bind=who, tty=tty)
    assert (r.code, r.out.strip()) == (5, b"x")


# ---- answers

def test_every_request_that_wants_an_answer_gets_sshds(stack, who):
    import paramiko
    with paramiko_client(stack, who) as client:
        channel = client.open_session()
        got = []
        client._channel_handler_table = {**paramiko.Transport._channel_handler_table, 99: lambda c, m: got.append("yes"), 100: lambda c, m: got.append("no")}
        window, eow = (b"window-change", struct.pack(">IIII", 100, 40, 0, 0)), (b"eow@openssh.com", b"")
        usr1, unknown = (b"signal", string(b"USR1")), (b"signal", string(b"FOO"))
        before = [(window, "yes"), (usr1, "no"), (unknown, "no"), (eow, "no"), ((b"env", string(b"LC_X") + string(b"x")), "yes"), ((b"signal", string(b"A" * 40)), "no"),
                  ((b"exec", string(b"trap '' USR1; echo ready; read a")), "yes")]
        after = [(usr1, "yes"), (unknown, "no"), (window, "yes"), (usr1, "yes"), ((b"nonsense", b""), "no"), (usr1, "yes"), (eow, "no"), (window, "yes")]
        for (name, payload), _ in before:
            send_request(channel, name, True, payload)
        channel.settimeout(20 * SLACK)
        assert channel.recv(100) == b"ready\n"
        for (name, payload), _ in after:
            send_request(channel, name, True, payload)
        expected = [answer for _, answer in before + after]
        wait_until(lambda: len(got) >= len(expected), "an answer to each")
        assert got == expected


def test_a_signal_to_what_the_client_did_not_choose_is_refused(stack):
    import paramiko
    with paramiko_client(stack, stack.plain_alice) as client:
        channel = client.open_session()
        got = []
        client._channel_handler_table = {**paramiko.Transport._channel_handler_table, 99: lambda c, m: got.append("yes"), 100: lambda c, m: got.append("no")}
        for name, payload in ((b"subsystem", string(b"sftp")), (b"signal", string(b"USR1"))):
            send_request(channel, name, True, payload)
        wait_until(lambda: len(got) >= 2, "an answer to each")
        assert got == ["yes", "no"]


# ---- what a client may ask for

@pytest.mark.parametrize("term, shown", [("xterm", b"[xterm]"), ("a b", b"[a b]"), ("x" * 64, b"[" + b"x" * 64 + b"]"), ("x" * 100, b"[dumb]"), ("x\ny", b"[dumb]")],
                         ids=["usual", "blank", "64", "100", "newline"])
def test_an_odd_name_of_a_terminal_does_not_cost_the_terminal(stack, who, term, shown):
    with paramiko_client(stack, who) as client:
        channel = client.open_session()
        channel.get_pty(term, 81, 25)
        channel.exec_command('echo "[$TERM]"; stty size')  # bash says dumb where there is none
        channel.settimeout(20 * SLACK)
        assert channel.makefile().read().replace(b"\r", b"").splitlines() == [shown, b"25 81"]


def test_a_long_value_of_a_variable_is_taken(stack, who):
    async def run():
        async with await stack.asyncssh(bind=who) as connection:
            return [(await connection.run("printf %s \"$POSTERN_TEST_LONG\" | wc -c", env={"POSTERN_TEST_LONG": "v" * size})).stdout.strip() for size in (20_000, 100_000)]
    assert asyncio.run(asyncio.wait_for(run(), 40 * SLACK)) == ["20000", "100000"]


def test_the_agents_socket_has_sshds_name(stack):
    with paramiko_client(stack, stack.plain_alice) as client:
        channel = client.open_session()
        channel.request_forward_agent(lambda c: None)
        channel.exec_command("echo $SSH_AUTH_SOCK")
        channel.settimeout(20 * SLACK)
        assert re.fullmatch(rb"/tmp/ssh-\w{6}/agent\.\d+\n", channel.makefile().read())
