"""What the programs around SSH libraries have in common: they take one request (JSON, argv[1]) and print one answer (JSON).

Request (drivers.py makes it; node/client.js and go/main.go read the same):
    host, port, bind, user                   whom to ask, and from which of our addresses
    auth      "none" | "password" | "key"    which method is sent first; password, key (file) are its value
    do        "run"                          one session: command (null: a shell), env, pty, rekey, and then
                 steps    [["expect", text], ["send", text], ["resize", cols, rows], ["signal", name], ["rekey"], ["eof"]]
                 stdin    a file to send before the end of input        stdout   a file for the output
              "sftp"     steps [["put", local, remote], ["get", remote, local], ["symlink", target, link], ["readlink", link], ["ls", folder]]
              "channels" count sessions of `command` at the same time: each is sent a line of its own once all are open
              "unix"     opens a channel to the unix socket `path` (libssh and ssh2 only, which look at the server's version first)
Answer:
    out, err (base64), status, signal, core, rekeys (key exchanges after the first), results (of sftp, channels), or error
"""
import base64
import json
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


def main(serve):
    """serve(request) -> answer."""
    request = json.loads(sys.argv[1])
    try:
        answer = serve(request)
    except Exception as e:  # whatever a library throws is what its user would see
        answer = {"error": f"{type(e).__name__}: {e}"}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
