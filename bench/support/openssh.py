"""OpenSSH's sshd of this Debian, unpacked and never installed (the package would start it), run by hand."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

from . import world
from .world import ROOT, USER, die, run

TOOLS = ROOT / "build" / "tools"
UNPACKED = TOOLS / "openssh-server"
BINARY = UNPACKED / "usr/sbin/sshd"


def fetch():
    """Unpacks openssh-server and libwrap0 into build/tools. Must run outside the private network."""
    library = UNPACKED / "usr/lib"
    if BINARY.exists() and any(library.glob("*/libwrap.so.0")):
        return
    TOOLS.mkdir(parents=True, exist_ok=True)
    for package in ("openssh-server", "libwrap0"):
        for old in TOOLS.glob(f"{package}_*.deb"):
            old.unlink()
        got = subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], cwd=TOOLS,
                             capture_output=True, text=True)
        if got.returncode != 0:
            die(f"apt-get download {package} failed (run `apt-get update`?):\n{got.stderr}")
        run("dpkg", "-x", next(TOOLS.glob(f"{package}_*.deb")), UNPACKED)


def version():
    deb = next(TOOLS.glob("openssh-server_*.deb"), None)
    said = subprocess.run([str(BINARY), "-V"], capture_output=True, text=True).stderr.strip().split(",")[0]
    return f"{said} ({deb.name.split('_')[1].replace('%3a', ':') if deb else '?'})"


def debian_pam_stack():
    return (UNPACKED / "etc/pam.d/sshd").read_text()


class Sshd:
    name = "sshd"

    def __init__(self, the_world, address="127.0.0.2", port=2022):
        self.address, self.port = address, port
        self.world = the_world
        the_world.ldconfig(next((UNPACKED / "usr/lib").glob("*/libwrap.so.0")).parent)
        folder = the_world.memory / "sshd"
        folder.mkdir()
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "user")
        self.identity = folder / "user"
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        # sshd wants its chroot folder (compiled in: /run/sshd); /run is the host's, so only if it is not there.
        self.run_folder = Path("/run/sshd")
        self.made_run_folder = not self.run_folder.exists()
        if self.made_run_folder:
            self.run_folder.mkdir(mode=0o755)
        config = folder / "sshd_config"
        config.write_text(f"""\
ListenAddress {address}:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
UsePAM yes
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
PrintMotd no
# The default, 10:30:100, would drop some of 100 at once.
MaxStartups 500
Subsystem sftp /usr/lib/openssh/sftp-server
""")
        self.log = the_world.memory / "sshd.log"
        self.process = subprocess.Popen([str(BINARY), "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=open(self.log, "w"))
        wait_for_port(address, port, self.process, self.log)

    def ssh_options(self):
        return ["-i", str(self.identity), "-o", "IdentitiesOnly=yes", "-p", str(self.port)]

    def target(self):
        return f"{USER}@{self.address}"

    def connection_memory(self, _client_address):
        """KiB PSS of all processes of all connections: the monitor (root) and its child (the user); not what the user runs."""
        pids = [p for p in world.tree(self.process.pid) if p != self.process.pid and world.exe(p) == str(BINARY)]
        return sum(world.pss_kib(p) for p in pids) + world.pipe_kib(pids), len(pids)

    def cpu_seconds(self):
        return sum(world.cpu_seconds(p) for p in world.tree(self.process.pid))

    def all_memory(self):
        """KiB PSS of everything of this server, users' programs excluded."""
        return sum(world.pss_kib(p) for p in world.tree(self.process.pid) if world.exe(p) == str(BINARY))

    def settle(self):
        """Until no process of an old connection is left."""
        wait_until(lambda: all(world.exe(p) != str(BINARY) for p in world.tree(self.process.pid) if p != self.process.pid))

    def close(self):
        self.process.terminate()
        self.process.wait()
        if self.made_run_folder:
            self.run_folder.rmdir()


def wait_for_port(address, port, process, log, limit=10):
    end = time.monotonic() + limit
    while True:
        if process.poll() is not None:
            die(f"{process.args[0]} ended at once:\n{Path(log).read_text()}")
        try:
            socket.create_connection((address, port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                die(f"{process.args[0]} does not listen on {address}:{port} after {limit} s:\n{Path(log).read_text()}")
            time.sleep(0.02)


def wait_until(condition, limit=20):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
