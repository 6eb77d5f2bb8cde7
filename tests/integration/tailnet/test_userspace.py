"""A server whose tailscaled has no TUN device, as in many containers: peers come from 127.0.0.1, by tailscaled's proxy."""
import subprocess

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
