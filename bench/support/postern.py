"""Postern's side of a bench: the integration tests' stack (tests/integration/harness.py) in the private world."""

import os
import subprocess
import sys
from pathlib import Path

from . import world
from .world import ROOT, UID, USER, die

# Who the client is, by the last part of its address (harness.Stack): alice is recorded, fail closed; plain-alice is not recorded.
RECORDED, UNRECORDED = "alice", "plain_alice"
DAEMONS = ("posternd", "postern-net", "postern-session", "postern-relay", "postern-recorder")


def find_programs(given=None):
    candidates = [Path(given)] if given else [ROOT / "build/release/bin", ROOT / "build/dev/bin"]
    for folder in candidates:
        if all((folder / name).exists() for name in DAEMONS + ("postern",)):
            if folder.resolve().is_relative_to("/tmp"):
                die(f"{folder}: /tmp is another one in the bench's private world; put the programs elsewhere")
            return folder.resolve()
    die(f"Postern's programs are not in {' or '.join(map(str, candidates))}; build them:\n"
        "  cmake --preset release && cmake --build --preset release")


def version(programs):
    said = subprocess.run([str(programs / "posternd"), "--version"], capture_output=True, text=True)
    return f"{(said.stdout or said.stderr).splitlines()[0]} ({programs.relative_to(ROOT) if programs.is_relative_to(ROOT) else programs})"


def shipped_pam_stack():
    for file in (ROOT / "packaging/pam/postern", ROOT / "packaging/pam.d/postern"):
        if file.exists():
            return file.read_text()
    die("packaging/pam/postern is not there; use --pam same")


def load_harness(programs):
    os.environ["POSTERN_BIN"] = str(programs)  # read when the module is loaded
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(ROOT / "tests/integration"), str(ROOT / "tests/integration/recording")]
    import harness
    harness.become_subreaper()
    return harness


def accounts(harness):
    """The world's user to log in as, and system users for the daemons, in the private /etc."""
    class WorldAccounts(harness.Accounts):
        def __init__(self):
            self.users, self.groups, self.homes = [], [], []
            self.user = self.other = USER
            self.net = self._user("pb-net", system=True)
            self.relay = self._user("pb-relay", system=True)
            self.recorder = self._user("pb-recorder", system=True)

        def uids(self):
            return super().uids() | {UID}
    return WorldAccounts()


class Postern:
    name = "postern"

    def __init__(self, the_world, programs):
        self.programs = programs
        harness = load_harness(programs)
        # Everything as a fresh installation has it, except: system PAM folder (the private /etc), log level as sshd's, and room for
        # 100 log-ins at once from one address (sshd's MaxStartups is raised likewise).
        self.stack = harness.new_stack(accounts(harness), posternd={
            "pam": {"service": "postern", "confdir": ""},
            "log": {"level": "info"},
            "limits": {"unauthenticated_connections": 500, "unauthenticated_connections_per_source": 500},
        }, relay={"log": {"level": "info"}}, recorder={"log": {"level": "info"}})
        self.stack.start()
        self.address, self.port = self.stack.server, self.stack.port

    def ssh_options(self):
        return ["-p", str(self.port)]

    def target(self):
        return f"{USER}@{self.address}"

    def _processes(self):
        found = world.tree(os.getpid())
        return {pid: Path(world.exe(pid)).name for pid in found if world.exe(pid).startswith(f"{self.programs}/")}

    def _of_connections(self, client_address):
        """pids of all net workers with a client, and of all sessions. Warm workers and the zygotes belong to no connection."""
        names = self._processes()
        inodes = set()
        wanted = f"{int.from_bytes(bytes(map(int, self.address.split('.'))), 'little'):08X}:{self.port:04X}"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == wanted and fields[3] == "01":  # ESTABLISHED
                inodes.add(f"socket:[{fields[9]}]")
        pids = []
        for pid, name in names.items():
            if name == "postern-net" and any(link in inodes for link in _links(pid)):
                pids.append(pid)
            elif name == "postern-session" and names.get(_parent(pid)) == "postern-session":
                pids.append(pid)
        return pids

    def connection_memory(self, client_address):
        pids = self._of_connections(client_address)
        return sum(world.pss_kib(p) for p in pids) + world.pipe_kib(pids), len(pids)

    def cpu_seconds(self):
        """Of everything, recorders included. What a session left behind is its zygote's child, which waits for it."""
        return sum(world.cpu_seconds(p) for p in self._processes())

    def all_memory(self):
        """KiB PSS of everything of Postern: broker, zygotes, warm workers, connections, relay, recorders; users' programs excluded."""
        return sum(world.pss_kib(p) for p in self._processes())

    def settle(self):
        """Until no process of an old connection is left and the recorders have all that was recorded."""
        from .openssh import wait_until
        wait_until(lambda: not self._of_connections(None))
        wait_until(lambda: not any(self.stack.dir.glob("recorder-?/**/*.part")))

    def count_recordings(self):
        whole = sum(1 for _ in self.stack.dir.glob("recorder-?/**/*.cast"))
        parts = sum(1 for _ in self.stack.dir.glob("recorder-?/**/*.part"))
        return f"{whole} whole, {parts} not"

    def drop_recordings(self):
        """Makes room: gigabytes of text were recorded."""
        for file in self.stack.dir.glob("recorder-?/**/*.cast"):
            file.unlink()

    def close(self):
        self.stack.stop()


def _links(pid):
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                yield os.readlink(f"/proc/{pid}/fd/{fd}")
            except OSError:
                pass
    except OSError:
        pass


def _parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0
