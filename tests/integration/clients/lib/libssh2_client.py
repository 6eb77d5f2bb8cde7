"""libssh2 (Debian's shared library, by ctypes) behind the interface of common.py."""
import ctypes
import os
import select
import socket
from ctypes import POINTER, byref, c_char_p, c_int, c_long, c_size_t, c_uint, c_ulong, c_void_p

import common

L = ctypes.CDLL("libssh2.so.1")
AGAIN = -37


def declare(name, result, *arguments):
    f = getattr(L, name)
    f.restype, f.argtypes = result, arguments
    return f


init = declare("libssh2_init", c_int, c_int)
new_session = declare("libssh2_session_init_ex", c_void_p, c_void_p, c_void_p, c_void_p, c_void_p)
handshake = declare("libssh2_session_handshake", c_int, c_void_p, c_int)
set_blocking = declare("libssh2_session_set_blocking", None, c_void_p, c_int)
last_error = declare("libssh2_session_last_error", c_int, c_void_p, POINTER(c_char_p), POINTER(c_int), c_int)
auth_list = declare("libssh2_userauth_list", c_char_p, c_void_p, c_char_p, c_uint)
authenticated = declare("libssh2_userauth_authenticated", c_int, c_void_p)
auth_password = declare("libssh2_userauth_password_ex", c_int, c_void_p, c_char_p, c_uint, c_char_p, c_uint, c_void_p)
auth_key = declare("libssh2_userauth_publickey_fromfile_ex", c_int, c_void_p, c_char_p, c_uint, c_char_p, c_char_p, c_char_p)
open_channel = declare("libssh2_channel_open_ex", c_void_p, c_void_p, c_char_p, c_uint, c_uint, c_uint, c_char_p, c_uint)
setenv = declare("libssh2_channel_setenv_ex", c_int, c_void_p, c_char_p, c_uint, c_char_p, c_uint)
request_pty = declare("libssh2_channel_request_pty_ex", c_int, c_void_p, c_char_p, c_uint, c_char_p, c_uint, c_int, c_int, c_int, c_int)
resize_pty = declare("libssh2_channel_request_pty_size_ex", c_int, c_void_p, c_int, c_int, c_int, c_int)
startup = declare("libssh2_channel_process_startup", c_int, c_void_p, c_char_p, c_uint, c_char_p, c_uint)
read_ex = declare("libssh2_channel_read_ex", c_long, c_void_p, c_int, c_void_p, c_size_t)
write_ex = declare("libssh2_channel_write_ex", c_long, c_void_p, c_int, c_char_p, c_size_t)
send_eof = declare("libssh2_channel_send_eof", c_int, c_void_p)
is_eof = declare("libssh2_channel_eof", c_int, c_void_p)
close = declare("libssh2_channel_close", c_int, c_void_p)
wait_closed = declare("libssh2_channel_wait_closed", c_int, c_void_p)
exit_status = declare("libssh2_channel_get_exit_status", c_int, c_void_p)
exit_signal = declare("libssh2_channel_get_exit_signal", c_int, c_void_p, POINTER(c_char_p), POINTER(c_size_t), POINTER(c_char_p), POINTER(c_size_t),
                      POINTER(c_char_p), POINTER(c_size_t))
direct_tcpip = declare("libssh2_channel_direct_tcpip_ex", c_void_p, c_void_p, c_char_p, c_int, c_char_p, c_int)
forward_listen = declare("libssh2_channel_forward_listen_ex", c_void_p, c_void_p, c_char_p, c_int, POINTER(c_int), c_int)
forward_accept = declare("libssh2_channel_forward_accept", c_void_p, c_void_p)
disconnect = declare("libssh2_session_disconnect_ex", c_int, c_void_p, c_int, c_char_p, c_char_p)
sftp_init = declare("libssh2_sftp_init", c_void_p, c_void_p)
sftp_open = declare("libssh2_sftp_open_ex", c_void_p, c_void_p, c_char_p, c_uint, c_ulong, c_long, c_int)
sftp_read = declare("libssh2_sftp_read", c_long, c_void_p, c_void_p, c_size_t)
sftp_write = declare("libssh2_sftp_write", c_long, c_void_p, c_char_p, c_size_t)
sftp_close = declare("libssh2_sftp_close_handle", c_int, c_void_p)
sftp_symlink = declare("libssh2_sftp_symlink_ex", c_int, c_void_p, c_char_p, c_uint, c_void_p, c_uint, c_int)
sftp_readdir = declare("libssh2_sftp_readdir_ex", c_int, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p)


class Session:
    def __init__(self, request):
        init(0)
        self.sock = socket.socket()
        self.sock.bind((request["bind"], 0))
        self.sock.connect((request["host"], request["port"]))
        self.handle = new_session(None, None, None, None)
        self.check(handshake(self.handle, self.sock.fileno()), "handshake")
        user = request["user"].encode()
        if request["auth"] == "password":
            word = request["password"].encode()
            self.check(auth_password(self.handle, user, len(user), word, len(word), None), "password")
        elif request["auth"] == "key":
            self.check(auth_key(self.handle, user, len(user), request["key"].encode() + b".pub", request["key"].encode(), None), "publickey")
        elif auth_list(self.handle, user, len(user)) is None and authenticated(self.handle):
            pass  # userauth_list() sends none, and answers NULL when that was enough
        if not authenticated(self.handle):
            raise RuntimeError("not authenticated")

    def check(self, result, what):
        if result is None or result < 0:
            text = c_char_p()
            number = last_error(self.handle, byref(text), None, 0)
            raise RuntimeError(f"{what}: {number} {(text.value or b'').decode(errors='replace')}")
        return result

    def channel(self):
        return self.check(open_channel(self.handle, b"session", 7, 2 << 20, 32768, None, 0), "channel")

    def start(self, handle, kind, text):
        self.check(startup(handle, kind, len(kind), text, len(text) if text is not None else 0), kind.decode())


class Channel:
    """Reads both streams without blocking; everything else may block."""

    def __init__(self, session, handle):
        self.session, self.handle = session, handle
        self.buffer = ctypes.create_string_buffer(1 << 16)

    def read(self):
        while True:
            set_blocking(self.session.handle, 0)
            try:
                for which in (0, 1):
                    n = read_ex(self.handle, which, self.buffer, len(self.buffer))
                    if n > 0:
                        return which, self.buffer.raw[:n]
                    if n != AGAIN:
                        self.session.check(n, "read")
                if is_eof(self.handle):
                    return None
            finally:
                set_blocking(self.session.handle, 1)
            select.select([self.session.sock], [], [])

    def write(self, data):
        while data:
            data = data[self.session.check(write_ex(self.handle, 0, data, len(data)), "write"):]

    def eof(self):
        self.session.check(send_eof(self.handle), "eof")

    def resize(self, cols, rows):
        self.session.check(resize_pty(self.handle, cols, rows, 0, 0), "resize")


def run(session, request):
    handle = session.channel()
    for name, value in (request.get("env") or {}).items():
        session.check(setenv(handle, name.encode(), len(name), value.encode(), len(value)), "env")
    if pty := request.get("pty"):
        # Modes as RFC 4254 section 8: VERASE is 3.
        modes = bytes([3]) + pty["verase"].to_bytes(4, "big") + b"\0" if "verase" in pty else b""
        session.check(request_pty(handle, pty["term"].encode(), len(pty["term"]), modes, len(modes), pty["cols"], pty["rows"], 0, 0), "pty")
    if request["command"] is None:
        session.start(handle, b"shell", None)
    else:
        session.start(handle, b"exec", request["command"].encode())
    answer = common.Script(Channel(session, handle), request).run()
    session.check(close(handle), "close")
    session.check(wait_closed(handle), "wait_closed")
    name, size = c_char_p(), c_size_t()
    exit_signal(handle, byref(name), byref(size), None, None, None, None)
    answer["signal"] = name.value.decode() if name.value else None
    answer["status"] = None if name.value else exit_status(handle)
    return answer


def local(session, request):
    host, port = request["target"]
    opened = [Channel(session, session.check(direct_tcpip(session.handle, host.encode(), port, b"127.0.0.1", 0), "forward")) for _ in range(request["count"])]
    common.ask_mirrors(request, opened)
    return {}


def remote(session, request):
    port = c_int()
    listener = session.check(forward_listen(session.handle, b"127.0.0.1", 0, byref(port), 16), "listen")
    common.told(request["port_file"], port.value)
    for _ in range(request["count"]):
        handle = session.check(forward_accept(listener), "accept")
        common.be_mirror(Channel(session, handle))
        session.check(close(handle), "close")
    return {}


def sftp(session, request):
    s, results = session.check(sftp_init(session.handle), "sftp"), []
    buffer = ctypes.create_string_buffer(1 << 16)

    def opened(path, flags, kind=0):
        return session.check(sftp_open(s, path.encode(), len(path), flags, 0o644, kind), f"open {path}")
    for what, *a in request["steps"]:
        if what == "put":
            f = opened(a[1], 0x2 | 0x8 | 0x10)
            with open(a[0], "rb") as source:
                while piece := source.read(1 << 18):
                    while piece:
                        piece = piece[session.check(sftp_write(f, piece, len(piece)), "write"):]
            session.check(sftp_close(f), "close")
        elif what == "get":
            f = opened(a[0], 0x1)
            with open(a[1], "wb") as target:
                while (n := session.check(sftp_read(f, buffer, len(buffer)), "read")) > 0:
                    target.write(buffer.raw[:n])
            session.check(sftp_close(f), "close")
        elif what == "symlink":
            # libssh2_sftp_symlink(sftp, orig, linkpath): sent in that order.
            session.check(sftp_symlink(s, a[0].encode(), len(a[0]), a[1].encode(), len(a[1]), 0), "symlink")
        elif what == "readlink":
            n = session.check(sftp_symlink(s, a[0].encode(), len(a[0]), ctypes.cast(buffer, c_void_p), len(buffer), 1), "readlink")
            results.append(buffer.raw[:n].decode())
        elif what == "ls":
            d, names = opened(a[0], 0, 1), []
            attributes = ctypes.create_string_buffer(256)
            while (n := session.check(sftp_readdir(d, buffer, len(buffer), None, 0, attributes), "readdir")) > 0:
                names.append(buffer.raw[:n].decode())
            session.check(sftp_close(d), "close")
            results.append(sorted(n for n in names if n not in (".", "..")))
    return {"results": results}


def channels(session, request):
    opened = []
    for _ in range(request["count"]):
        handle = session.channel()
        session.start(handle, b"exec", request["command"].encode())
        opened.append(Channel(session, handle))
    for i, c in enumerate(opened):
        c.write(f"line {i}\n".encode())
    results = []
    for c in opened:
        text = b""
        while (piece := c.read()) is not None:
            text += piece[1]
        results.append(text.decode())
    return {"results": results}


def serve(request):
    session = Session(request)
    answer = {"run": run, "sftp": sftp, "channels": channels, "local": local, "remote": remote}[request["do"]](session, request)
    disconnect(session.handle, 11, b"done", b"")
    return answer


if __name__ == "__main__":
    common.main(serve)
