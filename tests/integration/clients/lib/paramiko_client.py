"""paramiko behind the interface of common.py."""
import logging
import select
import socket
import warnings

warnings.filterwarnings("ignore")
import paramiko

import common


class Counter(logging.Handler):
    """paramiko tells of key exchanges in its log only."""
    count = 0

    def emit(self, record):
        self.count += "Switch to new keys" in record.getMessage()


COUNTER = Counter(logging.DEBUG)


class Channel:
    def __init__(self, channel):
        self.channel = channel
        self.write, self.eof = channel.sendall, channel.shutdown_write

    def read(self):
        c = self.channel
        while True:
            over = c.eof_received or c.closed
            if c.recv_ready():
                return 0, c.recv(1 << 16)
            if c.recv_stderr_ready():
                return 1, c.recv_stderr(1 << 16)
            if over:
                return None
            select.select([c], [], [])  # readable by data of either stream, and by the end

    def resize(self, cols, rows):
        self.channel.resize_pty(cols, rows)


def connect(request):
    sock = socket.socket()
    sock.bind((request["bind"], 0))
    sock.connect((request["host"], request["port"]))
    logger = logging.getLogger("paramiko")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(COUNTER)
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    how = dict(sock=sock, allow_agent=False, look_for_keys=False)
    if request["auth"] == "password":
        client.connect(request["host"], request["port"], request["user"], password=request["password"], **how)
    elif request["auth"] == "key":
        client.connect(request["host"], request["port"], request["user"], key_filename=request["key"], **how)
    else:
        # SSHClient has no way to log in without a secret; its Transport has.
        transport = paramiko.Transport(sock)
        transport.start_client()
        transport.auth_none(request["user"])
        client._transport = transport
    return client


def serve(request):
    client = connect(request)
    transport = client.get_transport()
    if request.get("rekey"):
        transport.packetizer.REKEY_BYTES = request["rekey"]
    if request["do"] == "run":
        raw = transport.open_session()
        for name, value in (request.get("env") or {}).items():
            raw.set_environment_variable(name, value)
        if pty := request.get("pty"):
            raw.get_pty(pty["term"], pty["cols"], pty["rows"])
        if request.get("agent"):
            paramiko.agent.AgentRequestHandler(raw)  # of SSH_AUTH_SOCK
        if request["command"] is None:
            raw.invoke_shell()
        else:
            raw.exec_command(request["command"])
        answer = common.Script(Channel(raw), request, transport.renegotiate_keys).run()
        answer["status"] = raw.recv_exit_status()
        answer["rekeys"] = COUNTER.count - 1
    elif request["do"] == "sftp":
        sftp, results = client.open_sftp(), []
        for what, *a in request["steps"]:
            if what == "put":
                sftp.put(*a)
            elif what == "get":
                sftp.get(*a)
            elif what == "symlink":
                sftp.symlink(*a)
            elif what == "readlink":
                results.append(sftp.readlink(a[0]))
            elif what == "ls":
                results.append(sorted(sftp.listdir(a[0])))
        answer = {"results": results}
    elif request["do"] == "channels":
        opened = []
        for _ in range(request["count"]):
            raw = transport.open_session()
            raw.exec_command(request["command"])
            opened.append(raw)
        results = []
        for i, raw in enumerate(opened):
            raw.sendall(f"line {i}\n".encode())
        for raw in opened:
            results.append(raw.makefile("rb").read().decode())
        answer = {"results": results}
    elif request["do"] == "local":
        opened = [Channel(transport.open_channel("direct-tcpip", tuple(request["target"]), ("127.0.0.1", 0))) for _ in range(request["count"])]
        common.ask_mirrors(request, opened)
        answer = {"rekeys": COUNTER.count - 1}
    elif request["do"] == "remote":
        common.told(request["port_file"], transport.request_port_forward("127.0.0.1", 0))
        for _ in range(request["count"]):
            incoming = transport.accept(60)
            common.be_mirror(Channel(incoming))
            incoming.close()
        answer = {"rekeys": COUNTER.count - 1}
    client.close()
    return answer


if __name__ == "__main__":
    common.main(serve)
