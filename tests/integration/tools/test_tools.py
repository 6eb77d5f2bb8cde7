"""Programs that people run over ssh every day, as they are: nothing of them knows that this is no OpenSSH at the other end.

They find the server by an ssh_config (alias `postern`), as a person would write it once, and are recorded: the way through more of our programs.
"""
from __future__ import annotations

import hashlib
import os
import pathlib
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess

import pytest

from harness import IS_ROOT, SLACK, new_stack, rng, wait_until


def tool(name: str, package: str | None = None):
    """The test needs this program; without it it is left out, with the package's name."""
    return pytest.mark.skipif(not shutil.which(name), reason=f"package {package or name} is not installed")


class Host:
    """The server as tools see it: the alias `postern` of an ssh_config, and an `ssh` in PATH that reads it."""

    def __init__(self, stack):
        self.stack, self.dir = stack, stack.dir / "tools"
        self.dir.mkdir()
        self.config = self.dir / "ssh_config"
        self.write()
        # ~/.ssh/config is looked up by passwd(5), not by HOME: so the tools get an ssh that is told.
        for name in ("ssh", "scp", "sftp"):
            script = self.dir / name
            script.write_text(f'#!/bin/sh\nexec {shutil.which(name)} -F {self.config} "$@"\n')
            script.chmod(0o755)

    def write(self, more: str = "") -> None:
        s = self.stack
        self.config.write_text(f"""\
Host postern
  HostName {s.server}
  Port {s.port}
  User {s.user}
  BindAddress {s.alice}
  UserKnownHostsFile {s.known_hosts}
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  IdentityFile none
  IdentityAgent none
  BatchMode yes
  LogLevel ERROR
{more}""")

    def environment(self, **more) -> dict:
        return {**self.stack.client_env(), "PATH": f"{self.dir}:{os.environ['PATH']}", "HOME": str(self.dir), "LANG": "C.UTF-8", **more}

    def run(self, *command, input: bytes | None = None, timeout: float = 60, env=None, **kw) -> subprocess.CompletedProcess:
        feed = dict(input=input) if input is not None else dict(stdin=subprocess.DEVNULL)
        return subprocess.run([str(c) for c in command], capture_output=True, env=self.environment(**(env or {})), timeout=timeout * SLACK, **feed, **kw)

    def popen(self, *command, **kw) -> subprocess.Popen:
        process = subprocess.Popen([str(c) for c in command], env=self.environment(), **kw)
        self.stack.clients.append(process)
        return process


@pytest.fixture(scope="module")
def host(accounts):
    stack = new_stack(accounts)
    stack.start()
    yield Host(stack)
    stack.stop()


@pytest.fixture
def there(host):
    """A folder of the server's user."""
    path = host.stack.dir / "there"
    path.mkdir()
    if IS_ROOT:
        entry = pwd.getpwnam(host.stack.user)
        os.chown(path, entry.pw_uid, entry.pw_gid)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def tree(tmp_path):
    """A small tree: a big file, an empty one, a name with blanks, a link, modes."""
    root = tmp_path / "tree"
    (root / "sub/deeper").mkdir(parents=True)
    (root / "big").write_bytes(rng("tools").randbytes(3 << 20))
    (root / "sub/empty").touch()
    (root / "sub/two words ü").write_text("text\n")
    (root / "sub/deeper/run").write_text("#!/bin/sh\n")
    (root / "sub/deeper/run").chmod(0o755)
    (root / "link").symlink_to("sub/empty")
    return root


def listing(root: pathlib.Path, links: bool = True) -> dict:
    """What is there, with contents."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            if links:
                found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = (hashlib.sha256(path.read_bytes()).hexdigest(), bool(path.stat().st_mode & 0o100))
        else:
            found[name] = "folder"
    return found


def ok(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done


# ---------------------------------------------------------------------------------------------------- copying

@tool("rsync")
def test_rsync_copies_a_tree_both_ways_and_then_only_what_changed(host, there, tree, tmp_path):
    ok(host.run("rsync", "-a", "-e", "ssh", f"{tree}/", f"postern:{there}/"))
    assert listing(there) == listing(tree)
    with open(tree / "big", "r+b") as f:
        f.seek(1 << 20)
        f.write(b"changed")
    stats = ok(host.run("rsync", "-a", "--ignore-times", "--stats", "-e", "ssh", f"{tree}/", f"postern:{there}/")).stdout.decode()
    literal = int(re.search(r"Literal data: ([\d,]+)", stats)[1].replace(",", ""))
    assert literal < 100_000, stats
    ok(host.run("rsync", "-az", "-e", "ssh", f"postern:{there}/", tmp_path / "back/"))
    assert listing(tmp_path / "back") == listing(tree)


@pytest.mark.parametrize("way", ["-O", "-s"])
def test_scp_copies_a_tree_both_ways_by_its_old_protocol_and_by_sftp(host, there, tree, tmp_path, way):
    (tree / "link").unlink()  # scp follows links
    ok(host.run("scp", way, "-rp", tree, f"postern:{there}/up"))
    assert listing(there / "up") == listing(tree)
    ok(host.run("scp", way, "-rp", f"postern:{there}/up", tmp_path / "back"))
    assert listing(tmp_path / "back") == listing(tree)


def test_sftp_lists_renames_and_removes(host, there, tree):
    batch = f"cd {there}\nput {tree}/big one\nrename one two\nmkdir sub\nls -1\nrm two\nrmdir sub\nls -1\n"
    done = ok(host.run("sftp", "-b", "-", "postern", input=batch.encode()))
    assert done.stdout.count(b"\ntwo") == 1 and list(there.iterdir()) == [], done.stdout


@tool("lftp")
def test_lftp_mirrors_a_tree_by_sftp(host, there, tree, tmp_path):
    (tree / "link").unlink()
    script = f"set sftp:connect-program 'ssh -a -x'; set cmd:fail-exit yes; set net:max-retries 1; open sftp://postern; mirror -R {tree} {there}/up; mirror {there}/up {tmp_path}/back"
    ok(host.run("lftp", "--norc", "-c", script))
    assert listing(tmp_path / "back") == listing(tree)


@tool("curl")
@pytest.mark.parametrize("scheme", ["sftp", "scp"])
def test_curl_puts_and_gets_a_file(host, there, tree, tmp_path, scheme):
    if scheme.encode() not in host.run("curl", "--version").stdout:
        pytest.skip("this curl has no libssh2")
    s = host.stack
    common = ["curl", "-sS", "-k", "--interface", s.alice, "-u", f"{s.user}:"]
    ok(host.run(*common, "-T", tree / "big", f"{scheme}://{s.server}:{s.port}{there}/up"))
    ok(host.run(*common, "-o", tmp_path / "down", f"{scheme}://{s.server}:{s.port}{there}/up"))
    assert (tmp_path / "down").read_bytes() == (tree / "big").read_bytes() == (there / "up").read_bytes()


@tool("git")
def test_git_pushes_clones_and_fetches(host, there, tmp_path):
    env = {"GIT_SSH": str(host.dir / "ssh"), "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.com",
           "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.com", "GIT_TERMINAL_PROMPT": "0"}
    git = lambda *a: ok(host.run("git", *a, env=env))
    ok(host.run("ssh", "postern", f"git init -q --bare -b main {there}/repo.git"))
    git("init", "-q", "-b", "main", tmp_path / "one")
    (tmp_path / "one/file").write_bytes(rng("git").randbytes(1 << 20))
    git("-C", tmp_path / "one", "add", ".")
    git("-C", tmp_path / "one", "commit", "-qm", "first")
    git("-C", tmp_path / "one", "push", "-q", f"postern:{there}/repo.git", "main")
    git("clone", "-q", f"ssh://postern{there}/repo.git", tmp_path / "two")
    assert (tmp_path / "two/file").read_bytes() == (tmp_path / "one/file").read_bytes()
    (tmp_path / "one/file").write_text("second\n")
    git("-C", tmp_path / "one", "commit", "-qam", "second")
    git("-C", tmp_path / "one", "push", "-q", f"postern:{there}/repo.git", "main")
    git("-C", tmp_path / "two", "pull", "-q")
    assert (tmp_path / "two/file").read_text() == "second\n"


# ---------------------------------------------------------------------------------------------------- living there

@tool("ansible", "ansible-core")
@pytest.mark.parametrize("pipelining", [False, True], ids=["copied modules", "pipelining"])
def test_ansible_pings_and_copies(host, there, tmp_path, pipelining):
    (tmp_path / "inventory").write_text("postern ansible_python_interpreter=/usr/bin/python3\n")
    (tmp_path / "ansible.cfg").write_text("[defaults]\n")
    (tmp_path / "source").write_bytes(rng("ansible").randbytes(100_000))
    env = {"ANSIBLE_PIPELINING": str(pipelining), "ANSIBLE_HOST_KEY_CHECKING": "True", "ANSIBLE_LOCAL_TEMP": str(tmp_path / "local"), "ANSIBLE_CONFIG": str(tmp_path / "ansible.cfg"),
           "ANSIBLE_REMOTE_TEMP": f"{there}/ansible", "ANSIBLE_NOCOLOR": "1", "ANSIBLE_SSH_CONTROL_PATH_DIR": str(host.dir / "cp"),
           # A master that stays would outlive the test.
           "ANSIBLE_SSH_ARGS": f"-F {host.config} -o ControlMaster=no"}
    ansible = lambda *a: ok(host.run("ansible", "-i", tmp_path / "inventory", "postern", *a, env=env, timeout=120)).stdout.decode()
    assert '"ping": "pong"' in ansible("-m", "ping")
    assert '"changed": true' in ansible("-m", "copy", "-a", f"src={tmp_path}/source dest={there}/copied mode=0640")
    assert (there / "copied").read_bytes() == (tmp_path / "source").read_bytes() and (there / "copied").stat().st_mode & 0o777 == 0o640
    assert '"changed": false' in ansible("-m", "copy", "-a", f"src={tmp_path}/source dest={there}/copied mode=0640")


def test_a_control_master_serves_many_clients(host):
    path = host.dir / "master"
    master = host.popen("ssh", "-M", "-N", "-S", path, "postern", stdin=subprocess.DEVNULL)
    try:
        wait_until(path.exists, "the master listens", 15)
        running = [host.popen("ssh", "-S", path, "postern", f"echo {i}; exit {i}", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) for i in range(8)]
        for i, p in enumerate(running):
            assert p.communicate(timeout=30 * SLACK)[0] == b"%d\n" % i and p.returncode == i
        ok(host.run("ssh", "-S", path, "-O", "exit", "postern"))
        assert master.wait(10 * SLACK) in (0, 255)
    finally:
        if master.poll() is None:
            master.kill()
            master.wait()


@tool("autossh")
def test_autossh_connects_again_when_its_connection_is_ended(host, there):
    # -M 0: ssh itself finds out. AUTOSSH_GATETIME=0: also the first try may fail.
    started = lambda: (there / "log").read_text().split() if (there / "log").exists() else []
    process = subprocess.Popen(["autossh", "-M", "0", "-F", str(host.config), "postern", f"echo $$ >>{there}/log; exec sleep 1003"], stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=host.environment(AUTOSSH_GATETIME="0", AUTOSSH_PATH=shutil.which("ssh")))
    host.stack.clients.append(process)
    try:
        wait_until(lambda: len(started()) == 1, "the first connection", 15)
        host.stack.postern("sessions", "kill", "--all")
        wait_until(lambda: len(started()) == 2, "the second connection", 30)
    finally:
        process.terminate()
        process.wait(10 * SLACK)
    wait_until(lambda: not host.stack.processes_of(), "nothing of it is left", 15)


@tool("mosh-server", "mosh")
def test_mosh_starts_its_server_which_outlives_the_login(host):
    # The client's part over UDP is mosh's own; what it needs of sshd is: a terminal, LANG, and a process that stays when the login ends.
    done = host.run("ssh", "-tt", "postern", f"mosh-server new -c 256 -s -i {host.stack.server} -l LANG=C.UTF-8 -- sleep 1004")
    text = done.stdout.decode()
    connect = re.search(r"MOSH CONNECT (\d+) (\S{22})", text)
    pid = re.search(r"\[mosh-server detached, pid = (\d+)\]", text + done.stderr.decode())
    assert connect and pid, (text, done.stderr)
    servers = [p for p in host.stack.processes_of() if p.name == "mosh-server"]
    assert int(pid[1]) in [p.pid for p in servers], "it runs on after the login is over"
    os.kill(int(pid[1]), signal.SIGTERM)
    wait_until(lambda: not host.stack.processes_of(), "it is gone", 15)


@tool("mosh")
def test_mosh_shows_a_session(host):
    from harness import Terminal
    # mosh asks ssh for the server's address and brings its own terminal. --local-address of UDP is the kernel's choice: 127.0.0.1.
    with Terminal(["mosh", "--ssh", f"ssh -F {host.config}", "--experimental-remote-ip=remote", "--bind-server=ssh", "postern", "--", "sh", "-c", "echo mosh-$((40+2)); read x; exit"],
                  env=host.environment(TERM="xterm-256color")) as t:
        host.stack.terminals.append(t)
        t.read_until("mosh-42", 30)
        t.send("\r")
        assert t.wait(20) == 0
    wait_until(lambda: not host.stack.processes_of(), "nothing of it is left", 15)


@tool("sshfs")
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="/dev/fuse is not there")
@pytest.mark.skipif(not IS_ROOT, reason="needs root")
def test_sshfs_shows_the_files_of_the_server(host, there, tree, tmp_path):
    mount = tmp_path / "mount"
    mount.mkdir()
    # -f: stays our child.
    process = host.popen("sshfs", "-f", "-F", host.config, f"postern:{there}", mount, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        def mounted():
            assert process.poll() is None, process.stdout.read()
            return os.path.ismount(mount)
        wait_until(mounted, "the file system is there", 20)
        # Not copytree: it sets the times of a link, which sftp version 3 can only do to what the link points to.
        ok(host.run("cp", "-RP", tree, mount / "up"))
        assert listing(mount / "up") == listing(tree) == listing(there / "up")
        os.rename(mount / "up/big", mount / "up/bigger")
        os.truncate(mount / "up/bigger", 1000)
        assert (there / "up/bigger").stat().st_size == 1000
        shutil.rmtree(mount / "up")
        assert not (there / "up").exists()
    finally:
        subprocess.run(["fusermount3", "-u", "-z", mount], stdin=subprocess.DEVNULL, capture_output=True)
        process.wait(15 * SLACK)


def block(host, alias: str, address: str, more: str = "") -> str:
    """Another alias of the same server, for who comes from `address`."""
    return host.config.read_text().replace("Host postern", f"Host {alias}", 1).replace(f"BindAddress {host.stack.alice}", f"BindAddress {address}") + more


def socks(proxy, port: int) -> socket.socket:
    """A connection to that port of the server's 127.0.0.1 (RFC 1928)."""
    sock = socket.create_connection(proxy, timeout=30 * SLACK)
    sock.sendall(b"\x05\x01\x00")
    assert sock.recv(2) == b"\x05\x00"
    sock.sendall(b"\x05\x01\x00\x01\x7f\x00\x00\x01" + struct.pack(">H", port))
    assert sock.recv(10)[:2] == b"\x05\x00"
    return sock


def test_a_vs_code_like_flow_keeps_a_server_running_by_a_shell_on_stdin(host, tmp_path):
    """VS Code's Remote-SSH: a shell without a terminal that is fed a script, keeps a server running, and carries by -D what the editor asks of that; a hundred short channels."""
    config = tmp_path / "config"
    config.write_text(block(host, "code", host.stack.plain_alice))
    proxy = (f"{host.stack.net}.77", 1080)  # nobody else has this net
    shell = host.popen(shutil.which("ssh"), "-F", config, "-T", "-D", f"{proxy[0]}:{proxy[1]}", "-o", "ExitOnForwardFailure=yes", "code", "bash", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    server = "import socketserver\nclass H(socketserver.StreamRequestHandler):\n  def handle(self): self.wfile.write(b'served ' + self.rfile.readline())\ns = socketserver.ThreadingTCPServer(('127.0.0.1', 0), H)\nprint(s.server_address[1], flush=True)\ns.serve_forever()\n"
    shell.stdin.write(f"echo start; cat > server.py <<'EOF'\n{server}EOF\npython3 server.py & echo started\n".encode())
    shell.stdin.flush()
    said = sorted(shell.stdout.readline() for _ in range(3))
    port = int(said[0])
    assert said[1:] == [b"start\n", b"started\n"]
    for i in range(100):
        with socks(proxy, port) as sock:
            sock.sendall(b"request %d\n" % i)
            assert sock.makefile("rb").read() == b"served request %d\n" % i
    waiting = [socks(proxy, port) for _ in range(20)]  # beside each other as well
    for i, sock in enumerate(waiting):
        sock.sendall(b"%d\n" % i)
    assert [sock.makefile("rb").read() for sock in waiting] == [b"served %d\n" % i for i in range(20)]
    for sock in waiting:  # ssh stays as long as one of them is open
        sock.close()
    for i in range(10):
        assert ok(host.run("ssh", "postern", f"echo {i}")).stdout == b"%d\n" % i
    shell.stdin.write(b"kill $!; echo over\n")
    shell.stdin.flush()
    assert shell.communicate(timeout=15 * SLACK)[0] == b"over\n" and shell.returncode == 0


def test_proxy_jump_through_ourselves_reaches_ourselves(host, tmp_path):
    """`ssh -J`: the second login comes from the server's own address, so the network must know that (here: a node for 127.0.0.1)."""
    stack = host.stack
    config = tmp_path / "config"
    config.write_text(block(host, "jump", stack.plain_alice) + block(host, "behind", stack.plain_alice, "\n  ProxyJump jump\n"))
    stack.write_nodes('[[node]]\nname = "the-server-itself"\naddresses = ["127.0.0.1"]\nuser = "plain@example.com"\n')
    stack.reload()
    try:
        done = ok(host.run(shutil.which("ssh"), "-F", config, "behind", 'cat; echo "$POSTERN_NODE"', input=bytes(range(256)) * 4096))
        assert done.stdout == bytes(range(256)) * 4096 + b"the-server-itself\n"
        copied = tmp_path / "copied"
        ok(host.run(shutil.which("scp"), "-F", config, config, "behind:copied"))
        ok(host.run(shutil.which("scp"), "-F", config, "-J", "jump", "behind:copied", copied))
        assert copied.read_bytes() == config.read_bytes()
    finally:
        stack.write_nodes()
        stack.reload()
