"""libssh's client side (Debian's shared library, by ctypes) behind the interface of common.py."""
import ctypes
import select
import socket
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p

import common

L = ctypes.CDLL("libssh.so.4")
OK, AGAIN = 0, -2
# enum ssh_options_e of libssh.h, 0.10
HOST, PORT, USER, BIND, PROCESS_CONFIG, REKEY_DATA = 0, 1, 4, 20, 38, 39
SIGNAL = CFUNCTYPE(None, c_void_p, c_void_p, c_char_p, c_int, c_char_p, c_char_p, c_void_p)
LOG = CFUNCTYPE(None, c_int, c_char_p, c_char_p, c_void_p)


def declare(name, result, *arguments):
    f = getattr(L, name)
    f.restype, f.argtypes = result, arguments
    return f


P = c_void_p
new = declare("ssh_new", P)
options_set = declare("ssh_options_set", c_int, P, c_int, P)
parse_config = declare("ssh_options_parse_config", c_int, P, c_char_p)
connect = declare("ssh_connect", c_int, P)
error = declare("ssh_get_error", c_char_p, P)
auth_none = declare("ssh_userauth_none", c_int, P, c_char_p)
auth_password = declare("ssh_userauth_password", c_int, P, c_char_p, c_char_p)
import_key = declare("ssh_pki_import_privkey_file", c_int, c_char_p, c_char_p, P, P, POINTER(P))
auth_key = declare("ssh_userauth_publickey", c_int, P, c_char_p, P)
channel_new = declare("ssh_channel_new", P, P)
open_session = declare("ssh_channel_open_session", c_int, P)
open_forward_unix = declare("ssh_channel_open_forward_unix", c_int, P, c_char_p, c_char_p, c_int)
request_env = declare("ssh_channel_request_env", c_int, P, c_char_p, c_char_p)
request_pty = declare("ssh_channel_request_pty_size", c_int, P, c_char_p, c_int, c_int)
change_pty = declare("ssh_channel_change_pty_size", c_int, P, c_int, c_int)
request_exec = declare("ssh_channel_request_exec", c_int, P, c_char_p)
request_shell = declare("ssh_channel_request_shell", c_int, P)
send_signal = declare("ssh_channel_request_send_signal", c_int, P, c_char_p)
poll_timeout = declare("ssh_channel_poll_timeout", c_int, P, c_int, c_int)
read_nonblocking = declare("ssh_channel_read_nonblocking", c_int, P, P, c_uint32, c_int)
write = declare("ssh_channel_write", c_int, P, c_char_p, c_uint32)
send_eof = declare("ssh_channel_send_eof", c_int, P)
is_eof = declare("ssh_channel_is_eof", c_int, P)
is_open = declare("ssh_channel_is_open", c_int, P)
exit_status = declare("ssh_channel_get_exit_status", c_int, P)
set_channel_callbacks = declare("ssh_set_channel_callbacks", c_int, P, P)
close = declare("ssh_channel_close", c_int, P)
disconnect = declare("ssh_disconnect", None, P)
open_forward = declare("ssh_channel_open_forward", c_int, P, c_char_p, c_int, c_char_p, c_int)
listen_forward = declare("ssh_channel_listen_forward", c_int, P, c_char_p, c_int, POINTER(c_int))
accept_forward = declare("ssh_channel_accept_forward", P, P, c_int, POINTER(c_int))
request_agent = declare("ssh_channel_request_auth_agent", c_int, P)
set_callbacks = declare("ssh_set_callbacks", c_int, P, P)
set_log_level = declare("ssh_set_log_level", c_int, c_int)
set_log_callback = declare("ssh_set_log_callback", c_int, P)
sftp_new = declare("sftp_new", P, P)
sftp_init = declare("sftp_init", c_int, P)
sftp_get_error = declare("sftp_get_error", c_int, P)
sftp_open = declare("sftp_open", P, P, c_char_p, c_int, c_uint32)
sftp_read = declare("sftp_read", ctypes.c_ssize_t, P, P, c_size_t)
sftp_write = declare("sftp_write", ctypes.c_ssize_t, P, c_char_p, c_size_t)
sftp_close = declare("sftp_close", c_int, P)
sftp_symlink = declare("sftp_symlink", c_int, P, c_char_p, c_char_p)
sftp_readlink = declare("sftp_readlink", c_char_p, P, c_char_p)


class Callbacks(ctypes.Structure):
    """struct ssh_channel_callbacks_struct of libssh/callbacks.h."""
    _fields_ = [("size", c_size_t), ("userdata", P), ("data", P), ("eof", P), ("close", P), ("signal", P), ("exit_status", P), ("exit_signal", SIGNAL),
                ("server_side", P * 9), ("write_wontblock", P)]


REKEYS = [-1]


@LOG
def count(_priority, _function, buffer, _data):
    REKEYS[0] += b"Received SSH_MSG_NEWKEYS" in buffer


class Session:
    def __init__(self, request):
        set_log_callback(ctypes.cast(count, P))
        set_log_level(3)
        self.handle = new()
        self.option(HOST, request["host"].encode())
        options_set(self.handle, PORT, ctypes.byref(c_int(request["port"])))
        self.option(USER, request["user"].encode())
        self.option(BIND, request["bind"].encode())
        if request.get("rekey"):
            options_set(self.handle, REKEY_DATA, ctypes.byref(c_uint64(request["rekey"])))
        options_set(self.handle, PROCESS_CONFIG, ctypes.byref(c_int(0)))
        self.check(connect(self.handle), "connect")
        if request["auth"] == "password":
            result = auth_password(self.handle, None, request["password"].encode())
        elif request["auth"] == "key":
            key = P()
            self.check(import_key(request["key"].encode(), None, None, None, ctypes.byref(key)), "key")
            result = auth_key(self.handle, None, key)
        else:
            result = auth_none(self.handle, None)
        if result != OK:
            raise RuntimeError(f"authentication: {result} {error(self.handle).decode()}")

    def option(self, which, text):
        options_set(self.handle, which, ctypes.cast(c_char_p(text), P))

    def check(self, result, what):
        if not result if what.endswith("?") else result is None or result < 0:
            raise RuntimeError(f"{what}: {error(self.handle).decode(errors='replace')}")
        return result

    def channel(self):
        handle = self.check(channel_new(self.handle), "channel")
        self.check(open_session(handle), "open")
        return handle


class Channel:
    def __init__(self, session, handle):
        self.session, self.handle = session, handle
        self.buffer = ctypes.create_string_buffer(1 << 16)
        self.signal_name, self.core = None, False
        self.agent = None

        @SIGNAL
        def signalled(_session, _channel, name, core, _text, _language, _data):
            self.signal_name, self.core = name.decode(), bool(core)
        # Kept as long as the channel lives.
        self.callbacks = Callbacks(size=ctypes.sizeof(Callbacks), exit_signal=signalled)
        set_channel_callbacks(handle, ctypes.byref(self.callbacks))

    def read(self):
        while True:
            for which in (0, 1):
                n = read_nonblocking(self.handle, self.buffer, len(self.buffer), which)
                if n > 0:
                    return which, self.buffer.raw[:n]
                if n == -1 and is_open(self.handle):
                    raise RuntimeError(f"read: {error(self.session.handle).decode()}")
            if is_eof(self.handle) or not is_open(self.handle):
                return None
            if self.agent:
                self.agent.carry()
            poll_timeout(self.handle, 50, 0)  # it watches one stream only: a short turn each

    def write(self, data):
        while data:
            data = data[self.session.check(write(self.handle, data, len(data)), "write"):]

    def eof(self):
        self.session.check(send_eof(self.handle), "eof")

    def resize(self, cols, rows):
        self.session.check(change_pty(self.handle, cols, rows), "resize")

    def signal(self, name):
        self.session.check(send_signal(self.handle, name.encode()), "signal")


def run(session, request):
    handle = session.channel()
    channel = Channel(session, handle)
    for name, value in (request.get("env") or {}).items():
        session.check(request_env(handle, name.encode(), value.encode()), "env")
    if pty := request.get("pty"):
        session.check(request_pty(handle, pty["term"].encode(), pty["cols"], pty["rows"]), "pty")
    if request.get("agent"):
        channel.agent = AgentForward(session, request["agent"])
        session.check(request_agent(handle), "agent")
    if request["command"] is None:
        session.check(request_shell(handle), "shell")
    else:
        session.check(request_exec(handle, request["command"].encode()), "exec")
    answer = common.Script(channel, request).run()
    status = exit_status(handle)  # waits for it
    answer["signal"], answer["core"] = channel.signal_name, channel.core
    answer["status"] = None if channel.signal_name else status
    close(handle)
    return answer


def local(session, request):
    opened = []
    for _ in range(request["count"]):
        handle = session.check(channel_new(session.handle), "channel")
        session.check(open_forward(handle, request["target"][0].encode(), request["target"][1], b"127.0.0.1", 0), "forward")
        opened.append(Channel(session, handle))
    common.ask_mirrors(request, opened)
    return {}


def remote(session, request):
    port = c_int()
    session.check(listen_forward(session.handle, b"127.0.0.1", 0, ctypes.byref(port)), "listen")
    common.told(request["port_file"], port.value)
    for _ in range(request["count"]):
        handle = session.check(accept_forward(session.handle, 60_000, ctypes.byref(port)), "accept?")
        common.be_mirror(Channel(session, handle))
        close(handle)
    return {}


AGENT = CFUNCTYPE(c_void_p, c_void_p, c_void_p)


class SessionCallbacks(ctypes.Structure):
    """struct ssh_callbacks_struct of libssh/callbacks.h, up to the agent's."""
    _fields_ = [("size", c_size_t), ("userdata", P), ("others", P * 5), ("agent", AGENT)]


class AgentForward:
    """The server's channel to our agent. libssh has no more than the callback that accepts it: the bytes are carried here."""

    def __init__(self, session, path):
        self.session, self.path, self.open = session, path, []

        @AGENT
        def asked(handle, _data):
            channel = channel_new(handle)
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.path)
            self.open.append((channel, sock))
            return channel
        self.callbacks = SessionCallbacks(size=ctypes.sizeof(SessionCallbacks), agent=asked)
        session.check(set_callbacks(session.handle, ctypes.byref(self.callbacks)), "callbacks")
        self.buffer = ctypes.create_string_buffer(1 << 16)

    def carry(self):
        for channel, sock in list(self.open):
            n = read_nonblocking(channel, self.buffer, len(self.buffer), 0)
            if n > 0:
                sock.sendall(self.buffer.raw[:n])
            if select.select([sock], [], [], 0)[0] and (data := sock.recv(1 << 16)):
                while data:
                    data = data[self.session.check(write(channel, data, len(data)), "write"):]
            if n < 0 or is_eof(channel) or not is_open(channel):
                close(channel)
                sock.close()
                self.open.remove((channel, sock))


def sftp(session, request):
    s, results = session.check(sftp_new(session.handle), "sftp_new"), []
    session.check(sftp_init(s), "sftp_init")
    buffer = ctypes.create_string_buffer(1 << 15)

    def good(value, what):
        if value is None or (isinstance(value, int) and value < 0):
            raise RuntimeError(f"{what}: sftp error {sftp_get_error(s)}, {error(session.handle).decode(errors='replace')}")
        return value
    for what, *a in request["steps"]:
        if what == "put":
            f = good(sftp_open(s, a[1].encode(), 0o1 | 0o100 | 0o1000, 0o644), "open")
            with open(a[0], "rb") as source:
                while piece := source.read(1 << 15):
                    while piece:
                        piece = piece[good(sftp_write(f, piece, len(piece)), "write"):]
            good(sftp_close(f), "close")
        elif what == "get":
            f = good(sftp_open(s, a[0].encode(), 0, 0), "open")
            with open(a[1], "wb") as target:
                while (n := good(sftp_read(f, buffer, len(buffer)), "read")) > 0:
                    target.write(buffer.raw[:n])
            good(sftp_close(f), "close")
        elif what == "symlink":
            good(sftp_symlink(s, a[0].encode(), a[1].encode()), "symlink")
        elif what == "readlink":
            results.append(good(sftp_readlink(s, a[0].encode()), "readlink").decode())
        else:
            raise NotImplementedError(what)
    return {"results": results}


def channels(session, request):
    opened = []
    for _ in range(request["count"]):
        handle = session.channel()
        session.check(request_exec(handle, request["command"].encode()), "exec")
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


def unix(session, request):
    handle = session.check(channel_new(session.handle), "channel")
    session.check(open_forward_unix(handle, request["path"].encode(), b"localhost", 0), "unix")
    return {}


def serve(request):
    session = Session(request)
    answer = {"run": run, "sftp": sftp, "channels": channels, "local": local, "remote": remote, "unix": unix}[request["do"]](session, request)
    answer["rekeys"] = REKEYS[0]
    disconnect(session.handle)
    return answer


if __name__ == "__main__":
    common.main(serve)
