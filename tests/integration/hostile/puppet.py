"""postern-net in a test's hand: a real posternd and postern-session, and tests/tools/hostile_net.cpp as "postern-net".

Each worker that posternd has forked hands its socket to us; what posternd or postern-session would give to postern-net arrives here.
    net = Puppet(accounts)             starts posternd (and the relay) around it
    w = net.worker(address)            connects a client from `address`; the worker that posternd gave its socket to
    w.sign(); w.ask_login(user)        sshd/protocol/net.h; w.login() does both and waits for the verdict
    w.say(type, body, ...)             any bytes on the session's socket; w.tell(...) on the broker's
    w.wait_killed()                    posternd or postern-session has killed the worker
"""
from __future__ import annotations

import array
import base64
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass

import harness
from harness import BIN, SLACK, Stack, wait_until

VERSION = 1
# net.h
SERVE, SIGNATURE, VERDICT, ASK_SIGN, ASK_LOGIN, NOTE = 20, 21, 22, 30, 31, 32
# channel.h
OPEN, PTY, ENV, START, WINDOW, SIGNAL, BREAK, CLOSED, SIGN = range(1, 10)
CONNECT, LISTEN, CANCEL, FORWARD_CLOSED, AGENT, X11 = range(11, 17)
READY, FAILED, LISTENING, INCOMING = range(28, 32)
OK, NO, STARTED, EXITED, CHANNEL_SIGNATURE, DISCONNECT, MESSAGE = range(20, 27)
SHELL, EXEC, SUBSYSTEM = range(3)


def text(value: bytes, size: int, length: int | None = None) -> bytes:
    """FixedText<size>; `length` may lie."""
    return struct.pack("<I", len(value) if length is None else length) + value[:size].ljust(size, b"\0")


def ask_sign(data: bytes, key: int = 0, digest: int = 0, length: int | None = None, purpose: int = 0) -> bytes:
    """`key`: net.h's key_id(); Worker.key_ids has them."""
    return struct.pack("<IBB2x", key, digest, purpose) + text(data, 64, length)


def key_id(blob: bytes) -> int:
    hash_ = 2166136261
    for byte in blob:
        hash_ = (hash_ ^ byte) * 16777619 & 0xFFFFFFFF
    return hash_


def ask_login(user: bytes, method: int = 0, version: bytes = b"SSH-2.0-hostile", length: int | None = None, version_length: int | None = None) -> bytes:
    return struct.pack("<I", method) + text(user, 256, length) + text(version, 255, version_length) + b"\0"


def note(value: bytes) -> bytes:
    return text(value, 256)


def ref(channel: int) -> bytes:
    return struct.pack("<I", channel)


def pty(channel: int, term: bytes = b"xterm", modes: bytes = b"", cols=80, rows=24, term_length=None, modes_length=None) -> bytes:
    return struct.pack("<5I", channel, cols, rows, 0, 0) + text(term, 64, term_length) + text(modes, 1024, modes_length)


def env(channel: int, name: bytes, value: bytes, name_length: int | None = None) -> bytes:
    return struct.pack("<II", channel, len(name) if name_length is None else name_length) + name + value


def start(channel: int, kind: int, command: bytes = b"") -> bytes:
    return struct.pack("<II", channel, kind) + command


def window(channel: int, cols: int = 100, rows: int = 40) -> bytes:
    return struct.pack("<5I", channel, cols, rows, 0, 0)


def send_signal(channel: int, name: bytes, length: int | None = None) -> bytes:
    return struct.pack("<I", channel) + text(name, 16, length)


def forward(number: int, target: bytes, port: int = 0, kind: int = 0, length: int | None = None) -> bytes:
    """kind: 0 host and port, 1 a unix socket."""
    return struct.pack("<III", number, kind, port) + text(target, 256, length)


def forward_closed(number: int, from_client: int = 0, to_client: int = 0) -> bytes:
    return struct.pack("<IIQQ", number, 0, from_client, to_client)


def x11(channel: int, protocol: bytes = b"MIT-MAGIC-COOKIE-1", cookie: bytes = b"00", protocol_length=None, cookie_length=None) -> bytes:
    return struct.pack("<III", channel, 0, 0) + text(protocol, 64, protocol_length) + text(cookie, 256, cookie_length)


def check_sizes() -> None:
    """What we pack is what the headers say."""
    real = json.loads(subprocess.run([BIN / "hostile_net", "--sizes"], stdout=subprocess.PIPE, check=True).stdout)
    ours = {"ask_sign": ask_sign(b""), "ask_login": ask_login(b""), "note": note(b""), "pty": pty(0), "env": env(0, b"", b""), "start": start(0, 0),
            "window_change": window(0), "signal": send_signal(0, b""), "forward": forward(0, b""), "forward_closed": forward_closed(0), "x11": x11(0)}
    assert {k: len(v) for k, v in ours.items()} == {k: real[k] for k in ours}


@dataclass
class Said:
    type: int
    body: bytes
    fds: list[int]


class Worker:
    def __init__(self, control: socket.socket, about: dict, broker: socket.socket):
        self.control, self.about, self.broker = control, about, broker
        self.pid = about["pid"]
        self.client_end = -1              # the client's TCP socket, as posternd gave it
        self.session: socket.socket | None = None
        self.tcp: socket.socket | None = None  # the client itself: ours
        self.fds: list[int] = []
        self.key_ids: list[int] = []  # ed25519, ecdsa, rsa

    # ---- the sockets

    @staticmethod
    def _send(sock: socket.socket, kind: int, body: bytes = b"", version: int = VERSION, size: int | None = None, fds=(), raw: bytes | None = None) -> bool:
        """False: nobody is at the other end, or it is full. Errors are what a hostile worker gets, not what a test fails on."""
        data = raw if raw is not None else struct.pack("<HHI", version, kind, len(body) if size is None else size) + body
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sock.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            return True
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            return False

    def tell(self, kind: int, body: bytes = b"", **kw) -> bool:
        return self._send(self.broker, kind, body, **kw)

    def say(self, kind: int, body: bytes = b"", **kw) -> bool:
        return self._send(self.session, kind, body, **kw)

    def _receive(self, sock: socket.socket, seconds: float) -> Said | None:
        """None: the other end is closed. TimeoutError when nothing came."""
        deadline = time.monotonic() + seconds * SLACK
        while True:
            if not select.select([sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("nothing was answered")
            try:
                data, fds, _, _ = socket.recv_fds(sock, 1 << 18, 64)
            except ConnectionResetError:
                continue  # told once; what was said before it follows
            self.fds += fds
            if not data:
                return None
            version, kind, size = struct.unpack_from("<HHI", data)
            assert version == VERSION and size == len(data) - 8
            return Said(kind, data[8:], list(fds))

    def heard(self, seconds: float = 5) -> Said | None:
        return self._receive(self.broker, seconds)

    def answer(self, seconds: float = 5) -> Said | None:
        return self._receive(self.session, seconds)

    def answers(self, seconds: float) -> list[Said]:
        """All that comes within `seconds`, or until the end."""
        got, deadline = [], time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while (left := deadline - time.monotonic()) > 0:
                said = self._receive(self.session, left / SLACK)
                if said is None:
                    break
                got.append(said)
        return got

    # ---- the honest way

    def sign(self, data: bytes | None = None, key: int = 0, **kw) -> bytes:
        """With the `key`th host key; a number that no key has goes out as it is."""
        self.tell(ASK_SIGN, ask_sign(os.urandom(32) if data is None else data, key=self.key_ids[key] if key < len(self.key_ids) else key, **kw))
        said = self.heard()
        assert said is not None and said.type == SIGNATURE, f"no signature: {said}"
        return said.body[4 : 4 + struct.unpack_from("<I", said.body)[0]]

    def verdict(self, seconds: float = 10) -> tuple[bool, str]:
        said = self.heard(seconds)
        assert said is not None and said.type == VERDICT, f"no verdict: {said}"
        accepted, length = struct.unpack_from("<II", said.body)
        assert len(said.fds) == (1 if accepted else 0), "a denied worker was given a descriptor"
        if accepted:
            self.session = socket.socket(fileno=os.dup(said.fds[0]))
        return bool(accepted), said.body[8 : 8 + length].decode()

    def login(self, user: str) -> "Worker":
        assert self.sign()
        self.tell(ASK_LOGIN, ask_login(user.encode()))
        accepted, why = self.verdict()
        assert accepted, why
        return self

    def open(self, channel: int = 0) -> None:
        self.say(OPEN, ref(channel))
        self.expect(OK, channel)

    def expect(self, kind: int, channel: int, seconds: float = 10) -> Said:
        said = self.answer(seconds)
        assert said is not None and said.type == kind and struct.unpack_from("<I", said.body)[0] == channel, f"wanted {kind} of {channel}: {said}"
        return said

    def run(self, command: str, channel: int = 0, kind: int = EXEC) -> list[int]:
        """Starts it; input, output and error as we were given them."""
        self.say(START, start(channel, kind, command.encode()))
        return self.expect(STARTED, channel).fds

    # ---- life

    def order(self, what: str) -> None:
        with contextlib.suppress(OSError):
            self.control.send(what.encode())

    def alive(self) -> bool:
        return not select.select([self.control], [], [], 0)[0]

    def wait_killed(self, seconds: float = 3.0) -> None:
        """It was killed by whom it lied to: it never ends by itself while we hold its control socket."""
        ready = select.select([self.control], [], [], seconds * SLACK)[0]
        assert ready, f"the worker {self.pid} still lives after {seconds * SLACK:.0f} s"

    def close(self) -> None:
        for s in (self.tcp, self.broker, self.session, self.control):
            if s is not None:
                s.close()
        for fd in [*self.fds, self.client_end]:
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.fds, self.client_end = [], -1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Puppet:
    def __init__(self, accounts: harness.Accounts, posternd=None, **kw):
        check_sizes()
        # On a path that the kernel can execute and that posternd's children may reach.
        self.programs = tempfile.mkdtemp(prefix="pth-", dir="/tmp")
        shutil.copy(BIN / "hostile_net", f"{self.programs}/postern-net")
        os.symlink(BIN / "postern-session", f"{self.programs}/postern-session")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(f"{self.programs}/control")
        self.listener.listen(512)
        self.listener.setblocking(False)
        settings = harness.merge({"programs": {"dir": self.programs}}, posternd)
        self.stack: Stack = harness.new_stack(accounts, posternd=settings, **kw)
        self.descriptors = 0
        self.warm: list[Worker] = []
        self.given: list[Worker] = []
        try:
            self.stack.relay.start()
            self.stack.posternd.start()
            keys = json.loads(self.stack.postern("host-keys", "--json").text)["host_keys"]
            self.key_ids = [key_id(base64.b64decode(k["line"].split()[1])) for k in keys]
        except BaseException:
            self.stop()
            raise

    @property
    def user(self) -> str:
        return self.stack.user

    def _new_workers(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                control, _ = self.listener.accept()
                try:
                    data, fds, _, _ = socket.recv_fds(control, 65536, 4)
                except OSError:
                    data = b""
                if not data:
                    control.close()
                    continue
                broker = socket.socket(fileno=fds[0])
                self.warm.append(Worker(control, json.loads(data[8:]), broker))

    def worker(self, address: str | None = None) -> Worker:
        """The worker that serves a new client from `address`."""
        tcp = self.stack.connect(address or self.stack.plain_alice)
        deadline = time.monotonic() + 10 * SLACK
        while True:
            self._new_workers()
            sockets = {w.broker: w for w in self.warm}
            ready = select.select([self.listener, *sockets], [], [], 0.2)[0]
            for s in ready:
                w = sockets.get(s)
                if w is None:
                    continue
                self.warm.remove(w)
                said = w.heard()
                if said is None:  # a warm one that posternd let go
                    w.close()
                    continue
                assert said.type == SERVE and len(said.fds) == 1, said
                w.client_end, w.tcp, w.key_ids = said.fds[0], tcp, self.key_ids
                w.fds.remove(said.fds[0])
                with socket.socket(fileno=os.dup(w.client_end)) as c:
                    try:
                        whom = c.getpeername()
                    except OSError:
                        whom = None
                self.given.append(w)
                if whom == tcp.getsockname():
                    return w
                w.tcp = None
                w.close()  # of a client that a test has given up
            assert time.monotonic() < deadline, "posternd gives no worker:\n" + self.stack.posternd.tail()

    def sessions(self) -> list[dict]:
        return [json.loads(line) for line in self.stack.postern("sessions", "ls", "--json").text.splitlines() if line.strip()]

    def release(self) -> None:
        """Ends what a test still holds."""
        for w in self.given:
            w.close()
        self.given.clear()

    def honest_login(self, address: str | None = None) -> None:
        """posternd still does its work."""
        with self.worker(address) as w:
            w.login(self.user)
            w.open(7)
            _, out, _ = w.run("id -un", 7)
            got, deadline = b"", time.monotonic() + 10 * SLACK
            while not got.endswith(b"\n"):
                assert select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0], f"no output: {got!r}"
                piece = os.read(out, 4096)
                assert piece, f"the output ended: {got!r}"
                got += piece
            assert got.decode().strip() == self.user
            w.expect(EXITED, 7)
            w.say(CLOSED, ref(7))
        self.given.remove(w)

    def count_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.stack.posternd.pid}/fd"))

    def calm_descriptors(self) -> int:
        """How many posternd has when nothing happens; 0 while something does."""
        first = self.count_descriptors()
        time.sleep(0.1)
        return first if first == self.count_descriptors() else 0

    def settled(self) -> None:
        """Nobody is in, and nothing of a user's or of a connection's is left."""
        wait_until(lambda: not self.sessions(), "no session is left", 15)
        wait_until(lambda: not self.stack.processes_of(self.user), "no process of the user is left", 15)
        wait_until(lambda: not self.stack.session_workers(), "no postern-session is left but the zygote", 15)

    def stop(self) -> None:
        self.release()
        for w in self.warm:
            w.close()
        self.warm.clear()
        self.listener.close()
        try:
            self.stack.stop()
        finally:
            shutil.rmtree(self.programs, ignore_errors=True)
