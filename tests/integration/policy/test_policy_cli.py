"""postern policy: what it says of a file, who gets in, why, and what another file would change. Nothing runs but the command itself."""
import json
import os
import re
import subprocess
import time
import unicodedata

import pytest

from harness import BIN, IS_ROOT, ROOT, SLACK, rng

CORPUS = sorted((ROOT / "tests/data/policy").glob("*.json"))
CASES = {path.stem: json.loads(path.read_text()) for path in CORPUS}
ACCEPTED = [name for name, case in CASES.items() if case["accepted"]]
REFUSED = [name for name, case in CASES.items() if not case["accepted"]]


def postern(*arguments, code=0, stdin=b""):
    """`postern policy …`: its output, when it ends with `code`."""
    done = subprocess.run([str(BIN / "postern"), "policy", *map(str, arguments)], input=stdin, capture_output=True, timeout=60 * SLACK)
    assert done.returncode == code, (done.returncode, done.stdout[-4000:], done.stderr[-4000:])
    return Answer(done.stdout.decode(), done.stderr.decode())


class Answer:
    def __init__(self, out, err):
        self.out, self.err = out, err

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def lines(self):
        return [json.loads(line) for line in self.out.splitlines()]


def network_of(name):
    return ROOT / "tests/data/policy" / f"{name}.json"


def policy_text(case):
    return case["policy_text"] if "policy_text" in case else json.dumps(case["policy"], indent=1)


@pytest.fixture
def policy_file(tmp_path):
    """policy_file(value, "name") -> the path of a file with that policy: text, bytes, or what becomes JSON."""
    def write(value, name="policy.hujson"):
        path = tmp_path / name
        if isinstance(value, (dict, list)):
            value = json.dumps(value, indent=2)
        path.write_bytes(value if isinstance(value, bytes) else value.encode())
        return path
    return write


def flags(**lists):
    return [word for option, values in lists.items() for value in values for word in (f"--{option}", value)]


def key(login):
    return login["dst"], login["src"], login["ssh_user"]


# ------------------------------------------------------------------------------------------------------- the corpus

def test_the_corpus_is_whole():
    assert len(CASES) == 67 and len(ACCEPTED) == 47


@pytest.mark.parametrize("name", ACCEPTED)
def test_who_gets_in_is_what_the_real_service_said(policy_file, name):
    case = CASES[name]
    path = policy_file(policy_text(case))
    report = postern("check", path, "--network", network_of(name))
    assert re.search(r": fine, \d+ ssh rules?, (no tests|\d+ tests? passed)", report.out), report.out
    asked = postern("who", "--policy", path, "--network", network_of(name), *flags(dst=case["dst_nodes"], user=case["ssh_users_probed"])).lines
    assert sorted(asked, key=key) == sorted(case["allow"], key=key)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_real_service_refuses_is_refused_with_its_words(policy_file, name):
    case = CASES[name]
    report = postern("check", policy_file(policy_text(case)), "--network", network_of(name), code=1)
    assert case["message"] in report.out
    assert re.search(r"^\S+/policy\.hujson:\d+:\d+: error: ", report.out, re.M), report.out
    assert report.out.splitlines()[-1].startswith(f"{report.out.split(':')[0]}: refused, ")


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_explanation_marks_the_rule_that_decides(policy_file, name):
    case = CASES[name]
    path = policy_file(json.dumps(case["policy"], indent=1))
    lines = path.read_text().splitlines()
    allowed = {key(login) for login in case["allow"]}
    every = [(dst, src, user) for dst in case["dst_nodes"] for src in case["nodes"] for user in case["ssh_users_probed"]]
    denied = [triple for triple in every if triple not in allowed]
    for dst, src, user in [*sorted(allowed), *rng(name).sample(denied, min(6, len(denied)))]:
        login = ["--policy", path, "--network", network_of(name), "--src", src, "--dst", dst, "--user", user]
        is_allowed = (dst, src, user) in allowed
        why = postern("explain", *login, "--json", code=0 if is_allowed else 1).json
        assert len(why["rules"]) == len(case["policy"].get("ssh") or [])
        marked = [rule for rule in why["rules"] if rule["decides"]]
        if not is_allowed:
            assert not marked and why["rule"] is None and why["verdict"] == "deny"
            continue
        assert [rule["rule"] for rule in marked] == [why["rule"]]
        assert postern("decide", *login, "--json").json == {name: value for name, value in why.items() if name != "rules"}
        # It is the rule that stands there in the file, and it may say so.
        rule = case["policy"]["ssh"][int(re.fullmatch(r"ssh\[(\d+)\]", marked[0]["field"])[1])]
        assert rule["action"].strip() == why["verdict"] == marked[0]["action"]
        assert lines[why["rule"]["line"] - 1][why["rule"]["column"] - 1] == "{"
        assert all(marked[0][condition] for condition in ("src", "dst", "user", "posture"))
    if allowed:
        text = postern("explain", *login[:4], *flags(dst=[min(allowed)[0]], src=[min(allowed)[1]], user=[min(allowed)[2]])).out
        assert len(re.findall(r"^> ssh\[\d+\] .* decides: ", text, re.M)) == 1, text


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_policy_does_not_differ_from_itself(policy_file, name):
    path = policy_file(policy_text(CASES[name]))
    for more in ([], ["--json"], flags(user=CASES[name]["ssh_users_probed"])):
        difference = postern("diff", path, path, "--network", network_of(name), *more)
        assert (difference.out, difference.err) == ("", "")


@pytest.mark.parametrize("seed", range(25))
def test_a_difference_is_the_difference_of_who_gets_in(policy_file, seed):
    before, after = rng(f"diff{seed}").sample(ACCEPTED, 2)
    network = network_of(before)
    names = sorted({*CASES[before]["ssh_users_probed"], *CASES[after]["ssh_users_probed"]})
    old, new = policy_file(policy_text(CASES[before]), "old"), policy_file(policy_text(CASES[after]), "new")
    was, now = ({key(login): login for login in postern("who", "--policy", path, "--network", network, *flags(user=names)).lines} for path in (old, new))
    difference = postern("diff", old, new, "--network", network, "--json", *flags(user=names)).lines
    by_kind = lambda kind: {key(line): line for line in difference if line["change"] == kind}
    assert len(by_kind("gained")) + len(by_kind("lost")) + len(by_kind("changed")) == len(difference)
    assert by_kind("gained").keys() == now.keys() - was.keys()
    assert by_kind("lost").keys() == was.keys() - now.keys()
    assert by_kind("changed").keys() == {login for login in now.keys() & was.keys() if now[login] != was[login]}
    for line in difference:
        for member, side in (("old", was), ("new", now)):
            login = dict(side.get(key(line), {}))
            for name in ("src", "dst", "ssh_user"):
                login.pop(name, None)
            assert line.get(member, {}) == login
    text = postern("diff", old, new, "--network", network, *flags(user=names))
    assert sorted(line[0] for line in text.out.splitlines()) == sorted({"gained": "+", "lost": "-", "changed": "~"}[line["change"]] for line in difference)
    if difference:
        assert text.err.startswith(f"{len(by_kind('gained'))} gained, {len(by_kind('lost'))} lost, {len(by_kind('changed'))} changed\n")


def test_without_names_a_difference_takes_those_of_both_policies(policy_file):
    rule = lambda *users: {"tagOwners": {"tag:a": []}, "ssh": [{"action": "accept", "src": ["tag:a"], "dst": ["tag:a"], "users": list(users)}]}
    network = policy_file({"nodes": {"a": {"ipv4": "100.64.0.1", "tags": ["tag:a"]}}}, "net")
    old, new = policy_file(rule("root", "ann"), "old"), policy_file(rule("autogroup:nonroot"), "new")
    assert postern("diff", old, new, "--network", network).out.splitlines() == ["- a -> a as root: accept", "+ a -> a as autogroup:nonroot: accept"]


# ------------------------------------------------------------------------------------------------------- a network of our own

NETWORK = {
    "users": [{"id": 1, "name": "alice", "email": "alice@example.com"}, {"id": 2, "name": "bob", "email": "bob@example.com"}],
    "nodes": {
        "laptop": {"ipv4": "100.64.0.1", "ipv6": "fd7a::1", "tags": [], "user": "alice"},
        "phone": {"ipv4": "100.64.0.2", "ipv6": "fd7a::2", "tags": [], "user": "bob"},
        "server": {"id": "n7", "ipv4": "100.64.0.3", "ipv6": "fd7a::3", "tags": ["tag:server"]},
        "rec-b": {"ipv4": "100.64.0.9", "tags": ["tag:recorder"]},
        "rec-a": {"ipv4": "100.64.0.8", "tags": ["tag:recorder"]},
    },
}
POLICY = {
    "tagOwners": {"tag:server": [], "tag:recorder": []},
    "grants": [{"src": ["alice@example.com"], "dst": ["tag:server"], "ip": ["tcp:22"]}],
    "ssh": [
        {"action": "accept", "src": ["alice@example.com"], "dst": ["tag:server"], "users": ["autogroup:nonroot", "root"], "acceptEnv": ["GIT_*", "LANG"],
         "recorder": ["tag:recorder"], "enforceRecorder": True},
        {"action": "accept", "src": ["bob@example.com"], "dst": ["tag:server"], "users": ["deploy"]},
    ],
}


@pytest.fixture
def ours(policy_file):
    """The options --policy and --network for POLICY and NETWORK."""
    return ["--policy", policy_file(POLICY), "--network", policy_file(NETWORK, "net.json")]


def test_a_decision_says_all_that_a_session_would_get(ours):
    d = postern("decide", *ours, "--src", "laptop", "--dst", "server", "--user", "ann", "--json").json
    assert {name: d[name] for name in ("src", "dst", "ssh_user", "verdict", "local_user", "accept_env", "recorder_tag", "recorders", "enforce_recorder", "session_rules")} == {
        "src": "laptop", "dst": "server", "ssh_user": "ann", "verdict": "accept", "local_user": "ann", "accept_env": ["GIT_*", "LANG"],
        "recorder_tag": "tag:recorder", "recorders": ["rec-a", "rec-b"], "enforce_recorder": True, "session_rules": {}}
    assert d["rule"] == {"file": str(ours[1]), "line": 20, "column": 5}
    assert d["network"]["open"] is True and d["network"]["required"] is False
    text = postern("decide", *ours, "--src", "laptop", "--dst", "server", "--user", "ann").out
    assert text.startswith("accept: laptop -> server as ann\n")
    for line in (f"rule            {ours[1]}:20:5", "local user      ann", "accept env      GIT_* LANG",
                 "recorders       tag:recorder: rec-a (100.64.0.8), rec-b (100.64.0.9)", "enforce         yes", f"network rule    {ours[1]}:7:5: grants[0] opens port 22: "):
        assert f"\n  {line}" in text
    assert text.endswith(" (not asked for)\n")


def test_a_decision_has_the_session_rules_of_the_app_grants(policy_file, ours):
    for capability, more in (("postern.internal/cap/ssh", []), ("example.com/cap/own", ["--session-capability", "example.com/cap/own"])):
        grants = [{**POLICY["grants"][0], "app": {capability: [{"sftp": "read-only", "maxDuration": "8h"}]}}]
        login = ["--policy", policy_file({**POLICY, "grants": grants}, "app"), *ours[2:], "--src", "laptop", "--dst", "server", "--user", "ann", *more]
        assert postern("decide", *login, "--json").json["session_rules"] == {"maxDuration": "8h", "sftp": "read-only"}
        assert '\n  session rule    sftp = "read-only"\n' in postern("decide", *login).out


def test_a_check_says_how_long_a_proof_of_identity_counts(policy_file, ours):
    rule = {"action": "check", "src": ["alice@example.com"], "dst": ["tag:server"], "users": ["root"]}
    for period, shown in (("90m", "1h30m0s"), ("always", "always"), (None, "12h0m0s")):
        path = policy_file({**POLICY, "ssh": [{**rule, **({"checkPeriod": period} if period else {})}]}, "checked")
        d = postern("decide", "--policy", path, *ours[2:], "--src", "laptop", "--dst", "server", "--user", "root", "--json").json
        assert (d["verdict"], d["check_period"]) == ("check", shown)


@pytest.mark.parametrize("ends", [("laptop", "server"), ("100.64.0.1", "n7"), ("fd7a::1", "fd7a::3")], ids=["names", "address and id", "addresses"])
def test_an_end_is_a_node_by_name_id_or_address(ours, ends):
    d = postern("decide", *ours, "--src", ends[0], "--dst", ends[1], "--user", "ann", "--require-network-rule", "--json").json
    assert (d["src"], d["dst"], d["verdict"]) == ("laptop", "server", "accept")


def test_a_denied_login_ends_with_1_and_the_sentence_that_the_client_would_hear(ours):
    d = postern("decide", *ours, "--src", "phone", "--dst", "server", "--user", "root", "--json", code=1).json
    assert (d["verdict"], d["rule"], d["message"]) == ("deny", None, 'tailnet policy does not permit you to SSH as user "root"')
    text = postern("decide", *ours, "--src", "phone", "--dst", "laptop", "--user", "root", code=1).out
    assert text.startswith("deny: phone -> laptop as root: tailnet policy does not permit you to SSH to this node\n")


def test_an_account_with_uid_0_by_another_name_is_not_nonroot(ours):
    login = [*ours, "--src", "laptop", "--dst", "server"]
    assert postern("decide", *login, "--user", "toor", "--json").json["verdict"] == "accept"
    postern("decide", *login, "--user", "toor", "--uid", "0", code=1)
    postern("decide", *login, "--user", "root")  # a rule names it


def test_the_network_rule_decides_only_when_it_is_asked_for(ours):
    login = [*ours, "--src", "phone", "--dst", "server", "--user", "deploy"]
    d = postern("decide", *login, "--json").json
    assert (d["verdict"], d["network"]["open"], d["network"]["required"]) == ("accept", False, False)
    d = postern("decide", *login, "--require-network-rule", "--json", code=1).json
    assert (d["verdict"], d["network"]["open"], d["network"]["required"]) == ("deny", False, True)
    assert d["message"] == "tailnet policy does not permit you to SSH to this node"


def test_a_node_may_come_from_any_of_its_addresses(policy_file, ours):
    grants = [{"src": ["fd7a::/64"], "dst": ["*"], "ip": ["*"]}]  # no IPv4
    path = policy_file({**POLICY, "grants": grants}, "six")
    login = ["--policy", path, *ours[2:], "--dst", "server", "--user", "ann", "--require-network-rule"]
    postern("decide", *login, "--src", "laptop")
    postern("decide", *login, "--src", "fd7a::1")
    postern("decide", *login, "--src", "100.64.0.1", code=1)
    assert len(postern("who", *login[:4], "--require-network-rule", *flags(user=["ann"])).lines) == 1


def test_who_lists_every_name_that_a_rule_can_let_in(ours):
    listed = postern("who", *ours)
    env = {"accept_env": ["GIT_*", "LANG"]}
    login = lambda src, user, **more: {"src": src, "dst": "server", "ssh_user": user, "verdict": "accept", "local_user": user, **more}
    assert listed.lines == [login("laptop", "deploy", **env), login("laptop", "root", **env), login("laptop", "autogroup:nonroot", **env), login("phone", "deploy")]
    assert listed.err == "postern policy who: no acl or grant opens port 22 for 1 of 4 logins (--require-network-rule leaves them out)\n"
    required = postern("who", *ours, "--require-network-rule")
    assert required.lines == listed.lines[:3] and required.err == ""


def test_who_takes_localparts_from_the_networks_users(policy_file, ours):
    path = policy_file({**POLICY, "ssh": [{"action": "accept", "src": ["autogroup:member"], "dst": ["tag:server"], "users": ["localpart:*@example.com"]}]}, "local")
    listed = postern("who", "--policy", path, *ours[2:], "--dst", "server").lines
    assert [(line["src"], line["ssh_user"], line["local_user"]) for line in listed] == [("laptop", "alice", "alice"), ("phone", "bob", "bob")]


def test_who_keeps_the_order_of_the_options_and_the_network(ours):
    asked = [*ours, *flags(dst=["server"], src=["phone", "laptop", "phone"], user=["root", "deploy"])]
    assert [(line["src"], line["ssh_user"]) for line in postern("who", *asked).lines] == [("phone", "deploy"), ("laptop", "root"), ("laptop", "deploy")]


def test_a_difference_tells_what_changes_for_whom(policy_file, ours):
    new = json.loads(json.dumps(POLICY))
    new["ssh"][0].update({"acceptEnv": [], "enforceRecorder": False, "users": ["deploy"]})
    new["ssh"][1]["users"] = ["root"]
    path = policy_file(new, "new")
    text = postern("diff", ours[1], path, *ours[2:])
    assert text.out.splitlines() == [
        "~ laptop -> server as deploy: accept, env GIT_* LANG, recorded by tag:recorder (enforced) => accept, recorded by tag:recorder",
        "- laptop -> server as root: accept, env GIT_* LANG, recorded by tag:recorder (enforced)",
        "- laptop -> server as autogroup:nonroot: accept, env GIT_* LANG, recorded by tag:recorder (enforced)",
        "- phone -> server as deploy: accept",
        "+ phone -> server as root: accept"]
    assert text.err == "1 gained, 3 lost, 1 changed\n"
    changed = postern("diff", ours[1], path, *ours[2:], "--json").lines[0]
    assert changed == {"change": "changed", "src": "laptop", "dst": "server", "ssh_user": "deploy",
                       "old": {"verdict": "accept", "local_user": "deploy", "accept_env": ["GIT_*", "LANG"], "recorder_tag": "tag:recorder", "enforce_recorder": True},
                       "new": {"verdict": "accept", "local_user": "deploy", "recorder_tag": "tag:recorder", "enforce_recorder": False}}


def test_another_check_period_is_told_though_the_logins_stay(policy_file, ours):
    rule = lambda period: policy_file({**POLICY, "ssh": [{"action": "check", "src": ["alice@example.com"], "dst": ["tag:server"], "users": ["root"], "checkPeriod": period}]}, period)
    difference = postern("diff", rule("1h"), rule("2h"), *ours[2:])
    assert (difference.out, difference.err) == ("", "postern policy diff: 1 login that stays has another check period\n")


def test_with_network_rules_a_difference_shows_what_a_grant_opens(policy_file, ours):
    new = {**POLICY, "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}]}
    path = policy_file(new, "new")
    assert postern("diff", ours[1], path, *ours[2:]).out == ""
    assert postern("diff", ours[1], path, *ours[2:], "--require-network-rule").out == "+ phone -> server as deploy: accept\n"


def test_who_answers_for_a_big_network_in_seconds(policy_file):
    nodes = {f"n{i}": {"ipv4": f"100.64.{i // 250}.{i % 250}", **({"tags": [f"tag:t{i % 10}"]} if i % 2 else {"tags": [], "user": f"u{i // 2 % 1000}@example.com"})}
             for i in range(5000)}
    network = policy_file({"nodes": nodes}, "net.json")
    groups = {f"group:g{i}": [f"u{k}@example.com" for k in range(i, 1000, 100)] for i in range(100)}
    path = policy_file({"groups": groups, "tagOwners": {f"tag:t{i}": [] for i in range(10)}, "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}],
                        "ssh": [{"action": "accept", "src": [f"group:g{i % 100}"], "dst": [f"tag:t{i % 10}"], "users": [f"app{i}", "root"]} for i in range(1000)]})
    begin = time.monotonic()
    listed = postern("who", "--policy", path, "--network", network, *flags(dst=["n1", "n3"], user=["root", "app1"])).lines
    seconds = time.monotonic() - begin
    assert len(listed) > 400
    assert seconds < 5 * SLACK, seconds


# ------------------------------------------------------------------------------------------------------- wrong files

def columns(text):
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)


def assert_fit_for_a_terminal(text):
    """No control characters, and nothing invisible or that turns the direction of writing."""
    assert all(sign == "\n" or unicodedata.category(sign) not in ("Cc", "Cf") for sign in text), text


def marked(report):
    """(line, column, message, what stands above the caret) of each error with a caret."""
    lines, found = report.splitlines(), []
    for i, line in enumerate(lines):
        at = re.match(r".*?:(\d+):(\d+): error: (.*)", line)
        if not at or i + 2 >= len(lines) or lines[i + 2].strip() != "^":
            continue
        before, rest = lines[i + 2].index("^"), lines[i + 1]
        while before > 0 and rest:
            before -= columns(rest[0])
            rest = rest[1:]
        assert before == 0, (line, lines[i + 1], lines[i + 2])
        found.append((int(at[1]), int(at[2]), at[3], rest))
    return found


VALID = json.dumps(POLICY, indent=2)
ONE_RULE = '{"ssh": [{"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:self"], "users": ["root"]}]}'
BAD = {
    "empty": (b"", "the file is empty"),
    "no object": (b"[]", "must be an object"),
    "a comma is missing": (b'{"ssh": [] "groups": {}}', "expected a comma"),
    "a quote is missing": (b'{"ssh: []}', "this string does not end"),
    "a comment does not end": (b'{"ssh": [] /* }', "this comment does not end"),
    "something after the end": (b'{"ssh": []}}', "text after the end"),
    "64 MB": (b'{"ssh": []}' + b" " * (64 << 20), "the file is too large"),
    "64 MB of brackets": (b"[" * (64 << 20), "the file is too large"),
    "nesting of 100,000": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "nesting of 100,000 objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "duplicate keys": (b'{"ssh": [],\n "ssh": []}', 'the name "ssh" appears twice'),
    "duplicate keys in a rule": (ONE_RULE.replace('"users"', '"action"').encode(), 'the name "action" appears twice'),
    "unknown action": (ONE_RULE.replace("accept", "deny").encode(), '"deny" is not a valid action'),
    "a group in itself": (b'{"groups": {"group:a": ["group:a"]}}', "group members cannot be recursive"),
    "a cycle of groups": (b'{"groups": {"group:a": ["group:b"],\n "group:b": ["group:a"]}}', "group members cannot be recursive"),
    "an unknown member of a rule": (ONE_RULE.replace('"dst"', '"dsts"').encode(), 'unknown member "dsts"'),
    "a tag beyond ASCII": ('{"tagOwners": {"tag:größe": [], "tag:ärger": []}}'.encode(), "tag names must start with a letter, after 'tag:'"),
    "no UTF-8": (b'{"groups": {"group:\xff": []}}', "not UTF-8"),
    "half a sign": ('{"groups": {"group:ä'.encode()[:-1], "not UTF-8"),
    "UTF-16": (ONE_RULE.encode("utf-16"), "not UTF-8"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "NUL": (b'{"ssh": [\0]}', "NUL byte"),
    "NUL, escaped": (b'{"groups": {"group:\\u0000": []}}', "NUL in a string"),
    "a control character": (b'{"groups": {"group:\x1b[31m": []}}', "control character"),
    "random bytes": (rng("bytes").randbytes(4096), ""),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_at_once_with_a_place(policy_file, name):
    text, message = BAD[name]
    path = policy_file(text)
    begin = time.monotonic()
    report = postern("check", path, code=1)
    seconds = time.monotonic() - begin
    first = re.match(rf"{re.escape(str(path))}:(\d+):(\d+): error: (.*)\n", report.out)
    assert first and message in report.out, report.out
    assert int(first[1]) <= text.count(b"\n") + 1
    assert_fit_for_a_terminal(report.out + report.err)
    assert len(report.out) < 2000 and seconds < 5 * SLACK
    d = postern("check", path, "--json", code=1).json
    assert d["fine"] is False and all(e["line"] >= 1 and e["column"] >= 1 for e in d["errors"]) and message in " ".join(e["message"] for e in d["errors"])
    # The commands that ask questions say the same, on stderr, and answer nothing.
    network = policy_file(NETWORK, "net.json")
    for question in (["who", "--policy", path], ["decide", "--policy", path, "--src", "laptop", "--dst", "server", "--user", "x"], ["diff", path, path]):
        asked = postern(*question, "--network", network, code=1)
        assert asked.out == "" and asked.err.startswith(first[0]), asked.err


def test_a_file_that_is_cut_off_anywhere_is_refused_with_a_place(policy_file):
    text = VALID.encode()
    for length in sorted({0, 1, len(text) - 1, *rng("cut").sample(range(len(text)), 40)}):
        report = postern("check", policy_file(text[:length]), code=1)
        assert re.match(r"\S+:\d+:\d+: error: ", report.out), (length, report.out)


def test_all_that_is_wrong_is_told_at_once_in_the_files_order(policy_file):
    path = policy_file('''{
  "groups": {"group:a": ["group:b"], "gruop:c": []},
  "hosts":  {"office": "10.1.0.300"},
  "tagOwners": {"tag:1": [], "tag:ok": ["group:none"]},
  "acls": [{"action": "drop", "src": ["*"], "dst": ["*:*"]}],
  "ssh": [
    {"action": "deny", "src": ["*"], "dst": ["tag:gone"], "users": ["*", ""]},
    {"action": "accept", "src": ["group:none"], "dst": ["tag:ok"], "users": [], "acceptEnv": [""], "sorce": []},
  ],
  "sshh": [],
}''')
    report = postern("check", path, code=1).out
    found = marked(report)
    places = [(line, column) for line, column, *_ in found]
    assert places == sorted(places) and len(found) >= 15
    for message in ('"group:b": group members cannot be recursive', "group names must start with", "tag names must start with a letter", "group not found",
                    '"deny" is not a valid action', '"*" is not allowed in src', 'tag not found: "tag:gone"', 'user "*" is not valid', 'user "" is not valid',
                    "users must be specified", "acceptEnv values cannot be empty", 'unknown member "sorce"', 'unknown member "sshh"'):
        assert any(message in said for _, _, said, _ in found), message
    assert report.splitlines()[-1] == f"{path}: refused, {len(found)} errors"


@pytest.mark.parametrize("before", ["", "\t\t", "/* größe */ ", "/* 漢字 かな */ ", '/* \U0001f6aa */ ', "/* " + "x" * 5000 + " */ ", "/* " + "漢\t" * 3000 + " */ "],
                         ids=["plain", "tabs", "umlauts", "wide", "emoji", "long", "long and wide"])
@pytest.mark.parametrize("after", ["", " // " + "y" * 5000, " // \t漢字"], ids=["end", "long", "wide"])
def test_the_caret_is_under_the_place(policy_file, before, after):
    path = policy_file('{"ssh": [{"src": [], "dst": [], "users": ["root"],\n' + before + '"action": "deny",' + after + "\n}]}")
    (line, column, message, above), = marked(postern("check", path, code=1).out)
    assert (line, column) == (2, len((before + '"action": ').encode()) + 1)
    assert message.startswith('ssh[0].action: "deny" is not a valid action') and above.startswith('"deny",')


def test_a_long_line_is_cut_around_the_caret(policy_file):
    report = postern("check", policy_file('{"groups": {' + '"group:a": [],' * 300 + "}}"), code=1).out
    sources = [line for line in report.splitlines() if line.startswith("    ") and line.strip() != "^"]
    assert len(sources) >= 200 and all(len(line) <= 110 for line in sources)
    assert sources[100].startswith("    ...") and sources[100].endswith("...")
    assert all(above.startswith('"group:a"') for *_, above in marked(report)[:-1])


def test_nothing_in_a_file_steers_the_terminal(policy_file):
    hostile = "\x1b]0;owned\x07\x9b31m\u202e\u200b\x7f\r"
    inside = json.dumps({"groups": {f"group:{hostile}": [hostile]}, "ssh": [{"action": hostile, "src": [hostile], "users": [hostile]}], hostile: 1}, ensure_ascii=False)
    for text in (inside, json.dumps(json.loads(inside), ensure_ascii=True), f"{{}} {hostile}", f"{{}} // {hostile}"):
        report = postern("check", policy_file(text), code=1)
        assert_fit_for_a_terminal(report.out + report.err)
    name = policy_file("{", f"a\x1b[31m{chr(0x202e)}.hujson")
    assert_fit_for_a_terminal(postern("check", name, code=1).out)
    names = {"nodes": {hostile: {"ipv4": "100.64.0.1", "tags": ["tag:a"]}}}
    network = policy_file(names, "net.json")
    path = policy_file({"tagOwners": {"tag:a": []}, "ssh": [{"action": "accept", "src": ["tag:a"], "dst": ["tag:a"], "users": ["root"], "acceptEnv": [hostile + "*"]}]})
    for command in (["who", "--policy", path], ["decide", "--policy", path, "--src", hostile, "--dst", hostile, "--user", "root"],
                    ["explain", "--policy", path, "--src", hostile, "--dst", hostile, "--user", "root"], ["diff", path, policy_file({}, "none")]):
        answer = postern(*command, "--network", network)
        assert "owned" in answer.out
        assert_fit_for_a_terminal(answer.out + answer.err)


def test_a_file_that_cannot_be_read_is_told_with_the_reason(policy_file, tmp_path):
    network = policy_file(NETWORK, "net.json")
    for path, reason in ((tmp_path / "gone", "No such file or directory"), (tmp_path, "Is a directory")):
        assert postern("check", path, code=1).out == f"{path}: error: {reason}\n"
        assert postern("check", policy_file(POLICY), "--network", path, code=1).out.startswith(f"{path}: error: {reason}\n")
        assert postern("who", "--policy", path, "--network", network, code=1).err == f"{path}: error: {reason}\n"
        d = postern("check", path, "--json", code=1).json
        assert d["fine"] is False and d["errors"] == [{"file": str(path), "message": reason}]


@pytest.mark.skipif(IS_ROOT, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_told_with_the_reason(policy_file):
    path = policy_file(POLICY)
    os.chmod(path, 0)
    assert postern("check", path, code=1).out == f"{path}: error: Permission denied\n"


def test_a_minus_is_standard_input(policy_file):
    assert postern("check", "-", stdin=VALID.encode()).out.splitlines()[-1].startswith("<stdin>: fine, 2 ssh rules")
    assert postern("check", "-", stdin=b"{", code=1).out.startswith("<stdin>:1:1: error: ")
    network = json.dumps(NETWORK).encode()
    assert len(postern("who", "--policy", policy_file(POLICY), "--network", "-", stdin=network).lines) == 4


def test_a_wrong_network_is_told_with_its_places(policy_file):
    network = policy_file('{"nodes": {\n  "a": {"ipv4": "100.64.0.1", "tags": ["server"]},\n  "b": {"ipv4": "100.64.0.1", "user": "nobody"}\n}}', "net.json")
    asked = postern("who", "--policy", policy_file(POLICY), "--network", network, code=1)
    assert asked.out == "" and len(re.findall(rf"^{network}:[23]:\d+: error: ", asked.err, re.M)) == 3
    # check: together with what is wrong with the policy
    report = postern("check", policy_file("{"), "--network", network, code=1).out
    assert len(re.findall(r": error: ", report)) == 4 and report.splitlines()[-1].endswith("policy.hujson: refused, 4 errors")


@pytest.mark.parametrize("arguments", [
    [], ["nonsense"], ["check"], ["check", "{policy}", "--nonsense"], ["check", "{policy}", "{policy}"], ["check", "-", "--network", "-"],
    ["decide", "--policy", "{policy}", "--network", "{network}", "--src", "laptop", "--dst", "server"],
    ["decide", "--policy", "{policy}", "--src", "laptop", "--dst", "server", "--user", "x"],
    ["decide", "--policy", "{policy}", "--network", "{network}", "--src", "nobody", "--dst", "server", "--user", "x"],
    ["decide", "--policy", "{policy}", "--network", "{network}", "--src", "100.64.0.99", "--dst", "server", "--user", "x"],
    ["decide", "--policy", "{policy}", "--network", "{network}", "--src", "laptop", "--dst", "server", "--user", "x", "--uid", "-1"],
    ["explain", "--policy", "{policy}", "--network", "{network}", "--src", "laptop", "--dst", "nobody", "--user", "x"],
    ["who", "--network", "{network}"], ["who", "--policy", "{policy}", "--network", "{network}", "--dst", "nobody"], ["who", "--policy", "-", "--network", "-"],
    ["diff", "{policy}", "--network", "{network}"], ["diff", "{policy}", "{policy}"], ["diff", "-", "-", "--network", "{network}"],
], ids=lambda arguments: " ".join(a for a in arguments if a[0] != "{"))
def test_wrong_usage_ends_with_2(policy_file, arguments):
    files = {"policy": str(policy_file(POLICY)), "network": str(policy_file(NETWORK, "net.json"))}
    said = postern(*(a.format(**files) for a in arguments), code=2)
    assert said.out == "" and said.err != ""


# ------------------------------------------------------------------------------------------------------- fine files

def test_a_fine_file_gets_one_line_and_its_warnings(policy_file):
    path = policy_file({**POLICY, "ssh": [*POLICY["ssh"], {"action": "accept", "src": ["tag:recorder"], "dst": ["tag:recorder"], "users": ["root", "group:x"]}]})
    report = postern("check", path).out
    assert len(re.findall(r"^\S+:\d+:\d+: warning: ssh\[[12]\]", report, re.M)) == 3, report  # bob and the recorders cannot reach port 22; no account is called group:x
    assert report.splitlines()[-1] == f"{path}: fine, 3 ssh rules, no tests, 3 warnings"
    d = postern("check", path, "--json").json
    assert (d["file"], d["fine"], d["ssh_rules"], d["tests_passed"], d["errors"], len(d["warnings"])) == (str(path), True, 3, 0, [], 3)


def test_a_files_own_tests_are_run_on_the_network_that_is_given(policy_file):
    network = policy_file(NETWORK, "net.json")
    tests = lambda *more: {**POLICY, "tests": [{"src": "alice@example.com", "accept": ["tag:server:22"]}],
                           "sshTests": [{"src": "alice@example.com", "dst": ["tag:server"], "accept": ["root"], "deny": list(more)}]}
    report = postern("check", policy_file(tests()), "--network", network).out
    assert ": fine, 2 ssh rules, 2 tests passed" in report
    assert ": fine, 2 ssh rules, 2 tests passed" in postern("check", policy_file(tests())).out  # on what the file names itself
    failed = postern("check", policy_file(tests("ann")), "--network", network, code=1).out
    assert "error: sshTests[0]" in failed and "test(s) failed: " in failed and ": refused, 1 error" in failed
