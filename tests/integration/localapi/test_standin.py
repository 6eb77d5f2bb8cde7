"""Live sessions and logins behind a tailscaled that says what none should, or goes away: nobody gets in by it, and nobody stays in by it."""
import copy
import datetime
import json
import time

import paramiko
import pytest

from harness import SLACK, new_stack, wait_until
from localapi.standin import Standin, whois


@pytest.fixture
def world(accounts):
    made = []

    def make(source="grants", tailscaled=None, policy=None, pam=None):
        stack = new_stack(accounts, start=(), pam=pam)
        made.append(stack)
        api = stack.api = Standin(stack.dir / "tailscaled.sock")
        login = {"postern.internal/cap/login": [{"action": "accept", "users": [stack.user]}]}
        api.nodes = {stack.plain_alice: whois("3", "alice", stack.plain_alice, "alice@example.com", login), stack.bob: whois("4", "bob", stack.bob, "bob@example.com")}
        peer = lambda number, name, user, address: {"ID": number, "DNSName": f"{name}.lab.example.com.", "UserID": user, "TailscaleIPs": [address]}
        api.status = {"TUN": True, "BackendState": "Running", "Self": {**peer("1", "server", 0, stack.server), "Tags": ["tag:server"]},
                      "Peer": {"a": peer("3", "alice", 1, stack.plain_alice), "b": peer("4", "bob", 2, stack.bob)},
                      "User": {"1": {"LoginName": "alice@example.com"}, "2": {"LoginName": "bob@example.com"}}}
        api.netmap = {"SSHPolicy": {"rules": [{"principals": [{"nodeIP": stack.plain_alice}], "sshUsers": {"*": "="}, "action": {"accept": True}}]}}
        settings = {**stack._posternd_defaults(), "identity": {"provider": "tailscaled"}, "tailscaled": {"socket": api.path, "timeout": "2s", **(tailscaled or {})},
                    "policy": {"source": [source], "file": stack.policy_file, "require_network_rule": False, **(policy or {})}, "audit": {"file": stack.dir / "audit.json", "journal_socket": ""}}
        stack._write("posternd.toml", settings)
        stack.posternd.start()
        stack.learn_host_key()
        return stack
    yield make
    for stack in made:
        stack.stop()
        stack.api.stop()


def live(stack):
    client = stack.popen("echo up; exec sleep 1000", bind=stack.plain_alice)
    assert client.stdout.readline() == b"up\n", client.stderr.read()
    return client


def is_cut(client) -> bool:
    client.wait(15 * SLACK)
    return b"Access revoked." in client.stderr.read()


def expire(of):
    of["Node"]["Expired"] = True


def lose_grant(of):
    of["CapMap"] = None


ODD = {"its system's version is too long": lambda n: n["Hostinfo"].update(OSVersion="x" * 400), "its system has a control character": lambda n: n["Hostinfo"].update(OS="linux\n"),
       "its version is a number": lambda n: n["Hostinfo"].update(IPNVersion=7), "its Hostinfo is a list": lambda n: n.update(Hostinfo=[1]), "it has a tag that none may have": lambda n: n.update(Tags=["tag:web_server"]),
       "a flag is a text": lambda n: n.update(IsJailed="no"), "the answer is longer than any": lambda n: n["Hostinfo"].update(RequestTags=["tag:" + "x" * 1000] * 900)}


@pytest.mark.parametrize("end", [expire, lose_grant])
@pytest.mark.parametrize("odd", ODD)
def test_no_word_of_a_nodes_own_keeps_it_in(world, odd, end):
    stack = world()
    client = live(stack)
    node = copy.deepcopy(stack.api.nodes[stack.plain_alice])
    ODD[odd](node["Node"])
    end(node)
    stack.api.nodes[stack.plain_alice] = node
    stack.api.notice()
    assert is_cut(client)
    assert stack.ssh("true", bind=stack.plain_alice).code == 255


def test_a_peer_that_cannot_be_read_disturbs_no_other(world):
    stack = world()
    client = live(stack)
    stack.api.status["Peer"]["c"] = {"ID": 9, "DNSName": ["db"], "UserID": "1", "TailscaleIPs": ["nowhere"], "Tags": [1]}
    asked = stack.api.asked["status"]
    stack.api.notice()
    wait_until(lambda: stack.api.asked["status"] > asked, "it has looked")
    assert stack.ssh("true", bind=stack.plain_alice).code == 0
    lose_grant(stack.api.nodes[stack.plain_alice])
    stack.api.notice()
    assert is_cut(client)


def test_without_a_network_map_the_networks_rules_deny_with_that_sentence_and_the_rest_is_heard(world):
    stack = world("tailnet")
    client = live(stack)
    stack.api.netmap = None
    stack.api.notice()
    wait_until(lambda: "no longer tells it the network's ssh rules" in stack.ssh("true", bind=stack.plain_alice).errors, "the sentence", 20, every=0.2)
    assert client.poll() is None, "that rules are not known ends nobody"
    expire(stack.api.nodes[stack.plain_alice])
    stack.api.notice()
    assert is_cut(client)


def test_who_had_connected_before_tailscaled_went_does_not_log_in_after_it(world):
    stack = world()
    transport = paramiko.Transport(stack.connect(stack.plain_alice))
    try:
        transport.start_client(timeout=20 * SLACK)
        stack.api.stop()
        stack.posternd.wait_log("event=tailscaled_away")
        with pytest.raises(paramiko.SSHException):
            transport.auth_none(stack.user)
    finally:
        transport.close()


def test_one_that_cannot_be_judged_is_asked_about_once_a_second_however_many_notices_come(world):
    stack = world()
    client = live(stack)
    stack.api.raw["whois"] = b"{}"
    since = stack.posternd.log_size()
    for _ in range(30):
        stack.api.notice()
        stack.posternd.wait_log("event=asking_again", since=since)
        time.sleep(0.05)  # notices as they come in a busy network, faster than the second
    counts = {line.rpartition("connections=")[2] for line in stack.posternd.log(since).splitlines() if "event=asking_again" in line}
    assert counts == {"1"} and client.poll() is None
    del stack.api.raw["whois"]
    lose_grant(stack.api.nodes[stack.plain_alice])
    stack.api.notice()
    assert is_cut(client)


def test_users_of_other_networks_are_let_in_by_name_only(world):
    stack = world("file", tailscaled={"shared_users": True})
    allow = lambda src: stack.set_policy(json.dumps({"tagOwners": {"tag:server": []}, "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}],
                                                     "ssh": [{"action": "accept", "src": [src], "dst": ["tag:server"], "users": [stack.user]}]}))
    stack.api.nodes[stack.bob] = whois("4", "guest", stack.bob, "eve@other.net", Sharer=7)
    stack.api.notice()
    allow("eve@other.net")
    wait_until(lambda: stack.ssh("true", bind=stack.bob).code == 0, "by her name", every=0.2)
    allow("autogroup:member")
    wait_until(lambda: stack.ssh("true", bind=stack.plain_alice).code == 0, "a member", every=0.2)
    assert stack.ssh("true", bind=stack.bob).code == 255


def test_the_audit_names_a_refused_identity(world):
    stack = world()
    expire(stack.api.nodes[stack.plain_alice])
    assert stack.ssh("true", bind=stack.plain_alice).code == 255
    event = [json.loads(line) for line in (stack.dir / "audit.json").read_text().splitlines()][-1]
    assert event["event"] == "login" and event["why"] == "identity_refused" and '"alice" ("3")' in event["detail"] and "expired" in event["detail"]


def test_a_key_that_expires_by_the_clock_cuts_without_a_notice(world):
    stack = world()
    due = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=4)
    text = due.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    stack.api.nodes[stack.plain_alice]["Node"]["KeyExpiry"] = stack.api.status["Peer"]["a"]["KeyExpiry"] = text
    stack.api.notice()
    client = live(stack)
    assert is_cut(client)
    late = (datetime.datetime.now(datetime.timezone.utc) - due).total_seconds()
    assert 0 <= late < 2 * SLACK


def test_a_huge_status_holds_up_nothing_for_long(world):
    """36 MiB, as of 40,000 machines: 26 s on the broker's only thread, before it was read in linear time."""
    stack = world()
    client = live(stack)
    peers = {f"k{i}": {"ID": f"n{i}", "DNSName": f"host-{i}.lab.", "UserID": 1, "TailscaleIPs": [f"100.{64 + i // 65536}.{i // 256 % 256}.{i % 256}"], "Note": "x" * 760} for i in range(40_000)}
    stack.api.raw["status"] = json.dumps({**stack.api.status, "Peer": {**stack.api.status["Peer"], **peers}}).encode()
    asked = stack.api.asked["status"]
    stack.api.notice()
    wait_until(lambda: stack.api.asked["status"] > asked, "it looks")
    begin = time.monotonic()
    stack.postern("status")
    assert time.monotonic() - begin < 8 * SLACK
    lose_grant(stack.api.nodes[stack.plain_alice])
    stack.api.notice()
    assert is_cut(client)
