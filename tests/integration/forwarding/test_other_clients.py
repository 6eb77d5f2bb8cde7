"""Port forwarding through clients that are not OpenSSH: -L and -R, half-close where the client has it."""
import contextlib
import os
import shutil
import socket
import subprocess
import threading

import pytest

from harness import SLACK, new_stack, wait_until
from test_forwarding import Server, both_ways, dial, echo, read_all


@pytest.fixture(scope="module")
def stack(accounts):
    made = new_stack(accounts, start=("relay", "posternd"))
    # plink cannot choose the address it comes from.
    made.write_nodes('[[node]]\nname = "loopback"\naddresses = ["127.0.0.1"]\nuser = "plain@example.com"\n')
    made.start()
    yield made
    made.stop()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def started(stack):
    running = []

    def start(command):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=stack.client_env())
        stack.clients.append(process)
        running.append(process)
        return process
    yield start
    for process in running:
        process.kill()
        process.wait(10)


def plink(stack, *more):
    keys = subprocess.run(["ssh-keygen", "-lf", stack.known_hosts], stdout=subprocess.PIPE, check=True).stdout.decode().split()
    return ["plink", "-batch", "-ssh", "-P", str(stack.port), "-l", stack.user, *(a for k in keys if k.startswith("SHA256:") for a in ("-hostkey", k)), "-N", *more, stack.server]


def dbclient(stack, *more):
    return ["dbclient", "-y", "-y", "-b", stack.plain_alice, "-p", str(stack.port), "-l", stack.user, "-N", *more, stack.server]


TOOLS = {"plink": plink, "dbclient": dbclient}


def reach(process, port) -> socket.socket:
    def attempt():
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(ConnectionRefusedError):
            return dial(("127.0.0.1", port))
    return wait_until(attempt, f"somebody listens at {port}", 20)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_forwards_both_ways(stack, started, tool):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    with Server(echo) as server:
        local, remote = free_port(), free_port()
        process = started(TOOLS[tool](stack, "-L", f"127.0.0.1:{local}:127.0.0.1:{server.port}", "-R", f"{remote}:127.0.0.1:{server.port}"))
        for port in (local, remote, local, remote):  # PuTTY's own requests must not be answered after a channel's end
            with reach(process, port) as sock:
                both_ways(sock, 2 << 20)
        assert process.poll() is None


def test_paramiko_forwards_both_ways(stack):
    import paramiko
    transport = paramiko.Transport(stack.connect(stack.plain_alice))
    transport.start_client(timeout=20 * SLACK)
    transport.auth_none(stack.user)
    try:
        with Server(echo) as server:
            channel = transport.open_channel("direct-tcpip", ("127.0.0.1", server.port), ("127.0.0.1", 1), timeout=20 * SLACK)
            channel.sendall(b"question" * 10_000)
            channel.shutdown_write()
            assert read_all(channel) == b"question" * 10_000
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            with pytest.raises(paramiko.ChannelException) as refused:
                transport.open_channel("direct-tcpip", ("127.0.0.1", closed.getsockname()[1]), ("127.0.0.1", 1), timeout=20 * SLACK)
            assert refused.value.code == 2
        port = transport.request_port_forward("127.0.0.1", 0)

        def answer():
            incoming = transport.accept(20 * SLACK)
            incoming.sendall(b"got " + read_all(incoming))
            incoming.close()
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with dial(("127.0.0.1", port)) as sock:
            sock.sendall(b"x" * 5000)
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b"got " + b"x" * 5000
        thread.join(10)
        transport.cancel_port_forward("127.0.0.1", port)
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) != 0, "nobody listens", 5)
    finally:
        transport.close()
