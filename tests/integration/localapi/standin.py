"""A LocalAPI that says what a test wants, in the place of tailscaled's: what a real one says only when it is broken, or when a machine of the network is not ours to break."""
import contextlib
import json
import os
import socket
import threading
import urllib.parse


class Standin:
    """`nodes`: by address, what whois answers; `status`, `netmap` (nothing: the bus has none); `raw` replaces a whole body, by "whois" or "status"."""

    def __init__(self, path):
        self.path, self.nodes, self.status, self.netmap, self.raw, self.asked = str(path), {}, {}, None, {}, {}
        self._buses, self._open = [], []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        os.chmod(self.path, 0o666)
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self):
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        for one in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def notice(self):
        """Something changed: what, tailscaled does not say."""
        for bus in list(self._buses):
            with contextlib.suppress(OSError):
                self._chunk(bus, '{"PeersChanged":[]}\n')

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                one, _ = self._listener.accept()
                self._open.append(one)
                threading.Thread(target=self._serve, args=(one,), daemon=True).start()

    @staticmethod
    def _chunk(to, text: str):
        to.sendall(b"%x\r\n" % len(text.encode()) + text.encode() + b"\r\n")

    def _serve(self, one):
        read = b""
        with contextlib.suppress(OSError):
            while True:
                while b"\r\n\r\n" not in read:
                    piece = one.recv(1 << 16)
                    if not piece:
                        return
                    read += piece
                head, read = read.split(b"\r\n\r\n", 1)
                target = urllib.parse.urlsplit(head.split()[1].decode())
                self._answer(one, target.path.rsplit("/", 1)[1], dict(urllib.parse.parse_qsl(target.query)))

    def _answer(self, one, what: str, query: dict):
        self.asked[what] = self.asked.get(what, 0) + 1
        if what == "watch-ipn-bus":
            one.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            wants_map = query["mask"] == "8"
            first = {"Version": "1.102.5", "State": 6, **({"NetMap": self.netmap} if wants_map and self.netmap is not None else {})}
            self._chunk(one, json.dumps(first, separators=(",", ":")) + "\n")
            if not wants_map:
                self._buses.append(one)
            return
        body = {"prefs": {"RunSSH": False}, "status": self.status}.get(what) if what != "whois" else self.nodes.get(query["addr"])
        if body is None:
            return one.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno\n")
        body = self.raw.get(what) or json.dumps(body).encode()
        one.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def whois(number: str, name: str, address: str, login: str, capabilities=None, **more) -> dict:
    node = {"ID": int(number), "StableID": number, "Name": f"{name}.lab.example.com.", "ComputedName": name, "User": 1, "Addresses": [address + "/32"], "MachineAuthorized": True,
            "Hostinfo": {"OS": "linux", "OSVersion": "6.1", "IPNVersion": "1.102.5"}, **more}
    return {"Node": node, "UserProfile": {"ID": 1, "LoginName": login}, "CapMap": capabilities}
