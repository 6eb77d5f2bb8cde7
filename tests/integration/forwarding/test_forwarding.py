"""Port forwarding as OpenSSH's client and asyncssh use it. Everything on loopback."""
import asyncio
import contextlib
import hashlib
import os
import pathlib
import pwd
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time

import pytest

from harness import IS_ROOT, SLACK, rng, wait_until

needs_root = pytest.mark.skipif(not IS_ROOT, reason="needs root: another user is the point")


class Server:
    """Answers every connection in a thread of its own by `talk(socket)`."""

    def __init__(self, talk, family=socket.AF_INET, at=None, backlog=512):
        self.sock = socket.socket(family)
        self.sock.bind(at or ("127.0.0.1", 0))
        self.sock.listen(backlog)
        self.talk, self.seen, self.errors = talk, 0, []
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def port(self):
        return self.sock.getsockname()[1]

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.sock.accept()
                self.seen += 1
                threading.Thread(target=self._one, args=(client,), daemon=True).start()

    def _one(self, client):
        with client:
            try:
                client.settimeout(60 * SLACK)
                self.talk(client)
            except OSError as e:
                self.errors.append(e)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def read_all(sock) -> bytes:
    parts = []
    while piece := sock.recv(1 << 16):
        parts.append(piece)
    return b"".join(parts)


def echo(sock):
    while piece := sock.recv(1 << 16):
        sock.sendall(piece)


def answer_at_the_end(sock):
    """Reads to the end of file, then says what it read: only half-close gets that through."""
    got = read_all(sock)
    sock.sendall(b"%d " % len(got) + hashlib.sha256(got).hexdigest().encode())


class Master:
    """One ssh connection without a session (-N), told by its control socket what to forward."""

    def __init__(self, stack, bind, **kw):
        self.stack = stack
        self.folder = tempfile.mkdtemp(prefix="ptm-", dir="/tmp")
        self.control = f"{self.folder}/c"
        self.process = stack.popen(None, bind=bind, arguments=["-M", "-S", self.control, "-N"], **kw)
        wait_until(lambda: os.path.exists(self.control) or self.process.poll() is not None, "the connection", 20)
        assert self.process.poll() is None, self.process.stderr.read().decode()

    def order(self, what, *arguments):
        return subprocess.run(["ssh", "-F", "/dev/null", "-S", self.control, "-O", what, *arguments, self.stack.server], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30 * SLACK)

    def forward(self, *arguments) -> str:
        done = self.order("forward", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().strip()

    def local(self, target: str) -> tuple:
        """-L from a unix socket of ours, so that no port is guessed."""
        path = f"{self.folder}/l{len(os.listdir(self.folder))}"
        self.forward("-L", f"{path}:{target}")
        return path

    def close(self):
        self.process.kill()
        self.process.wait(10)
        for name in os.listdir(self.folder):
            os.unlink(f"{self.folder}/{name}")
        os.rmdir(self.folder)


@contextlib.contextmanager
def connection(stack, bind=None, **kw):
    master = Master(stack, bind or stack.plain_alice, **kw)
    try:
        yield master
    finally:
        master.close()


def dial(where) -> socket.socket:
    if isinstance(where, str):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(60 * SLACK)
        sock.connect(where)
        return sock
    return socket.create_connection(where, timeout=60 * SLACK)


def is_cut(sock) -> bool:
    """No byte comes any more: end of file or a reset."""
    try:
        return read_all(sock) == b""
    except ConnectionError:
        return True


def home_of(stack) -> pathlib.Path:
    """A folder of the user's own for sockets, short enough for sun_path."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ptf-", dir="/tmp"))
    if IS_ROOT:
        entry = pwd.getpwnam(stack.user)
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    return folder


@pytest.fixture
def folder(stack):
    made = home_of(stack)
    yield made
    for p in made.iterdir():
        p.unlink()
    made.rmdir()


def own(stack, path):
    if IS_ROOT:
        os.chown(path, pwd.getpwnam(stack.user).pw_uid, -1)


def run(coroutine, seconds=120):
    return asyncio.run(asyncio.wait_for(coroutine, seconds * SLACK))


def both_ways(sock, size=16 << 20):
    """Sends and receives `size` bytes at once through an echo and compares."""
    noise = rng("both ways").randbytes(size)
    sent = threading.Thread(target=lambda: (sock.sendall(noise), sock.shutdown(socket.SHUT_WR)), daemon=True)
    sent.start()
    got = read_all(sock)
    sent.join(10)
    assert len(got) == size and hashlib.sha256(got).digest() == hashlib.sha256(noise).digest()


# ---------------------------------------------------------------------------------------------------- -L, -D, -W

def test_local_forwarding_brings_16_MiB_through_and_back_unchanged(stack):
    with Server(echo) as server, connection(stack) as c, dial(c.local(f"127.0.0.1:{server.port}")) as sock:
        both_ways(sock)


def test_a_unix_socket_at_the_servers_side_brings_16_MiB_through_and_back_unchanged(stack, folder):
    with Server(echo, socket.AF_UNIX, f"{folder}/s") as server, connection(stack) as c:
        own(stack, f"{folder}/s")
        with dial(c.local(f"{folder}/s")) as sock:
            both_ways(sock)
        assert server.seen == 1


def test_key_exchanges_in_the_middle_lose_nothing(stack):
    with Server(echo) as server, connection(stack, options=["RekeyLimit=1M"]) as c, dial(c.local(f"127.0.0.1:{server.port}")) as sock:
        both_ways(sock, 4 << 20)


def test_each_way_is_closed_on_its_own(stack):
    with Server(answer_at_the_end) as server, connection(stack) as c, dial(c.local(f"127.0.0.1:{server.port}")) as sock:
        sock.sendall(b"x" * 3_000_000)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"3000000 " + hashlib.sha256(b"x" * 3_000_000).hexdigest().encode()


def test_a_server_that_closed_its_side_still_hears_everything(stack):
    heard = []

    def says_first(sock):
        sock.sendall(b"done talking")
        sock.shutdown(socket.SHUT_WR)
        heard.append(len(read_all(sock)))
    with Server(says_first) as server, connection(stack) as c, dial(c.local(f"127.0.0.1:{server.port}")) as sock:
        assert read_all(sock) == b"done talking"
        sock.sendall(b"y" * 5_000_000)
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: heard == [5_000_000], "the server has heard all", 20)


def test_stdio_forwarding_reaches_a_port_and_our_own_server(stack):
    with Server(answer_at_the_end) as server:
        r = stack.ssh(None, bind=stack.plain_alice, arguments=["-W", f"127.0.0.1:{server.port}"], input=b"hello")
        assert (r.code, r.out.split()[0]) == (0, b"5")
    r = stack.ssh(None, bind=stack.plain_alice, arguments=["-W", f"{stack.server}:{stack.port}"], input=b"")
    assert r.out.startswith(b"SSH-2.0-")


def test_dynamic_forwarding_serves_names_and_addresses(stack):
    with Server(echo) as server, connection(stack) as c:
        free = socket.socket()
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        c.forward("-D", f"127.0.0.1:{port}")
        for address in (b"\x01" + socket.inet_aton("127.0.0.1"), b"\x03\x09localhost"):
            with dial(("127.0.0.1", port)) as sock:
                sock.sendall(b"\5\1\0")
                assert sock.recv(2) == b"\5\0"
                sock.sendall(b"\5\1\0" + address + struct.pack(">H", server.port))
                assert sock.recv(64)[:2] == b"\5\0"
                sock.sendall(b"ping")
                assert sock.recv(4) == b"ping"


def test_a_port_where_nobody_listens_is_reported_as_such(stack):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        r = stack.ssh(None, bind=stack.plain_alice, arguments=["-W", f"127.0.0.1:{closed.getsockname()[1]}"], input=b"")
    assert r.code == 255 and "open failed: connect failed: Connection refused" in r.errors
    r = stack.ssh(None, bind=stack.plain_alice, arguments=["-W", "no-such-name.invalid:80"], input=b"")
    assert r.code == 255 and "connect failed" in r.errors


def test_a_slow_connect_holds_up_nobody_and_ends_in_time(make_stack):
    stack = make_stack(start=("relay", "posternd"), posternd={"forwarding": {"connect_timeout": "3s"}})

    async def talk(slow, fast):
        import asyncssh
        async with await stack.asyncssh(bind=stack.plain_alice) as c:
            stuck = [asyncio.ensure_future(c.open_connection("127.0.0.1", slow)) for _ in range(20)]
            begin = time.monotonic()
            for _ in range(10):
                reader, writer = await c.open_connection("127.0.0.1", fast)
                writer.write(b"ping")
                assert await reader.readexactly(4) == b"ping"
            quick = time.monotonic() - begin
            assert not any(s.done() for s in stuck)
            for s in stuck:
                with pytest.raises(asyncssh.ChannelOpenError) as e:
                    await s
                assert e.value.code == asyncssh.OPEN_CONNECT_FAILED and "timed out" in e.value.reason
            return quick, time.monotonic() - begin
    # A full backlog: the kernel drops further SYNs, and connect(2) waits.
    with socket.socket() as full, Server(echo) as server, contextlib.ExitStack() as held:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            filler = held.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(full.getsockname())
        quick, whole = run(talk(full.getsockname()[1], server.port))
    assert quick < 2.5 * SLACK and whole < 10 * SLACK


# ---------------------------------------------------------------------------------------------------- -R

def reached(c, port, address="127.0.0.1") -> bytes:
    with dial((address, port)) as sock:
        sock.sendall(b"question")
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def refused(port, address="127.0.0.1") -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
        return False
    except ConnectionRefusedError:
        return True


def test_remote_forwarding_of_port_0_tells_the_port_and_brings_16_MiB_both_ways(stack):
    with Server(echo) as server, connection(stack) as c:
        port = int(c.forward("-R", f"0:127.0.0.1:{server.port}"))
        with dial(("127.0.0.1", port)) as sock:
            both_ways(sock)
        assert refused(port, stack.server)  # loopback alone


def test_a_cancelled_remote_forwarding_is_gone_and_can_be_had_again(stack):
    with Server(answer_at_the_end) as server, connection(stack) as c, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        spec = f"{port}:127.0.0.1:{server.port}"
        for _ in range(2):
            c.forward("-R", spec)
            assert reached(c, port).startswith(b"8 ")
            assert c.order("cancel", "-R", spec).returncode == 0
            wait_until(lambda: refused(port), "nobody listens", 5)


def test_global_requests_are_answered_in_their_order(stack):
    """A reply names no request (RFC 4254 section 4): the quick answers must not overtake the slow ones."""
    async def talk():
        async with await stack.asyncssh(bind=stack.plain_alice) as c:
            ask = lambda i: c.forward_remote_port("", 0, "127.0.0.1", 1) if i % 2 else c._make_global_request(b"keepalive@openssh.com")
            answers = await asyncio.gather(*(ask(i) for i in range(40)))
            return [a.get_port() for a in answers[1::2]], [a[0] for a in answers[0::2]]
    ports, keepalives = run(talk())
    assert len(set(ports)) == 20 and all(ports) and len(set(keepalives)) == 1


def test_a_port_that_is_taken_is_refused_and_the_connection_lives(stack):
    with Server(echo) as server, connection(stack) as c:
        assert c.order("forward", "-R", f"127.0.0.1:{server.port}:127.0.0.1:1").returncode != 0
        assert int(c.forward("-R", f"0:127.0.0.1:{server.port}")) > 0


def test_who_asks_for_all_addresses_gets_loopback(stack):
    with Server(answer_at_the_end) as server, connection(stack) as c:
        port = int(c.forward("-R", f"0.0.0.0:0:127.0.0.1:{server.port}"))
        assert reached(c, port).startswith(b"8 ") and refused(port, stack.server)


def test_where_the_client_may_choose_the_address_it_gets_it(make_stack):
    stack = make_stack(start=("relay", "posternd"), posternd={"forwarding": {"gateway_ports": "clientspecified"}})
    with Server(answer_at_the_end) as server, connection(stack) as c:
        port = int(c.forward("-R", f"{stack.server}:0:127.0.0.1:{server.port}"))
        assert reached(c, port, stack.server).startswith(b"8 ") and refused(port, "127.0.0.1")
        port = int(c.forward("-R", f"*:0:127.0.0.1:{server.port}"))
        assert reached(c, port, stack.server).startswith(b"8 ")
        port = int(c.forward("-R", f"localhost:0:127.0.0.1:{server.port}"))
        assert refused(port, stack.server)


@needs_root
def test_a_privileged_port_is_not_the_users(stack):
    with connection(stack) as c:
        assert c.order("forward", "-R", "81:127.0.0.1:1").returncode != 0
    assert "this port is for root alone" in stack.posternd.log()


def test_the_remote_listener_ends_with_the_connection(stack):
    with Server(echo) as server:
        with connection(stack) as c:
            port = int(c.forward("-R", f"0:127.0.0.1:{server.port}"))
            assert not refused(port)
        wait_until(lambda: refused(port), "nobody listens", 10)
    wait_until(lambda: not stack.processes_of(), "no process of the user is left")


# ---------------------------------------------------------------------------------------------------- unix sockets

def test_a_remote_unix_socket_is_the_users_alone_and_goes_with_its_cancel(stack, folder):
    path = folder / "r"
    with Server(answer_at_the_end) as server, connection(stack) as c:
        c.forward("-R", f"{path}:127.0.0.1:{server.port}")
        st = path.lstat()
        assert stat.S_ISSOCK(st.st_mode) and stat.S_IMODE(st.st_mode) == 0o600 and st.st_uid == pwd.getpwnam(stack.user).pw_uid
        with dial(str(path)) as sock:
            sock.sendall(b"abc")
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock).startswith(b"3 ")
        assert c.order("cancel", "-R", f"{path}:127.0.0.1:{server.port}").returncode == 0
        wait_until(lambda: not path.exists(), "the socket is gone", 5)
        c.forward("-R", f"{path}:127.0.0.1:{server.port}")
    wait_until(lambda: not path.exists(), "the socket is gone with the connection", 10)


def test_a_file_in_the_way_of_a_remote_unix_socket_stays(stack, folder):
    path = folder / "r"
    path.write_text("mine")
    with connection(stack) as c:
        assert c.order("forward", "-R", f"{path}:127.0.0.1:1").returncode != 0
    assert path.read_text() == "mine"


def test_a_stale_socket_is_replaced_where_the_setting_says_so(make_stack):
    stack = make_stack(start=("relay", "posternd"), posternd={"forwarding": {"unlink_sockets": True}})
    folder = home_of(stack)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{folder}/r")
    own(stack, f"{folder}/r")
    with Server(answer_at_the_end) as server, connection(stack) as c:
        c.forward("-R", f"{folder}/r:127.0.0.1:{server.port}")
        assert c.order("cancel", "-R", f"{folder}/r:127.0.0.1:{server.port}").returncode == 0
        wait_until(lambda: not (folder / "r").exists(), "the socket is gone", 5)
        (folder / "r").write_text("no socket")
        assert c.order("forward", "-R", f"{folder}/r:127.0.0.1:{server.port}").returncode != 0
    (folder / "r").unlink()
    folder.rmdir()


@needs_root
def test_connections_come_from_the_user_and_reach_what_the_user_reaches(stack, folder):
    """The kernel's word: SO_PEERCRED. And a socket in another user's 0700 folder is not there for this one."""
    who = []

    def ask(sock):
        who.append(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1:])
        sock.sendall(b"hi")
    entry, other = pwd.getpwnam(stack.user), pwd.getpwnam(stack.other)
    private = pathlib.Path(tempfile.mkdtemp(prefix="pto-", dir="/tmp"))
    os.chown(private, other.pw_uid, other.pw_gid)
    with Server(ask, socket.AF_UNIX, f"{folder}/s"), Server(ask, socket.AF_UNIX, f"{private}/s"):
        os.chmod(f"{folder}/s", 0o666)
        os.chmod(f"{private}/s", 0o666)
        with connection(stack) as c:
            with dial(c.local(f"{folder}/s")) as sock:
                assert read_all(sock) == b"hi"
            assert who == [(entry.pw_uid, entry.pw_gid)]
            with dial(c.local(f"{private}/s")) as sock:
                assert is_cut(sock)
            assert c.order("forward", "-R", f"{private}/r:127.0.0.1:1").returncode != 0
            assert c.order("forward", "-R", "/root/r:127.0.0.1:1").returncode != 0
        with connection(stack, user=stack.other) as c, dial(c.local(f"{private}/s")) as sock:
            assert read_all(sock) == b"hi"
        assert who[1:] == [(other.pw_uid, other.pw_gid)]
    os.unlink(f"{private}/s")
    private.rmdir()


@needs_root
def test_the_helper_is_the_user_and_nothing_else(stack):
    """Ids, groups, capabilities, descriptors, and nobody may look into it."""
    with Server(echo) as server, connection(stack) as c, dial(c.local(f"127.0.0.1:{server.port}")) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        helper = [p for p in stack.processes_of() if "forwards of" in p.command]
        assert len(helper) == 1, stack.processes_of()
        pid = helper[0].pid
        status = dict(line.split(":\t", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
        entry = pwd.getpwnam(stack.user)
        assert status["Uid"].split() == [str(entry.pw_uid)] * 4 and status["Gid"].split() == [str(entry.pw_gid)] * 4
        assert set(map(int, status["Groups"].split())) == set(os.getgrouplist(stack.user, entry.pw_gid))
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert len([link for link in links if link.startswith("socket:")]) == 1, links
        assert not [link for link in links if link.startswith("/") and link != "/dev/null"], links
        assert os.stat(f"/proc/{pid}/mem").st_uid == 0  # undumpable (proc(5))


# ---------------------------------------------------------------------------------------------------- rules

async def open_code(c, host, port):
    """0, or the code of the refusal."""
    import asyncssh
    try:
        _, writer = await c.open_connection(host, port)
        writer.close()
        return 0
    except asyncssh.ChannelOpenError as e:
        return e.code


def test_a_rule_names_the_targets_and_others_are_prohibited(stack):
    async def talk(good, bad):
        async with await stack.asyncssh(bind=stack.plain_alice) as c:
            codes = [await open_code(c, host, port) for host, port in (("127.0.0.1", good), ("localhost", good), ("127.0.0.1", bad), ("localhost", bad), ("::1", good))]
            assert (await c.run("echo still here")).stdout == "still here\n"
            return codes
    with Server(echo) as good, Server(echo) as bad:
        with stack.capabilities(plain_alice=[{"localForward": [f"127.0.0.0/8:{good.port}"]}]):
            assert run(talk(good.port, bad.port)) == [0, 0, 1, 1, 1]
        with stack.capabilities(plain_alice=[{"localForward": [f"localhost:{good.port}", "*:1"]}, {"localForward": ["*:*"]}]):
            assert run(talk(good.port, bad.port)) == [1, 0, 1, 1, 1]  # a name is a name
        with stack.capabilities(plain_alice=[{"localForward": []}]):
            assert run(talk(good.port, bad.port)) == [1, 1, 1, 1, 1]
        assert bad.seen == 0


def test_a_rule_on_sockets_cannot_be_gone_around_by_a_link(stack, folder):
    with Server(lambda s: s.sendall(b"hi"), socket.AF_UNIX, f"{folder}/allowed.sock"), Server(echo, socket.AF_UNIX, f"{folder}/secret") as secret:
        own(stack, f"{folder}/allowed.sock")
        own(stack, f"{folder}/secret")
        os.symlink(f"{folder}/secret", f"{folder}/link.sock")
        with stack.capabilities(plain_alice=[{"localForward": [f"unix:{folder}/*.sock"], "remoteForward": [f"unix:{folder}/r*", "*:40000-49999"]}]), connection(stack) as c:
            with dial(c.local(f"{folder}/allowed.sock")) as sock:
                assert read_all(sock) == b"hi"
            for path in ("secret", "link.sock"):
                with dial(c.local(f"{folder}/{path}")) as sock:
                    assert is_cut(sock)
            assert secret.seen == 0
            assert c.order("forward", "-R", f"{folder}/other:127.0.0.1:1").returncode != 0
            c.forward("-R", f"{folder}/r1:127.0.0.1:1")
            os.symlink("/tmp", f"{folder}/rx")
            for name in ("rx/r2", "..", ".", "r3/", "rx/.."):
                assert c.order("forward", "-R", f"{folder}/{name}:127.0.0.1:1").returncode != 0
            c.order("cancel", "-R", f"{folder}/r1:127.0.0.1:1")
            wait_until(lambda: not os.path.lexists(f"{folder}/r1"), "its file is removed", 5)
            assert c.order("forward", "-R", "50001:127.0.0.1:1").returncode != 0


def test_where_recording_is_enforced_only_a_named_forwarding_is_there(stack):
    async def talk(port):
        import asyncssh
        async with await stack.asyncssh(bind=stack.alice) as c:
            code = await open_code(c, "127.0.0.1", port)
            try:
                listener = await c.forward_remote_port("", 0, "127.0.0.1", port)
                listener.close()
                remote = True
            except asyncssh.ChannelListenError:
                remote = False
            return code, remote
    with Server(echo) as server:
        assert run(talk(server.port)) == (1, False)
        with stack.capabilities(alice=[{"localForward": ["*:*"]}]):
            assert run(talk(server.port)) == (0, False)


def test_what_a_recorded_connection_forwards_is_in_the_log(stack):
    since = stack.posternd.log_size()
    with Server(answer_at_the_end) as server:
        r = stack.ssh(None, bind=stack.open_alice, arguments=["-W", f"127.0.0.1:{server.port}"], input=b"hello")
        assert r.code == 0
        stack.posternd.wait_log(rf'event=forward .*direction=local kind=tcp target="127.0.0.1:{server.port}" from_client=5 to_client={len(r.out)} ms=\d+', since)


def test_a_revocation_cuts_forwardings(stack):
    policy = stack.policy_file.read_text()
    with Server(echo) as server, connection(stack) as c, dial(c.local(f"127.0.0.1:{server.port}")) as sock:
        port = int(c.forward("-R", f"0:127.0.0.1:{server.port}"))
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        try:
            stack.set_policy(policy.replace('"plain@example.com"', '"nobody@example.com"'))
            begin = time.monotonic()
            assert is_cut(sock)
            wait_until(lambda: refused(port), "nobody listens", 5)
            assert time.monotonic() - begin < 3 * SLACK
        finally:
            stack.set_policy(policy)
    wait_until(lambda: not stack.processes_of(), "no process of the user is left")


def test_a_rule_that_comes_later_ends_the_connection(stack):
    with Server(echo) as server, connection(stack) as c, dial(c.local(f"127.0.0.1:{server.port}")) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        with stack.capabilities(plain_alice=[{"localForward": [f"127.0.0.1:{server.port}"]}]):
            assert is_cut(sock)
        assert b"Access revoked." in c.process.stderr.read()


def test_a_forwarding_that_is_named_in_spite_of_enforcement_ends_with_the_recorders(make_stack):
    stack = make_stack(posternd={"recorder": {"grace": "1s"}})
    with stack.capabilities(alice=[{"localForward": ["*:*"]}]), Server(echo) as server, connection(stack, stack.alice) as c:
        session = subprocess.Popen(["ssh", "-F", "/dev/null", "-S", c.control, stack.server, "echo started; sleep 100"], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        stack.clients.append(session)
        assert session.stdout.readline() == b"started\n"
        path = c.local(f"127.0.0.1:{server.port}")
        with dial(path) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            stack.recorder_a.kill()
            stack.recorder_b.kill()
            assert is_cut(sock)
        assert session.wait(20 * SLACK) == 254
        # And no other one; the connection itself ends soon, for net may have kept what it was given.
        with contextlib.suppress(ConnectionRefusedError, FileNotFoundError), dial(path) as sock:
            assert is_cut(sock)
        assert c.process.wait(10 * SLACK) != 0


@needs_root
def test_who_kills_the_helper_loses_its_listeners_and_gets_another_one(stack):
    with Server(echo) as server, connection(stack) as c:
        port = int(c.forward("-R", f"0:127.0.0.1:{server.port}"))
        path = c.local(f"127.0.0.1:{server.port}")
        with dial(path) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            helper = [p.pid for p in stack.processes_of() if "forwards of" in p.command]
            since = stack.posternd.log_size()
            os.kill(helper[0], 9)
            wait_until(lambda: refused(port), "nobody listens", 5)
            stack.posternd.wait_log("event=forward_helper_gone", since=since)  # what is asked of it before that is refused
            sock.sendall(b"y")
            assert sock.recv(1) == b"y"  # what was connected goes on: net has it
        with dial(path) as sock:
            sock.sendall(b"z")
            assert sock.recv(1) == b"z"


def test_bytes_of_a_forwarding_keep_a_connection_alive_that_may_not_idle(stack):
    with stack.capabilities(plain_alice=[{"idleTimeout": "2s"}]), Server(echo) as server, connection(stack) as c:
        with dial(c.local(f"127.0.0.1:{server.port}")) as sock:
            begin = time.monotonic()
            while time.monotonic() - begin < 5:
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"
                time.sleep(0.2)  # the traffic itself
            assert is_cut(sock)
        assert b"Idle timeout of 2s elapsed" in c.process.stderr.read()


def test_no_more_forwardings_than_the_limit_and_they_come_back(make_stack):
    stack = make_stack(start=("relay", "posternd"), posternd={"limits": {"forwards_per_connection": 5}})

    async def talk(port):
        async with await stack.asyncssh(bind=stack.plain_alice) as c:
            held = [await c.open_connection("127.0.0.1", port) for _ in range(5)]
            assert await open_code(c, "127.0.0.1", port) == 4
            held[0][1].close()
            await held[0][1].wait_closed()
            return await open_code(c, "127.0.0.1", port)
    with Server(echo) as server:
        assert run(talk(server.port)) == 0


# ---------------------------------------------------------------------------------------------------- many

def test_a_thousand_channels_on_one_connection_all_work_at_once(stack):
    count = 1000

    async def talk(port):
        async with await stack.asyncssh(bind=stack.plain_alice) as c:
            begin = time.monotonic()
            held = await asyncio.gather(*(c.open_connection("127.0.0.1", port) for _ in range(count)))
            opened = time.monotonic() - begin

            async def one(i, reader, writer):
                text = b"%06d" % i * 700
                writer.write(text)
                assert await reader.readexactly(len(text)) == text
                writer.write_eof()
                assert await reader.read() == b""
            await asyncio.gather(*(one(i, *h) for i, h in enumerate(held)))
            return opened, time.monotonic() - begin
    with Server(echo, backlog=2048) as server:
        opened, whole = run(talk(server.port))
        print(f"{count} channels: opened in {opened:.2f} s, all used and closed after {whole:.2f} s")
        assert server.seen == count
    stack.posternd.wait_log(r"event=forward ")
    assert stack.ssh("echo fine", bind=stack.plain_alice).text == "fine\n"


def test_what_nobody_reads_is_bounded_for_all_forwardings_together(stack, folder):
    """48 windows of 2 MiB would be 96 MiB of net's."""
    async def talk(path):
        async with await stack.asyncssh(bind=stack.plain_alice) as c:
            held = await asyncio.gather(*(c.open_unix_connection(path) for _ in range(48)))
            for _, writer in held:
                writer.write(b"x" * (3 << 20))
            lost, deadline = 0, time.monotonic() + 60 * SLACK
            while lost == 0 and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
                lost = sum(writer.channel.is_closing() or reader.at_eof() for reader, writer in held)
            await asyncio.sleep(1)
            lost = sum(writer.channel.is_closing() or reader.at_eof() for reader, writer in held)
            assert (await c.run("echo fine")).stdout == "fine\n"
            return lost
    with Server(lambda s: time.sleep(30), socket.AF_UNIX, f"{folder}/deaf") as server:
        own(stack, f"{folder}/deaf")
        lost = run(talk(f"{folder}/deaf"))
        assert 0 < lost < 40, lost


def test_a_bulk_forwarding_leaves_room_for_the_others(stack):
    async def talk(bulk, small):
        async with await stack.asyncssh(bind=stack.plain_alice) as c:
            reader, _ = await c.open_connection("127.0.0.1", bulk)
            drain = asyncio.ensure_future(reader.read(64 << 20))
            worst = 0.0
            r, w = await c.open_connection("127.0.0.1", small)
            for _ in range(30):
                begin = time.monotonic()
                w.write(b"ping")
                assert await r.readexactly(4) == b"ping"
                worst = max(worst, time.monotonic() - begin)
            drain.cancel()
            return worst

    def flood(sock):
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(b"z" * 65536)
    with Server(flood) as bulk, Server(echo) as small:
        assert run(talk(bulk.port, small.port)) < 5 * SLACK


# ---------------------------------------------------------------------------------------------------- the agent

@pytest.fixture(scope="module")
def agent():
    """A running ssh-agent with one key; the socket's path and the key's comment."""
    folder = tempfile.mkdtemp(prefix="pta-", dir="/tmp")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", f"{folder}/a"], stdout=subprocess.DEVNULL)
    wait_until(lambda: os.path.exists(f"{folder}/a"), "the agent")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "forwarded-key", "-f", f"{folder}/k"], check=True)
    subprocess.run(["ssh-add", "-q", f"{folder}/k"], check=True, env={**os.environ, "SSH_AUTH_SOCK": f"{folder}/a"}, stderr=subprocess.DEVNULL)
    yield f"{folder}/a"
    process.kill()
    process.wait(10)
    subprocess.run(["rm", "-r", folder], check=True)


LOOK = 'ssh-add -l; stat -c "%a %U %F" "$SSH_AUTH_SOCK" "$(dirname "$SSH_AUTH_SOCK")"; echo "$SSH_AUTH_SOCK"'


def with_agent(stack, agent, command, **kw):
    return stack.ssh(command, options=["IdentityAgent=SSH_AUTH_SOCK", "PubkeyAuthentication=no"], arguments=["-A"], env={"SSH_AUTH_SOCK": agent}, **kw)


def test_the_clients_agent_is_there_in_a_socket_of_the_users_that_goes_with_the_connection(stack, agent):
    r = with_agent(stack, agent, LOOK, bind=stack.plain_alice)
    lines = r.text.splitlines()
    assert "forwarded-key (ED25519)" in lines[0], r
    assert lines[1:3] == [f"600 {stack.user} socket", f"700 {stack.user} directory"]
    wait_until(lambda: not os.path.exists(os.path.dirname(lines[3])), "the folder is gone")


@pytest.mark.parametrize("who", ["alice", "ruled"])
def test_an_agent_that_a_rule_denies_is_not_there_and_the_command_runs(stack, agent, who):
    rules = {"plain_alice": [{"agentForwarding": False}]} if who == "ruled" else {}
    with stack.capabilities(**rules):
        r = with_agent(stack, agent, "echo \"in ${SSH_AUTH_SOCK:-without}\"", bind=stack.alice if who == "alice" else stack.plain_alice)
    assert r.text == "in without\n"


# ---------------------------------------------------------------------------------------------------- X11

class Display(Server):
    """An X server as far as its first packet: keeps what clients authenticate with, and says one word."""

    def __init__(self):
        self.hellos = []
        super().__init__(self._hello)

    def _hello(self, sock):
        self.hellos.append(sock.recv(4096))
        sock.sendall(b"welcome")

    @property
    def name(self):
        return f"127.0.0.1:{self.port - 6000}"


X_CLIENT = """python3 - <<'END'
import os, socket, struct, subprocess
display = os.environ["DISPLAY"]
host, rest = display.split(":")
number, screen = rest.split(".")
assert host == "localhost"
line = subprocess.run(["xauth", "list", "unix:" + number], capture_output=True, text=True).stdout.split()
protocol, cookie = line[1], bytes.fromhex(line[2])
pad = lambda b: b + bytes(-len(b) % 4)
s = socket.create_connection(("localhost", 6000 + int(number)))
s.sendall(struct.pack("<cxHHHHxx", b"l", 11, 0, len(protocol), len(cookie)) + pad(protocol.encode()) + pad(cookie))
print(display, s.recv(100).decode())
END
stat -c %a ~/.Xauthority"""


@pytest.mark.skipif(not os.path.exists("/usr/bin/xauth"), reason="xauth is not installed")
@pytest.mark.parametrize("allowed", [True, False])
def test_x_clients_reach_the_clients_display_with_a_cookie_of_their_own(stack, allowed):
    with Display() as display, stack.capabilities(**({} if allowed else {"plain_alice": [{"x11Forwarding": False}]})):
        r = stack.ssh(X_CLIENT if allowed else 'echo "in ${DISPLAY:-without}"', bind=stack.plain_alice, arguments=["-Y"], env={"DISPLAY": display.name})
        if not allowed:
            assert r.text == "in without\n" and not display.hellos
            return
        lines = r.text.splitlines()
        assert lines and lines[0].startswith("localhost:") and lines[0].endswith(".0 welcome"), r
        assert lines[1] == "600" and len(display.hellos) == 1
        port = 6000 + int(lines[0].split(":")[1].split(".")[0])
        wait_until(lambda: refused(port), "the display is gone", 10)


# ---------------------------------------------------------------------------------------------------- waiting

def cpu_of(pids) -> float:
    ticks = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("what", ["idle", "server-closed-its-side", "client-closed-its-side", "client-does-not-read", "server-does-not-read"])
def test_waiting_forwardings_cost_no_processor_time(stack, what):
    from harness import descendants
    wait = threading.Event()

    def talk(sock):
        if what == "server-closed-its-side":
            sock.shutdown(socket.SHUT_WR)
        if what == "client-does-not-read":
            sock.settimeout(1)
            with contextlib.suppress(OSError):
                while True:
                    sock.sendall(b"z" * 65536)
        wait.wait(60)
    with Server(talk) as server, connection(stack) as c:
        path = c.local(f"127.0.0.1:{server.port}")
        with contextlib.ExitStack() as held:
            for _ in range(5):
                sock = held.enter_context(dial(path))
                if what == "client-closed-its-side":
                    sock.shutdown(socket.SHUT_WR)
                if what == "server-does-not-read":
                    sock.settimeout(1)
                    with contextlib.suppress(OSError):
                        while True:
                            sock.sendall(b"z" * 65536)
            wait_until(lambda: server.seen == 5, "all are connected")

            def ours():
                return [p.pid for p in descendants(stack.posternd.pid) if p.command.startswith(("postern-net: 127", "postern-session: ")) and "zygote" not in p.command]
            assert len(ours()) >= 3, ours()
            # What was sent has to settle first.
            settled = [cpu_of(ours())]
            wait_until(lambda: settled.append(cpu_of(ours())) or settled[-1] - settled[-2] < 0.02, "the queues are full", 20, every=0.5)
            before = cpu_of(ours())
            time.sleep(1.5)  # the measurement itself
            assert cpu_of(ours()) - before < 0.1
        wait.set()
