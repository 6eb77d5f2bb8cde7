"""Clients that break SSH on the wire: the connection ends or the request is refused, nothing grows, nobody else notices."""
import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import wire
from harness import QUARANTINE, SLACK, rng, wait_until
from wire import (CHACHA, CLOSE, CTR, DATA, DISCONNECT, ECDH_INIT, EM, EOF, ETM, EXTENDED_DATA, FAILURE, GCM, GLOBAL_REQUEST, IGNORE, KEXINIT, NEWKEYS, OPEN_CONFIRMATION,
                  OPEN_FAILURE, REQUEST, REQUEST_FAILURE, SERVICE_REQUEST, SUCCESS, SUITES, UNIMPLEMENTED, USERAUTH_FAILURE, USERAUTH_REQUEST, USERAUTH_SUCCESS, WINDOW_ADJUST,
                  Wire, string, strings)

suites = pytest.mark.parametrize("cipher, mac", SUITES, ids=["chacha20", "gcm", "ctr-etm", "ctr-and-mac"])
MAX_GROWTH = (8 << 20) + QUARANTINE  # of a worker's peak memory, over what it has after a login: two windows and the buffers of the socket fit


def control(stack, command: str) -> dict:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(10 * SLACK)
        s.connect(str(stack.control))
        s.sendall(json.dumps({"command": command}).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += s.recv(1 << 20)
    return json.loads(answer)


@pytest.fixture(scope="module")
def world(stack):
    """The module's network with somebody in it whom nothing of all this may reach."""
    bystander = stack.popen("cat", bind=stack.open_alice)
    bystander.stdin.write(b"hello\n")
    bystander.stdin.flush()
    assert bystander.stdout.readline() == b"hello\n"
    stack.bystander = bystander
    return stack


@pytest.fixture(autouse=True)
def unharmed(world):
    before = world.posternd.log_size()
    yield
    assert world.posternd.running
    line = f"still here {time.monotonic()}\n".encode()
    world.bystander.stdin.write(line)
    world.bystander.stdin.flush()
    assert select.select([world.bystander.stdout], [], [], 10 * SLACK)[0], "another connection hangs"
    assert world.bystander.stdout.readline() == line
    wait_until(lambda: control(world, "status")["connections"] == 1, "every other connection is gone", 10)
    log = world.posternd.log(before)
    assert "event=net_crashed" not in log and "event=session_crashed" not in log, "a worker died of a signal:\n" + log[-4000:]


def memory(pid: int, what: str = "VmHWM") -> int:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(what)


def cpu(pid: int) -> float:
    """Seconds so far; 0 of a process that is gone, which does not spin."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker(stack, w: Wire) -> int:
    """The postern-net that serves this connection."""
    mine = [c for c in control(stack, "ls")["connections"] if c["peer"].endswith(f":{w.port}")]
    assert len(mine) == 1, mine
    return mine[0]["net_pid"]


class Watched:
    """A logged-in connection and how much its worker grows."""

    def __init__(self, stack, **kw):
        self.wire = Wire(stack, **kw).login()
        self.pid = worker(stack, self.wire)
        self.before = self.peak = memory(self.pid)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wire.close()

    def grown(self) -> int:
        """At its peak so far; of a worker that has ended, as far as it was looked at."""
        with contextlib.suppress(OSError, AssertionError):
            self.peak = max(self.peak, memory(self.pid))
        return self.peak - self.before

    def check(self):
        assert self.grown() < MAX_GROWTH, f"the worker grew by {self.grown() >> 20} MiB"


def refused_or_ended(w: Wire) -> list[bytes]:
    said = w.ended()
    assert not any(p[0] in (USERAUTH_SUCCESS, OPEN_CONFIRMATION) for p in said), said
    return said


# ---------------------------------------------------------------- before the keys

HELLO = [b"", b"\n", b"\r\n\r\n", b"SSH-1.5-old\r\n", b"SSH-2.0\r\n", b"SSH-9.9-x\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
         b"SSH-2.0-" + b"x" * 5000 + b"\r\n", b"A" * 100_000, b"\0" * 1000, b"SSH-2.0-\0\0\0\r\n", b"SSH-2.0-%s%n%x\r\n" + bytes(64)]


def test_a_client_with_which_nothing_matches_is_shown_what_there_is(world):
    """Version line and KEXINIT in one segment, as they often come: the answer is the server's own KEXINIT, from which ssh makes "no matching key exchange method found"."""
    for _ in range(20):
        with Wire(world) as w:
            w.raw(w.version + b"\r\n" + w.packet(w.our_kexinit(kex="none@example.com")))
            w.server_version = w.line()
            assert b"curve25519-sha256" in w.expect(KEXINIT)
            w.ended(5)


@pytest.mark.parametrize("number", range(1, len(HELLO)))
def test_what_does_not_begin_as_ssh_ends(world, number):
    with Wire(world) as w:
        w.line()
        w.raw(HELLO[number])
        w.sock.shutdown(socket.SHUT_WR)
        w.ended(5)


EARLY = {
    "a service request": bytes([SERVICE_REQUEST]) + string("ssh-userauth"),
    "a login": None,  # needs a name
    "USERAUTH_SUCCESS": bytes([USERAUTH_SUCCESS]),
    "NEWKEYS": bytes([NEWKEYS]),
    "ECDH_INIT": bytes([ECDH_INIT]) + string(bytes(32)),
    "a key exchange's reply": bytes([31]) + string(bytes(32)) * 3,
    "a group exchange's request": bytes([34]) + struct.pack(">III", 1024, 2048, 8192),
    "a channel": bytes([90]) + string("session") + struct.pack(">III", 0, 1 << 20, 32768),
    "channel data": Wire.on(DATA, 0, string("x")),
    "a global request": bytes([GLOBAL_REQUEST]) + string("tcpip-forward") + b"\1" + string("") + bytes(4),
}


IN_TIME = {("after KEXINIT", "ECDH_INIT"), ("after the keys", "a service request"), ("after ECDH_INIT", "NEWKEYS")}


@pytest.mark.parametrize("when, what", [(when, what) for when in ("before KEXINIT", "after KEXINIT", "after ECDH_INIT", "after the keys") for what in EARLY if (when, what) not in IN_TIME])
def test_a_message_before_its_time_ends_the_connection(world, when, what):
    with Wire(world) as w:
        payload = EARLY[what] or w.auth_none()
        if when != "after the keys":
            w.versions()
        if when == "before KEXINIT":
            w.send(payload)
        elif when == "after KEXINIT":
            w.kexinit()
            w.send(payload)
        elif when == "after ECDH_INIT":
            w.kexinit()
            w.exchange(before_newkeys=payload)  # the server's NEWKEYS follows its reply at once
        else:
            w.keys()
            w.send(payload)
            if what == "a login":  # without the service request: refused or ended, never in
                w.send(w.channel_open())
        refused_or_ended(w)


@pytest.mark.parametrize("when", ["at once", "after ECDH_INIT", "after the keys", "after the service", "while the login is asked for"])
def test_a_second_KEXINIT_before_the_login_ends_the_connection(world, when):
    with Wire(world) as w:
        if when == "at once":
            w.versions()
            w.kexinit()
            w.send(w.our_kexinit())
        elif when == "after ECDH_INIT":
            w.versions()
            w.kexinit()
            w.exchange(before_newkeys=w.our_kexinit())
        else:
            w.keys() if when == "after the keys" else w.handshake()
            data = w.packet(w.auth_none()) if when.startswith("while") else b""
            w.raw(data + w.packet(w.our_kexinit()))
        said = w.ended()
        assert not any(p[0] == OPEN_CONFIRMATION for p in said)


def test_two_KEXINIT_in_a_rekey_end_the_connection(world):
    with Watched(world) as a:
        a.wire.kexinit(a.wire.our_kexinit())
        a.wire.send(a.wire.our_kexinit())
        a.wire.ended()


NAME_LISTS = {
    "nothing in common": {"kex": "none-of-these"}, "no cipher in common": {"ciphers": "aes128-cbc"}, "no host key in common": {"host_keys": "ssh-dss"},
    "empty lists": {"kex": "", "ciphers": "", "macs": ""}, "CBC with EtM": {"ciphers": "aes256-cbc,aes128-cbc", "ciphers_back": "aes256-cbc,aes128-cbc", "macs": ETM},
    "the null cipher": {"ciphers": "none", "ciphers_back": "none"}, "no MAC": {"ciphers": CTR, "macs": "none", "macs_back": "none"},
    "names with control characters": {"kex": "\x00\x01,\n"}, "20,000 names": {"kex": ",".join(f"k{i}" for i in range(20_000))}, "one name of 30 kB": {"kex": "k" * 30_000},
}


@pytest.mark.parametrize("what", NAME_LISTS)
def test_a_KEXINIT_that_cannot_be_agreed_on_ends_the_connection(world, what):
    with Wire(world) as w:
        w.versions()
        w.send(w.our_kexinit(**NAME_LISTS[what]))
        refused_or_ended(w)


@pytest.mark.parametrize("cut", [1, 16, 17, 20, 60, 100, -1, -4, -5])
def test_half_a_KEXINIT_ends_the_connection(world, cut):
    with Wire(world) as w:
        w.versions()
        ours = w.our_kexinit()
        w.send(ours[:cut])
        w.send(bytes([ECDH_INIT]) + string(bytes(32)))
        refused_or_ended(w)


POINTS = {"empty": b"", "31 bytes": b"\1" * 31, "33 bytes": b"\1" * 33, "zero": bytes(32), "one": b"\1" + bytes(31), "of low order": bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
          "100 kB": b"\1" * 100_000}


@pytest.mark.parametrize("what", POINTS)
@pytest.mark.parametrize("kex", ["curve25519-sha256", "mlkem768x25519-sha256", "sntrup761x25519-sha512"])
def test_a_key_share_that_is_none_ends_the_connection(world, what, kex):
    with Wire(world, kex=kex) as w:
        w.versions()
        w.kexinit()
        w.send(bytes([ECDH_INIT]) + string(POINTS[what]))
        said = refused_or_ended(w)
        assert not any(p[0] == wire.ECDH_REPLY for p in said)


# ---------------------------------------------------------------- Terrapin (CVE-2023-48795)

def test_strict_key_exchange_is_offered_and_what_terrapin_needs_is_not(world):
    with Wire(world) as w:
        w.versions()
        lists = [x.decode().split(",") for x in w.kexinit()]
    assert wire.STRICT_SERVER in lists[0]
    assert CHACHA in lists[2]
    assert not [c for c in lists[2] + lists[3] if "cbc" in c or c == "none" or "arcfour" in c or "3des" in c]


@suites
@pytest.mark.parametrize("kind", [IGNORE, wire.DEBUG, UNIMPLEMENTED, 200])
@pytest.mark.parametrize("when", ["before KEXINIT", "after KEXINIT", "before NEWKEYS"])
def test_with_strict_key_exchange_no_packet_can_be_slipped_in_before_the_keys(world, cipher, mac, kind, when):
    extra = {IGNORE: string("x"), wire.DEBUG: b"\0" + string("x") + string(""), UNIMPLEMENTED: bytes(4), 200: b""}[kind]
    extra = bytes([kind]) + extra
    with Wire(world, cipher=cipher, mac=mac) as w:
        w.versions()
        if when == "before KEXINIT":
            w.send(extra)
        w.kexinit()
        if when == "after KEXINIT":
            w.send(extra)
        with pytest.raises(AssertionError):
            w.exchange(before_newkeys=extra if when == "before NEWKEYS" else None)
            w.send(bytes([SERVICE_REQUEST]) + string("ssh-userauth"))
            w.expect(wire.SERVICE_ACCEPT)
        w.ended()


@suites
def test_sequence_numbers_begin_anew_with_strict_keys_and_go_on_without(world, cipher, mac):
    for strict in (True, False):
        with Wire(world, cipher=cipher, mac=mac, strict=strict) as w:
            w.login()
            channel = w.open()
            w.exec(channel, "cat")
            for n in range(3):
                w.rekey()
                w.send(w.data(channel, b"round %d." % n))
                w.read_until(b"round %d." % n)


@suites
def test_a_wrong_sequence_number_ends_the_connection(world, cipher, mac):
    """What a packet that was cut out of the stream does to all that follow."""
    with Wire(world, cipher=cipher, mac=mac) as w:
        w.handshake()
        w.packet(bytes([IGNORE]) + string("this one is never sent"))
        w.send(w.auth_none())
        refused_or_ended(w)


class Middle:
    """Between a real client and the server, in clear text until the client's NEWKEYS; `inject` and `drop` are what Terrapin does."""

    def __init__(self, stack, bind: str, inject: str | None = None, drop_first: bool = False):
        self.stack, self.bind, self.inject, self.drop_first = stack, bind, inject, drop_first
        self.listener = socket.create_server((bind, 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        client, _ = self.listener.accept()
        server = self.stack.connect(self.bind)
        for s in (client, server):
            s.settimeout((3 if self.drop_first else 20) * SLACK)  # without its beginning both would wait for the grace time
        back = threading.Thread(target=self.copy, args=(server, client), daemon=True)
        back.start()
        ignore = struct.pack(">IBB", 12, 6, IGNORE) + string(b"") + bytes(6)
        try:
            data = b""
            while b"\n" not in data:
                data += client.recv(1)
            server.sendall(data)
            while True:
                head = client.recv(5, socket.MSG_WAITALL)
                packet = head + client.recv(struct.unpack(">I", head[:4])[0] - 1, socket.MSG_WAITALL)
                if (self.inject, packet[5]) in (("before KEXINIT", KEXINIT), ("before NEWKEYS", NEWKEYS)):
                    server.sendall(ignore)
                server.sendall(packet)
                if packet[5] == NEWKEYS:
                    break
            if self.drop_first:
                client.recv(1 << 16)  # the client's first encrypted packet: its service request or EXT_INFO
            self.copy(client, server)
        except (OSError, struct.error, IndexError):
            pass
        for s in (client, server):
            s.close()
        back.join(20 * SLACK)

    @staticmethod
    def copy(one, other):
        try:
            while data := one.recv(1 << 16):
                other.sendall(data)
        except OSError:
            pass
        for s in (one, other):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()
        self.thread.join(20 * SLACK)
        assert not self.thread.is_alive()


@pytest.mark.parametrize("cipher", [CHACHA, CTR])
@pytest.mark.parametrize("inject, drop_first", [(None, False), ("before KEXINIT", False), ("before NEWKEYS", False), ("before NEWKEYS", True), (None, True)])
def test_a_man_in_the_middle_of_openssh_cannot_cut_the_beginning_off(world, cipher, inject, drop_first):
    mark = world.dir / "ran"
    mark.unlink(missing_ok=True)
    with Middle(world, world.plain_alice, inject, drop_first) as middle:
        command = world.ssh_command("echo in", bind=world.plain_alice, options=[f"Ciphers={cipher}", f"MACs={ETM}", f"HostKeyAlias=[{world.server}]:{world.port}", "ConnectTimeout=10"])
        command[command.index("-p") + 1] = str(middle.port)
        command[command.index(world.server)] = world.plain_alice
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60 * SLACK, env=world.client_env())
    honest = inject is None and not drop_first
    assert (done.returncode == 0 and done.stdout == b"in\n") == honest, done


# ---------------------------------------------------------------- packets that are none

LENGTHS = [0, 1, 2, 3, 4, 262_145, 300_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFB, 0xFFFFFFFF]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_packet_of_impossible_length_ends_the_connection(world, length):
    """In clear text, at once; encrypted at the latest when its authentication fails."""
    with Wire(world) as w:
        w.versions()
        w.raw(struct.pack(">I", length) + bytes(60))
        refused_or_ended(w)
    for cipher, mac in SUITES:
        with Wire(world, cipher=cipher, mac=mac) as w:
            w.handshake()
            w.send(w.auth_none(), length=length)
            w.raw(bytes(400))
            refused_or_ended(w)


@pytest.mark.parametrize("padding, said", [(0, None), (1, None), (3, None), (None, 255), (None, 0), (11, 40)], ids=["none", "1 byte", "3 bytes", "says 255", "says 0", "more than there is"])
def test_bad_padding_ends_the_connection(world, padding, said):
    """RFC 4253 section 6: at least four bytes of it."""
    def bad(w, payload):
        if padding is None or said is not None:
            return w.packet(payload, padding_byte=said)
        # Filled up by the payload, so that only the padding is wrong.
        size = len(payload) + padding + (1 if w.out.clear_length else 5)
        return w.packet(payload + bytes(-size % w.out.block), padding=padding)

    ignore = bytes([IGNORE]) + string(b"")
    with Wire(world) as w:
        w.versions()
        w.raw(bad(w, ignore))
        w.send(w.our_kexinit())
        refused_or_ended(w)
    for cipher, mac in SUITES:
        with Wire(world, cipher=cipher, mac=mac) as w:
            w.handshake()
            w.raw(bad(w, ignore))
            w.send(w.auth_none())
            refused_or_ended(w)
        with Wire(world, cipher=cipher, mac=mac) as w:
            w.login()
            w.raw(bad(w, ignore))
            w.send(w.channel_open())
            refused_or_ended(w)


@suites
def test_a_packet_that_does_not_fill_its_blocks_ends_the_connection(world, cipher, mac):
    for more in (1, 3, 7) if cipher == CHACHA else (1, 4, 8, 15):
        with Wire(world, cipher=cipher, mac=mac) as w:
            w.handshake()
            payload = w.auth_none()
            size = len(payload) + (1 if w.out.clear_length else 5)
            padding = w.out.block - size % w.out.block + w.out.block
            w.raw(w.packet(payload, padding=padding + more))
            w.raw(bytes(64))
            refused_or_ended(w)


@suites
def test_an_empty_packet_is_no_way_in(world, cipher, mac):
    with Wire(world, cipher=cipher, mac=mac) as w:
        w.handshake()
        for _ in range(10):
            w.send(b"")
        w.send(w.channel_open())
        refused_or_ended(w)


@suites
def test_a_flipped_bit_in_the_MAC_or_the_text_ends_the_connection(world, cipher, mac):
    for where in (-1, -16, 5, 20):
        with Wire(world, cipher=cipher, mac=mac) as w:
            w.handshake()
            data = bytearray(w.packet(w.auth_none()))
            data[where] ^= 0x10
            w.raw(bytes(data))
            w.raw(bytes(300))
            refused_or_ended(w)


# ---------------------------------------------------------------- 10,000 flipped bits

FLIPS = int(os.environ.get("POSTERN_FLIPS", "10000"))


@pytest.mark.slow
def test_every_flipped_bit_ends_the_connection_and_nothing_runs_that_was_not_sent(world):
    """One random bit of one connection each, in packets of every kind from the first encrypted one to the last: 10,000, unless POSTERN_FLIPS says
    otherwise (50 s on two cores)."""
    random = rng("flips")
    folder = world.dir / "ran"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    plan = []
    for n in range(FLIPS):
        cipher, mac = SUITES[n % len(SUITES)]
        # One in eight is a whole login: those take longest. `at` is the packet that is hit.
        plan.append((n, cipher, mac, n % 8 == 7, random.randrange(1 << 30), random.random()))
    unhurt, ran = [], set()

    def attempt(n, cipher, mac, whole, pick, where):
        with Wire(world, bind=world.plain_alice, cipher=cipher, mac=mac, timeout=30) as w:
            if not whole:
                w.keys()
                packets = [bytes([SERVICE_REQUEST]) + string("ssh-userauth"), w.auth_none(), bytes([IGNORE]) + string(b"x" * 100)]
                hit = pick % 3
            else:
                w.login()
                channel = w.open()
                packets = [w.request(channel, "env", True, string("LANG") + string("C")),
                           w.request(channel, "exec", True, string(f"touch {folder}/{n}; cat > /dev/null")),
                           w.data(channel, b"text" * 50), w.on(WINDOW_ADJUST, channel, struct.pack(">I", 1000)), w.on(EOF, channel)]
                hit = pick % 5
                if hit > 1:
                    ran.add(n)
            stream = b""
            for number, payload in enumerate(packets):
                data = bytearray(w.packet(payload))
                if number == hit:
                    bit = int(where * len(data) * 8)
                    data[bit // 8] ^= 1 << bit % 8
                stream += data
            # Where the length was hit the server waits for the rest of that packet: at most 256 KiB (libssh's MAX_PACKET_LEN).
            stream += bytes(1 << 10)
            w.raw(stream)
            said = []
            for more in (0, 1 << 18):
                if more and not w.closed:
                    w.raw(bytes(more))
                try:
                    said += w.ended(0.5 / SLACK if not more else 20)
                    break
                except AssertionError:
                    if more:
                        unhurt.append((n, cipher, mac, whole, hit, bit))
            return said

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(attempt, *one) for one in plan]:
            done.result()
    assert not unhurt, f"{len(unhurt)} of {FLIPS} connections lived on: {unhurt[:10]}"
    assert {int(p.name) for p in folder.iterdir()} <= ran, "a program ran whose packet never came whole"


# ---------------------------------------------------------------- channels

UNKNOWN = [0, 1, 5, 43, 127, 0x7FFFFFFF, 0xFFFFFFFF]


@pytest.mark.parametrize("number", UNKNOWN)
@pytest.mark.parametrize("with_channel", [False, True], ids=["no channel at all", "beside one"])
def test_messages_for_channels_that_are_not_there_do_nothing(world, number, with_channel):
    with Watched(world) as a:
        w = a.wire
        if with_channel:
            real = w.open()
            w.exec(real, "cat")
            number = number if number != real else real + 1000
        for _ in range(200):
            for kind, more in ((DATA, string(b"x" * 1000)), (EXTENDED_DATA, struct.pack(">I", 1) + string("x")), (WINDOW_ADJUST, struct.pack(">I", 1)), (EOF, b""), (CLOSE, b""),
                               (REQUEST, string("exec") + b"\1" + string("touch /tmp/never")), (SUCCESS, b""), (FAILURE, b""), (OPEN_CONFIRMATION, struct.pack(">III", 0, 1, 1)),
                               (OPEN_FAILURE, struct.pack(">I", 1) + string("") + string(""))):
                w.send(w.on(kind, number, more))
        if with_channel:
            w.send(w.data(real, b"and on"))
            try:
                w.read_until(b"and on")
            except AssertionError:
                assert w.closed
        else:
            w.sock.shutdown(socket.SHUT_WR)
            w.ended()
        if not w.closed:
            a.check()
    assert not os.path.exists("/tmp/never")


def test_two_channels_with_the_same_number_of_the_clients_are_two_channels(world):
    with Watched(world) as a:
        w = a.wire
        one, two = w.open(7), w.open(7)
        assert one != two
        for channel in (one, two):
            w.exec(channel, "cat")
        w.send(w.data(one, b"first"))
        w.read_until(b"first")
        w.send(w.data(two, b"second"))
        w.read_until(b"second")
        a.check()


@pytest.mark.parametrize("kind", [DATA, EXTENDED_DATA])
def test_more_data_than_the_window_has_is_not_kept(world, kind):
    """A program that reads nothing, and 64 MiB for it."""
    with Watched(world) as a:
        w = a.wire
        channel = w.open()
        w.exec(channel, "sleep 60")
        more = struct.pack(">I", 1) if kind == EXTENDED_DATA else b""
        w.sock.settimeout(2 * SLACK)
        packet = w.on(kind, channel, more + string(bytes(32 * 1024)))
        sent = 0
        try:
            while sent < 64 << 20 and w.send(packet):
                sent += len(packet)
                a.grown()
        except TimeoutError:
            pass  # the server does not take it any more: as good
        a.check()


@pytest.mark.parametrize("size", [32 * 1024 + 1, 200_000])
def test_data_beyond_the_largest_packet_of_the_channel_hurts_nobody(world, size):
    with Watched(world) as a:
        w = a.wire
        channel = w.open()
        w.exec(channel, "wc -c")
        for _ in range(5):
            w.send(w.data(channel, b"x" * size))
        w.send(w.on(EOF, channel))
        w.read_until(str(5 * size).encode() + b"\n") if not w.closed else None
        a.check()


def test_a_window_that_overflows_ends_the_connection(world):
    with Watched(world) as a:
        channel = a.wire.open()
        a.wire.send(a.wire.on(WINDOW_ADJUST, channel, struct.pack(">I", 0xFFFFFFFF)))
        a.wire.ended()


def test_a_window_of_nothing_and_drops_of_it_hold_the_output_back(world):
    with Watched(world) as a:
        w = a.wire
        channel = w.open(window=0)
        w.exec(channel, "yes")
        w.drain()
        got = 0
        for _ in range(200):
            w.send(w.on(WINDOW_ADJUST, channel, struct.pack(">I", 1)))
        while got < 200:
            payload = w.read()
            if payload[0] == DATA:
                got += len(payload) - 9
        assert got == 200
        assert not [k for k in w.drain() if k == DATA]
        a.check()


@pytest.mark.parametrize("change", ["packets of nothing", "another number", "a window of all"])
def test_a_second_confirmation_changes_nothing_of_a_channel(world, change):
    """A confirmation for a channel that the client opened itself, and with which output would go on in packets of no bytes (as CVE-2026-59843)."""
    with Watched(world) as a:
        w = a.wire
        channel = w.open(3)
        w.exec(channel, "cat")
        values = {"packets of nothing": (3, 1 << 20, 0), "another number": (99, 1 << 20, 32768), "a window of all": (3, 0xFFFFFFFF, 32768)}[change]
        w.send(w.on(OPEN_CONFIRMATION, channel, struct.pack(">III", *values)))
        w.send(w.data(channel, b"some output"))
        before, begin = cpu(a.pid), time.monotonic()
        try:
            while (payload := w.read(2)) is not None:
                if payload[0] == DATA:
                    assert payload[:5] == w.on(DATA, 3)
                    assert change != "packets of nothing" or len(payload) > 9
                    break
        except TimeoutError:
            pass
        assert cpu(a.pid) - before < 0.5 * (time.monotonic() - begin) + 0.2, "the worker spins"
        a.check()


@pytest.mark.parametrize("kind", [OPEN_FAILURE, SUCCESS, FAILURE])
def test_answers_that_nobody_asked_for_change_nothing(world, kind):
    with Watched(world) as a:
        w = a.wire
        channel = w.open()
        w.exec(channel, "cat")
        for _ in range(100):
            w.send(w.on(kind, channel, struct.pack(">I", 1) + string("no") + string("") if kind == OPEN_FAILURE else b""))
        w.send(w.data(channel, b"goes on"))
        try:
            w.read_until(b"goes on", 5)
        except AssertionError:
            assert w.closed
            return
        a.check()


def test_requests_and_data_on_a_closed_channel_start_nothing(world):
    mark = world.dir / "after-close"
    with Watched(world) as a:
        w = a.wire
        for close in ("by the client", "by the server"):
            channel = w.open(1)
            if close == "by the client":
                w.send(w.on(CLOSE, channel))
            else:
                w.exec(channel, "true")
                while (payload := w.read()) is not None and payload[0] != CLOSE:
                    pass
            for _ in range(50):
                for packet in (w.request(channel, "exec", True, string(f"touch {mark}")), w.request(channel, "shell", True), w.request(channel, "pty-req", True, string("x") + bytes(20)),
                               w.request(channel, "env", True, string("A") + string("b")), w.data(channel, b"x"), w.on(EOF, channel), w.on(WINDOW_ADJUST, channel, struct.pack(">I", 9))):
                    w.send(packet)
            w.send(w.on(CLOSE, channel))
            w.send(w.on(CLOSE, channel))
        again = w.open(2)
        w.exec(again, "echo still works")
        w.read_until(b"still works")
        a.check()
    assert not mark.exists()


def test_data_and_requests_before_the_confirmation_go_nowhere(world):
    """Guessed numbers, sent with the open."""
    mark = world.dir / "before-confirmation"
    with Watched(world) as a:
        w = a.wire
        guess = w.open(0)
        w.send(w.on(CLOSE, guess))
        burst = w.packet(w.channel_open(1))
        for number in range(guess, guess + 4):
            burst += w.packet(w.request(number, "exec", True, string(f"touch {mark}-$$"))) + w.packet(w.data(number, b"x" * 1000)) + w.packet(w.on(EOF, number))
        w.raw(burst)
        w.sock.shutdown(socket.SHUT_WR)
        w.ended()
    # Nothing of ours may have run for another channel than the one that was opened: at most once.
    assert len(list(world.dir.glob("before-confirmation-*"))) <= 1


def test_data_before_the_clients_own_confirmation_goes_nowhere(world):
    """A channel that the server opens (-R): data for it before the client has confirmed it."""
    with Watched(world) as a:
        w = a.wire
        w.send(bytes([GLOBAL_REQUEST]) + string("tcpip-forward") + b"\1" + string("127.0.0.1") + bytes(4))
        port = struct.unpack_from(">I", w.expect(wire.REQUEST_SUCCESS), 1)[0]
        with socket.create_connection(("127.0.0.1", port), 10 * SLACK) as s:
            opened = w.expect(wire.CHANNEL_OPEN)
            number = struct.unpack_from(">I", opened, 5 + len("forwarded-tcpip"))[0]
            for _ in range(20):
                w.send(w.data(number, b"too early" * 100))
            w.send(w.on(CLOSE, number))
            w.send(w.on(OPEN_CONFIRMATION, number, struct.pack(">III", 0, 1 << 20, 32768)))
            w.send(bytes([GLOBAL_REQUEST]) + string("keepalive@openssh.com") + b"\1")
            while (payload := w.read()) is not None and payload[0] != REQUEST_FAILURE:
                pass
            s.settimeout(5 * SLACK)
        if not w.closed:
            a.check()


def talk(w: Wire, packets, want: int, kinds, seconds: float = 120) -> int:
    """Sends all packets while reading answers; returns how many answers of `kinds` came. Stops when the server closes."""
    got, out = 0, bytearray()
    source = iter(packets)
    w.sock.setblocking(False)
    deadline = time.monotonic() + seconds * SLACK
    exhausted = False
    while got < want and not w.closed:
        assert time.monotonic() < deadline, f"{got} of {want} answers"
        while not exhausted and len(out) < 1 << 16:
            try:
                out += w.packet(next(source))
            except StopIteration:
                exhausted = True
        readable, writable, _ = select.select([w.sock], [w.sock] if out else [], [], 1)
        if writable:
            try:
                del out[:w.sock.send(out)]
            except BlockingIOError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                out.clear()
        if readable:
            try:
                while (payload := w.read(0)) is not None:
                    got += payload[0] in kinds
            except (TimeoutError, BlockingIOError):
                pass
    w.sock.setblocking(True)
    return got


@pytest.mark.parametrize("kind", ["session", "direct-tcpip", "made-up@example.com"])
def test_100_000_channel_opens_are_answered_and_nothing_grows(world, kind):
    count = 100_000
    # direct-tcpip: a port where nobody listens; each is refused by the kernel, through the helper.
    more = string(world.server) + struct.pack(">I", 1) + string("127.0.0.1") + bytes(4) if kind == "direct-tcpip" else b""
    count = count if kind != "direct-tcpip" else 1_000
    with Watched(world) as a:
        w = a.wire
        answered = talk(w, (w.channel_open(n & 0xFFFFFFFF, kind=kind, more=more) for n in range(count)), count, (OPEN_CONFIRMATION, OPEN_FAILURE))
        assert answered == count
        a.check()


def test_channels_that_open_and_close_10_000_times_leave_nothing(world):
    with Watched(world) as a:
        w = a.wire
        for _ in range(100):
            burst = b""
            numbers = [w.open(n) for n in range(10)]
            for n in numbers:
                burst += w.packet(w.on(CLOSE, n))
            w.raw(burst)
            for _ in numbers:
                w.expect(CLOSE)
        early = a.grown()
        for _ in range(300):
            numbers = [w.open(n) for n in range(10)]
            w.raw(b"".join(w.packet(w.on(CLOSE, n)) for n in numbers))
            for _ in numbers:
                w.expect(CLOSE)
        assert a.grown() - early < (2 << 20) + QUARANTINE
        a.check()


def test_no_window_is_given_back_on_a_channel_that_we_closed(world):
    """Data that was on its way when the program ended: asyncssh ends the connection at a WINDOW_ADJUST for a channel that it has closed."""
    with Wire(world) as w:
        w.login()
        channel = w.open()
        w.exec(channel, "true")
        while w.expect(DATA, REQUEST, EOF, CLOSE, WINDOW_ADJUST)[0] != CLOSE:
            pass
        for _ in range(60):
            w.send(w.data(channel, bytes(32000)))
        w.send(bytes([GLOBAL_REQUEST]) + string("made-up@example.com") + b"\1")
        assert w.read()[0] == REQUEST_FAILURE, "and nothing before it"


def test_a_thousand_forwardings_asked_for_at_once_by_who_does_not_listen_are_all_answered(world):
    count = 1000
    with socket.create_server((world.server, 0), backlog=1024) as server, Wire(world) as w:
        w.login()
        more = string(world.server) + struct.pack(">I", server.getsockname()[1]) + string("127.0.0.1") + bytes(4)
        w.raw(b"".join(w.packet(w.channel_open(n, kind="direct-tcpip", more=more)) for n in range(count)))
        answers = [w.expect(OPEN_CONFIRMATION, OPEN_FAILURE, seconds=15)[0] for _ in range(count)]
        assert answers == [OPEN_CONFIRMATION] * count


def test_a_start_that_was_refused_may_be_followed_by_another(world):
    """As PuTTY's pscp does where there is no sftp."""
    with world.capabilities(plain_alice=[{"sftp": "none"}]), Wire(world, bind=world.plain_alice) as w:
        w.login()
        channel = w.open()
        w.send(w.request(channel, "subsystem", True, string("sftp")))
        assert w.expect(SUCCESS, FAILURE)[0] == FAILURE
        w.send(w.request(channel, "exec", True, string("echo in; cat")))
        assert w.expect(SUCCESS, FAILURE)[0] == SUCCESS
        w.read_until(b"in")
        w.send(w.request(channel, "exec", True, string("echo again")))
        assert w.expect(SUCCESS, FAILURE)[0] == FAILURE, "one program a channel"


def test_a_keepalive_on_a_channel_is_answered_in_its_turn(world):
    """Clients match answers to requests by their order alone (RFC 4254 section 5.4)."""
    with Wire(world) as w:
        w.login()
        channel = w.open()
        w.raw(w.packet(w.request(channel, "exec", True, string("true"))) + w.packet(w.request(channel, "keepalive@openssh.com")))
        assert [w.expect(SUCCESS, FAILURE)[0] for _ in range(2)] == [SUCCESS, FAILURE]


FLOODS = {
    "global requests": lambda w, n: bytes([GLOBAL_REQUEST]) + string("keepalive@openssh.com") + b"\1",
    "messages that there are not": lambda w, n: bytes([192 + n % 60]) + b"x" * 10,
    "opens of an unknown kind": lambda w, n: w.channel_open(n, kind="x" * 200),
    "channel requests": lambda w, n: w.request(w.flooded, "made-up@example.com"),
    "keepalives of a channel": lambda w, n: w.request(w.flooded, "keepalive@openssh.com"),
    "service requests": lambda w, n: bytes([SERVICE_REQUEST]) + string("ssh-userauth"),
    "environment": lambda w, n: w.request(w.flooded, "env", True, string(f"LC_{n}") + string("v" * 500)),
}


@pytest.mark.parametrize("what", FLOODS)
@pytest.mark.parametrize("in_a_rekey", [False, True], ids=["", "in a key exchange that never ends"])
def test_a_client_that_asks_without_reading_the_answers_makes_nothing_grow(world, what, in_a_rekey):
    """Up to 24 MiB of requests, none of whose answers is read (as CVE-2025-26466)."""
    with Watched(world) as a:
        w = a.wire
        w.flooded = w.open()
        if in_a_rekey:
            w.send(w.our_kexinit())
        w.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        w.sock.settimeout(1.5 * SLACK)
        sent = n = 0
        try:
            while sent < 24 << 20:
                burst = b""
                while len(burst) < 1 << 16:
                    burst += w.packet(FLOODS[what](w, n))
                    n += 1
                if not w.raw(burst):
                    break
                sent += len(burst)
                a.grown()
        except TimeoutError:
            pass  # the server has stopped reading: that is the way
        a.check()


def test_requests_behind_one_that_waits_are_bounded(world):
    """Its session is stopped: nobody answers the first one, and no other answer may overtake that."""
    with Watched(world) as a:
        w = a.wire
        channel = w.open()
        session = next(c["session_pid"] for c in control(world, "ls")["connections"] if c["net_pid"] == a.pid)
        os.kill(session, signal.SIGSTOP)
        try:
            w.send(w.request(channel, "exec", True, string("true")))
            w.raw(b"".join(w.packet(w.request(channel, "made-up@example.com")) for _ in range(2000)))
            said = w.ended()
            assert any(p[0] == DISCONNECT and b"Too many requests" in p for p in said), said
        finally:
            os.kill(session, signal.SIGCONT)
        a.check()


def test_window_changes_that_no_relay_takes_make_nothing_grow(world):
    with Watched(world, bind=world.alice) as a:
        w = a.wire
        channel = w.open()
        w.send(w.request(channel, "pty-req", True, string("xterm") + struct.pack(">IIII", 80, 24, 0, 0) + string("")))
        w.expect(SUCCESS)
        w.exec(channel, "echo up; exec sleep 3600")
        w.read_until(b"up")
        session = next(c["session_pid"] for c in control(world, "ls")["connections"] if c["net_pid"] == a.pid)
        world.relay.pause()
        try:
            before = memory(session)
            w.raw(b"".join(w.packet(w.request(channel, "window-change", False, struct.pack(">IIII", 80 + n % 2, 24, 0, 0))) for n in range(200_000)))
            w.send(w.request(channel, "break", True, struct.pack(">I", 0)))
            w.expect(SUCCESS, seconds=30)
            assert memory(session) - before < (2 << 20) + QUARANTINE
        finally:
            world.relay.resume()


def test_output_in_packets_of_one_byte_makes_nothing_grow(world):
    with Watched(world) as a:
        w = a.wire
        channel = w.open(window=0, most=1)
        since = world.posternd.log_size()
        w.exec(channel, "head -c 1000000 /dev/zero")
        world.posternd.wait_log("event=session_end", since)  # all of it is in the pipe
        w.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        w.send(w.on(WINDOW_ADJUST, channel, struct.pack(">I", 1 << 20)))
        for _ in range(2000):
            w.expect(DATA)
        a.check()


def test_a_login_that_is_asked_for_again_and_again_stays_one(world):
    with Watched(world) as a:
        w = a.wire
        for _ in range(1000):
            w.send(w.auth_none("root"))
        try:
            channel = w.open()
        except AssertionError:
            assert w.closed or w.read() is None  # more at once than may wait
            return
        w.exec(channel, "id -un")
        assert w.user.encode() in w.read_until(b"\n")
        a.check()
