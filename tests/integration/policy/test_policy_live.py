"""--network live: postern policy asks the posternd that runs here who is in the network."""
import json
import os
import pwd
import subprocess

import pytest

from harness import BIN, IS_ROOT, SLACK

BIG = 5000


@pytest.fixture
def broker(make_stack):
    return make_stack(start=("posternd",))


def policy(stack, *arguments, code=0):
    """What `postern policy …` says on its standard output, when it ends with `code`."""
    done = stack.postern("policy", *arguments, check=False, timeout=60)
    assert done.code == code, done
    return done.out.decode()


def test_the_live_network_is_what_the_identity_provider_knows(broker):
    ours = ["--policy", broker.policy_file, "--network", "live"]
    listed = [json.loads(line) for line in policy(broker, "who", *ours).splitlines()]
    users = sorted({broker.user, broker.other})
    assert [(line["src"], line["dst"], line["ssh_user"]) for line in listed] == [(src, "server", user) for src in ("alice", "open-alice", "plain-alice") for user in users]
    login = ["--dst", "server", "--user", broker.user]
    d = json.loads(policy(broker, "decide", *ours, "--src", broker.alice, *login, "--require-network-rule", "--json"))
    assert (d["src"], d["verdict"], d["recorders"]) == ("alice", "accept", ["recorder-a", "recorder-b"])
    policy(broker, "decide", *ours, "--src", "bob", *login, code=1)
    policy(broker, "decide", *ours, "--src", broker.stranger, *login, code=2)  # no node has that address
    assert ": fine, 3 ssh rules" in policy(broker, "check", broker.policy_file, "--network", "live")
    assert policy(broker, "diff", broker.policy_file, broker.policy_file, "--network", "live") == ""


def test_the_live_network_follows_a_reload(broker):
    broker.write_nodes(f'[[node]]\nname = "carol"\naddresses = ["{broker.net}.77"]\nuser = "alice@example.com"\n')
    since = broker.posternd.log_size()
    broker.posternd.reload()
    broker.posternd.wait_log("event=policy_(loaded|kept)", since)
    assert "carol" in policy(broker, "who", "--policy", broker.policy_file, "--network", "live")


def test_the_live_network_has_the_domains_of_the_settings(make_stack):
    stack = make_stack(start=("posternd",), posternd={"policy": {"domains": ["example.com"]}})
    for domain, code in (("example.com", 0), ("example.org", 1)):
        path = stack.dir / "other.hujson"
        path.write_text(json.dumps({"ssh": [{"action": "accept", "src": [f"user:*@{domain}"], "dst": ["autogroup:self"], "users": ["root"]}]}))
        assert ("is not associated with this Tailnet" in policy(stack, "check", path, "--network", "live", code=code)) == (code == 1)


def test_a_live_network_of_thousands_of_nodes_is_answered_whole(make_stack):
    stack = make_stack(start=())
    stack.write_nodes("".join(f'[[node]]\nname = "node-{i}-{"x" * 100}"\naddresses = ["10.9.{i // 250}.{i % 250}", "fd7a::{i + 1:x}"]\nuser = "alice@example.com"\n'
                              for i in range(BIG)))
    stack.posternd.start()
    lines = policy(stack, "who", "--policy", stack.policy_file, "--network", "live", "--dst", "server", "--user", stack.user).splitlines()
    assert len(lines) == BIG + 3


def test_without_a_posternd_the_reason_is_told(tmp_path):
    (tmp_path / "policy.hujson").write_text("{}")
    for command in (["who", "--policy", tmp_path / "policy.hujson"], ["check", tmp_path / "policy.hujson"]):
        done = subprocess.run([str(BIN / "postern"), "--control", str(tmp_path / "no.sock"), "policy", *map(str, command), "--network", "live"], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=20 * SLACK)
        assert done.returncode == 1
        assert f"--network live: error: connect to {tmp_path}/no.sock (is posternd running, and are you root?): No such file or directory\n" in done.stdout + done.stderr


@pytest.mark.needs_root
def test_another_user_is_not_told_who_is_in_the_network(broker):
    entry = pwd.getpwnam(broker.user)
    assert IS_ROOT and os.stat(broker.control).st_mode & 0o077 == 0
    done = subprocess.run([str(BIN / "postern"), "--control", str(broker.control), "policy", "check", "-", "--network", "live"], input=b"{}", capture_output=True,
                          timeout=20 * SLACK, user=entry.pw_uid, group=entry.pw_gid, extra_groups=[])
    assert done.returncode == 1 and b"Permission denied" in done.stdout
