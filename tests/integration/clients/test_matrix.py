"""Every client, everything it can ask for. Who cannot do what stands in drivers.py (`cannot`) and docs/CLIENTS.md."""
from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import time

import pytest

from clients import table
from clients.drivers import BUGS, CLIENTS, FEATURES, OpenSSHForky, Pty
from harness import IS_ROOT, SLACK, new_stack, rng, wait_until

SIZE = 16 << 20

def able(feature: str):
    """Parametrizes a test with the clients that can do it."""
    cases = []
    for name, client in CLIENTS.items():
        if client.can(feature):
            bug = BUGS.get((name, feature))
            cases.append(pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=bug)] if bug else []))
    return pytest.mark.parametrize("client", cases, indirect=True)


@pytest.fixture
def client(request):
    chosen = CLIENTS[request.param]
    if why := chosen.missing():
        pytest.skip(f"{chosen.title} is left out: {why}")
    return chosen


@pytest.fixture(scope="module")
def stack(accounts):
    # POSTERN_TEST_VERSION_STRING: the whole matrix with another [ssh] version_string.
    version = os.environ.get("POSTERN_TEST_VERSION_STRING")
    made = new_stack(accounts, posternd={"limits": {"sessions_per_connection": 64}, **({"ssh": {"version_string": version}} if version else {})})
    # plink and psftp cannot choose the address they come from.
    made.write_nodes('[[node]]\nname = "loopback"\naddresses = ["127.0.0.1"]\nuser = "alice@example.com"\n')
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def big(stack):
    """A file that the server's user may read, and its sha256."""
    path = stack.dir / "big"
    data = rng("clients").randbytes(SIZE)
    path.write_bytes(data)
    path.chmod(0o644)
    return path, hashlib.sha256(data).hexdigest()


@pytest.fixture
def home(stack):
    """A folder of the user's."""
    import pwd
    import shutil
    entry = pwd.getpwnam(stack.user)
    path = stack.dir / "work"
    path.mkdir(mode=0o755)
    if IS_ROOT:
        os.chown(path, entry.pw_uid, entry.pw_gid)
    yield path
    shutil.rmtree(path)


def sha256(path) -> str:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------- programs and their end

@able("status")
def test_a_command_ends_with_its_own_status_also_when_it_is_recorded(stack, client):
    r = client.run(stack, f"echo marker-{client.name}; exit 37", recorded=True)
    assert (r.out, r.status) == (f"marker-{client.name}\n".encode(), 37), r
    assert stack.find_recording(f"marker-{client.name}")


@able("stderr")
def test_stderr_comes_apart_from_stdout(stack, client):
    r = client.run(stack, "echo to-out; echo to-err >&2")
    assert r.out == b"to-out\n" and r.err == b"to-err\n" and r.status == 0, r


@able("told of a signal")
def test_a_program_that_dies_of_a_signal_is_no_success(stack, client):
    r = client.run(stack, "kill -TERM $$")
    assert (r.status, r.signal) == ((client.signal_status, None) if client.signal_status else (None, "TERM")), r


@able("signal")
def test_a_signal_of_the_client_reaches_the_program(stack, client):
    r = client.run(stack, "trap 'echo caught; exit 6' USR1; echo ready; while :; do sleep 0.05; done", steps=[("expect", "ready"), ("signal", "USR1")])
    assert r.out == b"ready\ncaught\n" and r.status == 6, r


@able("eof")
def test_output_goes_on_after_the_end_of_input(stack, client, tmp_path):
    (tmp_path / "in").write_bytes(b"some\ninput\n")
    r = client.run(stack, "cat; echo after; exit 5", stdin=tmp_path / "in")
    assert r.out == b"some\ninput\nafter\n" and r.status == 5, r


@able("shell")
def test_a_shell_without_a_terminal_reads_its_commands_from_input(stack, client):
    r = client.run(stack, None, steps=[("send", "echo shell-$((40 + 2))\nexit 4\n")])
    assert b"shell-42\n" in r.out and r.status == 4, r


@able("long")
def test_a_command_line_of_100_kb_runs(stack, client):
    r = client.run(stack, ": " + "x" * 100_000 + "; echo done")
    assert r.out == b"done\n" and r.status == 0, r


@able("env")
def test_variables_that_the_policy_accepts_arrive(stack, client):
    r = client.run(stack, 'echo "$POSTERN_TEST_A|$LANG"', env={"POSTERN_TEST_A": "one", "LANG": "C.UTF-8"})
    assert r.out == b"one|C.UTF-8\n", r


# ---------------------------------------------------------------------------------------------------- bulk

@able("up")
def test_16_mib_go_up_whole(stack, client, big):
    path, digest = big
    r = client.run(stack, "sha256sum", stdin=path, timeout=120)
    assert r.out.split()[:1] == [digest.encode()] and r.status == 0, r


@able("down")
def test_16_mib_come_down_whole(stack, client, big, tmp_path):
    path, digest = big
    r = client.run(stack, f"cat {path}", stdout=tmp_path / "got", timeout=120)
    assert r.status == 0 and sha256(tmp_path / "got") == digest, r


@able("rekey up")
def test_a_client_that_rekeys_while_it_sends_loses_nothing(stack, client, big):
    path, digest = big
    r = client.run(stack, "sha256sum", stdin=path, rekey=4 << 20, timeout=120)
    assert r.out.split()[:1] == [digest.encode()] and r.status == 0, r
    assert r.rekeys >= 2, "no key exchange took place"


@able("rekey down")
def test_a_client_that_rekeys_while_it_receives_loses_nothing(stack, client, big, tmp_path):
    path, digest = big
    r = client.run(stack, f"cat {path}", stdout=tmp_path / "got", rekey=4 << 20, timeout=120)
    assert r.status == 0 and sha256(tmp_path / "got") == digest, r
    assert r.rekeys >= 2, "no key exchange took place"


@pytest.mark.parametrize("client", ["openssh"], indirect=True)
def test_a_client_that_rekeys_very_often_is_slowed_down_and_not_disconnected(stack, client, big):
    path, digest = big
    r = client.run(stack, "sha256sum", stdin=path, rekey=SIZE // 20, timeout=120)
    assert r.status == 0 and r.out.split()[:1] == [digest.encode()], r


# ---------------------------------------------------------------------------------------------------- terminals

@able("pty")
def test_the_terminal_has_the_size_and_type_of_the_clients(stack, client):
    r = client.run(stack, "stty size; echo $TERM; tty", pty=Pty(cols=111, rows=33), recorded=True)
    assert b"33 111\r\nxterm-256color\r\n/dev/pts/" in r.out and r.status == 0, r


@able("resize")
def test_a_resized_window_is_seen_by_the_program(stack, client):
    r = client.run(stack, "trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.05; done", pty=Pty(cols=80, rows=24),
                   steps=[("expect", "ready"), ("resize", 132, 50), ("expect", "50 132")])
    assert r.status == 3, r


@able("ctrl-c")
def test_ctrl_c_interrupts_the_program(stack, client):
    r = client.run(stack, "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 0.05; done", pty=Pty(),
                   steps=[("expect", "ready"), ("send", "\x03"), ("expect", "caught")])
    assert r.status == 7, r


@able("modes")
def test_the_erase_character_is_the_clients(stack, client):
    # ^H; the server's own default is ^?.
    r = client.run(stack, "stty -a", pty=Pty(verase=8))
    assert b"erase = ^H;" in r.out, r


# ---------------------------------------------------------------------------------------------------- sftp, channels

@able("sftp")
def test_a_file_goes_up_and_comes_down_by_sftp(stack, client, big, home, tmp_path):
    path, digest = big
    r = client.sftp(stack, [("put", path, home / "up"), ("get", home / "up", tmp_path / "down")])
    assert not r.error, r
    assert sha256(home / "up") == digest and sha256(tmp_path / "down") == digest
    if IS_ROOT:
        assert (home / "up").owner() == stack.user



@pytest.mark.parametrize("client", [name for name, c in CLIENTS.items() if c.can("sftp")], indirect=True)
def test_an_upload_by_sftp_does_not_crawl(stack, client, big, home):
    # 0.3 to 2 s where nothing is wrong; 9 to 28 s where it is.
    begin = time.monotonic()
    r = client.sftp(stack, [("put", big[0], home / "up")], timeout=7)
    assert not r.error and time.monotonic() - begin < 7 * SLACK, r


@able("symlink")
def test_a_symlink_made_by_sftp_points_to_its_target(stack, client, home):
    r = client.sftp(stack, [("symlink", "the-target", home / "the-link")])
    assert not r.error, r
    assert os.readlink(home / "the-link") == "the-target", os.listdir(home)


@able("channels")
def test_30_sessions_of_one_connection_run_at_once(stack, client):
    r = client.channels(stack, 30, "echo up; read line; echo got $line")
    assert not r.error, r
    assert r.results == [f"up\ngot line {i}\n" for i in range(30)]


# ---------------------------------------------------------------------------------------------------- the client goes away

@able("killed")
def test_kill_9_of_the_client_ends_what_it_ran(stack, client, home):
    process = client.start(stack, f"sleep 1001 & echo $! >{home}/started; sleep 1002")
    wait_until((home / "started").exists, "the program runs", 20)
    process.kill()
    process.wait(10 * SLACK)
    # 127.0.0.1's and everybody else's: no other test of this module runs at the same time.
    wait_until(lambda: not [p for p in stack.processes_of() if "sleep 100" in p.command], "nothing of it is left", 15)


# ---------------------------------------------------------------------------------------------------- logging in

@pytest.fixture(scope="module")
def key(stack):
    path = stack.dir / "a-key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


@able("none")
def test_the_network_is_enough_to_log_in(stack, client):
    assert client.run(stack, "id -un", auth="none").out.decode() == stack.user + "\n"


@able("password")
def test_a_client_that_begins_with_a_password_is_let_in_with_any(stack, client):
    assert client.run(stack, "id -un", auth="password", password="whatever it has").out.decode() == stack.user + "\n"


@able("empty password")
def test_a_client_that_begins_with_an_empty_password_is_let_in(stack, client):
    assert client.run(stack, "id -un", auth="password", password="").out.decode() == stack.user + "\n"


@able("key")
def test_a_client_that_begins_with_a_key_is_let_in_with_any(stack, client, key):
    assert client.run(stack, "id -un", auth="key", key=key).out.decode() == stack.user + "\n"


@pytest.mark.parametrize("client", ["openssh-forky"], indirect=True)
def test_a_new_openssh_does_not_warn_of_a_key_exchange_that_a_quantum_computer_breaks(stack, client):
    assert isinstance(client, OpenSSHForky)
    r = client.run(stack, "true", options=["LogLevel DEBUG1"])
    text = r.err.decode()
    assert r.status == 0 and "post-quantum" not in text.lower(), text
    assert "kex: algorithm: mlkem768x25519-sha256" in text or "kex: algorithm: sntrup761x25519-sha512" in text, text
    assert client.run(stack, "true").err == b"", "and says nothing at all"


# ---------------------------------------------------------------------------------------------------- the page

def test_the_page_says_what_each_client_cannot_do():
    assert table.page_is_current(), "docs/CLIENTS.md differs: /usr/bin/python3 tests/integration/clients/table.py --write"
    for c in CLIENTS.values():
        assert not set(c.cannot) - set(FEATURES) and not set(c.remarks) - set(FEATURES)
        assert not set(c.cannot) & set(c.remarks)
