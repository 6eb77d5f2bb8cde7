"""An SSH client that says what no client says: every byte of the binary packet protocol (RFC 4253 section 6) is in a test's hand.

    w = Wire(stack, bind=…)          connected, nothing sent; cipher=, mac=, strict= choose what is negotiated
    w.versions(); w.kexinit(); w.exchange(); w.service()        step by step ...
    w.handshake()                    ... or up to SERVICE_ACCEPT; w.login(user) up to USERAUTH_SUCCESS
    w.send(payload)                  one right packet; w.packet(payload, padding=…, length=…) builds one that may be wrong, unsent
    w.raw(data)                      bytes as they are
    w.read(seconds)                  the next payload, or None when the server has closed; TimeoutError
    w.ended(seconds)                 what the server said until it closed the connection (payloads); AssertionError when it did not
    w.open(sender)                   a session channel -> the server's number

Nothing of it is for use: the host key's signature is not looked at.
"""
from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import select
import socket
import struct
import threading
import time

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.poly1305 import Poly1305

from harness import SLACK

DISCONNECT, IGNORE, UNIMPLEMENTED, DEBUG, SERVICE_REQUEST, SERVICE_ACCEPT, EXT_INFO = range(1, 8)
KEXINIT, NEWKEYS, ECDH_INIT, ECDH_REPLY = 20, 21, 30, 31
USERAUTH_REQUEST, USERAUTH_FAILURE, USERAUTH_SUCCESS, USERAUTH_BANNER = 50, 51, 52, 53
GLOBAL_REQUEST, REQUEST_SUCCESS, REQUEST_FAILURE = 80, 81, 82
CHANNEL_OPEN, OPEN_CONFIRMATION, OPEN_FAILURE, WINDOW_ADJUST, DATA, EXTENDED_DATA, EOF, CLOSE, REQUEST, SUCCESS, FAILURE = range(90, 101)

GCM, CHACHA, CTR = "aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes128-ctr"
ETM, EM = "hmac-sha2-256-etm@openssh.com", "hmac-sha2-256"
SUITES = [(CHACHA, ETM), (GCM, ETM), (CTR, ETM), (CTR, EM)]
STRICT_CLIENT, STRICT_SERVER = "kex-strict-c-v00@openssh.com", "kex-strict-s-v00@openssh.com"


def string(data: bytes | str) -> bytes:
    data = data.encode() if isinstance(data, str) else data
    return struct.pack(">I", len(data)) + data


def strings(data: bytes, count: int) -> tuple[list[bytes], bytes]:
    found = []
    for _ in range(count):
        size = struct.unpack_from(">I", data)[0]
        found.append(data[4:4 + size])
        data = data[4 + size:]
    return found, data


def mpint(data: bytes) -> bytes:
    data = data.lstrip(b"\0")
    return string(b"\0" + data if data and data[0] & 0x80 else data)


class Plain:
    block, mac, clear_length = 8, 0, False

    def seal(self, seq: int, packet: bytes) -> bytes:
        return packet

    def length(self, seq: int, head: bytes) -> int:
        return struct.unpack(">I", head[:4])[0]

    def open(self, seq: int, data: bytes) -> bytes:
        return data

    head = 4


class CtrHmac:
    """aes128-ctr with hmac-sha2-256, over the ciphertext (etm) or the plain packet."""
    block, mac = 16, 32

    def __init__(self, keys, etm: bool, sending: bool):
        cipher = Cipher(algorithms.AES(keys("key", 16)), modes.CTR(keys("iv", 16)))
        self.stream = cipher.encryptor() if sending else cipher.decryptor()
        self.key, self.etm, self.clear_length = keys("mac", 32), etm, etm
        self.head = 4 if etm else 16
        self.first = b""

    def tag(self, seq, data):
        return hmac.digest(self.key, struct.pack(">I", seq & 0xFFFFFFFF) + data, "sha256")

    def seal(self, seq, packet):
        if self.etm:
            sealed = packet[:4] + self.stream.update(packet[4:])
            return sealed + self.tag(seq, sealed)
        return self.stream.update(packet) + self.tag(seq, packet)

    def length(self, seq, head):
        self.first = b"" if self.etm else self.stream.update(head)
        return struct.unpack(">I", (head if self.etm else self.first)[:4])[0]

    def open(self, seq, data):
        body, tag = data[:-32], data[-32:]
        plain = body[:4] + self.stream.update(body[4:]) if self.etm else self.first + self.stream.update(body[16:])
        assert tag == self.tag(seq, body if self.etm else plain), "the server's MAC is wrong"
        return plain


class Gcm:
    """RFC 5647, as aes128-gcm@openssh.com."""
    block, mac, clear_length, head = 16, 16, True, 4

    def __init__(self, keys, sending: bool):
        self.cipher, self.iv = AESGCM(keys("key", 16)), keys("iv", 12)

    def nonce(self):
        iv, counter = self.iv, int.from_bytes(self.iv[4:], "big")
        self.iv = iv[:4] + ((counter + 1) % 2**64).to_bytes(8, "big")
        return iv

    def seal(self, seq, packet):
        return packet[:4] + self.cipher.encrypt(self.nonce(), packet[4:], packet[:4])

    def length(self, seq, head):
        return struct.unpack(">I", head[:4])[0]

    def open(self, seq, data):
        return data[:4] + self.cipher.decrypt(self.nonce(), data[4:], data[:4])


class Chacha:
    """OpenSSH PROTOCOL.chacha20poly1305."""
    block, mac, clear_length, head = 8, 16, True, 4

    def __init__(self, keys, sending: bool):
        key = keys("key", 64)
        self.main, self.header = key[:32], key[32:]

    @staticmethod
    def stream(key, seq, counter, data):
        return Cipher(algorithms.ChaCha20(key, struct.pack("<Q", counter) + struct.pack(">Q", seq & 0xFFFFFFFF)), mode=None).encryptor().update(data)

    def tag(self, seq, data):
        return Poly1305.generate_tag(self.stream(self.main, seq, 0, bytes(32)), data)

    def seal(self, seq, packet):
        sealed = self.stream(self.header, seq, 0, packet[:4]) + self.stream(self.main, seq, 1, packet[4:])
        return sealed + self.tag(seq, sealed)

    def length(self, seq, head):
        return struct.unpack(">I", self.stream(self.header, seq, 0, head[:4]))[0]

    def open(self, seq, data):
        assert data[-16:] == self.tag(seq, data[:-16]), "the server's tag is wrong"
        return data[:4] + self.stream(self.main, seq, 1, data[4:-16])


class Wire:
    def __init__(self, stack, bind: str | None = None, cipher: str = GCM, mac: str = ETM, strict: bool = True, kex: str = "curve25519-sha256", timeout: float = 10):
        self.sock = stack.connect(bind or stack.plain_alice, timeout=timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = self.sock.getsockname()[1]
        self.user, self.cipher, self.mac, self.strict, self.kex = stack.user, cipher, mac, strict, kex
        self.out, self.inn = Plain(), Plain()
        self.sent = self.received = 0  # sequence numbers
        self.buffer = b""
        self.version, self.server_version = b"SSH-2.0-Wire", b""
        self.session_id = b""
        self.both_strict = False
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.sock.close()

    # ---- packets

    def packet(self, payload: bytes, padding: int | None = None, length: int | None = None, fill: bytes = b"\0", padding_byte: int | None = None) -> bytes:
        """Sealed, with the next sequence number. `padding`: how many bytes; `padding_byte` and `length`: what the packet says of itself."""
        if padding is None:
            size = len(payload) + (1 if self.out.clear_length else 5)
            padding = self.out.block - size % self.out.block
            if padding < 4:
                padding += self.out.block
        inner = bytes([padding if padding_byte is None else padding_byte]) + payload + fill * padding
        packet = struct.pack(">I", len(inner) if length is None else length) + inner
        sealed = self.out.seal(self.sent, packet)
        self.sent += 1
        return sealed

    def raw(self, data: bytes) -> bool:
        """False: the server has closed."""
        try:
            self.sock.sendall(data)
            return True
        except (BrokenPipeError, ConnectionResetError):
            return False

    def send(self, payload: bytes, **kw) -> bool:
        return self.raw(self.packet(payload, **kw))

    def _more(self, deadline: float) -> bool:
        poll = select.poll()  # select(2) ends at descriptor 1024
        poll.register(self.sock, select.POLLIN)
        if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
            raise TimeoutError("nothing came")
        try:
            piece = self.sock.recv(1 << 18)
        except ConnectionResetError:
            piece = b""
        self.buffer += piece
        self.closed = not piece
        return bool(piece)

    def line(self, seconds: float = 10) -> bytes:
        deadline = time.monotonic() + seconds * SLACK
        while b"\n" not in self.buffer:
            if not self._more(deadline):
                return b""
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.rstrip(b"\r")

    def read(self, seconds: float = 10) -> bytes | None:
        deadline = time.monotonic() + seconds * SLACK
        while len(self.buffer) < self.inn.head:
            if not self._more(deadline):
                return None
        length = self.inn.length(self.received, self.buffer[:self.inn.head])
        assert length <= 300_000, f"the server sends a packet of {length} bytes"
        whole = 4 + length + self.inn.mac
        while len(self.buffer) < whole:
            if not self._more(deadline):
                return None
        data, self.buffer = self.buffer[:whole], self.buffer[whole:]
        plain = self.inn.open(self.received, data)
        self.received += 1
        return plain[5:4 + length - plain[4]]

    def expect(self, *kinds: int, seconds: float = 10) -> bytes:
        """The next payload of one of these types; what may come at any time is passed over."""
        while True:
            payload = self.read(seconds)
            assert payload is not None, f"closed before one of {kinds}"
            if payload[0] in kinds:
                return payload
            assert payload[0] in (IGNORE, DEBUG, EXT_INFO, USERAUTH_BANNER, GLOBAL_REQUEST, UNIMPLEMENTED, *range(WINDOW_ADJUST, FAILURE + 1)), f"{payload[:60]!r} came before one of {kinds}"

    def ended(self, seconds: float = 10) -> list[bytes]:
        """Reads until the server has closed. What came after a wrong byte of ours is still the server's, and right."""
        payloads = []
        while True:
            try:
                payload = self.read(seconds)
            except TimeoutError:
                raise AssertionError(f"the connection did not end within {seconds * SLACK:.0f} s; the server said {[p[:60] for p in payloads]}") from None
            if payload is None:
                return payloads
            payloads.append(payload)

    # ---- a connection, step by step

    def versions(self) -> bytes:
        self.raw(self.version + b"\r\n")
        self.server_version = self.line()
        return self.server_version

    def our_kexinit(self, follows: bool = False, **lists: str) -> bytes:
        names = [self.kex + ",ext-info-c" + ("," + STRICT_CLIENT if self.strict else ""), "ssh-ed25519", self.cipher, self.cipher, self.mac, self.mac, "none", "none", "", ""]
        for key, value in lists.items():
            names[["kex", "host_keys", "ciphers", "ciphers_back", "macs", "macs_back", "compression", "compression_back", "languages", "languages_back"].index(key)] = value
        return bytes([KEXINIT]) + os.urandom(16) + b"".join(map(string, names)) + bytes([follows]) + bytes(4)

    def kexinit(self, ours: bytes | None = None) -> list[bytes]:
        """Both sides' KEXINIT; returns the server's ten name-lists."""
        self.ours = ours or self.our_kexinit()
        self.send(self.ours)
        self.theirs = self.expect(KEXINIT)
        return strings(self.theirs[17:], 10)[0]

    def exchange(self, before_newkeys: bytes | None = None) -> None:
        """ECDH_INIT to NEWKEYS. `before_newkeys`: a payload that does not belong there, sent between ECDH_INIT and our NEWKEYS."""
        key = X25519PrivateKey.generate()
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
        public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.send(bytes([ECDH_INIT]) + string(public))
        reply = self.expect(ECDH_REPLY)
        (host_key, theirs, _), _ = strings(reply[1:], 3)
        shared = mpint(key.exchange(X25519PublicKey.from_public_bytes(theirs)))
        h = hashlib.sha256(string(self.version) + string(self.server_version) + string(self.ours) + string(self.theirs) + string(host_key) + string(public) + string(theirs) + shared).digest()
        self.session_id = self.session_id or h
        if before_newkeys is not None:
            self.send(before_newkeys)
        self.send(bytes([NEWKEYS]))
        if self.session_id == h:  # agreed on by the first exchange, for all
            self.both_strict = self.strict and STRICT_SERVER.encode() in strings(self.theirs[17:], 1)[0][0].split(b",")
        self.out = self._cipher(shared, h, {"iv": b"A", "key": b"C", "mac": b"E"}, True)
        if self.both_strict:
            self.sent = 0
        self.incoming = self._cipher(shared, h, {"iv": b"B", "key": b"D", "mac": b"F"}, False)
        self.finish()

    def finish(self) -> None:
        self.expect(NEWKEYS)
        self.inn = self.incoming
        if self.both_strict:
            self.received = 0

    def _cipher(self, shared, h, letters, sending):
        def keys(name, size):
            out = hashlib.sha256(shared + h + letters[name] + self.session_id).digest()
            while len(out) < size:
                out += hashlib.sha256(shared + h + out).digest()
            return out[:size]
        if self.cipher == GCM:
            return Gcm(keys, sending)
        if self.cipher == CHACHA:
            return Chacha(keys, sending)
        return CtrHmac(keys, self.mac == ETM, sending)

    def keys(self) -> "Wire":
        """Up to the NEWKEYS of both."""
        self.versions()
        self.kexinit()
        self.exchange()
        return self

    def rekey(self) -> None:
        self.kexinit(self.our_kexinit())
        self.exchange()

    def handshake(self) -> "Wire":
        self.keys()
        self.send(bytes([SERVICE_REQUEST]) + string("ssh-userauth"))
        self.expect(SERVICE_ACCEPT)
        return self

    def auth_none(self, user: str | None = None) -> bytes:
        return bytes([USERAUTH_REQUEST]) + string(user or self.user) + string("ssh-connection") + string("none")

    def login(self, user: str | None = None) -> "Wire":
        self.handshake()
        self.send(self.auth_none(user))
        self.expect(USERAUTH_SUCCESS)
        return self

    # ---- channels

    def channel_open(self, sender: int = 0, kind: str = "session", window: int = 1 << 21, most: int = 32768, more: bytes = b"") -> bytes:
        return bytes([CHANNEL_OPEN]) + string(kind) + struct.pack(">III", sender, window, most) + more

    def open(self, sender: int = 0, **kw) -> int:
        self.send(self.channel_open(sender, **kw))
        answer = self.expect(OPEN_CONFIRMATION)
        assert struct.unpack_from(">I", answer, 1)[0] == sender
        return struct.unpack_from(">I", answer, 5)[0]

    @staticmethod
    def on(kind: int, channel: int, more: bytes = b"") -> bytes:
        return bytes([kind]) + struct.pack(">I", channel) + more

    def data(self, channel: int, data: bytes) -> bytes:
        return self.on(DATA, channel, string(data))

    def request(self, channel: int, name: str, reply: bool = True, more: bytes = b"") -> bytes:
        return self.on(REQUEST, channel, string(name) + bytes([reply]) + more)

    def exec(self, channel: int, command: str) -> None:
        self.send(self.request(channel, "exec", True, string(command)))
        self.expect(SUCCESS)

    def read_until(self, text: bytes, seconds: float = 10) -> bytes:
        """Channel data of any channel until `text` is in it."""
        seen = b""
        deadline = time.monotonic() + seconds * SLACK
        while text not in seen:
            payload = self.read(max(0.0, deadline - time.monotonic()) / SLACK)
            assert payload is not None, f"closed before {text!r}; seen: {seen!r}"
            if payload[0] == DATA:
                seen += payload[9:]
        return seen

    def drain(self) -> list[int]:
        """The types of what has come so far, without waiting."""
        kinds = []
        with contextlib.suppress(TimeoutError):
            while (payload := self.read(0)) is not None:
                kinds.append(payload[0])
        return kinds


class Slow:
    """Clients that dribble: half of them the version line, half a KEXINIT, a byte each now and then."""

    def __init__(self, stack, sources: list[str], count: int):
        self.sockets = []
        kexinit = struct.pack(">IBB", 1500, 4, 20) + bytes(1494)
        for n in range(count):
            sock = stack.connect(sources[n % len(sources)], timeout=30)
            self.sockets.append((sock, b"SSH-2.0-" + b"s" * 100 if n % 2 == 0 else b"SSH-2.0-slow\r\n" + kexinit))
        for sock, text in self.sockets:
            if text[-1:] != b"s":
                sock.sendall(text[:14])
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.sent = 14
        self.thread.start()

    def run(self):
        at = 0
        while not self.stop.wait(1.0) and at < 90:
            for sock, text in self.sockets:
                begin = at if text[-1:] == b"s" else 14 + at
                with contextlib.suppress(OSError):
                    sock.send(text[begin:begin + 1])
            at += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(20 * SLACK)
        for sock, _ in self.sockets:
            sock.close()
