"""Postern on a real tailnet: who gets in by the network's word, where the rules come from, and where it listens."""
import contextlib
import copy
import json
import os
import re
import signal
import subprocess
import time

import pytest

from harness import SLACK, wait_until
from login.sshd import Sshd


@contextlib.contextmanager
def settings(stack, more: dict):
    """Other settings for a test, with a start anew; afterwards the module's."""
    before = stack.posternd_settings
    stack.configure(more)
    try:
        stack.posternd.start()
        yield
    finally:
        stack.posternd.stop()
        stack._write("posternd.toml", before)
        stack.posternd.start()


@contextlib.contextmanager
def network_policy(stack, policy: dict):
    stack.lab.set_policy(policy)
    try:
        yield
    finally:
        stack.lab.set_policy(stack.base)


def gets_in(stack, node: str, user=None) -> bool:
    return stack.ssh_from(node, "-o", "ConnectTimeout=5", "true", user=user).returncode == 0


def test_alice_logs_in_by_the_servers_name_with_plain_ssh_and_bob_does_not(tailnet):
    stack = tailnet
    done = stack.ssh_from("alice-laptop", "id -un; tty || :; echo $SSH_CONNECTION")
    assert done.returncode == 0 and done.stdout.splitlines()[0] == stack.user, done
    assert done.stderr == "", "no question, no warning"
    peer, _, server, port = done.stdout.splitlines()[-1].split()
    assert (peer, server, port) == (stack.lab.ip("alice-laptop"), stack.lab.ip("server"), "22")

    since = stack.posternd.log_size()
    refused = stack.ssh_from("bob-laptop", "true")
    assert refused.returncode == 255 and "does not permit" in refused.stderr, refused
    assert 'user="bob@example.com"' in stack.posternd.wait_log("event=login verdict=deny.*", since=since)[0]
    assert not gets_in(stack, "alice-laptop", user="root"), "only the accounts that the rule names"


def test_ipv6_is_as_good(tailnet):
    stack = tailnet
    six = next(a for a in stack.posternd.ready["listening"] if a.startswith("["))
    address = six[1:].split("]")[0]
    done = subprocess.run(stack.on("alice-laptop", "ssh", "-o", "BatchMode=yes", f"{stack.user}@{address}", "echo in"), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30 * SLACK, cwd="/")
    assert done.stdout == "in\n" and done.stderr == "", done


def test_a_session_knows_who_is_in_it(tailnet):
    stack = tailnet
    tell = 'printf "%s|" "$POSTERN_USER" "$POSTERN_NODE" "$POSTERN_TAGS" "$POSTERN_CONNECTION_ID"'
    user, node, tags, connection, _ = stack.ssh_from("alice-laptop", tell).stdout.split("|")
    assert (user, node, tags) == ("alice@example.com", "alice-laptop", "") and len(connection) > 20
    user, node, tags, _, _ = stack.ssh_from("ci", tell, user=stack.other).stdout.split("|")
    assert (user, node, tags) == ("", "ci", "tag:ci")


def test_app_grants_reach_the_decision(tailnet):
    stack = tailnet
    policy = copy.deepcopy(stack.base)
    policy["grants"].append({"src": ["bob@example.com"], "dst": ["tag:server"], "app": {
        "postern.internal/cap/login": [{"action": "accept", "users": [stack.user], "acceptEnv": ["BOB_*"]}], "postern.internal/cap/ssh": [{"sftp": "none", "localForward": []}]}})
    with network_policy(stack, policy):
        wait_until(lambda: gets_in(stack, "bob-laptop"), "bob's grant is there", 15, every=0.2)
        done = stack.ssh_from("bob-laptop", "-o", "SetEnv=BOB_X=1", "-o", "RequestTTY=no", "echo $BOB_X")
        assert done.stdout == "1\n", done
        assert stack.ssh_from("bob-laptop", "-s", "sftp").returncode != 0, "what the grant says of sessions holds, too"
        # What cannot be read denies.
        policy["grants"][-1]["app"]["postern.internal/cap/login"] = [{"action": "accept", "users": [stack.user], "no_such_key": 1}]
        stack.lab.set_policy(policy)
        since = stack.posternd.log_size()
        wait_until(lambda: not gets_in(stack, "bob-laptop"), "a grant that cannot be read lets nobody in", 15, every=0.2)
        assert "no_such_key" in stack.posternd.log(since)


def test_a_file_of_the_hosts_can_narrow_what_the_network_grants(tailnet):
    stack = tailnet
    rules = lambda *users: json.dumps({"grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}], "tagOwners": {"tag:server": ["alice@example.com"], "tag:ci": ["alice@example.com"]},
                                       "ssh": [{"action": "accept", "src": [u], "dst": ["tag:server"], "users": [stack.user, stack.other]} for u in users]})
    stack.policy_file.write_text(rules("tag:ci"))
    with settings(stack, {"policy": {"source": ["file", "grants"]}}):
        assert gets_in(stack, "ci", user=stack.other)
        assert not gets_in(stack, "alice-laptop")
        # And is followed when it changes, as an editor replaces it.
        live = stack.hold(stack.on("ci", "ssh", "-o", "BatchMode=yes", f"{stack.other}@server", "echo up; exec sleep 1000"))
        live.wait_for("up")
        new = stack.policy_file.with_suffix(".new")
        new.write_text(rules("alice@example.com", "bob@example.com"))
        new.rename(stack.policy_file)
        assert any("Access revoked." in line for line in live.to_the_end()), live.seen
        assert gets_in(stack, "alice-laptop")
        assert not gets_in(stack, "bob-laptop"), "the file allows it, no grant does"


def test_headscales_own_ssh_rules_decide_where_the_server_is_told_to_take_them(tailnet):
    stack = tailnet
    rule = lambda src, *users, **more: {"action": "accept", "src": [src], "dst": ["tag:server"], "users": list(users), **more}
    policy = {**stack.base, "ssh": [rule("alice@example.com", stack.user)]}
    with network_policy(stack, policy), settings(stack, {"policy": {"source": ["tailnet"], "require_network_rule": False}}):
        wait_until(lambda: gets_in(stack, "alice-laptop"), "alice gets in by Headscale's rule", 15, every=0.2)
        assert not gets_in(stack, "bob-laptop") and not gets_in(stack, "alice-laptop", user=stack.other) and not gets_in(stack, "ci", user=stack.other)
        live = stack.hold(stack.on("alice-laptop", "ssh", "-o", "BatchMode=yes", f"{stack.user}@server", "echo up; exec sleep 1000"))
        live.wait_for("up")
        stack.lab.set_policy({**policy, "ssh": [rule("alice@example.com", stack.user), rule("bob@example.com", "autogroup:nonroot")]})
        wait_until(lambda: gets_in(stack, "bob-laptop"), "bob's rule is there", 15, every=0.2)
        assert gets_in(stack, "bob-laptop", user=stack.other) and not gets_in(stack, "bob-laptop", user="root")
        assert live.process.poll() is None, "a change that is not alice's leaves her alone"
        stack.lab.set_policy({**policy, "ssh": [rule("bob@example.com", stack.user)]})
        assert any("Access revoked." in line for line in live.to_the_end()), live.seen
        # No rules for this server: nobody, not everybody. (Headscale tells nodes nothing at all when its last rule goes, and tailscaled keeps what it had.)
        stack.lab.set_policy({**policy, "ssh": [{**rule("alice@example.com", stack.user), "dst": ["autogroup:self"]}]})
        wait_until(lambda: not gets_in(stack, "bob-laptop"), "without rules nobody gets in", 15, every=0.2)
        assert not gets_in(stack, "alice-laptop")


def test_all_sources_must_allow(tailnet):
    stack = tailnet
    policy = {**stack.base, "ssh": [{"action": "accept", "src": ["bob@example.com", "alice@example.com"], "dst": ["tag:server"], "users": [stack.user]}]}
    with network_policy(stack, policy), settings(stack, {"policy": {"source": ["grants", "tailnet"]}}):
        wait_until(lambda: gets_in(stack, "alice-laptop"), "both name alice", 15, every=0.2)
        assert not gets_in(stack, "bob-laptop"), "only Headscale's rules name bob"
        assert not gets_in(stack, "ci", user=stack.other), "only the grants name ci"


def test_tailscale_ssh_on_the_server_is_an_error_at_the_start_with_the_command_that_turns_it_off(tailnet):
    stack = tailnet
    stack.posternd.stop()
    try:
        stack.lab("ts", "server", "set", "--ssh")
        with pytest.raises(AssertionError, match=r"tailscale set --ssh=false"):
            stack.posternd.start()
    finally:
        stack.lab("ts", "server", "set", "--ssh=false", "--accept-risk=lose-ssh")
        stack.posternd.start()
    assert gets_in(stack, "alice-laptop")


def test_a_tailscaled_that_hangs_holds_nobody_up_for_long(tailnet):
    """The kernel's peer address is all that is known then, and that says nothing."""
    stack = tailnet
    pid, since = stack.lab.tailscaled("server"), stack.posternd.log_size()
    # Through the server's own namespace: the tunnel is tailscaled's, and stands as well.
    probe = [*stack.lab.inside("server"), "ssh", "-F", "/dev/null", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
             f"{stack.user}@{stack.lab.ip('server')}", "true"]
    os.kill(pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        done = subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        took = time.monotonic() - begin
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 255 and took < 5 * SLACK, (took, done)
    assert re.search(r"event=login verdict=deny .*why=identity_unavailable", stack.posternd.log(since)), stack.posternd.log(since)[-3000:]
    wait_until(lambda: gets_in(stack, "alice-laptop"), "it works again", 15, every=0.2)


def test_who_could_not_be_judged_because_tailscaled_hung_is_judged_when_it_answers(tailnet):
    """A change of the policy file, in the one moment in which nobody says who she is. No notice of the network's tells of it later."""
    stack = tailnet
    rules = lambda *who: json.dumps({"tagOwners": {"tag:server": ["alice@example.com"]}, "acls": [{"action": "accept", "src": ["*"], "dst": ["tag:server:22"]}],
                                     "ssh": [{"action": "accept", "src": [name], "dst": ["tag:server"], "users": [stack.user]} for name in who]})
    stack.policy_file.write_text(rules("alice@example.com", "bob@example.com"))
    with settings(stack, {"policy": {"source": ["file"]}}):
        held = stack.hold(stack.on("alice-laptop", "ssh", "-o", "BatchMode=yes", f"{stack.user}@server", "echo up; exec sleep 1000"))
        wait_until(lambda: "up" in held.take(), "she is in", 20)
        time.sleep(1.5)  # what tailscaled said of her at the login is believed for a second
        pid, since = stack.lab.tailscaled("server"), stack.posternd.log_size()
        os.kill(pid, signal.SIGSTOP)
        try:
            stack.policy_file.write_text(rules("bob@example.com"))
            stack.posternd.wait_log("event=asking_again", since=since, seconds=20)
            assert stack.live("alice-laptop"), "nobody said that she may not"
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: not stack.live("alice-laptop"), "she is cut off", 5)
        wait_until(lambda: any("Access revoked." in line for line in held.take()), "and told", 10)


def test_the_server_itself_is_nobody_to_its_own_rules(tailnet):
    stack = tailnet
    done = subprocess.run(stack.on("server", "ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", f"{stack.user}@{stack.lab.ip('server')}", "true"), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=30 * SLACK, cwd="/")
    assert done.returncode == 255 and "This machine cannot log in to itself" in done.stderr, done


def test_the_server_follows_its_addresses(tailnet):
    """A node that was deleted and joins again has others."""
    stack = tailnet
    old, since = stack.lab.ip("server"), stack.posternd.log_size()
    stack.lab("delete", "server")
    stack.lab("login", "server")
    new = stack.lab.ip("server")
    assert new != old
    stack.posternd.wait_log(re.escape(f"event=listening address={new}:22"), since=since, seconds=20)
    wait_until(lambda: gets_in(stack, "alice-laptop"), "by the same name, at the new address", 20, every=0.2)
    assert not any(a.startswith(old + ":") for a in json.loads(stack.postern("status").text)["listening"])


# ---- beside sshd

@pytest.fixture
def beside(tailnet, tmp_path):
    """Debian's sshd on 0.0.0.0:22 of the server's namespace, as on any machine; posternd is not running yet."""
    stack = tailnet
    stack.posternd.stop()
    sshd = Sshd(stack, tmp_path / "sshd", listen=("0.0.0.0", 22), prefix=stack.lab.inside("server"))
    yield sshd
    sshd.stop()
    if stack.posternd.running:
        stack.posternd.stop()
    stack._write("posternd.toml", stack.posternd_settings)
    stack.posternd.start()


def banner(stack, node: str, address: str) -> str:
    """Who answers there, by the version string."""
    done = subprocess.run([*stack.lab.inside(node), "ssh-keyscan", "-T", "5", address], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30 * SLACK)
    return next((line.split(" SSH-")[1] for line in done.stderr.splitlines() if " SSH-" in line), "")


def lan(stack, node: str) -> str:
    out = subprocess.run([*stack.lab.inside(node), "ip", "-4", "-j", "addr", "show", "eth0"], capture_output=True, text=True, check=True).stdout
    return json.loads(out)[0]["addr_info"][0]["local"]


def test_without_takeover_a_port_that_sshd_has_is_an_error_that_names_the_ways_out(beside, tailnet):
    stack = tailnet
    with pytest.raises(AssertionError) as error:
        stack.posternd.start()
    text = str(error.value)
    assert "Address already in use" in text and "takeover" in text and "ListenAddress" in text, text


def test_beside_sshd_the_tailnet_address_is_ours_and_every_other_is_sshds(beside, tailnet):
    stack = tailnet
    stack.configure({"policy": {"source": ["grants"]}, "listen": {"port": 22, "takeover": "nft", "takeover_port": 2222}})
    stack.posternd.start()
    done = stack.ssh_from("alice-laptop", "echo $SSH_CONNECTION")
    assert done.returncode == 0 and done.stdout.split()[0] == stack.lab.ip("alice-laptop"), done
    assert "OpenSSH_9" in banner(stack, "alice-laptop", lan(stack, "server")) and "Postern" not in banner(stack, "alice-laptop", lan(stack, "server"))
    assert "Postern" in banner(stack, "alice-laptop", stack.lab.ip("server"))
    # Connections from the host itself skip the redirect: sshd has them, as docs/SETTINGS.md says.
    assert "Postern" not in banner(stack, "server", stack.lab.ip("server"))
    assert "Postern" not in banner(stack, "server", "127.0.0.1")
    rules = lambda: subprocess.run([*stack.lab.inside("server"), "nft", "list", "tables"], capture_output=True, text=True).stdout
    assert "postern_takeover" in rules()
    stack.posternd.stop()
    assert "postern_takeover" not in rules()
    assert "Postern" not in banner(stack, "alice-laptop", stack.lab.ip("server")), "sshd has it again"
    # A kill leaves the redirect; the next start takes it over.
    stack.posternd.start()
    stack.posternd.kill()
    assert "postern_takeover" in rules()
    stack.posternd.start()
    assert gets_in(stack, "alice-laptop")
    # Nor does it stay when the next one has another port instead.
    stack.posternd.kill()
    stack.configure({"policy": {"source": ["grants"]}, "listen": {"port": 2222}})
    stack.posternd.start()
    assert "postern_takeover" not in rules()
    assert "Postern" not in banner(stack, "alice-laptop", stack.lab.ip("server")), "sshd has it again"


def test_a_firewalls_reload_takes_the_takeover_away_for_a_moment_only(beside, tailnet):
    """`flush ruleset` is the first line of Debian's /etc/nftables.conf: `systemctl reload nftables`."""
    stack = tailnet
    stack.configure({"policy": {"source": ["grants"]}, "listen": {"port": 22, "takeover": "nft", "takeover_port": 2222}})
    stack.posternd.start()
    nft = lambda *words: subprocess.run([*stack.lab.inside("server"), "nft", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    ours = lambda: "Postern" in banner(stack, "alice-laptop", stack.lab.ip("server"))
    before = nft("list", "table", "inet", "postern_takeover")
    assert before.count("dnat") >= 2 and ours()
    # What is none of ours is no reason for anything, our own table least of all.
    since = stack.posternd.log_size()
    nft("add", "table", "inet", "somebodys")
    for how in (["flush", "ruleset"], ["delete", "table", "inet", "postern_takeover"], ["flush", "table", "inet", "postern_takeover"]):
        assert "takeover_lost" not in stack.posternd.log(since)
        nft(*how)
        stack.posternd.wait_log("event=takeover_lost", since=since, seconds=5)
        wait_until(ours, f"the tailnet's port 22 is ours again after nft {' '.join(how)}", 5, every=0.2)
        assert nft("list", "table", "inet", "postern_takeover") == before
        assert gets_in(stack, "alice-laptop")
        since = stack.posternd.log_size()
    # The next stop takes the table with it, and nobody brings it back.
    stack.posternd.stop()
    assert "postern_takeover" not in nft("list", "ruleset")
