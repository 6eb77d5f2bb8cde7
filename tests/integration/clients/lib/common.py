"""What the programs around SSH libraries have in common: they take one request (JSON, argv[1]) and print one answer (JSON).

Request (drivers.py makes it; node/client.js and go/main.go read the same):
    host, port, bind, user                   whom to ask, and from which of our addresses
    auth      "none" | "password" | "key"    which method is sent first; password, key (file) are its value
    do        "run"                          one session: command (null: a shell), env, pty, rekey, agent (socket of one, to forward), ciphers, macs (asyncssh), and then
                 steps    [["expect", text], ["send", text], ["resize", cols, rows], ["signal", name], ["rekey"], ["eof"]]
                 stdin    a file to send before the end of input        stdout   a file for the output
              "sftp"     steps [["put", local, remote], ["get", remote, local], ["symlink", target, link], ["readlink", link], ["ls", folder]]
              "channels" count sessions of `command` at the same time: each is sent a line of its own once all are open
              "local"    opens a connection to `target` [host, port] through the server and talks to the mirror there (mirror.py): sends the file
                         `stdin`, writes what comes back to the file `stdout`; `count` connections at once, which all send the same
              "remote"   has the server listen on 127.0.0.1, any port, writes the number to the file `port_file`, and is a mirror
                         for the `count` connections that come
              "unix"     opens a channel to the unix socket `path` (libssh and ssh2 only, which look at the server's version first)
Answer:
    out, err (base64), status, signal, core, rekeys (key exchanges after the first), results (of sftp, channels), or error
"""
import base64
import json
import os
import sys


class Ended(Exception):
    """The session ended before what was expected."""


class Script:
    """Runs the steps of a request on a channel: read() -> (0 or 1, bytes) or None at the end, write(bytes), eof(), resize(), signal()."""

    def __init__(self, channel, request, rekey=None):
        self.channel, self.request, self.rekey = channel, request, rekey
        self.out, self.err, self.seen = bytearray(), bytearray(), 0
        self.file = open(request["stdout"], "wb") if request.get("stdout") else None

    def take(self):
        piece = self.channel.read()
        if piece is None:
            return False
        which, data = piece
        if which == 0 and self.file:
            self.file.write(data)
        else:
            (self.out, self.err)[which].extend(data)
        return True

    def run(self):
        ended = False
        for what, *arguments in self.request.get("steps") or []:
            if what == "expect":
                text = arguments[0].encode()
                while (at := self.out.find(text, self.seen)) < 0:
                    if not self.take():
                        raise Ended(f"ended before {text!r}: {bytes(self.out[-500:])!r} {bytes(self.err[-500:])!r}")
                self.seen = at + len(text)
            elif what == "send":
                self.channel.write(arguments[0].encode())
            elif what == "resize":
                self.channel.resize(*arguments)
            elif what == "signal":
                self.channel.signal(arguments[0])
            elif what == "rekey":
                self.rekey()
            elif what == "eof":
                self.channel.eof()
                ended = True
            else:
                raise ValueError(what)
        if self.request.get("stdin"):
            with open(self.request["stdin"], "rb") as f:
                while piece := f.read(1 << 15):
                    self.channel.write(piece)
        if not ended and not self.request.get("pty"):
            self.channel.eof()
        while self.take():
            pass
        if self.file:
            self.file.close()
        return {"out": base64.b64encode(self.out).decode(), "err": base64.b64encode(self.err).decode()}


def told(port_file, port):
    """Says which port it is; the name appears with its content."""
    with open(port_file + ".new", "w") as f:
        f.write(str(port))
    os.rename(port_file + ".new", port_file)


class Mirror:
    """What is said to a mirror, and what it says (mirror.py): 8 bytes of length, big endian, and so many bytes, and the same comes back.
    Nobody needs a half-close for it, which not every client has."""

    @staticmethod
    def question(data):
        return len(data).to_bytes(8, "big") + data

    @staticmethod
    def whole(got):
        return len(got) >= 8 and len(got) >= 8 + int.from_bytes(got[:8], "big")


def read_question(channel):
    got = bytearray()
    while not Mirror.whole(got):
        piece = channel.read()
        if piece is None:
            raise Ended(f"the other end ended after {len(got)} bytes")
        got += piece[1]
    return bytes(got)


def ask_mirrors(request, channels):
    """Sends what is in the request's file on each of the channels and writes the answers to its files: for channels that are written to without a look at what comes. A mirror hears all first."""
    with open(request["stdin"], "rb") as f:
        question = Mirror.question(f.read())
    for i, channel in enumerate(channels):
        channel.write(question)
        with open(f"{request['stdout']}.{i}", "wb") as f:
            f.write(read_question(channel)[8:])


def be_mirror(channel):
    channel.write(read_question(channel))


def main(serve):
    """serve(request) -> answer."""
    request = json.loads(sys.argv[1])
    try:
        answer = serve(request)
    except Exception as e:  # whatever a library throws is what its user would see
        answer = {"error": f"{type(e).__name__}: {e}"}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
