"""postern-net alone, against real clients: tests/tools/net_harness.cpp stands in for posternd and postern-session."""

import json
import pathlib
import subprocess
import threading
import time

import pytest

from harness import BIN, SLACK

SOON = 20 * SLACK  # a deadline, not a measurement


class Harness:
    def __init__(self, folder, *arguments):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [BIN / "net_harness", "--net", BIN / "postern-net", *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(self.folder / "stderr", "wb"))
        first = self.process.stdout.readline()
        assert first, (self.folder / "stderr").read_text()
        ready = json.loads(first)
        self.port, self.zygote, self.missing, self.root = ready["port"], ready["zygote"], ready["missing"], ready["root"]
        self.changed = threading.Condition()
        self.events = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.config = self.folder / "ssh_config"
        self.config.write_text(
            f"Host *\n  Port {self.port}\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  GlobalKnownHostsFile /dev/null\n"
            "  LogLevel INFO\n  IdentityFile none\n  IdentityAgent none\n  BatchMode yes\n")

    def _read(self):
        for line in self.process.stdout:
            with self.changed:
                self.events.append(json.loads(line))
                self.changed.notify_all()

    def seen(self, event, **fields):
        return [e for e in list(self.events) if e.get("event") == event and all(e.get(k) == v for k, v in fields.items())]

    def wait(self, event, count=1, **fields):
        """Waits until `count` such events were seen."""
        deadline = time.monotonic() + SOON
        with self.changed:
            while len(self.seen(event, **fields)) < count:
                assert self.changed.wait(deadline - time.monotonic()) or len(self.seen(event, **fields)) >= count, \
                    f"no {event} {fields} in {self.events[-10:]}"
        return self.seen(event, **fields)[-1]

    def ssh(self, command, *options, user="user", **kw):
        kw.setdefault("timeout", SOON)
        if "input" not in kw:
            kw.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(["ssh", "-F", str(self.config), *options, f"{user}@127.0.0.1", command], capture_output=True, **kw)

    def stop(self):
        self.process.stdin.close()
        try:
            self.process.wait(SOON)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join(SOON)


@pytest.fixture(scope="session")
def shared_harness(tmp_path_factory):
    h = Harness(tmp_path_factory.mktemp("net"))
    yield h
    h.stop()
    # Nothing a client did ended a worker by a signal: a call outside the filter would be SIGSYS (31).
    assert [e for e in h.events if e.get("event") == "died" and e["status"] != 0] == []


@pytest.fixture
def harness(shared_harness):
    return shared_harness


@pytest.fixture
def own_harness(tmp_path):
    """own_harness(arguments...): one with other settings."""
    made = []

    def make(*arguments):
        made.append(Harness(tmp_path / f"own{len(made)}", *arguments))
        return made[-1]

    yield make
    for h in made:
        h.stop()
