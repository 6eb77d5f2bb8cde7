"""The sandbox of a live postern-net worker, seen from outside. What it can do from inside: build/dev/bin/sshd_net_test '[sandbox]'."""

import os
import pathlib
import subprocess

import pytest


@pytest.fixture(scope="module")
def worker(shared_harness):
    p = subprocess.Popen(["ssh", "-F", str(shared_harness.config), "sandboxed@127.0.0.1", "echo up; cat"], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert p.stdout.readline() == b"up\n"
    yield shared_harness.wait("login", user="sandboxed")["worker"]
    p.stdin.close()
    p.wait()


def status(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: line.split(":")[1].strip() for line in lines}


not_sanitized = pytest.mark.skipif(any(name in os.environ.get("POSTERN_BIN", "") for name in ("asan", "tsan")), reason="a sanitizer needs its stderr and memory")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: an ordinary user's sandbox has no user of its own")


def test_it_has_no_capability_and_cannot_get_any(worker):
    s = status(worker)
    assert [s[k] for k in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == ["0" * 16] * 4
    assert s["NoNewPrivs"] == "1"


def test_its_system_calls_are_filtered(worker):
    assert status(worker)["Seccomp"] == "2"


@root_only
def test_it_is_nobody_else_and_the_bounding_set_is_empty(worker):
    s = status(worker)
    assert s["Uid"].split() == ["65534"] * 4 and s["Gid"].split() == ["65534"] * 4
    assert s["Groups"] == "" and s["CapBnd"] == "0" * 16


@root_only
def test_its_root_is_empty_and_its_namespaces_are_its_own(worker, shared_harness):
    assert shared_harness.missing == ""
    assert os.listdir(f"/proc/{worker}/root/") == []
    for kind in ("net", "mnt", "ipc", "uts"):
        assert os.readlink(f"/proc/{worker}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    mounts = pathlib.Path(f"/proc/{worker}/mounts").read_text().splitlines()
    assert len(mounts) == 1 and " / " in mounts[0] and mounts[0].split()[3].startswith("ro,")


@root_only
@not_sanitized
def test_it_holds_its_sockets_and_the_programs_pipes_only(worker):
    folder = f"/proc/{worker}/fd"
    kinds = sorted(os.readlink(f"{folder}/{fd}").split(":")[0] for fd in os.listdir(folder))
    assert kinds == ["/dev/null"] * 3 + ["pipe"] * 3 + ["socket"] * 2


@root_only
@not_sanitized
def test_its_limits_are_tight(worker):
    limits = {line[:26].strip(): line[26:].split()[:2] for line in pathlib.Path(f"/proc/{worker}/limits").read_text().splitlines()[1:]}
    for name in ("Max processes", "Max file size", "Max core file size"):
        assert limits[name] == ["0", "0"]
    assert int(limits["Max open files"][1]) <= 5120


@root_only
def test_it_cannot_be_looked_into_by_its_own_kind(worker):
    """Not dumpable: /proc/PID belongs to root, so no process of its uid can ptrace it."""
    assert os.stat(f"/proc/{worker}/environ").st_uid == 0
