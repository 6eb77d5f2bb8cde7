"""The clients of the matrix behind one interface, and what each of them cannot do.

    client.run(stack, "command", stdin=file, steps=[…], pty=Pty(…), env={…}, rekey=bytes, auth="password", …) -> Outcome
    client.start(stack, "command")     in the background, for what happens when it is killed
    client.sftp(stack, steps)          [("put", local, remote), ("get", remote, local), ("symlink", target, link)]
    client.channels(stack, n, "cmd")   n sessions of one connection at once
    with client.local(stack, target, n, data) / client.remote(stack, n) as f: …    forwardings: Forward

`steps` is what a person at the terminal does: ("expect", text), ("send", text), ("resize", cols, rows), ("signal", name).
Programs (ssh, plink, dbclient) are driven here, on a pty of ours where they want one; libraries by small programs (lib/, node/, go/)
that take the same request as JSON: lib/common.py says how.

`cannot` is part of the documentation: docs/CLIENTS.md is made of it (table.py), and a test keeps the two equal. No test is skipped silently:
what stands in `cannot` has no test, and a client that is not on this machine skips its tests with the reason.
"""
from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from clients.mirror import Mirror, ask
from harness import ROOT, SLACK, Stack, Terminal, wait_until

HERE = pathlib.Path(__file__).resolve().parent
TOOLS = ROOT / "build/tools/clients"
PYTHON = "/usr/bin/python3"  # the one that Debian's packages belong to

# What the tests look at, in the order of the table.
FEATURES = {
    "status": "exit status",
    "stderr": "stderr apart from stdout",
    "told of a signal": "is told that the program died of a signal",
    "signal": "sends a signal",
    "up": "16 MiB up, by sha256",
    "down": "16 MiB down, by sha256",
    "eof": "end of input, then more output",
    "shell": "shell without a terminal",
    "long": "100 KB command line",
    "pty": "terminal: size and TERM",
    "resize": "window change",
    "ctrl-c": "Ctrl-C",
    "modes": "terminal modes (erase)",
    "env": "environment variables",
    "sftp": "sftp put and get",
    "symlink": "sftp symlink",
    "channels": "many sessions at once in one connection",
    "-L": "`-L`: connections through the server",
    "-R": "`-R`: connections to a port of the server's",
    "agent": "agent forwarding",
    "rekey up": "rekeys while it sends",
    "rekey down": "rekeys while it receives",
    "server rekey up": "the server rekeys while it sends",
    "server rekey down": "the server rekeys while it receives",
    "server rekey -L": "the server rekeys under `-L` and `-R`",
    "killed": "kill -9 of the client ends the program",
    "none": "logs in with `none`",
    "password": "`password` first, any password",
    "empty password": "`password` first, empty",
    "key": "`publickey` first, any key",
}
# (client, feature) -> the bug of the server's that it meets. Its test is expected to fail, and turns red when the bug is mended.
BUGS: dict[tuple[str, str], str] = {}
ALWAYS_NONE = "always begins with `none`, and is in"


@dataclass
class Pty:
    term: str = "xterm-256color"
    cols: int = 111
    rows: int = 33
    verase: int | None = None

    def json(self):
        return {k: v for k, v in vars(self).items() if v is not None}


@dataclass
class Outcome:
    out: bytes = b""
    err: bytes = b""
    status: int | None = None
    signal: str | None = None
    rekeys: int = -1
    error: str = ""
    results: list = field(default_factory=list)


class Client:
    name = title = ""
    cannot: dict[str, str] = {}
    remarks: dict[str, str] = {}    # what works, with something to know
    signal_status = None            # exit status of a tool whose program died of TERM
    term = "xterm-256color"

    def missing(self) -> str | None:
        return None

    def can(self, feature: str) -> bool:
        assert feature in FEATURES
        return feature not in self.cannot

    def source(self, stack: Stack, recorded: bool) -> str:
        return stack.alice if recorded else stack.plain_alice

    def local(self, stack: Stack, target: tuple[str, int], count: int, data: bytes) -> list[bytes]:
        """`count` connections at once to a mirror at `target`, through the server: what each got back for `data`."""
        raise NotImplementedError

    def remote(self, stack: Stack, count: int, data: bytes) -> list[bytes]:
        """The server listens, this client is the mirror: what `count` connections, one after the other, got back for `data`."""
        raise NotImplementedError


def not_fetched(name: str) -> str:
    with contextlib.suppress(OSError):
        for line in (TOOLS / "missing").read_text().splitlines():
            what, _, why = line.partition("\t")
            if what == name:
                return why
    return "scripts/fetch-clients has not been run (scripts/test does it)"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---------------------------------------------------------------------------------------------------- programs

class Tool(Client):
    """A program for the command line."""

    def command(self, stack: Stack, command, *, recorded=False, pty=None, env=None, rekey=None, auth="none", **more) -> tuple[list[str], dict]:
        """Its command line and environment."""
        raise NotImplementedError

    def run(self, stack: Stack, command, *, stdin=None, stdout=None, steps=(), timeout=60, pty=None, **how) -> Outcome:
        line, environment = self.command(stack, command, pty=pty, **how)
        if pty:
            # A person's terminal has its erase character before the client starts.
            erase = ["sh", "-c", f"stty erase ^{chr(pty.verase + 64)}; exec \"$@\"", "sh"] if pty.verase else []
            with Terminal(erase + line, pty.rows, pty.cols, environment) as t:
                stack.terminals.append(t)
                for what, *a in steps:
                    if what == "expect":
                        t.read_until(re.escape(a[0]), timeout)
                    elif what == "send":
                        t.send(a[0])
                    elif what == "resize":
                        t.resize(a[1], a[0])
                status = t.wait(timeout)
                return Outcome(out=t.screen, status=status)
        assert all(what == "send" for what, *_ in steps), "without a terminal only input is sent"
        text = "".join(a[0] for _, *a in steps).encode()
        with contextlib.ExitStack() as files:
            source = files.enter_context(open(stdin, "rb")) if stdin else None
            target = files.enter_context(open(stdout, "wb")) if stdout else subprocess.PIPE
            feed = dict(input=text) if text else dict(stdin=source or subprocess.DEVNULL)
            done = subprocess.run(line, stdout=target, stderr=subprocess.PIPE, env=environment, timeout=timeout * SLACK, **feed)
        return Outcome(out=done.stdout or b"", err=self.without_noise(done.stderr), status=done.returncode, rekeys=self.count_rekeys(done.stderr))

    def start(self, stack: Stack, command, **how) -> subprocess.Popen:
        line, environment = self.command(stack, command, **how)
        process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        stack.clients.append(process)
        return process

    def forwarding(self, stack: Stack, arguments: list[str], agent=None) -> tuple[list[str], dict]:
        """Its command line for forwardings alone, with -L or -R as they stand in `arguments`."""
        line, environment = self.command(stack, None)
        return [*line[:-1], "-N", *arguments, line[-1]], environment

    @contextlib.contextmanager
    def forwards(self, stack, arguments, port):
        """Runs it until somebody listens at `port` of 127.0.0.1, and ends it afterwards."""
        line, environment = self.forwarding(stack, arguments)
        process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        stack.clients.append(process)

        def listens():
            assert process.poll() is None, process.communicate()
            with socket.socket() as s:
                return s.connect_ex(("127.0.0.1", port)) == 0
        try:
            wait_until(listens, f"somebody listens at {port}", 20)
            yield
            assert process.poll() is None, process.communicate()
        finally:
            process.kill()
            process.communicate()

    def local(self, stack, target, count, data):
        port = free_port()
        with self.forwards(stack, ["-L", f"127.0.0.1:{port}:{target[0]}:{target[1]}"], port):
            with ThreadPoolExecutor(count) as pool:
                return list(pool.map(lambda _: ask(("127.0.0.1", port), data), range(count)))

    def remote(self, stack, count, data):
        port = free_port()
        with Mirror() as mirror, self.forwards(stack, ["-R", f"{port}:127.0.0.1:{mirror.port}"], port):
            return [ask(("127.0.0.1", port), data) for _ in range(count)]

    def without_noise(self, err: bytes) -> bytes:
        return err

    def count_rekeys(self, err: bytes) -> int:
        return -1


class OpenSSH(Tool):
    name, title = "openssh", "OpenSSH 9.2 (Debian 12)"
    cannot = {
        "signal": "has no command for it (`~B` sends a break)",
        "password": ALWAYS_NONE,
        "empty password": ALWAYS_NONE,
        "key": ALWAYS_NONE,
    }
    remarks = {"told of a signal": "status 255, no name", "channels": "ControlMaster"}
    signal_status = 255

    def program(self, name: str) -> str:
        return name

    def missing(self):
        return None if shutil.which("ssh") else "package openssh-client is not installed"

    def command(self, stack, command, *, recorded=False, pty=None, env=None, rekey=None, auth="none", options=(), agent=None, **more):
        assert auth == "none"
        options = list(options)
        if agent:  # the first of an option counts, and the stack's command line says IdentityAgent=none
            options += [f"IdentityAgent={agent}", "ForwardAgent=yes"]
        if env:
            options.append("SetEnv " + " ".join(f'{k}="{v}"' for k, v in env.items()))
        if rekey:
            options += [f"RekeyLimit {rekey}", "LogLevel DEBUG1"]
        line = stack.ssh_command(command, bind=self.source(stack, recorded), tty=bool(pty), options=options)
        return [self.program("ssh")] + line[1:], stack.client_env({"TERM": pty.term} if pty else None)

    def count_rekeys(self, err):
        return err.count(b"SSH2_MSG_NEWKEYS received") - 1

    def sftp(self, stack, steps, timeout=60) -> Outcome:
        words = {"put": "put", "get": "get", "symlink": "ln -s"}
        batch = "".join(f"{words[what]} {a} {b}\n" for what, a, b in steps)
        options = [x for o in ["StrictHostKeyChecking=yes", f"UserKnownHostsFile={stack.known_hosts}", "BatchMode=yes", "IdentityFile=none",
                               f"BindAddress={stack.plain_alice}", "LogLevel=ERROR"] for x in ("-o", o)]
        done = subprocess.run([self.program("sftp"), "-q", "-F", "/dev/null", "-S", shutil.which(self.program("ssh")), *options, "-P", str(stack.port),
                               "-b", "-", f"{stack.user}@{stack.server}"],
                              input=batch.encode(), capture_output=True, env=stack.client_env(), timeout=timeout * SLACK)
        return Outcome(out=done.stdout, err=done.stderr, status=done.returncode, error=done.stderr.decode() if done.returncode else "")

    def channels(self, stack, count, command) -> Outcome:
        path = stack.dir / f"mux-{self.name}"
        line, environment = self.command(stack, None)
        master = subprocess.Popen(line[:-1] + ["-M", "-N", "-S", str(path), line[-1]], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL, env=environment)
        stack.clients.append(master)
        try:
            wait_until(path.exists, "the master's socket")
            one = [self.program("ssh"), "-F", "/dev/null", "-S", str(path), "-T", stack.server, command]
            opened = [subprocess.Popen(one, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) for _ in range(count)]
            stack.clients += opened
            # Each says that it is there before any is told its line.
            for process in opened:
                assert process.stdout.readline() == b"up\n"
            return Outcome(results=["up\n" + process.communicate(f"line {i}\n".encode(), timeout=60 * SLACK)[0].decode() for i, process in enumerate(opened)])
        finally:
            # Not by SIGTERM: ssh 9.2 misses it when it comes between its look at the flag and its poll(2), and sits there for ever.
            subprocess.run([self.program("ssh"), "-F", "/dev/null", "-S", str(path), "-O", "exit", stack.server], stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, timeout=10 * SLACK)
            with contextlib.suppress(subprocess.TimeoutExpired):
                master.wait(10 * SLACK)
            master.kill()
            master.wait()


class OpenSSHForky(OpenSSH):
    name, title = "openssh-forky", "OpenSSH of Debian forky (≥ 10.1)"

    def program(self, name):
        return str(TOOLS / f"{name}-forky")

    def missing(self):
        return None if (TOOLS / "ssh-forky").exists() else not_fetched("openssh-forky")


class Putty(Tool):
    """plink and psftp. They cannot choose their own address, so 127.0.0.1 is somebody in these stacks (test_matrix.py), recorded."""
    name, title = "putty", "PuTTY 0.78 (plink, psftp)"
    cannot = {
        "signal": "plink has no command for it",
        "symlink": "psftp has no command for it",
        "channels": "one session a connection, without a shared upstream",
        "password": ALWAYS_NONE,
        "empty password": ALWAYS_NONE,
        "key": ALWAYS_NONE,
    }
    remarks = {"told of a signal": "status 128, name on stderr with -v", "env": "saved session", "pty": "TERM by saved session",
               "rekey up": "saved session", "rekey down": "saved session"}
    signal_status = 128

    def missing(self):
        return None if shutil.which("plink") and shutil.which("psftp") else "package putty-tools is not installed"

    def source(self, stack, recorded):
        return "127.0.0.1"

    def home(self, stack, pty=None, env=None, rekey=None) -> tuple[list[str], dict]:
        """A home folder with a saved session, and the arguments that load it and accept the host key."""
        home = stack.dir / "putty"
        sessions = home / ".putty/sessions"
        sessions.mkdir(parents=True, exist_ok=True)
        lines = []
        if env:
            lines.append("Environment=" + ",".join(f"{k}={v}" for k, v in env.items()))
        if rekey:
            lines.append(f"RekeyBytes={rekey}")
        if pty:
            lines.append(f"TerminalType={pty.term}")
        name = f"s{len(list(sessions.iterdir()))}"
        (sessions / name).write_text("\n".join(lines + ["Protocol=ssh"]) + "\n")
        prints = subprocess.run(["ssh-keygen", "-l", "-f", stack.known_hosts], capture_output=True, text=True, check=True).stdout
        keys = [x for m in re.finditer(r"SHA256:\S+", prints) for x in ("-hostkey", m[0])]
        return ["-load", name, "-batch", "-P", str(stack.port), "-l", stack.user, *keys], stack.client_env({"HOME": str(home)})

    def command(self, stack, command, *, recorded=False, pty=None, env=None, rekey=None, auth="none", agent=None, **more):
        assert auth == "none"
        arguments, environment = self.home(stack, pty, env, rekey)
        if agent:
            arguments, environment = ["-A", *arguments], environment | {"SSH_AUTH_SOCK": str(agent)}
        line = ["plink", "-ssh", "-t" if pty else "-T", *(["-v"] if rekey else []), *arguments, stack.server]
        return line + ([command] if command is not None else []), environment

    def count_rekeys(self, err):
        # Its own only, and told of with -v.
        return err.count(b"Initiating key re-exchange") if b"Remote version:" in err else -1

    def sftp(self, stack, steps, timeout=60):
        arguments, environment = self.home(stack)
        batch = stack.dir / "putty/batch"
        batch.write_text("".join(f"{what} {a} {b}\n" for what, a, b in steps))
        done = subprocess.run(["psftp", *arguments, "-b", str(batch), stack.server], stdin=subprocess.DEVNULL, capture_output=True, env=environment,
                              timeout=timeout * SLACK)
        return Outcome(out=done.stdout, err=done.stderr, status=done.returncode, error=done.stderr.decode() if done.returncode else "")


class Dropbear(Tool):
    name, title = "dropbear", "Dropbear 2022.83 (dbclient)"
    cannot = {
        "told of a signal": "ends with status 0",
        "signal": "has no command for it",
        "long": "its own packets have at most 35,000 bytes",
        "env": "sends none",
        "sftp": "has no sftp of its own",
        "symlink": "has no sftp of its own",
        "channels": "one session a connection",
        "rekey up": "by itself after 1 GB or 8 h only",
        "rekey down": "by itself after 1 GB or 8 h only",
        "password": ALWAYS_NONE,
        "empty password": ALWAYS_NONE,
        "key": ALWAYS_NONE,
    }

    def missing(self):
        return None if shutil.which("dbclient") else "package dropbear-bin is not installed"

    def command(self, stack, command, *, recorded=False, pty=None, auth="none", agent=None, **more):
        assert auth == "none"
        # -y -y: takes any host key. HOME has no ~/.ssh of anybody's.
        line = ["dbclient", "-y", "-y", "-b", self.source(stack, recorded), "-p", str(stack.port), "-l", stack.user, "-t" if pty else "-T",
                *(["-A"] if agent else []), stack.server]
        more_env = ({"TERM": pty.term} if pty else {}) | ({"SSH_AUTH_SOCK": str(agent)} if agent else {})
        return line + ([command] if command is not None else []), stack.client_env(more_env)

    def without_noise(self, err):
        # A caution about -y -y, before anything of the session.
        return b"".join(line for line in err.splitlines(keepends=True) if not line.startswith((b"dbclient: Caution", b"Caution")) and line.strip())


# ---------------------------------------------------------------------------------------------------- libraries

class Library(Client):
    """A library in a small program that speaks common.py's JSON."""
    program: list[str] = []

    def request(self, stack, do, *, recorded=False, auth="none", pty=None, **more) -> dict:
        # A command of None is a shell.
        return {"host": stack.server, "port": stack.port, "bind": self.source(stack, recorded), "user": stack.user, "do": do, "auth": auth,
                "pty": pty.json() if pty else None, **{k: str(v) if isinstance(v, pathlib.Path) else v for k, v in more.items()}}

    def popen(self, stack, request) -> subprocess.Popen:
        agent = {"SSH_AUTH_SOCK": request["agent"]} if request.get("agent") else {}
        process = subprocess.Popen([*self.program, json.dumps(request)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env=stack.client_env(self.environment() | agent))
        stack.clients.append(process)
        return process

    def environment(self) -> dict:
        return {"PYTHONDONTWRITEBYTECODE": "1"}

    def ask(self, stack, request, timeout=60) -> Outcome:
        return self.answer(self.popen(stack, request), timeout)

    def answer(self, process, timeout) -> Outcome:
        try:
            out, err = process.communicate(timeout=timeout * SLACK)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{self.name} did not end within {timeout * SLACK:.0f} s: {out[-500:]!r} {err[-2000:].decode(errors='replace')}") from None
        assert out, f"{self.name} answered nothing (status {process.returncode}): {err.decode(errors='replace')}"
        answer = json.loads(out)
        return Outcome(out=base64.b64decode(answer.get("out") or ""), err=base64.b64decode(answer.get("err") or ""), status=answer.get("status"),
                       signal=answer.get("signal"), rekeys=answer.get("rekeys", -1), error=answer.get("error") or "", results=answer.get("results") or [])

    def run(self, stack, command, *, timeout=60, **more) -> Outcome:
        outcome = self.ask(stack, self.request(stack, "run", command=command, **more), timeout)
        assert not outcome.error, f"{self.name}: {outcome.error}"
        return outcome

    def start(self, stack, command, **more):
        return self.popen(stack, self.request(stack, "run", command=command, **more))

    def sftp(self, stack, steps, timeout=60):
        return self.ask(stack, self.request(stack, "sftp", steps=[[what, *map(str, a)] for what, *a in steps]), timeout)

    def channels(self, stack, count, command):
        return self.ask(stack, self.request(stack, "channels", count=count, command=command))

    def local(self, stack, target, count, data):
        with tempfile.TemporaryDirectory(dir=stack.dir) as folder:
            source = pathlib.Path(folder) / "data"
            source.write_bytes(data)
            outcome = self.ask(stack, self.request(stack, "local", target=target, count=count, stdin=source, stdout=pathlib.Path(folder) / "got"), 120)
            assert not outcome.error, f"{self.name}: {outcome.error}"
            return [(pathlib.Path(folder) / f"got.{i}").read_bytes() for i in range(count)]

    def remote(self, stack, count, data):
        with tempfile.TemporaryDirectory(dir=stack.dir) as folder:
            port_file = pathlib.Path(folder) / "port"
            process = self.popen(stack, self.request(stack, "remote", count=count, port_file=port_file))
            wait_until(lambda: port_file.exists() or process.poll() is not None, "the client listens, or has ended", 20)
            assert port_file.exists(), process.communicate()
            got = [ask(("127.0.0.1", int(port_file.read_text())), data) for _ in range(count)]
            outcome = self.answer(process, 60)
            assert not outcome.error, f"{self.name}: {outcome.error}"
            return got

    def unix(self, stack, path):
        return self.ask(stack, self.request(stack, "unix", path=path))


class Paramiko(Library):
    name, title = "paramiko", "paramiko 2.12"
    program = [PYTHON, str(HERE / "lib/paramiko_client.py")]
    cannot = {
        "told of a signal": "status -1, no name",
        "signal": "not in its interface",
        "modes": "not in its interface",
        "rekey down": "its own bug: sometimes times out, with OpenSSH too",
    }
    remarks = {"none": "`Transport.auth_none`; `SSHClient.connect` sends `password` (also `password=''`) or `publickey` only"}

    def missing(self):
        return None if _python_has("paramiko") else "package python3-paramiko is not installed"


class AsyncSSH(Library):
    name, title = "asyncssh", "asyncssh 2.10"
    program = [PYTHON, str(HERE / "lib/asyncssh_client.py")]
    cannot = {
        "rekey down": "counts the bytes that it sends only",
        "password": ALWAYS_NONE,
        "empty password": ALWAYS_NONE,
        "key": ALWAYS_NONE,
    }

    def missing(self):
        return None if _python_has("asyncssh") else "package python3-asyncssh is not installed"


class NodeSsh2(Library):
    name, title = "node-ssh2", "ssh2 1.17 (Node)"
    program = ["node", str(HERE / "node/client.js")]
    remarks = {name: "`authHandler`; by default it sends `none` first" for name in ("password", "empty password", "key")}

    def missing(self):
        return None if (TOOLS / "node/node_modules/ssh2").is_dir() and shutil.which("node") else not_fetched("node-ssh2")

    def environment(self):
        return {"NODE_PATH": str(TOOLS / "node/node_modules")}


class Go(Library):
    name, title = "go", "Go x/crypto/ssh 0.58, pkg/sftp 1.13"
    program = [str(TOOLS / "go/client")]
    cannot = {
        "password": ALWAYS_NONE,
        "empty password": ALWAYS_NONE,
        "key": ALWAYS_NONE,
    }

    def missing(self):
        return None if (TOOLS / "go/client").exists() else not_fetched("go")


class Libssh(Library):
    name, title = "libssh", "libssh 0.10 (as a client)"
    program = [PYTHON, str(HERE / "lib/libssh_client.py")]
    cannot = {"modes": "not in its interface before 0.11"}

    def missing(self):
        return None if _library("libssh.so.4") else "package libssh-4 is not installed"


class Libssh2(Library):
    name, title = "libssh2", "libssh2 1.10"
    program = [PYTHON, str(HERE / "lib/libssh2_client.py")]
    cannot = {
        "signal": "not in its interface before 1.11",
        "agent": "asks for it, and refuses the server's channel; a callback for it comes with 1.11",
        "long": "its own packets have at most 35,000 bytes",
        "rekey up": "never begins one",
        "rekey down": "never begins one",
    }

    def missing(self):
        return None if _library("libssh2.so.1") else "package libssh2-1 is not installed"


def _python_has(name: str) -> bool:
    import importlib.util
    return importlib.util.find_spec(name) is not None


def _library(name: str) -> bool:
    import ctypes
    with contextlib.suppress(OSError):
        ctypes.CDLL(name)
        return True
    return False


CLIENTS = {c.name: c for c in (OpenSSH(), OpenSSHForky(), Putty(), Dropbear(), Paramiko(), AsyncSSH(), NodeSsh2(), Go(), Libssh(), Libssh2())}
