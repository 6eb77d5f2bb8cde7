"""Postern on plain WireGuard: wireguard-go in two network namespaces, names of public keys from a file."""
import base64
import json
import os
import pathlib
import pwd
import re
import socket
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from harness import IS_ROOT, ROOT, SLACK, Stack, _run, new_stack, wait_until
from tailnet.lab import TailnetStack

PROGRAM = ROOT / "build/tools/clients/go/wireguard-go"
CLIENT = ROOT / "build/tools/clients/go/client"
SERVER, ALICE, CAROL = "10.77.0.1", "10.77.0.2", "10.77.0.3"
RAW = (serialization.Encoding.Raw,)


class Key:
    def __init__(self):
        private = X25519PrivateKey.generate()
        self.private = private.private_bytes(*RAW, serialization.PrivateFormat.Raw, serialization.NoEncryption()).hex()
        public = private.public_key().public_bytes(*RAW, serialization.PublicFormat.Raw)
        self.public, self.text = public.hex(), base64.b64encode(public).decode()


class Machine:
    """A namespace with wireguard-go, on a cable to the others."""

    def __init__(self, net, name: str, number: int, addresses: list[str]):
        self.net, self.name, self.key = net, name, Key()
        self.namespace, self.interface = f"{net.prefix}-{name}", f"w{name[0]}{net.tag}"
        self.outside = f"192.168.79.{number}"
        _run("ip", "netns", "add", self.namespace)
        _run("ip", "-n", self.namespace, "link", "set", "lo", "up")
        if name == "server":
            _run("ip", "-n", self.namespace, "link", "add", "eth0", "type", "bridge")
        else:
            hub = net.machines["server"].namespace
            _run("ip", "-n", hub, "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
            _run("ip", "-n", hub, "link", "set", f"v{number}", "master", "eth0", "up")
        _run("ip", "-n", self.namespace, "addr", "add", f"{self.outside}/24", "dev", "eth0")
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "up")
        self.process = subprocess.Popen(["ip", "netns", "exec", self.namespace, PROGRAM, "--foreground", self.interface], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        wait_until(lambda: os.path.exists(self.socket), "wireguard-go serves")
        self.set(f"private_key={self.key.private}", "listen_port=51820")
        for address in addresses:
            _run("ip", "-n", self.namespace, "addr", "add", f"{address}/24", "dev", self.interface)
        _run("ip", "-n", self.namespace, "link", "set", self.interface, "up")

    @property
    def socket(self) -> str:
        return f"/var/run/wireguard/{self.interface}.sock"

    def set(self, *lines: str) -> None:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(10)
            s.connect(self.socket)
            s.sendall(("set=1\n" + "\n".join(lines) + "\n\n").encode())
            assert b"errno=0" in s.recv(4096)

    def peer(self, other: "Machine", *allowed: str) -> None:
        self.set(f"public_key={other.key.public}", f"endpoint={other.outside}:51820", "replace_allowed_ips=true", *(f"allowed_ip={a}" for a in allowed))

    def remove(self, other: "Machine") -> None:
        self.set(f"public_key={other.key.public}", "remove=true")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        subprocess.run(["ip", "netns", "del", self.namespace], stderr=subprocess.DEVNULL)


class Net:
    """What TailnetStack wants of a lab."""

    def __init__(self, tag: str):
        self.tag, self.prefix, self.machines = tag, f"pw-{tag}", {}

    def inside(self, node: str) -> list[str]:
        return ["ip", "netns", "exec", self.machines[node].namespace]

    def down(self) -> None:
        for machine in reversed(self.machines.values()):
            machine.stop()


class WireguardStack(TailnetStack):
    def _posternd_defaults(self) -> dict:
        settings = Stack._posternd_defaults(self)
        settings["listen"], settings["limits"] = {"port": 22}, {"penalty_sources": 0}
        settings["identity"] = {"provider": "wireguard"}
        settings["wireguard"] = {"interface": self.lab.machines["server"].interface, "file": self.dir / "wireguard.toml", "poll": "100ms", "timeout": "1s"}
        return settings

    def person(self, node: str) -> str:
        if node not in self.people:
            name = self.people[node] = self.accounts.new_user()
            home = pathlib.Path(pwd.getpwnam(name).pw_dir)
            (home / ".ssh").mkdir(mode=0o700)
            (home / ".ssh/config").write_text("Host *\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n")
            for path in (home / ".ssh", home / ".ssh/config"):
                os.chown(path, pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_gid)
        return self.people[node]

    def names(self, *peers: str) -> None:
        """Replaces the file as an editor does."""
        new = self.dir / "wireguard.new"
        new.write_text('[self]\nname = "server"\ntags = ["tag:server"]\n' + "".join(peers))
        new.rename(self.dir / "wireguard.toml")

    def peer(self, machine: str, who: str, more: str = "") -> str:
        return f'[[peer]]\npublic_key = "{self.lab.machines[machine].key.text}"\nname = "{machine}-laptop"\n{who}\n{more}\n'

    def ssh_from(self, node, *words, user=None, timeout=30, bind=None):
        return subprocess.run(self.on(node, "ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", *(["-b", bind] if bind else []), f"{user or self.user}@{SERVER}", *words), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=timeout * SLACK, cwd="/")


@pytest.fixture(scope="module")
def wireguard(accounts):
    if not IS_ROOT or not os.path.exists("/dev/net/tun"):
        pytest.skip("needs root and /dev/net/tun")
    if not PROGRAM.exists():
        pytest.skip("no wireguard-go: scripts/fetch-clients builds it where there is Go")
    os.makedirs("/var/run/wireguard", mode=0o755, exist_ok=True)
    net = Net(accounts.user[-5:])
    stack = None
    try:
        net.machines["server"] = Machine(net, "server", 1, [SERVER])
        # carol's machine also has an address of a network behind it.
        net.machines["alice"] = Machine(net, "alice", 2, [ALICE])
        net.machines["carol"] = Machine(net, "carol", 3, [CAROL, "10.78.0.5"])
        for name, address in (("alice", [f"{ALICE}/32"]), ("carol", [f"{CAROL}/32", "10.78.0.0/24"])):
            net.machines["server"].peer(net.machines[name], *address)
            net.machines[name].peer(net.machines["server"], f"{SERVER}/32")
        _run("ip", "-n", net.machines["server"].namespace, "route", "add", "10.78.0.0/24", "dev", net.machines["server"].interface)
        stack = new_stack(accounts, kind=WireguardStack, lab=net)
        stack.server = SERVER
        stack.names(stack.peer("alice", 'user = "alice@example.com"'))
        stack.start()
        yield stack
    finally:
        if stack:
            stack.stop()
        net.down()


def alice(stack) -> str:
    return stack.peer("alice", 'user = "plain@example.com"')


def live_ones(stack):
    session = stack.hold(stack.on("alice", "ssh", "-tt", "-o", "BatchMode=yes", f"{stack.user}@{SERVER}", "echo up; exec sleep 1000"))
    idle = stack.hold(stack.on("alice", "ssh", "-N", "-o", "BatchMode=yes", f"{stack.user}@{SERVER}"))
    wait_until(lambda: any("up" in line for line in session.take()) and len(stack.live("alice-laptop")) == 2, "both are in")
    return session, idle


def cut(stack):
    wait_until(lambda: not stack.live("alice-laptop") and not stack.processes_of(stack.user), "nothing of hers is left", 5)


def restored(stack):
    net = stack.lab
    stack.names(alice(stack))
    net.machines["server"].peer(net.machines["alice"], f"{ALICE}/32")
    wait_until(lambda: stack.ssh_from("alice", "true").returncode == 0, "alice may log in again", 15, every=0.2)


def test_a_peer_logs_in_by_the_name_of_its_public_key_on_the_interfaces_own_address(wireguard):
    stack = wireguard
    restored(stack)
    assert stack.posternd.ready["listening"] == [f"{SERVER}:22"]
    done = stack.ssh_from("alice", 'echo "$POSTERN_USER $POSTERN_NODE $SSH_CONNECTION"')
    assert done.stdout.split()[:3] == ["plain@example.com", "alice-laptop", ALICE], done
    refused = stack.ssh_from("carol", "true")
    assert refused.returncode == 255 and "does not know" in refused.stderr, refused


def test_who_comes_from_behind_a_peer_is_a_stranger_unless_its_network_is_named(wireguard):
    stack = wireguard
    stack.names(alice(stack), stack.peer("carol", 'user = "plain@example.com"'))
    wait_until(lambda: stack.ssh_from("carol", "true", bind=CAROL).returncode == 0, "carol's name is there", 15, every=0.2)
    assert stack.ssh_from("carol", "true", bind="10.78.0.5").returncode == 255
    stack.names(alice(stack), stack.peer("carol", 'user = "plain@example.com"', 'networks = ["10.78.0.0/24"]'))
    wait_until(lambda: stack.ssh_from("carol", "true", bind="10.78.0.5").returncode == 0, "her network is named", 15, every=0.2)


def test_removing_the_peer_cuts_what_it_has_open(wireguard):
    stack = wireguard
    restored(stack)
    live_ones(stack)
    stack.lab.machines["server"].remove(stack.lab.machines["alice"])
    cut(stack)
    restored(stack)


def test_another_key_at_the_same_address_is_another_node(wireguard):
    stack = wireguard
    restored(stack)
    live_ones(stack)
    # The address is carol's now, and even called the same.
    stack.lab.machines["server"].peer(stack.lab.machines["carol"], f"{CAROL}/32", f"{ALICE}/32")
    cut(stack)
    stack.lab.machines["server"].peer(stack.lab.machines["carol"], f"{CAROL}/32")
    restored(stack)


def test_taking_the_name_away_cuts_too_and_a_file_with_a_mistake_does_not(wireguard):
    stack = wireguard
    restored(stack)
    session, _ = live_ones(stack)
    since = stack.posternd.log_size()
    stack.names("[[peer]]\nname = \"x\"\nuser = \"x@example.com\"\npublic_key = 7\n")
    assert "wireguard.toml:7:14: peer[0].public_key" in stack.posternd.wait_log("event=wireguard_file_kept.*", since=since)[0]
    assert len(stack.live("alice-laptop")) == 2
    stack.names()
    cut(stack)
    wait_until(lambda: any("Access revoked." in line for line in session.take()), "she is told")
    restored(stack)


def test_a_network_that_changes_while_many_are_cut_saves_none_of_them(wireguard):
    """They are cut a few at a time, so there is a while in which the network can change again."""
    stack, many = wireguard, 300
    restored(stack)
    connections = {"Host": SERVER, "Port": 22, "User": stack.user, "Groups": [{"Bind": ALICE, "Kind": "none", "Count": many}]}
    holder = subprocess.Popen([*stack.lab.inside("alice"), CLIENT, "many", json.dumps(connections)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    server, added = stack.lab.machines["server"], []
    try:
        assert json.loads(holder.stdout.readline()) == {"ready": many}
        since = stack.posternd.log_size()
        stack.names()
        stack.posternd.wait_log("event=revoked", since=since)

        def all_are_cut():
            added.append(Key().public)
            server.set(f"public_key={added[-1]}")
            return not stack.live("alice-laptop")
        wait_until(all_are_cut, "nothing of hers is left", 20, every=0.02)
        assert len(added) > 2 and len(re.findall("event=revoked connection=.* peer=", stack.posternd.log(since))) == many
    finally:
        holder.kill()
        holder.wait()
        for key in added:
            server.set(f"public_key={key}", "remove=true")
    restored(stack)


def test_wireguard_away_cuts_nobody_and_new_logins_are_refused(wireguard):
    """Its answers alone: wireguard-go itself is the tunnel."""
    stack = wireguard
    restored(stack)
    live_ones(stack)
    path = stack.lab.machines["server"].socket
    since = stack.posternd.log_size()
    os.rename(path, path + ".away")
    try:
        stack.posternd.wait_log("event=wireguard_away", since=since)
        refused = stack.ssh_from("alice", "true")
        assert refused.returncode == 255 and "try again" in refused.stderr.lower(), refused
        assert len(stack.live("alice-laptop")) == 2
    finally:
        os.rename(path + ".away", path)
    restored(stack)
    assert len(stack.live("alice-laptop")) >= 2 and "event=revoked" not in stack.posternd.log(since)
