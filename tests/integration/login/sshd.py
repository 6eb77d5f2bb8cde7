"""OpenSSH's own sshd (Debian's, unpacked by scripts/test into build/tools, never installed), to compare with."""
from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
import time

from harness import ROOT, SLACK, Stack, Terminal, _free_port, wait_until

FOLDER = ROOT / "build/tools/openssh-server"


class Sshd:
    """Serves the same users on the same address with the same PAM stack, from a private mount namespace.

    sshd reads /etc/pam.d/sshd (its name is compiled in) and wants a user "sshd": both come from a copy of /etc that only it sees.
    Its logins are by a throw-away key, because it knows no identity network.
    """

    def __init__(self, stack: Stack, work: pathlib.Path, more: str = "", listen: tuple[str, int] | None = None, prefix=()):
        """`listen`: address and port, in the network namespace that `prefix` ("ip netns exec …") enters."""
        self.stack, self.work = stack, work
        work.mkdir(mode=0o755)
        etc = work / "etc"
        shutil.copytree("/etc", etc, symlinks=True, ignore_dangling_symlinks=True)
        # copytree keeps modes, not owners; shadow's group matters to nobody here (sshd runs as root).
        (etc / "pam.d/sshd").write_text((stack.dir / "pam/postern").read_text())
        passwd = (etc / "passwd").read_text()
        if "\nsshd:" not in passwd:
            (etc / "passwd").write_text(passwd + "sshd:x:64998:65534::/run/sshd:/usr/sbin/nologin\n")
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # compiled in; left there, because other tests' sshd may need it at any time
        for name in ("host", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", work / name], check=True)
        shutil.copy(work / "key.pub", work / "authorized")
        os.chmod(work / "authorized", 0o644)
        self.address, self.port = listen or (stack.server, _free_port(stack.server))
        (work / "sshd_config").write_text(f"""\
Port {self.port}
ListenAddress {self.address}
HostKey {work}/host
PidFile none
UsePAM yes
StrictModes no
AuthorizedKeysFile {work}/authorized
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PrintMotd yes
PrintLastLog yes
AcceptEnv LANG LC_* POSTERN_TEST_*
Subsystem sftp /usr/lib/openssh/sftp-server
UseDNS no
LogLevel DEBUG
{more}""")
        libraries = next((FOLDER / "lib").glob("*/libwrap.so.0"), None) or next((FOLDER / "usr/lib").glob("*/libwrap.so.0"))
        self.log = open(work / "log", "wb")
        self.process = subprocess.Popen(
            [*prefix, "unshare", "--mount", "--propagation", "private", "sh", "-c", 'mount --bind "$1" /etc && shift && exec "$@"', "sh", str(etc),
             str(FOLDER / "usr/sbin/sshd"), "-D", "-e", "-f", str(work / "sshd_config")],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LD_LIBRARY_PATH": str(libraries.parent)})
        stack.clients.append(self.process)  # known to the leak check, ended with the stack at the latest

        def listens():
            assert self.process.poll() is None, (work / "log").read_text()
            return "Server listening on" in (work / "log").read_text()
        wait_until(listens, "sshd listens")
        (work / "known").write_text(f"[{stack.server}]:{self.port} {(work / 'host.pub').read_text()}")

    def command(self, command=None, *, user=None, tty=None, options=(), bind=None) -> list[str]:
        line = ["ssh", "-F", "/dev/null", "-b", bind or self.stack.alice, "-p", str(self.port), "-l", user or self.stack.user, "-i", str(self.work / "key")]
        for option in [*options, "IdentitiesOnly=yes", "IdentityAgent=none", f"UserKnownHostsFile={self.work}/known", "BatchMode=yes", "UpdateHostKeys=no"]:
            line += ["-o", option]
        line += {True: ["-tt"], False: ["-T"], None: []}[tty]
        return line + [self.stack.server] + ([command] if command is not None else [])

    def stop(self):
        self.process.terminate()
        self.process.wait(10 * SLACK)
        self.log.close()
