"""Every client, everything it can ask for. Who cannot do what stands in drivers.py (`cannot`) and docs/CLIENTS.md."""
from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import time

import pytest

from clients import table
from clients.drivers import BUGS, CLIENTS, FEATURES, OpenSSH, OpenSSHForky, Pty
from clients.mirror import Mirror
from harness import BIN, IS_ROOT, SLACK, new_stack, rng, wait_until

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


def make(accounts, **ssh):
    # POSTERN_TEST_VERSION_STRING: the whole matrix with another [ssh] version_string.
    if version := os.environ.get("POSTERN_TEST_VERSION_STRING"):
        ssh["version_string"] = version
    made = new_stack(accounts, posternd={"limits": {"sessions_per_connection": 64}, **({"ssh": ssh} if ssh else {})})
    # plink and psftp cannot choose the address they come from: recorded, but not enforced, which would rule out forwardings.
    made.write_nodes('[[node]]\nname = "loopback"\naddresses = ["127.0.0.1"]\nuser = "open@example.com"\n')
    return made


@pytest.fixture(scope="module")
def stack(accounts):
    with make(accounts) as made:
        yield made


@pytest.fixture(scope="module")
def rekeying(accounts):
    """A server that begins a key exchange after each MiB. No client does of itself, before a GiB (paramiko: before 512 MiB)."""
    with make(accounts, rekey_bytes="1MiB") as made:
        yield made


class Rekeys:
    """Key exchanges after the first, of all connections to a server, by its log: each needs a signature of posternd's."""

    def __init__(self, stack):
        self.stack, self.since = stack, stack.posternd.log_size()

    @property
    def count(self) -> int:
        return self.stack.posternd.log(self.since).count("event=rekey ")


def verbose(client) -> dict:
    """So that OpenSSH tells of the server's key exchanges."""
    return {"options": ["LogLevel DEBUG1"]} if isinstance(client, OpenSSH) else {}


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
    # The warning of a new OpenSSH is a test of its own, below: with such a libssh it is left out here.
    more = {} if is_post_quantum() or not isinstance(client, OpenSSHForky) else {"options": ["WarnWeakCrypto=no-pq-kex"]}
    r = client.run(stack, "echo to-out; echo to-err >&2", **more)
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
    rekeys = Rekeys(stack)
    r = client.run(stack, "sha256sum", stdin=path, timeout=120)
    assert r.out.split()[:1] == [digest.encode()] and r.status == 0, r
    assert rekeys.count == 0, "nobody asked for a key exchange"


@able("down")
def test_16_mib_come_down_whole(stack, client, big, tmp_path):
    path, digest = big
    rekeys = Rekeys(stack)
    r = client.run(stack, f"cat {path}", stdout=tmp_path / "got", timeout=120)
    assert r.status == 0 and sha256(tmp_path / "got") == digest, r
    assert rekeys.count == 0, "nobody asked for a key exchange"


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


@able("server rekey up")
def test_a_server_that_rekeys_while_the_client_sends_gets_all(rekeying, client, big):
    path, digest = big
    rekeys = Rekeys(rekeying)
    r = client.run(rekeying, "sha256sum", stdin=path, timeout=120, **verbose(client))
    assert r.out.split()[:1] == [digest.encode()] and r.status == 0, r
    # Not 16: until the client answers our KEXINIT it may use up its window of 2 MiB.
    assert rekeys.count >= 5
    assert r.rekeys in (-1, rekeys.count), "the client saw each of them, where it tells"


@able("server rekey down")
def test_a_server_that_rekeys_while_the_client_receives_sends_all(rekeying, client, big, tmp_path):
    path, digest = big
    rekeys = Rekeys(rekeying)
    r = client.run(rekeying, f"cat {path}", stdout=tmp_path / "got", timeout=120, **verbose(client))
    assert r.status == 0 and sha256(tmp_path / "got") == digest, r
    assert rekeys.count >= SIZE // (1 << 20) - 2
    assert r.rekeys in (-1, rekeys.count), "the client saw each of them, where it tells"


@pytest.mark.parametrize("client", ["openssh"], indirect=True)
def test_a_recording_is_whole_though_the_server_rekeys(rekeying, client):
    rekeys = Rekeys(rekeying)
    r = client.run(rekeying, "echo recorded-and-rekeyed; seq 1 800000; cat >&2", recorded=True, stdin=__file__)
    assert rekeys.count >= 4 and r.status == 0
    assert r.out == b"recorded-and-rekeyed\n" + b"".join(b"%d\n" % i for i in range(1, 800001)) and r.err == pathlib.Path(__file__).read_bytes()
    recording = rekeying.find_recording("recorded-and-rekeyed")
    assert recording.stream("o") == r.out and recording.stream("e") == r.err


@pytest.mark.parametrize("client", ["openssh"], indirect=True)
def test_a_server_rekeys_by_time_at_the_next_packet(accounts, client):
    with make(accounts, rekey_interval="1s") as timed:
        rekeys = Rekeys(timed)
        # A line a moment, until it has happened twice: the test ends it.
        line, environment = client.command(timed, "while echo x; do sleep 0.1; done")
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment)
        timed.clients.append(process)
        wait_until(lambda: rekeys.count >= 2, "two key exchanges", 20)
        assert process.stdout.readline() == b"x\n" and process.poll() is None
        process.kill()
        process.communicate()


@pytest.mark.parametrize("cipher", ["chacha20-poly1305@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr hmac-sha2-256",
                                    "aes256-ctr hmac-sha2-512-etm@openssh.com"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_channel_data_in_the_middle_of_the_clients_key_exchange_is_taken_with_every_cipher(stack, big, cipher, way):
    """asyncssh goes on sending, as RFC 4253 section 7.1 forbids: what is taken then is found in a packet whose form depends on cipher and MAC."""
    asyncssh = CLIENTS["asyncssh"]
    if why := asyncssh.missing():
        pytest.skip(why)
    path, digest = big
    encryption, _, mac = cipher.partition(" ")
    more = {"ciphers": [encryption], **({"macs": [mac]} if mac else {}), "rekey": 2 << 20}
    r = asyncssh.run(stack, "sha256sum" if way == "up" else f"sha256sum {path}; cat", stdin=path, timeout=120, **more)
    assert r.out.split()[:1] == [digest.encode()] and r.status == 0 and r.rekeys >= 4, r


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


@able("channels")
def test_30_sessions_of_one_connection_get_all_their_output_while_the_server_rekeys(rekeying, client):
    rekeys = Rekeys(rekeying)
    r = client.channels(rekeying, 30, "echo up; read line; head -c 200000 /dev/zero | tr '\\0' x; echo got $line")
    assert not r.error, r
    assert r.results == [f"up\n{'x' * 200_000}got line {i}\n" for i in range(30)]
    assert rekeys.count >= 3


# ---------------------------------------------------------------------------------------------------- forwardings

DATA = rng("forwardings").randbytes(1 << 20)


@able("-L")
def test_connections_go_through_the_server_to_a_target(stack, client):
    with Mirror() as mirror:
        assert client.local(stack, ("127.0.0.1", mirror.port), 5, DATA) == [DATA] * 5


@able("-R")
def test_connections_to_a_port_of_the_server_come_to_the_client(stack, client):
    assert client.remote(stack, 3, DATA) == [DATA] * 3


@able("server rekey -L")
def test_forwardings_lose_nothing_while_the_server_rekeys(rekeying, client):
    rekeys = Rekeys(rekeying)
    with Mirror() as mirror:
        assert client.local(rekeying, ("127.0.0.1", mirror.port), 5, DATA) == [DATA] * 5
    assert rekeys.count >= 3
    rekeys = Rekeys(rekeying)
    assert client.remote(rekeying, 5, DATA) == [DATA] * 5
    assert rekeys.count >= 3


@pytest.fixture(scope="module")
def agent(stack, key):
    """An agent with one key: its socket, and the line that `ssh-add -L` says of it."""
    path = stack.dir / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    stack.clients.append(process)
    wait_until(path.exists, "the agent's socket")
    subprocess.run(["ssh-add", "-q", key], env=stack.client_env({"SSH_AUTH_SOCK": str(path)}), check=True)
    yield path, key.with_suffix(".pub").read_text()
    process.kill()
    process.wait(10)


@able("agent")
def test_a_program_reaches_the_agent_of_the_client(stack, client, agent):
    path, line = agent
    r = client.run(stack, "ssh-add -L && ssh-add -L", agent=path)
    assert r.out.decode() == line * 2 and r.status == 0, r


@able("agent")
def test_without_being_asked_no_agent_is_forwarded(stack, client):
    r = client.run(stack, 'echo "agent: $SSH_AUTH_SOCK"')
    assert r.out == b"agent: \n", r


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


def is_post_quantum():
    return "missing: post-quantum key exchange" not in subprocess.run([BIN / "posternd", "--version"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("client", ["openssh-forky"], indirect=True)
def test_a_new_openssh_does_not_warn_of_a_key_exchange_that_a_quantum_computer_breaks(stack, client):
    assert isinstance(client, OpenSSHForky)
    r = client.run(stack, "true", options=["LogLevel DEBUG1"])
    text = r.err.decode()
    if not is_post_quantum():
        assert r.status == 0 and "post-quantum" in text.lower(), "system-static with a libssh before 0.12: the client warns, and our version has said why"
        return
    assert r.status == 0 and "post-quantum" not in text.lower(), text
    assert "kex: algorithm: mlkem768x25519-sha256" in text or "kex: algorithm: sntrup761x25519-sha512" in text, text
    assert client.run(stack, "true").err == b"", "and says nothing at all"


# ---------------------------------------------------------------------------------------------------- the page

def test_the_page_says_what_each_client_cannot_do():
    assert table.page_is_current(), "docs/CLIENTS.md differs: /usr/bin/python3 tests/integration/clients/table.py --write"
    for c in CLIENTS.values():
        assert not set(c.cannot) - set(FEATURES) and not set(c.remarks) - set(FEATURES)
        assert not set(c.cannot) & set(c.remarks)
