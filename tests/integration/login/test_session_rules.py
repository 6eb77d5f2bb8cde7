"""Rules of our own (docs/POLICY.md): what a session may do, whoever says it - a node's capability or posternd.toml - with OpenSSH's own clients."""
import asyncio
import hashlib
import json
import os
import pwd
import re
import subprocess
import time

import pytest

from harness import BIN, SLACK, Recording, Terminal, rng, wait_until
from login.sshd import Sshd

WHO = ["alice", "plain_alice"]  # recorded and not: their bytes take different ways
QUIET = ["LogLevel=ERROR"]


def of(name: str, *rules: dict) -> dict:
    return {name: list(rules)}


def home_of(stack) -> str:
    return pwd.getpwnam(stack.user).pw_dir


def sftp(stack, batch: str, tmp_path, bind: str, program=("sftp", "-b", "{batch}", "{to}")) -> subprocess.CompletedProcess:
    """The sftp client with these commands; or scp."""
    command = [a for a in stack.ssh_command(bind=bind) if a not in ("-l", stack.user, stack.server)]
    command[command.index("-p")] = "-P"
    at = command.index("-b")
    options = command[1:at] + [f"-oBindAddress={command[at + 1]}"] + command[at + 2:]
    (tmp_path / "batch").write_text(batch)
    name, *rest = [w.format(batch=tmp_path / "batch", to=f"{stack.user}@{stack.server}") for w in program]
    return subprocess.run([name, *options, *rest], stdin=subprocess.DEVNULL, capture_output=True, timeout=60 * SLACK, env=stack.client_env())


def new_recording(stack, before: set) -> Recording:
    def look():
        return next((r for letter in "ab" for r in stack.recordings(letter) if r.finished and r.id not in before), None)
    return wait_until(look, "the recording is whole", 15)


def ids(stack) -> set:
    return {r.id for letter in "ab" for r in stack.recordings(letter)}


# ---------------------------------------------------------------------------------------------------- forced command

FORCED = """printf '%s|' "original=${SSH_ORIGINAL_COMMAND-unset}" "name=$0" "tty=$(tty)"; echo; exit 3"""


@pytest.mark.needs_root
def test_a_forced_command_finds_what_it_finds_under_sshds_force_command(make_stack):
    stack = make_stack(posternd={"session_rules": {"command": FORCED}})
    sshd = Sshd(stack, stack.dir / "sshd", f"ForceCommand {FORCED}\n")
    try:
        ways = {
            "command": dict(command="echo  'two  blanks'; $x \"q\" \\"),
            "command with a terminal": dict(command="vi /etc/passwd", tty=True),
            "shell": dict(tty=False),
            "shell with a terminal": dict(tty=True),
        }
        for way, kw in ways.items():
            seen = []
            for command_of in (sshd.command, stack.ssh_command):
                with Terminal(command_of(options=QUIET, **kw), env=stack.client_env()) as t:
                    assert t.wait() == 3, (way, t.screen)
                    seen.append(re.sub(rb"/dev/pts/\d+", b"/dev/pts/N", t.screen))
            assert seen[0] == seen[1], way
        for command_of in (sshd.command, stack.ssh_command):  # the subsystem, as sftp and scp ask for it
            line = command_of("sftp", options=QUIET)
            line.insert(line.index(stack.server), "-s")
            done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, env=stack.client_env(), timeout=30 * SLACK)
            assert done.returncode == 3
            assert done.stdout.startswith(b"original=/usr/lib/openssh/sftp-server|"), done.stdout
    finally:
        sshd.stop()


@pytest.mark.parametrize("who", WHO)
def test_a_forced_command_lets_no_sftp_or_scp_by(stack, who, tmp_path):
    (tmp_path / "up").write_text("no\n")
    target = f"{home_of(stack)}/forced-upload"
    with stack.capabilities(**of(who, {"command": "echo only this"})):
        bind = getattr(stack, who)
        assert stack.ssh("id", bind=bind).text == "only this\n"
        assert sftp(stack, f"put {tmp_path}/up {target}\n", tmp_path, bind).returncode != 0
        for old in ([], ["-O"]):
            assert sftp(stack, "", tmp_path, bind, ("scp", *old, f"{tmp_path}/up", f"{{to}}:{target}")).returncode != 0
    assert not os.path.exists(target)
    assert stack.ssh("echo free again", bind=getattr(stack, who)).text == "free again\n"


def test_two_forced_commands_that_differ_let_nobody_in(make_stack):
    stack = make_stack(posternd={"session_rules": {"command": "echo of the host"}})
    assert stack.ssh("id").text == "of the host\n"
    with stack.capabilities(alice=[{"command": "echo of the host"}], plain_alice=[{"command": "echo of the network"}]):
        assert stack.ssh("id").text == "of the host\n"
        since = stack.posternd.log_size()
        r = stack.ssh("id", bind=stack.plain_alice)
        assert r.code == 255 and r.out == b""
        assert "two rules force different commands on this login; ask the administrator" in r.errors
        assert re.search(r"event=login verdict=deny .*why=\"command_conflict\"", stack.posternd.log(since))


# ---------------------------------------------------------------------------------------------------- time

@pytest.mark.parametrize("who", WHO)
def test_the_time_of_a_connection_ends_it_and_all_it_started(stack, who):
    with stack.capabilities(**of(who, {"maxDuration": "2s"})):
        script = ("trap '' HUP TERM; nohup sleep 2001 >/dev/null 2>&1 & setsid sleep 2002 >/dev/null 2>&1 & while :; do echo busy; sleep 0.1; done")
        begin = time.monotonic()
        r = stack.ssh(script, bind=getattr(stack, who))
        assert r.code == 255 and b"busy\n" in r.out
        assert "Session timeout of 2s elapsed." in r.errors
        assert 1.9 <= time.monotonic() - begin <= 2 + 6 * SLACK
        wait_until(lambda: not [p for p in stack.processes_of() if re.match(r"sleep 200\d", p.command)], "what it started is gone", 5)


def test_a_connection_without_a_session_has_its_time_too(stack):
    with stack.capabilities(plain_alice=[{"maxDuration": "1s"}]):
        p = stack.popen(None, bind=stack.plain_alice, arguments=["-N"])
        _, errors = p.communicate(timeout=15 * SLACK)
        assert p.returncode == 255
        assert b"Session timeout of 1s elapsed." in errors


def test_the_time_is_shown_on_a_terminal(stack):
    with stack.capabilities(alice=[{"maxDuration": "1s"}]):
        with stack.terminal(bind=stack.alice) as t:
            t.read_until("Session timeout of 1s elapsed.")
            assert t.wait() == 255


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("tty", [True, False])
def test_a_session_on_which_nothing_moves_ends_and_one_that_is_used_does_not(stack, who, tty):
    bind = getattr(stack, who)
    with stack.capabilities(**of(who, {"idleTimeout": "2s"})):
        command = "while read line; do [ $line = out ] && { for i in 1 2 3 4 5 6 7 8; do sleep 0.5; echo tick; done; }; done"
        with Terminal(stack.ssh_command(command, bind=bind, tty=tty), env=stack.client_env()) as t:
            stack.terminals.append(t)
            begin = last = time.monotonic()
            while time.monotonic() - begin < 4:  # one way: typed, and (without a terminal) nothing comes back
                t.send("in\r")
                last = time.monotonic()
                t.pump(0.2)
                assert t.process.poll() is None, t.screen
            t.send("out\r")  # and the other
            for _ in range(8):
                t.read_until("tick")
                last = time.monotonic()
            t.read_until("Idle timeout of 2s elapsed.")
            assert time.monotonic() - last >= 1.9
            assert t.wait() == 255
        wait_until(lambda: not stack.processes_of(), "nothing of the user is left")


def test_keepalives_are_no_activity(stack):
    with stack.capabilities(plain_alice=[{"idleTimeout": "3s"}]):
        for arguments in (["-N"], []):
            p = stack.popen(None if arguments else "sleep 60", bind=stack.plain_alice, options=["ServerAliveInterval=1"], arguments=arguments)
            begin = time.monotonic()
            _, errors = p.communicate(timeout=20 * SLACK)
            assert p.returncode == 255 and b"Idle timeout of 3s elapsed." in errors
            assert time.monotonic() - begin >= 2.9


# ---------------------------------------------------------------------------------------------------- sessions, terminal, sftp

def test_a_connection_has_no_more_sessions_than_its_rule_says(stack):
    async def run():
        import asyncssh
        async with await stack.asyncssh(bind=stack.plain_alice) as connection:
            held = [await connection.create_process("cat") for _ in range(2)]
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.create_process("cat")
            held[0].stdin.write_eof()
            await held[0].wait()
            for _ in range(200):  # the end of a channel is ours to see a moment later
                try:
                    assert (await connection.run("echo again")).stdout == "again\n"
                    return
                except asyncssh.ChannelOpenError:
                    await asyncio.sleep(0.05)
            raise AssertionError("no session although one has ended")
    with stack.capabilities(plain_alice=[{"maxSessions": 2}]):
        asyncio.run(asyncio.wait_for(run(), 60 * SLACK))


def test_a_rule_of_no_session_refuses_all_of_them(stack):
    with stack.capabilities(plain_alice=[{"maxSessions": 0}]):
        r = stack.ssh("echo in", bind=stack.plain_alice)
        assert r.code == 255 and r.out == b""


@pytest.mark.parametrize("who", WHO)
def test_without_terminals_commands_run_and_a_terminal_is_refused(stack, who):
    with stack.capabilities(**of(who, {"pty": False})):
        r = stack.ssh("tty", bind=getattr(stack, who), tty=True)  # insists: OpenSSH's client then gives up (client_status_confirm)
        assert r.code == 255 and "PTY allocation request failed" in r.errors
        with stack.terminal(bind=getattr(stack, who)) as t:  # would like one
            t.read_until("PTY allocation request failed")
            t.send("tty; exit 5\n")
            t.read_until("not a tty")
            assert t.wait() == 5
        assert stack.ssh("echo fine", bind=getattr(stack, who)).text == "fine\n"


@pytest.mark.parametrize("who", WHO)
def test_read_only_sftp_gives_files_and_takes_none(stack, who, tmp_path):
    bind, home = getattr(stack, who), home_of(stack)
    data = rng("read-only").randbytes(100_000)
    (tmp_path / "up").write_bytes(b"no\n")
    assert stack.ssh(f"cat > {home}/given", bind=bind, input=data).code == 0
    with stack.capabilities(**of(who, {"sftp": "read-only"})):
        r = sftp(stack, f"get {home}/given {tmp_path}/down\nput {tmp_path}/up {home}/taken\n", tmp_path, bind)
        assert r.returncode != 0
        assert (tmp_path / "down").read_bytes() == data
        for change in (f"put {tmp_path}/up {home}/taken", f"rm {home}/given", f"rename {home}/given {home}/taken", f"mkdir {home}/taken", f"chmod 777 {home}/given",
                       f"symlink {home}/given {home}/taken"):
            assert sftp(stack, change + "\n", tmp_path, bind).returncode != 0, change
        # scp by its newer way is sftp, too. (Its older way is a command: docs/POLICY.md.)
        assert sftp(stack, "", tmp_path, bind, ("scp", f"{tmp_path}/up", f"{{to}}:{home}/taken")).returncode != 0
    assert not os.path.exists(f"{home}/taken") and os.path.getsize(f"{home}/given") == len(data)
    os.unlink(f"{home}/given")


@pytest.mark.parametrize("who", WHO)
def test_no_sftp_is_no_sftp(stack, who, tmp_path):
    with stack.capabilities(**of(who, {"sftp": "none"})):
        assert sftp(stack, "ls\n", tmp_path, getattr(stack, who)).returncode != 0
        assert stack.ssh("echo commands run", bind=getattr(stack, who)).text == "commands run\n"


# ---------------------------------------------------------------------------------------------------- input in the recording

def test_what_is_typed_at_a_terminal_is_recorded_where_a_rule_says_so(stack):
    before = ids(stack)
    with stack.capabilities(alice=[{"recordInput": True}]):
        with stack.terminal(bind=stack.alice, options=QUIET) as t:
            t.read_until(r"[$#] $")
            t.send("echo caf\u00e9 \u65e5\u672c\r")
            t.read_until("\u65e5\u672c\r\n".encode() + rb".*[$#] (\x1b\[K)?$")
            t.send("stty -echo; echo pass''word:; read secret; stty echo\r")
            t.read_until("password:")
            t.send("hunter2\r")
            t.read_until(r"[$#] (\x1b\[K)?$")
            t.send("echo ${#secret}; exit 4\r")
            assert t.wait() == 4
            screen = t.screen
    recording = new_recording(stack, before)
    assert recording.stream("o") == screen
    assert recording.stream("i") == "echo caf\u00e9 \u65e5\u672c\rstty -echo; echo pass''word:; read secret; stty echo\recho ${#secret}; exit 4\r".encode()
    assert b"hunter" not in recording.raw
    assert [e[2] for e in recording.events if e[1] == "m"] == ["input: not recorded while the terminal does not echo"]
    assert b"\r7\r\n" in screen
    assert recording.times() == sorted(recording.times())

    # Who plays it sees the output, not the input.
    play = lambda *more: subprocess.run([str(BIN / "postern"), "play", *more, str(recording.path)], capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    assert play("--raw").stdout == screen
    assert play("--speed", "100000").stdout == screen
    with Terminal(["/usr/bin/asciinema", "cat", str(recording.path)], env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(stack.dir), "TERM": "xterm"}) as t:
        assert t.wait() == 0, t.screen
        assert t.screen == screen


def test_what_is_sent_to_a_command_is_recorded_exactly_where_a_rule_says_so(stack):
    before = ids(stack)
    data = rng("input").randbytes(1_500_000) + "na\u00efve".encode() * 1000 + bytes(range(256))
    with stack.capabilities(alice=[{"recordInput": True}]):
        r = stack.ssh("sha256sum; echo end >&2; exit 6", input=data)
    assert r.code == 6 and r.text.split()[0] == hashlib.sha256(data).hexdigest() and r.err == b"end\n"
    recording = new_recording(stack, before)
    assert recording.stream("i") == data
    assert recording.stream("o") == r.out and recording.stream("e") == r.err


def test_what_is_typed_is_not_recorded_of_others(stack):
    before = ids(stack)
    with stack.capabilities(plain_alice=[{"recordInput": True}]):
        assert stack.ssh("cat", bind=stack.plain_alice, input=b"unseen\n").out == b"unseen\n"  # no rule records it
        assert stack.ssh("wc -c", bind=stack.alice, input=b"unseen\n").text == "7\n"
    recording = new_recording(stack, before)
    assert "i" not in recording.codes() and b"unseen" not in recording.raw


# ---------------------------------------------------------------------------------------------------- who says it

def test_the_stricter_of_network_and_host_holds(make_stack):
    stack = make_stack(posternd={"session_rules": {"max_duration": "3s", "sftp": "read-only", "pty": True}})
    with stack.capabilities(plain_alice=[{"maxDuration": "1h", "pty": False, "sftp": "full"}]):
        since = stack.posternd.log_size()
        begin = time.monotonic()
        with stack.terminal(bind=stack.plain_alice) as t:
            t.read_until("PTY allocation request failed")
            t.read_until("Session timeout of 3s elapsed.")
        assert time.monotonic() - begin >= 2.9
        assert re.search(r"verdict=accept .* session_rules=maxDuration,sftp,pty ", stack.posternd.log(since))


def test_a_rule_that_changes_ends_the_connection_and_one_that_stays_does_not(stack):
    with stack.capabilities(alice=[{"maxDuration": "1h"}], plain_alice=[{"maxDuration": "1h"}]):
        with stack.terminal(bind=stack.alice) as changed, stack.terminal(bind=stack.plain_alice) as same:
            changed.read_until(r"[$#] $")
            same.read_until(r"[$#] $")
            with stack.capabilities(alice=[{"maxDuration": "2h"}], plain_alice=[{"maxDuration": "60m", "sftp": "full"}]):  # the same in other words
                changed.read_until("Access revoked.")
                assert changed.wait() == 255
                same.send("echo still-$((1+1))\r")
                same.read_until("still-2")
                since = stack.posternd.log_size()
                with stack.capabilities(plain_alice="[{\"maxDuration\": \"60m\"},"
                                                    " {\"noSuchRule\": 1}]"):  # nobody knows what it forbids
                    same.read_until("Access revoked.")
                    assert same.wait() == 255
                    assert "noSuchRule" in stack.posternd.log(since)


@pytest.mark.parametrize("capability, named", [
    ('[{"maxDuration": "soon"}]', "maxDuration"),
    ('[{"futureRule": true}]', "futureRule"),
    ('["pty"]', "must be an object"),
    ('[{"pty": false, "pty": true}]', "pty"),
])
def test_a_capability_that_cannot_be_read_lets_its_node_in_no_more_and_says_why(stack, capability, named):
    with stack.capabilities(alice=capability):
        since = stack.posternd.log_size()
        r = stack.ssh("id")
        assert r.code == 255 and r.out == b""
        assert "this server cannot read what the network says of your sessions; ask the administrator" in r.errors
        log = stack.posternd.log(since)
        assert re.search(r"why=\"session_rules_unreadable\"", log)
        assert re.search(rf"event=session_rules_unreadable .*node=\"alice\" .*{named}", log)
        assert stack.ssh("echo in", bind=stack.plain_alice).text == "in\n", "nobody else suffers"
        checked = subprocess.run([str(BIN / "posternd"), "--config", str(stack.posternd.config), "--check-config"], capture_output=True, text=True, timeout=20 * SLACK)
        assert checked.returncode == 0 and re.search(rf"warning: .*node \"alice\" cannot log in: .*{named}", checked.stderr)
    assert stack.ssh("echo in").text == "in\n"


def test_a_capability_that_is_no_json_keeps_the_nodes_of_before(stack):
    with stack.capabilities(alice=[{"pty": False}]):
        stack.write_nodes(more={"alice": "capabilities = {\"postern.internal/cap/ssh\" = '[{]'}\n"})
        log = stack.reload()
        assert re.search(r"event=identity_problem kept=old .*nodes.toml:5:\d+: .*is no JSON", log)
        assert "PTY allocation request failed" in stack.ssh("tty", tty=True).errors, "the rule of before holds"


def test_rules_outlive_posternd_and_a_new_one_judges_by_its_own(make_stack):
    stack = make_stack(posternd={"session_rules": {"max_duration": "1h", "idle_timeout": "30m"}})
    with stack.terminal(bind=stack.plain_alice) as t:
        t.read_until(r"[$#] $")
        stack.posternd.kill()
        stack.posternd.start()
        stack.posternd.wait_log("event=session_registered")
        t.send("echo same-$((1+1))\r")
        t.read_until("same-2")
        stack.posternd.kill()
        config = stack.posternd.config
        config.write_text(config.read_text().replace('idle_timeout = "30m"', 'idle_timeout = "20m"'))
        stack.posternd.start()
        t.read_until("Access revoked.", seconds=15)
        assert t.wait() == 255


def test_the_name_of_the_capability_is_a_setting(make_stack):
    stack = make_stack(posternd={"policy": {"session_capability": "example.com/cap/shell"}})
    with stack.capabilities(plain_alice=[{"command": "echo forced"}]):  # under the default name: not ours
        assert stack.ssh("echo free", bind=stack.plain_alice).text == "free\n"
    stack.write_nodes(more={"plain-alice": "capabilities = {\"example.com/cap/shell\" = '[{\"command\": \"echo forced\"}]'}\n"})
    stack.reload()
    assert stack.ssh("echo free", bind=stack.plain_alice).text == "forced\n"


# ---------------------------------------------------------------------------------------------------- the policy file

def set_policy(stack, change) -> None:
    """Loads the default policy, changed."""
    document = json.loads(stack.default_policy().split("\n", 1)[1])
    change(document)
    since = stack.posternd.log_size()
    stack.set_policy(json.dumps(document))
    assert "event=policy_loaded" in stack.posternd.log(since)


def grant(*rules: dict) -> dict:
    return {"src": ["plain@example.com"], "dst": ["tag:server"], "app": {"postern.internal/cap/ssh": list(rules)}}


def test_a_grant_of_the_policy_file_narrows_whom_it_names_and_a_change_ends_the_session(make_stack):
    stack = make_stack()
    set_policy(stack, lambda p: p.update(grants=[grant({"command": "echo forced"})]))
    assert stack.ssh("id", bind=stack.plain_alice).text == "forced\n"
    assert stack.ssh("echo free", bind=stack.alice).text == "free\n"
    set_policy(stack, lambda p: p.update(grants=[grant({"pty": True}), grant({"maxDuration": "1h"})]))
    with stack.terminal(bind=stack.plain_alice) as t:
        t.read_until(r"[$#] $")
        set_policy(stack, lambda p: p.update(grants=[grant({"maxDuration": "1h", "pty": True})]))  # the same in other words
        t.send("echo still-$((1+1))\r")
        t.read_until("still-2")
        set_policy(stack, lambda p: p.update(grants=[grant({"maxDuration": "1h", "pty": False})]))
        t.read_until("Access revoked.")
        assert t.wait() == 255


def test_a_login_that_needs_a_check_is_told_that_this_server_cannot_ask(make_stack):
    stack = make_stack()
    set_policy(stack, lambda p: p["ssh"][2].update(action="check"))
    since = stack.posternd.log_size()
    r = stack.ssh("id", bind=stack.plain_alice)
    assert r.code == 255 and r.out == b""
    assert "this login needs a check of your identity, which this server cannot ask for yet; ask the administrator" in r.errors
    assert 'why="check_not_available"' in stack.posternd.log(since)
    assert stack.ssh("echo in", bind=stack.alice).text == "in\n"
