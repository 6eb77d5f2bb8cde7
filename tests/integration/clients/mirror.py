"""The other end of the forwardings of the matrix: says back what it hears.

8 bytes of length, big endian, and so many bytes; then the same comes back, and the connection stays open until the one who asked closes it.
So nobody needs a half-close, which not every client has. lib/common.py, node/client.js and go/main.go speak it as well.
"""
from __future__ import annotations

import contextlib
import socket
import threading

from harness import SLACK


def exactly(sock: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        piece = sock.recv(min(size - len(got), 1 << 20))
        if not piece:
            raise EOFError(f"ended after {len(got)} of {size} bytes")
        got += piece
    return bytes(got)


def ask(address, data: bytes) -> bytes:
    """What the mirror behind `address` says to `data`."""
    with socket.create_connection(address, timeout=60 * SLACK) as sock:
        sock.settimeout(60 * SLACK)
        sock.sendall(len(data).to_bytes(8, "big") + data)
        return exactly(sock, int.from_bytes(exactly(sock, 8), "big"))


class Mirror:
    """Serves until the end of the `with`; `port` of 127.0.0.1."""

    def __enter__(self):
        self.sock = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.sock.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.serve, args=(self.sock.accept()[0],), daemon=True).start()

    @staticmethod
    def serve(sock):
        with sock, contextlib.suppress(OSError, EOFError):
            head = exactly(sock, 8)
            sock.sendall(head + exactly(sock, int.from_bytes(head, "big")))
            sock.recv(1)

    def __exit__(self, *_):
        # Wakes the accept() as well, which close() alone does not.
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
