"""A server whose tailscaled has no TUN device, as in many containers: peers come from 127.0.0.1, by tailscaled's proxy."""
import pwd
import re
import subprocess
import sys

import pytest

from harness import SLACK, wait_until
from tailnet.lab import network


@pytest.fixture(scope="module")
def userspace(accounts):
    with network(accounts, "server,alice-laptop,bob-laptop,ci", "--userspace", "server") as stack:
        yield stack


def test_peers_are_told_apart_behind_tailscaleds_proxy_and_lose_access_when_the_grant_goes(userspace):
    stack = userspace
    assert stack.posternd.ready["listening"] == ["127.0.0.1:22"]
    done = stack.ssh_from("alice-laptop", 'echo "$POSTERN_USER $POSTERN_NODE"')
    assert done.stdout == "alice@example.com alice-laptop\n", done
    refused = stack.ssh_from("bob-laptop", "true")
    assert refused.returncode == 255 and "does not permit" in refused.stderr, refused

    live = stack.hold(stack.on("alice-laptop", "ssh", "-o", "BatchMode=yes", f"{stack.user}@server", "echo up; exec sleep 1000"))
    live.wait_for("up")
    stack.lab.set_policy({**stack.base, "grants": [g for g in stack.base["grants"] if g["src"] != ["alice@example.com"]]})
    assert any("Access revoked." in line for line in live.to_the_end()), live.seen
    stack.lab.set_policy(stack.base)
    wait_until(lambda: stack.ssh_from("alice-laptop", "true").returncode == 0, "the grant is back", 15, every=0.2)


def test_who_is_on_the_machine_itself_is_nobody(userspace):
    stack = userspace
    done = subprocess.run(stack.on("server", "ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", f"{stack.user}@127.0.0.1", "true"), stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=30 * SLACK, cwd="/")
    assert done.returncode == 255 and "does not know 127.0.0.1" in done.stderr, done


ATTACK = """
import socket, sys
port, user = int(sys.argv[1]), sys.argv[2]
sock = socket.socket()
# connect(2) shares a port between destinations. IP_LOCAL_PORT_RANGE (Linux 6.3); on any kernel who has bound all other ports of the range gets it as well.
sock.setsockopt(socket.IPPROTO_IP, 51, (port << 16 | port).to_bytes(4, "little"))
sock.connect(("127.0.0.1", 22))
print("port", sock.getsockname()[1], flush=True)
import paramiko
try:
    transport = paramiko.Transport(sock); transport.start_client(timeout=20); transport.auth_none(user)
    print("in", flush=True)
except Exception as e:
    print("refused", e, flush=True)
"""


def test_a_user_of_the_server_cannot_borrow_the_port_of_a_peers_other_connection(userspace):
    stack = userspace
    service = stack.hold([*stack.lab.inside("server"), sys.executable, "-c",
                          "import socket\ns = socket.create_server(('127.0.0.1', 9000))\nprint('listens', flush=True)\nkept = []\nwhile True: kept.append(s.accept())"])
    service.wait_for("listens")
    client = stack.hold([*stack.lab.inside("alice-laptop"), sys.executable, "-c",
                         f"import socket, time\ns = socket.create_connection(('{stack.lab.ip('server')}', 9000))\nprint('connected', flush=True)\ntime.sleep(1000)"])
    client.wait_for("connected")

    def port():
        shown = subprocess.run([*stack.lab.inside("server"), "ss", "-Htn", "dst", "127.0.0.1:9000"], capture_output=True, text=True).stdout
        found = re.search(r"127\.0\.0\.1:(\d+)\s+127\.0\.0\.1:9000", shown)
        return found and found[1]
    taken = wait_until(port, "tailscaled's connection", 20)
    eve = pwd.getpwnam(stack.accounts.new_user())
    done = subprocess.run([*stack.lab.inside("server"), "setpriv", f"--reuid={eve.pw_uid}", f"--regid={eve.pw_gid}", "--clear-groups", "/usr/bin/python3", "-c", ATTACK, taken, stack.user],
                          capture_output=True, text=True, timeout=120 * SLACK, cwd="/")
    assert f"port {taken}\n" in done.stdout, done
    assert "refused" in done.stdout and "in\n" not in done.stdout, done
    assert "event=connection_refused" in stack.posternd.log() and "not_the_networks_proxy" in stack.posternd.log()
    assert stack.ssh_from("alice-laptop", "true").returncode == 0


def test_one_peer_that_holds_many_connections_keeps_no_other_out(userspace):
    stack = userspace
    held = stack.hold([*stack.lab.inside("bob-laptop"), sys.executable, "-c",
                       f"import socket, time\nkept = [socket.create_connection(('{stack.lab.ip('server')}', 22)) for _ in range(110)]\nfor k in kept: k.recv(1)\nprint('held', flush=True)\ntime.sleep(1000)"])
    held.wait_for("held")
    done = stack.ssh_from("alice-laptop", "true")
    assert done.returncode == 0, done
