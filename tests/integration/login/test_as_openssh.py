"""What a program finds when Postern starts it is what it finds when OpenSSH's sshd does: both run here, and every difference must be in
docs/DIFFERENCES.md, with its reason. A line there that no longer describes a difference fails, too."""
import os
import pathlib
import pwd
import re
import subprocess

import pytest

from harness import ROOT, SLACK, Terminal, new_stack
from login.sshd import Sshd

pytestmark = pytest.mark.needs_root
PROBE = pathlib.Path(__file__).with_name("probe.sh")
DIFFERENCES = ROOT / "docs/DIFFERENCES.md"


def listed() -> dict[tuple[str, str], str]:
    """The table rows `| way | what | OpenSSH | Postern | why |`; "every" stands for each way."""
    rows = {}
    for line in DIFFERENCES.read_text().splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if len(cells) == 5 and cells[0] not in ("way", "") and not set(cells[0]) <= {"-", ":"}:
            way, what, _, _, why = cells
            assert len(why) > 10, f"no reason: {line}"
            rows[way, what.strip("`")] = why
    return rows


@pytest.fixture(scope="module")
def both(accounts, tmp_path_factory):
    """A stack and sshd beside it, and a user whose home holds the probe."""
    stack = new_stack(accounts).start()
    sshd = Sshd(stack, stack.dir / "sshd")
    home = pathlib.Path(pwd.getpwnam(stack.user).pw_dir)
    (home / "probe.sh").write_text(PROBE.read_text())
    # A login shell reads this; the facts of an interactive login are written to where POSTERN_TEST_FACTS says.
    (home / ".profile").write_text('[ -z "$POSTERN_TEST_FACTS" ] || . ~/probe.sh >"$POSTERN_TEST_FACTS"\n')
    yield stack, sshd, home
    for name in ("probe.sh", ".profile"):
        (home / name).unlink()
    sshd.stop()
    stack.stop()


def parse(text: str) -> dict[str, str]:
    return dict(line.rstrip("\r").split("\t", 1) for line in text.splitlines() if "\t" in line)


def normal(key: str, value: str, stack, port: int) -> str:
    """What must differ between two connections (port numbers, terminal numbers) is made equal."""
    if key in ("env:SSH_CLIENT", "env:SSH_CONNECTION"):
        return " ".join("CLIENT_PORT" if i == 1 else "SERVER_PORT" if word == str(port) else word for i, word in enumerate(value.split()))
    if key in ("env:SSH_TTY", "tty"):
        return re.sub(r"\d+$", "N", value)
    return value


WAYS = ["command", "command with a terminal", "login shell", "login shell without a terminal"]


def facts(way: str, command_of, stack, home) -> dict[str, str]:
    full_env = stack.client_env({"POSTERN_TEST_MARK": "a b", "LANG": "C.UTF-8"})
    send = ["SendEnv=POSTERN_TEST_*", "SendEnv=LANG", "LogLevel=ERROR"]
    if way.startswith("command"):
        # As somebody types it: the shell's -c gets the text.
        command = ". ./probe.sh"
        line = command_of(command, tty=way != "command", options=send)
        if way == "command":
            done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=full_env, timeout=30 * SLACK)
            assert done.returncode == 0, done.stderr
            return parse(done.stdout)
        with Terminal(line, rows=24, cols=80, env=full_env) as t:
            assert t.wait() == 0, t.screen
            return parse(t.screen.decode())
    file = home / "facts"
    full_env["POSTERN_TEST_FACTS"] = str(file)
    line = command_of(None, tty=way == "login shell", options=send)
    if way == "login shell":
        with Terminal(line, rows=24, cols=80, env=full_env) as t:
            t.read_until(r"[$#] $")
            t.send("exit\r")
            t.wait()
    else:
        subprocess.run(line, input=b"true\n", capture_output=True, env=full_env, timeout=30 * SLACK)
    text = file.read_text()
    file.unlink()
    found = parse(text)
    found.pop("env:POSTERN_TEST_FACTS")
    return found


def compare(way, both):
    stack, sshd, home = both
    theirs = facts(way, lambda c, **kw: sshd.command(c, bind=stack.plain_alice, **kw), stack, home)
    ours = facts(way, lambda c, **kw: stack.ssh_command(c, bind=stack.plain_alice, **kw), stack, home)
    assert len(theirs) > 40, theirs
    return {key: (a, b) for key in sorted(theirs.keys() | ours.keys())
            if (a := normal(key, theirs.get(key, "(absent)"), stack, sshd.port)) != (b := normal(key, ours.get(key, "(absent)"), stack, stack.port))}


@pytest.mark.parametrize("way", WAYS)
def test_a_program_finds_what_sshd_gives_it_except_for_the_listed_differences(both, way):
    known = listed()
    found = compare(way, both)
    surprises = {k: v for k, v in found.items() if (way, k) not in known and ("every", k) not in known}
    assert not surprises, "not in docs/DIFFERENCES.md (OpenSSH, Postern):\n" + "\n".join(f"{k}: {a!r} | {b!r}" for k, (a, b) in surprises.items())
    stale = [k for (w, k) in known if w == way and k not in found]
    assert not stale, f"docs/DIFFERENCES.md lists what does not differ: {stale}"


@pytest.mark.parametrize("way", WAYS)
def test_a_recorded_program_finds_the_same_as_an_unrecorded_one(both, way):
    """Only the kind of its stdin, stdout and stderr may differ without a terminal."""
    stack, _, home = both
    plain = facts(way, lambda c, **kw: stack.ssh_command(c, bind=stack.plain_alice, **kw), stack, home)
    recorded = facts(way, lambda c, **kw: stack.ssh_command(c, bind=stack.alice, **kw), stack, home)
    for f, address, node in ((plain, stack.plain_alice, "plain-alice"), (recorded, stack.alice, "alice")):
        assert f.pop("env:POSTERN_NODE") == node
        del f["env:POSTERN_CONNECTION_ID"], f["env:POSTERN_USER"]
        for key in ("env:SSH_CLIENT", "env:SSH_CONNECTION"):
            f[key] = " ".join("CLIENT" if word == address else word for word in normal(key, f[key], stack, stack.port).split())
        for key in ("env:SSH_TTY", "tty"):
            if key in f:
                f[key] = normal(key, f[key], stack, stack.port)
    differs = {k for k in plain.keys() | recorded.keys() if plain.get(k) != recorded.get(k)}
    assert differs <= {"stdin", "stdout-of-shell", "stderr-of-shell"}, {k: (plain.get(k), recorded.get(k)) for k in differs}


def test_ids_groups_umask_and_folder_come_from_the_account_and_pam(both):
    """The comparison above could compare two wrong things: the values themselves."""
    stack, _, home = both
    r = parse(stack.ssh(". ./probe.sh", env={"POSTERN_TEST_MARK": "m"}, options=["SendEnv=POSTERN_TEST_MARK"]).text)
    entry = pwd.getpwnam(stack.user)
    assert (r["uid"], r["gid"]) == (str(entry.pw_uid), str(entry.pw_gid))
    assert r["groups"].split() == [str(g) for g in sorted(os.getgrouplist(stack.user, entry.pw_gid))] and len(r["groups"].split()) == 3
    assert r["status:Uid"].split() == [str(entry.pw_uid)] * 4 and r["status:Gid"].split() == [str(entry.pw_gid)] * 4
    assert r["umask"] == "0027"
    assert r["cwd"] == str(home)
    assert r["status:CapEff"] == r["status:CapPrm"] == r["status:CapAmb"] == "0" * 16
    assert r["env:POSTERN_PAM_MARK"] == "from-pam" and r["env:POSTERN_TEST_MARK"] == "m"
    assert r["env:USER"] == r["env:LOGNAME"] == stack.user
    assert (r["env:HOME"], r["env:SHELL"]) == (str(home), "/bin/bash")


def screen(line, stack) -> str:
    with Terminal(line, env=stack.client_env()) as t:
        t.read_until(r"[$#] $")
        t.send("exit\r")
        t.wait()
        return t.screen.decode()


def test_a_login_shell_greets_with_the_last_login_like_sshd(both):
    stack, sshd, home = both
    ours = [stack.ssh_command(None, bind=stack.plain_alice, options=["LogLevel=ERROR"]), sshd.command(None, bind=stack.plain_alice, options=["LogLevel=ERROR"])]
    screen(ours[0], stack)  # so that there is a last login
    told = []
    for line in ours:
        text = screen(line, stack)
        match = re.search(r"Last login: \w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4} from (\S+)", text)
        assert match, text
        told.append(match[1])
    assert told == [stack.plain_alice] * 2


def test_hushlogin_silences_the_greeting(both):
    stack, _, home = both
    (home / ".hushlogin").touch()
    try:
        assert "Last login" not in screen(stack.ssh_command(None, bind=stack.plain_alice), stack)
    finally:
        (home / ".hushlogin").unlink()


def test_a_command_is_not_greeted(both):
    stack, _, _ = both
    assert stack.ssh("true", tty=True, options=["LogLevel=ERROR"]).out == b""


def test_a_shell_that_cannot_be_started_ends_like_with_sshd(both, accounts):
    stack, sshd, home = both
    results = []
    for shell in ("/no/such/shell", "/bin/false", "/etc/passwd"):
        user = accounts.new_user(shell=shell)
        stack.set_policy(stack.default_policy(users=[stack.user, user]))
        # sshd sees its own copy of /etc, made before this user: only ours is run, the expected value is what sshd 9.2 does
        # (session.c do_child: perror + exit 1; auth.c allowed_user refuses a shell that does not exist or is no program).
        r = stack.ssh("true", user=user)
        if shell == "/bin/false":
            assert r.code == 1 and r.out == b""
        else:
            assert r.code in (1, 126, 127, 255) and r.out == b"", (shell, r)
    stack.set_policy(stack.default_policy())


def test_a_home_that_is_missing_leads_to_the_root_folder_like_with_sshd(both, accounts):
    stack, _, _ = both
    user = accounts.new_user()
    os.rename(pwd.getpwnam(user).pw_dir, pwd.getpwnam(user).pw_dir + ".away")
    try:
        stack.set_policy(stack.default_policy(users=[stack.user, user]))
        r = stack.ssh("pwd", user=user)
        assert r.out == b"/\n" and r.code == 0
        assert "Could not chdir to home directory" in r.errors
    finally:
        os.rename(pwd.getpwnam(user).pw_dir + ".away", pwd.getpwnam(user).pw_dir)
        stack.set_policy(stack.default_policy())


@pytest.mark.parametrize("who", ["plain_alice", "alice"])
def test_nologin_keeps_users_out_with_its_message(both, who, make_stack):
    """pam_nologin, as packaging/pam/postern has it."""
    stack = make_stack(pam="account required pam_nologin.so file={0}\naccount required pam_unix.so\nsession required pam_unix.so\n".format("/tmp/postern-tests-nologin-" + str(os.getpid())))
    note = pathlib.Path("/tmp/postern-tests-nologin-" + str(os.getpid()))
    assert stack.ssh("echo in", bind=getattr(stack, who)).text == "in\n"
    note.write_text("The system is going down for maintenance.\n")
    try:
        r = stack.ssh("echo in", bind=getattr(stack, who))
        assert r.code == 255 and r.out == b""
        assert "maintenance" in r.errors
    finally:
        note.unlink()
