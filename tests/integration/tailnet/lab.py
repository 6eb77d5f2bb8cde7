"""A real tailnet (tests/lab/tailnet: Headscale, tailscaled, network namespaces) with posternd on its node "server"."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import pwd
import queue
import shutil
import subprocess
import sys
import tempfile
import threading

import pytest

from harness import BIN, IS_ROOT, ROOT, SLACK, Accounts, Stack, merge, new_stack, wait_until

SCRIPT = ROOT / "tests/lab/tailnet"
TICKER = pathlib.Path(__file__).with_name("ticker.py")
LOGIN = "postern.internal/cap/login"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str | None:
    """Why there can be no tailnet here; None: there can."""
    if not IS_ROOT:
        return "needs root, for network namespaces"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    for name in ("ip", "iptables"):
        if not shutil.which(name):
            return f"needs {name}"
    if why := os.environ.get("POSTERN_NO_LAB"):
        return why
    built = subprocess.run([SCRIPT, "build"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return None if built.returncode == 0 else "Headscale and tailscaled could not be built: " + (built.stderr.strip().splitlines() or ["?"])[-1]


class Lab:
    """`tailnet` with a folder of its own. Nodes' owners as the script names them."""

    def __init__(self, nodes: str, policy: dict, *more: str):
        self._sweep()
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="tn-", dir="/tmp"))
        self.dir.chmod(0o755)
        (self.dir / "owner").write_text(str(os.getpid()))
        self.set_file(policy)
        try:
            self("up", "--nodes", nodes, "--policy", self.dir / "policy.json", "--batch-ms", "50", *more, timeout=120)
        except AssertionError:
            self.down()
            raise

    def __call__(self, verb: str, *words, timeout: float = 60) -> str:
        done = subprocess.run([SCRIPT, verb, self.dir, *map(str, words)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout * SLACK)
        assert done.returncode == 0, f"tailnet {verb} {words}: {done.stderr}{done.stdout}"
        return done.stdout

    def set_file(self, policy: dict) -> None:
        (self.dir / "policy.json").write_text(json.dumps(policy, indent=1))

    def set_policy(self, policy: dict) -> None:
        """In force at the control server when it returns; the nodes hear of it within about 0.1 s."""
        self.set_file(policy)
        self("policy", self.dir / "policy.json")

    def status(self) -> dict:
        return json.loads(self("status"))

    def node_ids(self) -> dict[str, str]:
        return {n["given_name"]: str(n["id"]) for n in json.loads(self("hs", "-o", "json", "nodes", "list"))}

    def ip(self, node: str) -> str:
        return self("ip", node).strip()

    def socket(self, node: str) -> str:
        return str(self.dir / f"run/{node}.sock")

    def inside(self, node: str) -> list[str]:
        """Words that run a program in a node's network namespace."""
        return ["ip", "netns", "exec", self.namespace(node)]

    def namespace(self, node: str) -> str:
        return f"pn-{hashlib.sha256(str(self.dir).encode()).hexdigest()[:8]}-{node}"

    def tailscaled(self, node: str) -> int:
        return self.status()["nodes"][node]["pid"]

    def start_tailscaled(self, node: str) -> subprocess.Popen:
        """Another one in the place of one that was ended, as `up` starts it."""
        built = subprocess.run([SCRIPT, "build"], capture_output=True, text=True, check=True).stdout.strip()
        with open(self.dir / f"{node}.log", "ab") as log:
            return subprocess.Popen(
                [*self.inside(node), f"{built}/tailscaled", "--no-logs-no-support", "--tun=tailscale0", "--port=41641", f"--socket={self.socket(node)}", f"--statedir={self.dir}/run/{node}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "TS_NO_LOGS_NO_SUPPORT": "true", "TS_DEBUG_USE_DERP_HTTP": "true", "TS_DISABLE_PORTMAPPER": "true"})

    def down(self) -> None:
        subprocess.run([SCRIPT, "down", self.dir], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        shutil.rmtree(self.dir, ignore_errors=True)

    @staticmethod
    def _sweep():
        """What a killed run left."""
        for folder in pathlib.Path("/tmp").glob("tn-*"):
            try:
                if not os.path.exists(f"/proc/{int((folder / 'owner').read_text())}"):
                    subprocess.run([SCRIPT, "down", folder], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
                    shutil.rmtree(folder, ignore_errors=True)
            except (OSError, ValueError):
                continue


class Lines:
    """What a program prints, line by line, without waiting for ever."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.seen, self._queue = process, [], queue.Queue()

        def read():
            for line in process.stdout:
                self._queue.put(line.decode(errors="replace").rstrip("\n"))
        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()

    def take(self) -> list[str]:
        while not self._queue.empty():
            self.seen.append(self._queue.get())
        return self.seen

    def to_the_end(self, seconds: float = 15) -> list[str]:
        """All it prints until it is gone. A process that is gone has not been read to its end yet."""
        self.process.wait(seconds * SLACK)
        self._reader.join(seconds * SLACK)
        assert not self._reader.is_alive(), "something holds its output open"
        return self.take()

    def wait_for(self, text: str, seconds: float = 15) -> None:
        wait_until(lambda: text in self.take(), f"{text!r} from {self.process.args[-4:]}", seconds)


class TailnetStack(Stack):
    """posternd in the server's namespace, listening where the network's own addresses are. Clients run as users with an empty home on other nodes.

    Plain `ssh USER@server`: their ~/.ssh/config names `postern known-hosts`, as docs/SETTINGS.md recommends, and nothing else.
    """

    def __init__(self, accounts: Accounts, lab: Lab, posternd=None, policy=None):
        self.lab = lab
        self.people: dict[str, str] = {}
        super().__init__(accounts, posternd=posternd, policy=policy, start=("posternd",))
        self.posternd.prefix = lab.inside("server")
        self.server = "server"

    def _posternd_defaults(self) -> dict:
        settings = super()._posternd_defaults()
        settings["listen"] = {"port": 22}
        settings["identity"] = {"provider": "tailscaled"}
        settings["tailscaled"] = {"socket": self.lab.socket("server"), "timeout": "1s"}
        settings["limits"] = {"penalty_sources": 0}
        return settings

    def configure(self, more: dict) -> None:
        """Other settings, with a start anew."""
        self.posternd.stop()
        self._write("posternd.toml", merge(self._posternd_defaults(), more))

    @property
    def port(self) -> int:
        return 22

    def learn_host_key(self) -> None:
        pass  # the network vouches for it

    def person(self, node: str) -> str:
        """The local user who sits at a node."""
        if node not in self.people:
            name = self.people[node] = self.accounts.new_user()
            home = pathlib.Path(pwd.getpwnam(name).pw_dir)
            (home / ".ssh").mkdir(mode=0o700)
            (home / ".ssh/config").write_text(f"Host *\n  KnownHostsCommand {BIN}/postern known-hosts --tailscaled {self.lab.socket(node)} %H\n")
            for path in (home / ".ssh", home / ".ssh/config"):
                os.chown(path, pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_gid)
        return self.people[node]

    def on(self, node: str, *words) -> list[str]:
        """Words that run a program at a node, as the one who sits there."""
        user = pwd.getpwnam(self.person(node))
        return [*self.lab.inside(node), "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "env", "-i", f"HOME={user.pw_dir}", f"PATH={PATH}", "TERM=xterm",
                *map(str, words)]

    def ssh_from(self, node: str, *words, user: str | None = None, timeout: float = 30) -> subprocess.CompletedProcess:
        return subprocess.run(self.on(node, "ssh", "-o", "BatchMode=yes", f"{user or self.user}@server", *words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              timeout=timeout * SLACK, cwd="/")

    def hold(self, words: list[str], name: str = "") -> Lines:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/", start_new_session=True)
        self.clients.append(process)
        return Lines(process)

    def ticker(self, node: str, *words) -> Lines:
        return self.hold([*self.lab.inside(node), sys.executable, str(TICKER), *map(str, words)])

    def live(self, node: str) -> list[dict]:
        """Connections from a node, by its name, as `postern sessions ls` has them."""
        return [s for s in map(json.loads, self.postern("sessions", "ls", "--json").text.splitlines()) if s["node"] == node]


def grants(**more) -> dict:
    """All reach all; alice and the node ci hold login rules on the server, as app grants."""
    return {"tagOwners": {t: ["alice@example.com"] for t in ("tag:server", "tag:ci", "tag:other")}, "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}], **more}


def login_grant(src: str, *users: str, **more) -> dict:
    return {"src": [src], "dst": ["tag:server"], "app": {LOGIN: [{"action": "accept", "users": list(users), **more}]}}


@contextlib.contextmanager
def network(accounts: Accounts, nodes: str, *more: str):
    """A tailnet with posternd on "server" and its rules in app grants: alice's devices as one user, the node ci as another. `stack.base`: that policy."""
    if why := missing():
        pytest.skip(why)
    policy = grants()
    policy["grants"] += [login_grant("alice@example.com", accounts.user), login_grant("tag:ci", accounts.other)]
    lab = Lab(nodes, policy, *more)
    stack = None
    try:
        stack = new_stack(accounts, kind=TailnetStack, lab=lab, posternd={"policy": {"source": ["grants"]}})
        stack.base = policy
        stack.start()
        yield stack
    finally:
        if stack:
            stack.stop()
        lab.down()
