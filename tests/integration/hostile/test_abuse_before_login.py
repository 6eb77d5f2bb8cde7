"""What a client can do to the server before it has logged in: little, for a short time, and nobody else notices."""
import contextlib
import json
import os
import pathlib
import resource
import select
import socket
import struct
import threading
import time

import pytest

import harness
from harness import QUARANTINE, SLACK, descendants, wait_until
from wire import DEBUG, IGNORE, Slow, Wire, string


def status(stack) -> dict:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(20 * SLACK)
        s.connect(str(stack.control))
        s.sendall(b'{"command": "status"}\n')
        answer = b""
        while not answer.endswith(b"\n"):
            answer += s.recv(1 << 20)
    return json.loads(answer)


def workers(stack) -> list:
    """postern-net processes that serve somebody."""
    return [p for p in descendants(stack.posternd.pid) if p.command.startswith("postern-net: ") and not p.command.startswith(("postern-net: zygote", "postern-net: warm")) and p.state != "Z"]


def nothing_left(stack) -> None:
    wait_until(lambda: (lambda s: (s["connections"], s["unauthenticated"]) == (0, 0))(status(stack)), "no connection is counted any more", 20)
    wait_until(lambda: not workers(stack), "every worker is gone", 20)


def said_to(sock: socket.socket) -> bytes:
    """All that the server says until it closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(4096):
            data += piece
    return data


def refused(stack, bind: str) -> bool:
    """The source is not served now, and is told so."""
    with stack.connect(bind) as sock:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while b"\n" not in data and (piece := sock.recv(4096)):
                data += piece
            if data.endswith(b"\n") and select.select([sock], [], [], 0.05)[0]:
                data += sock.recv(4096)
        return b"too many failed attempts from here" in data


def denied(stack, bind: str, user: str = "nobody-here") -> bytes:
    """Asks for a login that the policy does not give; what the server said."""
    with Wire(stack, bind=bind) as w:
        w.handshake()
        w.send(w.auth_none(user))
        return b"".join(w.ended())


def until_refused(stack, bind: str, offend, most: int = 100) -> int:
    """How often `offend` was done until the source was refused, which it is now."""
    since = stack.posternd.log_size()
    for n in range(most):
        if "event=penalty " in stack.posternd.log(since):
            assert refused(stack, bind)
            return n
        try:
            offend()
        except (AssertionError, ConnectionError):  # refused in the meantime
            stack.posternd.wait_log("event=penalty ", since)
    stack.posternd.wait_log("event=penalty ", since)  # clients that leave at once are ahead of the server
    assert refused(stack, bind)
    return most


# ---------------------------------------------------------------- slow, but honest

@pytest.mark.parametrize("what", ["the version line", "everything up to the login"])
def test_a_client_whose_bytes_come_one_by_one_gets_in(stack, what):
    with Wire(stack) as w:
        send = w.sock.sendall

        def dribble(data):
            for n in range(len(data)):
                send(data[n:n + 1])
                if n % 16 == 15:
                    time.sleep(0.001)  # so that they arrive one by one
            return True
        whole = w.raw
        w.raw = dribble
        w.raw(w.version + b"\r\n")
        w.server_version = w.line()
        if what == "the version line":
            w.raw = whole
        w.kexinit()
        w.exchange()
        w.send(bytes([5]) + string("ssh-userauth"))
        w.expect(6)
        w.send(w.auth_none())
        w.expect(52)


def test_noise_between_the_packets_of_a_slow_login_is_fine(stack):
    """What RFC 4253 section 11 lets a client send at any time, in the amount that one does."""
    with Wire(stack, strict=False) as w:
        w.versions()
        w.send(bytes([IGNORE]) + string(b"x" * 1000))
        w.kexinit()
        w.send(bytes([DEBUG]) + b"\0" + string("hello") + string(""))
        w.exchange()
        for _ in range(20):
            w.send(bytes([IGNORE]) + string(b"x" * 500))
        w.send(bytes([5]) + string("ssh-userauth"))
        w.expect(6)
        w.send(w.auth_none())
        w.expect(52)


# ---------------------------------------------------------------- how much may come

@pytest.fixture(scope="module")
def tight(accounts):
    made = harness.new_stack(accounts, posternd={"limits": {"bytes_before_login": "32KiB", "packets_before_login": 40}})
    made.start()
    yield made
    made.stop()


def test_too_many_packets_before_the_login_end_the_connection(tight):
    for encrypted in (False, True):
        since = tight.posternd.log_size()
        with Wire(tight, strict=False) as w:
            w.handshake() if encrypted else w.versions()
            for _ in range(60):
                w.send(bytes([IGNORE]) + string(b"x"))
            w.ended(5)
        tight.posternd.wait_log(r"event=net_note .*too many packets before the login", since)
    nothing_left(tight)


@pytest.mark.parametrize("kind", ["whole packets", "half a packet", "unknown messages", "half a KEXINIT"])
def test_too_many_bytes_before_the_login_end_the_connection(tight, kind):
    since = tight.posternd.log_size()
    with Wire(tight, strict=False) as w:
        w.versions()
        if kind == "whole packets":
            for _ in range(5):
                w.send(bytes([IGNORE]) + string(b"x" * 10_000))
        elif kind == "unknown messages":
            for _ in range(5):
                w.send(bytes([200]) + b"x" * 10_000)
        else:
            w.raw(struct.pack(">I", 200_000) + bytes([4, IGNORE if kind == "half a packet" else 20]) + bytes(40_000))
        w.ended(5)
    tight.posternd.wait_log(r"event=net_note .*too many bytes before the login", since)
    nothing_left(tight)


def test_after_the_login_no_such_limit_holds(tight):
    with Wire(tight) as w:
        w.login()
        channel = w.open()
        w.exec(channel, "wc -c")
        for _ in range(100):
            w.send(w.data(channel, b"x" * 10_000))
            w.send(bytes([IGNORE]) + string(b"x" * 1000))
        w.send(w.on(96, channel))
        w.read_until(b"1000000")


def test_every_ordinary_client_stays_far_below_the_default_limits(stack):
    """OpenSSH with the largest key exchange, six large keys and no luck with them."""
    import subprocess
    keys = []
    for n in range(6):
        path = stack.dir / f"key-{n}"
        if not path.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "3072" if n else "4096", "-N", "", "-f", path], check=True)
        keys += ["-i", str(path)]
    done = stack.ssh("echo in", bind=stack.plain_alice, options=["IdentitiesOnly=yes", "PreferredAuthentications=publickey,keyboard-interactive,password", "KexAlgorithms=sntrup761x25519-sha512@openssh.com"],
                     arguments=keys)
    assert done.text == "in\n", done
    assert "before the login" not in stack.posternd.log()


# ---------------------------------------------------------------- floods

def room_for_sockets(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            pytest.skip(f"{count} descriptors are needed, {hard} are allowed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def test_a_thousand_slow_clients_keep_nobody_out(make_stack):
    """Only that logins succeed; how quick they are is measured by bench/slow-clients."""
    room_for_sockets(2200)
    stack = make_stack(posternd={"limits": {"unauthenticated_connections": 1200, "unauthenticated_connections_per_source": 400, "login_grace_time": "120s"}, "log": {"level": "info"}})
    with Slow(stack, [stack.alice, stack.open_alice, stack.bob], 1000):
        # While they all come, and when they are there.
        for _ in range(10):
            with Wire(stack) as w:
                w.login()
        wait_until(lambda: status(stack)["unauthenticated"] == 1000, "all of them are connected", 60)
        wait_until(lambda: len(workers(stack)) == 1000, "each has its worker", 120, every=0.5)
        for _ in range(10):
            with Wire(stack) as w:
                w.login()
        assert stack.ssh("echo in", bind=stack.alice, timeout=60).text == "in\n"
        assert status(stack)["unauthenticated"] == 1000
    nothing_left(stack)
    assert "net_crashed" not in stack.posternd.log()


@pytest.mark.parametrize("stops", ["after the version", "after KEXINIT", "after ECDH_INIT"])
def test_a_flood_of_key_exchanges_that_go_nowhere_is_bounded(make_stack, stops):
    stack = make_stack(posternd={"limits": {"unauthenticated_connections": 60, "unauthenticated_connections_per_source": 30, "login_grace_time": "60s"}})
    held, turned_away = [], 0
    for n in range(150):
        w = Wire(stack, bind=stack.alice)
        try:
            assert w.versions().startswith(b"SSH-2.0-")
            if stops != "after the version":
                w.kexinit()
            if stops == "after ECDH_INIT":
                w.exchange()
            elif stops == "after the version" and select.select([w.sock], [], [], 0.05)[0] and not w.buffer and b"too many" in w.sock.recv(1000, socket.MSG_PEEK):
                raise AssertionError
            elif b"too many" in w.buffer:
                raise AssertionError
            held.append(w)
        except AssertionError:
            turned_away += 1
            w.close()
    assert len(held) == 30 and turned_away == 120
    assert len(workers(stack)) == 30
    assert status(stack)["unauthenticated"] == 30
    stack.posternd.wait_log(r"event=connection_refused .*why=unauthenticated_connections_per_source")
    with Wire(stack) as other:
        other.login()
    for w in held:
        w.close()
    nothing_left(stack)


def test_refusals_do_not_fill_the_log(make_stack):
    stack = make_stack(posternd={"limits": {"unauthenticated_connections_per_source": 1, "login_grace_time": "60s"}})
    with stack.connect(stack.alice) as held:
        assert held.recv(8) == b"SSH-2.0-"
        since = stack.posternd.log_size()
        for _ in range(500):
            with stack.connect(stack.alice) as sock:
                assert b"too many connections from here are logging in" in said_to(sock)
        lines = stack.posternd.log(since).count("event=connection_refused")
        # 100 at once, then 10 a second.
        assert 100 <= lines <= 400, lines
        assert "left_out=" in stack.posternd.log(since)
    nothing_left(stack)


@pytest.mark.parametrize("what", ["service requests", "login requests"])
def test_a_flood_before_the_login_makes_nothing_grow(stack, what):
    """At full speed: a reader that goes on for as long as there is more would never come to its limits."""
    with Wire(stack, timeout=30) as w:
        w.handshake()
        worker, = workers(stack)
        peak = lambda: int(next(line for line in pathlib.Path(f"/proc/{worker.pid}/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]) << 10
        before = after = peak()
        payload = bytes([5]) + string("ssh-userauth") if what == "service requests" else w.auth_none("nobody")
        data = memoryview(b"".join(w.packet(payload) for _ in range(400_000)))
        since = stack.posternd.log_size()
        # Without a time-out, for which Python would send in small pieces, slower than the server reads.
        w.sock.settimeout(None)
        w.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(30 * SLACK), 0))

        def send():
            with contextlib.suppress(OSError):
                w.sock.sendall(data)
        sender = threading.Thread(target=send)
        sender.start()
        with contextlib.suppress(OSError, StopIteration):  # until it has ended
            while sender.is_alive() or "net_note" not in stack.posternd.log(since):
                after = max(after, peak())
        sender.join()
        stack.posternd.wait_log(r"event=net_note .*(too many|the client|at once)", since)
        assert after - before < (8 << 20) + QUARANTINE, f"the worker grew by {(after - before) >> 20} MiB"
    nothing_left(stack)


# ---------------------------------------------------------------- sources that misbehave

PENALTIES = {"penalty_exempt": [], "penalty_auth_failed": "2s", "penalty_no_auth": "500ms", "penalty_key_scan": "200ms", "penalty_grace_exceeded": "4s", "penalty_min": "4s", "penalty_max": "5s",
             "login_grace_time": "2s"}


@pytest.fixture(scope="module")
def strict(accounts):
    def two_addresses(stack):
        stack.twin, stack.other_stranger = f"{stack.net}.5", f"{stack.net}.10"
        return stack
    made = two_addresses(harness.new_stack(accounts, posternd={"limits": PENALTIES}))
    made.write_nodes(f'[[node]]\nname = "twin"\naddresses = ["{made.twin}", "{made.net}.6"]\nuser = "bob@example.com"\n')
    made.start()
    yield made
    made.stop()


@pytest.fixture
def calm(strict):
    """Nobody is refused when a test begins."""
    for source in (strict.alice, strict.bob, strict.plain_alice, strict.stranger, strict.twin, strict.other_stranger):
        wait_until(lambda: not refused(strict, source), f"{source} may come again", 30, every=0.7)
    return strict


def test_who_is_denied_again_and_again_is_refused_for_a_while(calm):
    since = calm.posternd.log_size()
    until_refused(calm, calm.bob, lambda: denied(calm, calm.bob, calm.user))
    calm.posternd.wait_log(r"event=penalty .*why=auth_failed", since)
    calm.posternd.wait_log(r"event=connection_refused .*why=penalty", since)
    # OpenSSH's client shows why, at once.
    result = calm.ssh("true", bind=calm.bob)
    assert result.seconds < 2 * SLACK
    assert result.code == 255 and "too many failed attempts from here; try again later" in result.errors, result
    # Nobody else is.
    assert calm.ssh("echo in", bind=calm.plain_alice).text == "in\n"
    # Being refused costs nothing more, and it ends.
    wait_until(lambda: not refused(calm, calm.bob), "the penalty has run down", 10, every=0.5)
    assert b"policy does not permit" in denied(calm, calm.bob, calm.user)


def test_who_types_the_wrong_name_twice_gets_in(make_stack):
    """With the defaults, and as fast as a machine types."""
    stack = make_stack(posternd={"limits": {"penalty_exempt": []}})
    for _ in range(2):
        assert b"does not permit" in denied(stack, stack.plain_alice)
    assert stack.ssh("echo in", bind=stack.plain_alice).text == "in\n"
    assert "event=penalty" not in stack.posternd.log()


def test_who_looks_at_the_host_keys_before_each_login_gets_in(make_stack):
    """With the defaults: ssh runs KnownHostsCommand twice or more for a connection, and `postern known-hosts` looks by ssh-keyscan."""
    stack = make_stack(posternd={"limits": {"penalty_exempt": []}})
    for _ in range(40):
        with Wire(stack, bind=stack.plain_alice) as w:
            w.keys()
    assert stack.ssh("echo in", bind=stack.plain_alice).text == "in\n"
    assert "event=penalty" not in stack.posternd.log()


def test_who_logs_in_often_is_never_refused(calm):
    for _ in range(60):
        with Wire(calm) as w:
            w.login()
    assert calm.ssh("echo in", bind=calm.plain_alice).text == "in\n"


@pytest.mark.parametrize("offence", ["nothing", "a version", "rubbish", "a key exchange"])
def test_who_connects_and_never_asks_is_refused_after_a_while(calm, offence):
    def offend():
        with Wire(calm, bind=calm.alice) as w:
            if offence == "a version":
                w.versions()
            elif offence == "rubbish":
                w.raw(b"\xff" * 1000)
                said_to(w.sock)
            elif offence == "a key exchange":
                w.keys()
    since = calm.posternd.log_size()
    assert until_refused(calm, calm.alice, offend) >= 6, "a scanner on the same address is no reason"
    calm.posternd.wait_log(rf"event=penalty .*why={'key_scan' if offence == 'a key exchange' else 'no_auth'}", since)


def test_who_stays_for_the_whole_grace_time_is_refused(calm):
    since = calm.posternd.log_size()
    socks = [calm.connect(calm.alice) for _ in range(3)]
    for sock in socks:
        said_to(sock)
        sock.close()
    calm.posternd.wait_log(r"event=penalty .*why=grace_exceeded", since)
    assert refused(calm, calm.alice)


def test_a_stranger_is_told_why_before_it_is_refused(calm):
    with calm.connect(calm.stranger) as sock:
        assert b"does not know" in said_to(sock)

    def offend():
        with calm.connect(calm.stranger) as sock:
            said_to(sock)
    assert until_refused(calm, calm.stranger, offend) >= 6
    assert not refused(calm, calm.other_stranger)


def test_a_node_is_refused_at_all_its_addresses(calm):
    until_refused(calm, calm.twin, lambda: denied(calm, calm.twin, calm.user))
    assert refused(calm, f"{calm.net}.6")
    assert not refused(calm, calm.bob)  # another node of the same user


def test_the_exempt_are_never_refused(make_stack):
    stack = make_stack(posternd={"limits": {**PENALTIES, "penalty_exempt": ["192.0.2.1", "127.0.0.0/8"]}})
    for _ in range(20):
        denied(stack, stack.bob, stack.user)
        with stack.connect(stack.bob):
            pass
    assert not refused(stack, stack.bob)
    assert "event=penalty" not in stack.posternd.log()


def test_no_penalty_is_a_setting_too(make_stack):
    off = {"penalty_auth_failed": "0ms", "penalty_no_auth": "0ms", "penalty_key_scan": "0ms", "penalty_grace_exceeded": "0ms"}
    stack = make_stack(posternd={"limits": {"penalty_exempt": [], **off}})
    for _ in range(20):
        denied(stack, stack.bob, stack.user)
    assert not refused(stack, stack.bob)


def test_live_sessions_of_a_refused_source_go_on(calm):
    with Wire(calm, bind=calm.plain_alice) as w:
        w.login()
        channel = w.open()
        w.exec(channel, "cat")
        until_refused(calm, calm.plain_alice, lambda: denied(calm, calm.plain_alice))
        w.send(w.data(channel, b"still here"))
        w.read_until(b"still here")


def test_the_table_of_penalties_does_not_grow_with_who_comes(make_stack):
    """Strangers from 2,000 addresses, room for 50 in the table."""
    stack = make_stack(posternd={"limits": {**PENALTIES, "penalty_sources": 50}, "log": {"level": "error"}})
    memory = lambda: int(next(l for l in pathlib.Path(f"/proc/{stack.posternd.pid}/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1])

    def visit(n):
        with stack.connect(f"127.{10 + n // 60000}.{n // 250 % 240}.{1 + n % 250}") as sock:
            sock.shutdown(socket.SHUT_WR)
            said_to(sock)
    for n in range(300):
        visit(n)
    before = memory()
    for n in range(300, 2300):
        visit(n)
    assert memory() - before < 2048 + QUARANTINE // 1024, "posternd grows with every address"
    nothing_left(stack)
