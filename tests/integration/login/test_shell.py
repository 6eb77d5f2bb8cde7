"""A login as a person or a script sees it, with OpenSSH's own client."""
import asyncio
import hashlib
import os
import re
import signal
import subprocess
import time

import pytest

from harness import SLACK, rng, wait_until

# The three kinds of rule: everything here holds for each of them, because a recorded session's bytes take another way.
KINDS = ["alice", "open_alice", "plain_alice"]


@pytest.fixture(params=KINDS)
def who(stack, request):
    return getattr(stack, request.param)


def test_a_pty_shows_a_prompt_and_echoes_what_is_typed(stack, who):
    with stack.terminal(bind=who) as t:
        t.read_until(r"[$#] $")
        t.send("echo a-$((40 + 2))-z\r")
        t.read_until(r"echo a-\$\(\(40 \+ 2\)\)-z\r\n")  # the terminal's echo
        t.read_until(r"a-42-z\r\n")
        t.read_until(r"[$#] $")
        t.send("exit 7\r")
        assert t.wait() == 7


def test_the_exit_status_comes_back(stack, who):
    for status in (0, 1, 7, 255):
        assert stack.ssh(f"exit {status}", bind=who).code == status
    assert stack.ssh("exit 7", bind=who, tty=True).code == 7


def test_commands_without_a_pty_have_no_terminal(stack, who):
    r = stack.ssh("tty; echo \"term=$SSH_TTY\"", bind=who)
    assert r.text == "not a tty\nterm=\n"
    assert r.err == b""


def test_a_command_with_a_pty_has_one(stack, who):
    r = stack.ssh("tty; echo $SSH_TTY; echo $TERM; test -t 0 -a -t 1 -a -t 2 && echo all", bind=who, tty=True)
    lines = r.text.replace("\r", "").splitlines()
    assert lines[0].startswith("/dev/pts/") and lines[1] == lines[0]
    assert lines[2:] == ["xterm-256color", "all"]


def test_a_program_killed_by_a_signal_makes_ssh_exit_255(stack, who):
    assert stack.ssh("kill -TERM $$", bind=who).code == 255
    assert stack.ssh("kill -TERM $$", bind=who, tty=True).code == 255


def test_a_library_client_sees_the_name_of_the_signal(stack, who):
    async def run(command):
        async with await stack.asyncssh(bind=who) as connection:
            return await connection.run(command)
    for name in ("TERM", "KILL", "USR1"):
        result = asyncio.run(run(f"kill -{name} $$"))
        assert result.exit_signal is not None, f"exit status {result.exit_status} in place of a signal"
        assert result.exit_signal[0] == name
        assert result.returncode < 0


def test_a_signal_from_the_client_reaches_the_program(stack, who):
    async def run():
        async with await stack.asyncssh(bind=who) as connection:
            process = await connection.create_process("trap 'echo got-it; exit 3' USR1; echo ready; while :; do sleep 0.05; done")
            assert (await process.stdout.readline()) == "ready\n"
            process.send_signal("USR1")
            result = await process.wait()
            return result.stdout, result.exit_status
    assert asyncio.run(asyncio.wait_for(run(), 20 * SLACK)) == ("got-it\n", 3)


def test_64_mib_through_cat_both_ways_arrive_unchanged(stack, who):
    data = rng(f"cat {who[-1]}").randbytes(64 << 20)
    r = stack.ssh("cat", input=data, bind=who, timeout=120)
    assert r.code == 0, r.errors
    assert len(r.out) == len(data)
    assert hashlib.sha256(r.out).digest() == hashlib.sha256(data).digest()


def test_keys_are_exchanged_again_in_the_middle_of_a_transfer(stack, who):
    data = rng("rekey").randbytes(24 << 20)
    r = stack.ssh("cat", input=data, bind=who, options=["RekeyLimit=4M"], timeout=120)
    assert r.code == 0, r.errors
    assert hashlib.sha256(r.out).digest() == hashlib.sha256(data).digest()


def test_an_upload_alone_and_a_download_alone_arrive_whole(stack, who):
    data = rng("upload").randbytes(16 << 20)
    r = stack.ssh("sha256sum; echo done", input=data, bind=who, timeout=60)
    assert r.text == f"{hashlib.sha256(data).hexdigest()}  -\ndone\n"
    r = stack.ssh("head -c 20000000 /dev/zero", bind=who, timeout=60)
    assert r.code == 0 and r.out == bytes(20_000_000)


def test_stdout_and_stderr_stay_apart(stack, who):
    r = stack.ssh("for i in 1 2 3; do echo out$i; echo err$i >&2; done", bind=who)
    assert r.text == "out1\nout2\nout3\n"
    assert r.errors == "err1\nerr2\nerr3\n"
    r = stack.ssh("head -c 3000000 /dev/zero >&2; head -c 2000000 /dev/zero", bind=who)
    assert (len(r.out), len(r.err)) == (2_000_000, 3_000_000)


def test_cat_ends_when_stdin_does(stack, who):
    assert stack.ssh("cat; echo after", input=b"last words", bind=who).out == b"last wordsafter\n"
    assert stack.ssh("cat; echo after", bind=who).out == b"after\n"  # /dev/null


def test_output_after_the_end_of_stdin_still_arrives(stack, who):
    r = stack.ssh("cat >/dev/null; sleep 0.3; seq 1 100000", input=b"x" * 100_000, bind=who)
    assert r.out == b"".join(b"%d\n" % i for i in range(1, 100_001))


def test_a_program_that_reads_nothing_does_not_hold_the_session(stack, who):
    r = stack.ssh("exec <&-; echo bye; exit 4", input=bytes(4 << 20), bind=who)
    assert (r.code, r.out) == (4, b"bye\n")


def test_a_program_in_the_background_that_keeps_stdout_does_not_hold_a_pty_session(stack, who):
    begin = time.monotonic()
    r = stack.ssh("sh -c 'trap \"\" HUP; exec sleep 1005' & echo up; exit 5", bind=who, tty=True)
    assert r.code == 5 and b"up" in r.out
    assert time.monotonic() - begin < 10 * SLACK
    # It ignores hang-ups, so it goes on, as with sshd; nobody but us ends it.
    for p in stack.processes_of():
        if p.command == "sleep 1005":
            os.kill(p.pid, signal.SIGKILL)


def test_a_program_on_a_terminal_goes_on_when_the_clients_output_is_closed(stack, who):
    """`ssh -t host make install | head -1`, as under sshd: OpenSSH's client says so by eow@openssh.com, and a terminal is no pipe."""
    async def run():
        async with await stack.asyncssh(bind=who) as connection:
            process = await connection.create_process("echo ready; read a; read b; sleep 0.3; test $a$b = onetwo && exit 6", term_type="xterm")
            assert (await process.stdout.readline()) == "ready\r\n"
            process.stdin.write("one\n")
            process.channel._send_request(b"eow@openssh.com")
            process.stdin.write("two\n")
            result = await process.wait()
            return result.exit_status, result.exit_signal
    assert asyncio.run(asyncio.wait_for(run(), 20 * SLACK)) == (6, None)


def prompt_after_ctrl_c(t):
    """The kernel empties the terminal's queues between the signal and the echo (n_tty.c, isig): a prompt that was quicker is gone, and Enter gives another."""
    t.read_until(r"\^C", seconds=15)
    t.send("\r")
    t.read_until(r"[$#] $")


def test_ctrl_c_interrupts_the_program_not_the_shell(stack, who):
    with stack.terminal(bind=who) as t:
        t.read_until(r"[$#] $")
        t.send("sleep 1000; echo st=$?.\r")
        wait_until(lambda: [t.pump(), any(p.command == "sleep 1000" for p in stack.processes_of())][1], "sleep runs")
        t.send("\x03")
        # bash gives the whole list up at SIGINT; the prompt comes back.
        prompt_after_ctrl_c(t)
        t.send("echo alive-$((1+1))\r")
        t.read_until(r"alive-2\r\n")
        assert not any(p.command == "sleep 1000" for p in stack.processes_of())
        t.send("exit\r")
        t.wait()


def test_ctrl_c_gets_through_a_flood_of_output(stack, who):
    with stack.terminal(bind=who) as t:
        t.read_until(r"[$#] $")
        t.send("yes postern\r")
        t.read_until(r"(postern\r\n){1000}")
        t.send("\x03")
        prompt_after_ctrl_c(t)
        t.send("exit 0\r")
        t.wait(20)


def test_the_terminal_starts_with_the_clients_size_and_modes(stack, who):
    with stack.terminal("stty size; stty -a", rows=31, cols=97, tty=True, bind=who) as t:
        t.read_until(r"31 97\r\n")
        t.read_until(r"rows 31; columns 97")
        t.wait()


def test_a_new_window_size_reaches_the_program(stack, who):
    with stack.terminal(bind=who) as t:
        t.read_until(r"[$#] $")
        t.send("trap 'stty size' WINCH; echo armed\r")
        t.read_until(r"armed\r\n.*[$#] $")
        for rows, cols in ((40, 120), (10, 33)):
            t.resize(rows, cols)  # the kernel tells ssh, SIGWINCH
            # bash runs a trap after the next command; ask until the size is there.
            def shown(rows=rows, cols=cols):
                t.send("stty size\r")
                t.pump(0.2)
                return re.search(b"%d %d\r\n" % (rows, cols), t.screen)
            wait_until(shown, f"stty size says {rows} {cols}", every=0.05)
        t.send("exit\r")
        t.wait()


def test_the_program_has_stdin_stdout_stderr_and_nothing_else_open(stack, who):
    """A descriptor of ours in a user's process would be a way around the recording."""
    # The listing's own folder is one more descriptor; it leads to /proc.
    listing = "ls -l /proc/self/fd | awk 'NR>1{print $9, $11}'"
    for tty in (False, True):
        lines = stack.ssh(listing, bind=who, tty=tty).text.replace("\r", "").splitlines()
        open_ = {line.split()[0] for line in lines if "/proc/" not in line}
        assert open_ == {"0", "1", "2"}, lines
    # And in the user's shell itself, which has no folder open.
    shell = stack.ssh("ls -l /proc/$$/fd; true", bind=who).text
    numbers = set(re.findall(r" (\d+) -> ", shell))
    assert numbers == {"0", "1", "2"}, shell


def test_the_client_that_vanishes_hangs_up_its_programs(stack, who):
    home = stack.ssh("pwd", bind=who).text.strip()
    mark = f"{home}/hup-{who}"
    with stack.terminal(f"trap 'echo hup >{mark}; exit' HUP; echo armed; while :; do sleep 0.05; done", tty=True, bind=who) as t:
        t.read_until("armed")
        t.process.kill()
        wait_until(lambda: os.path.exists(mark), "the program gets SIGHUP")
    os.unlink(mark)


def test_several_sessions_share_a_connection_up_to_the_limit(make_stack):
    stack = make_stack(posternd={"limits": {"sessions_per_connection": 3}})

    async def run():
        async with await stack.asyncssh() as connection:
            held = [await connection.create_process("cat") for _ in range(3)]
            for i, p in enumerate(held):
                p.stdin.write(f"line {i}\n")
            assert [await p.stdout.readline() for p in held] == [f"line {i}\n" for i in range(3)]
            import asyncssh
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.create_process("cat")
            held[0].stdin.write_eof()
            await held[0].wait()
            last = None
            for _ in range(100):  # the end of a channel is ours to see a moment later
                try:
                    last = await connection.run("echo again")
                    break
                except asyncssh.ChannelOpenError:
                    await asyncio.sleep(0.05)
            assert last is not None and last.stdout == "again\n"
            for p in held[1:]:
                p.stdin.write_eof()
                await p.wait()
    asyncio.run(asyncio.wait_for(run(), 60 * SLACK))


def test_sftp_takes_and_gives_a_file(stack, who, tmp_path):
    data = rng("sftp").randbytes(3 << 20)
    (tmp_path / "up").write_bytes(data)
    home = stack.ssh("pwd", bind=who).text.strip()
    command = [a for a in stack.ssh_command(bind=who) if a not in ("-l", stack.user, stack.server)]
    command[command.index("-p")] = "-P"
    bind = command.index("-b")
    options = command[1:bind] + [f"-oBindAddress={command[bind + 1]}"] + command[bind + 2:]
    batch = tmp_path / "batch"
    batch.write_text(f"put {tmp_path}/up {home}/sftp-file\nget {home}/sftp-file {tmp_path}/down\nrm {home}/sftp-file\n")
    r = subprocess.run(["sftp", *options, "-b", str(batch), f"{stack.user}@{stack.server}"], stdin=subprocess.DEVNULL, capture_output=True,
                       timeout=60 * SLACK, env=stack.client_env())
    assert r.returncode == 0, r.stderr.decode()
    assert (tmp_path / "down").read_bytes() == data
    assert not os.path.exists(f"{home}/sftp-file")


def test_an_unknown_subsystem_is_refused_and_the_connection_lives(stack, who):
    async def run():
        import asyncssh
        async with await stack.asyncssh(bind=who) as connection:
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.create_process(subsystem="no-such-thing")
            return (await connection.run("echo still here")).stdout
    assert asyncio.run(asyncio.wait_for(run(), 20 * SLACK)) == "still here\n"


def test_forwarding_is_refused_where_recording_is_enforced(stack):
    """A forward would go around the recording; tests/integration/forwarding has the rest."""
    who = stack.alice

    async def run():
        import asyncssh
        async with await stack.asyncssh(bind=who) as connection:
            with pytest.raises(asyncssh.ChannelOpenError) as refused:
                await connection.open_connection("127.0.0.1", 22)
            assert refused.value.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED
            with pytest.raises((asyncssh.ChannelListenError, asyncssh.ChannelOpenError)):
                await connection.start_server(lambda *_: None, "127.0.0.1", 0)
            return (await connection.run("echo still here")).stdout
    assert asyncio.run(asyncio.wait_for(run(), 20 * SLACK)) == "still here\n"


def test_the_environment_that_the_rule_names_is_taken_and_no_other(stack, who):
    r = stack.ssh("env", bind=who, env={"POSTERN_TEST_A": "one two", "LD_PRELOAD_X": "no", "SECRET": "no"},
                  options=["SendEnv=POSTERN_TEST_A", "SendEnv=SECRET", "SetEnv=\"LD_LIBRARY_PATH=/tmp\" \"POSTERN_TEST_B=b\""])
    values = dict(line.split("=", 1) for line in r.text.splitlines() if "=" in line)
    assert values["POSTERN_TEST_A"] == "one two" and values["POSTERN_TEST_B"] == "b"
    assert "SECRET" not in values and "LD_LIBRARY_PATH" not in values


def test_a_long_command_line_arrives_whole(stack, who):
    text = "x" * 100_000
    assert stack.ssh(f"printf %s {text} | wc -c", bind=who).text.strip() == "100000"


def test_a_hundred_logins_one_after_another_leave_nothing_behind(stack, who):
    for i in range(100 if who == stack.alice else 20):
        assert stack.ssh(f"echo {i}", bind=who).text == f"{i}\n"
    wait_until(lambda: not stack.processes_of(), "no process of the user is left")
