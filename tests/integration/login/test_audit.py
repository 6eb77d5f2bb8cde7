"""What is told of each decision: JSON lines, journald's fields, the kernel's audit; and what a session is told of who is in it."""
import contextlib
import fcntl
import json
import os
import re
import socket
import struct

import paramiko
import pytest

from harness import SLACK, new_stack, wait_until


def lines(stack) -> list[dict]:
    return [json.loads(line) for line in (stack.dir / "audit.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def audited(accounts):
    stack = new_stack(accounts)
    stack._write("posternd.toml", {**stack._posternd_defaults(), "audit": {"file": stack.dir / "audit.json", "journal_socket": stack.dir / "journal"}})
    journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    journal.bind(str(stack.dir / "journal"))
    journal.settimeout(10)
    stack.journal = journal
    with stack:
        yield stack
    journal.close()


def ask_as(stack, name: str, bind: str) -> None:
    """OpenSSH's client refuses odd names by itself."""
    transport = paramiko.Transport(stack.connect(bind))
    try:
        transport.start_client(timeout=20 * SLACK)
        with pytest.raises(paramiko.SSHException):
            transport.auth_none(name)
    finally:
        transport.close()


def of(stack, event: str, since: int) -> dict:
    wait_until(lambda: [e for e in lines(stack)[since:] if e["event"] == event], f"an event {event}")
    return [e for e in lines(stack)[since:] if e["event"] == event][-1]


def test_each_decision_is_one_json_line_with_who_where_and_by_which_rule(audited):
    stack, since = audited, len(lines(audited))
    assert stack.ssh("true", bind=stack.alice).code == 0
    login = of(stack, "login", since)
    assert login["verdict"] == "accept" and login["user"] == "alice@example.com" and login["node"] == "alice" and login["node_id"]
    assert login["ssh_user"] == login["local_user"] == stack.user and login["recorded"] == "yes"
    assert login["peer"].startswith(stack.alice + ":") and login["server"] == f"{stack.server}:{stack.port}" and login["client"].startswith("SSH-2.0-OpenSSH")
    file, line, _ = login["rule"].rsplit(":", 2)
    # The place is that of the rule's opening brace: what follows is the rule.
    assert file == str(stack.policy_file) and "alice@example.com" in "".join(stack.policy_file.read_text().splitlines()[int(line) - 1:int(line) + 4])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", login["time"])
    assert of(stack, "closed", since)["connection"] == login["connection"]
    assert os.stat(stack.dir / "audit.json").st_mode & 0o777 == 0o600

    since = len(lines(stack))
    assert stack.ssh("true", bind=stack.bob).code == 255
    denied = of(stack, "login", since)
    assert denied["verdict"] == "deny" and denied["why"] and denied["user"] == "bob@example.com" and denied["ssh_user"] == stack.user
    assert "local_user" not in denied and denied["connection"] != login["connection"]

    # What a stranger calls itself stays inside its field.
    since = len(lines(stack))
    name = 'x","verdict":"accept","z":"\\'
    ask_as(stack, name, stack.alice)
    denied = of(stack, "login", since)
    assert denied["verdict"] == "deny" and denied["ssh_user"] == name and len(lines(stack)) - since <= 2


def test_access_that_ends_is_told_with_the_reason(audited):
    stack, since = audited, len(lines(audited))
    before = stack.policy_file.read_text()
    p = stack.popen("echo up; exec sleep 1000", bind=stack.plain_alice)
    assert p.stdout.readline() == b"up\n"
    try:
        stack.set_policy(before.replace("plain@example.com", "nobody@example.com"))
        assert p.wait(10) == 255
        revoked = of(stack, "revoked", since)
        assert revoked["user"] == "plain@example.com" and revoked["connection"] == of(stack, "login", since)["connection"] and revoked["why"]
    finally:
        stack.set_policy(before)


def test_logrotate_moves_the_file_away_and_a_reload_begins_a_new_one(audited):
    stack = audited
    old = stack.dir / "audit.json.1"
    (stack.dir / "audit.json").rename(old)
    stack.reload()
    size = old.stat().st_size
    assert stack.ssh("true", bind=stack.plain_alice).code == 0
    assert of(stack, "login", 0)["user"] == "plain@example.com" and old.stat().st_size == size


def journal_entries(journal) -> list[dict[str, str]]:
    """journald's native protocol, as its documentation has it."""
    entries = []
    journal.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            data, fields = journal.recv(1 << 18), {}
            while data:
                head, data = data.split(b"\n", 1)
                if b"=" in head:
                    name, value = head.split(b"=", 1)
                else:
                    name, (size,) = head, struct.unpack("<Q", data[:8])
                    value, data = data[8:8 + size], data[8 + size + 1:]
                fields[name.decode()] = value.decode()
            entries.append(fields)
    return entries


def test_journald_gets_the_same_as_fields(audited):
    stack = audited
    journal_entries(stack.journal)
    since = len(lines(stack))
    assert stack.ssh("true", bind=stack.alice).code == 0
    name = 'a" verdict="accept"'
    ask_as(stack, name, stack.alice)
    wait_until(lambda: sum(e["event"] == "login" for e in lines(stack)[since:]) == 2, "both logins are told")
    entries = [e for e in journal_entries(stack.journal) if e["POSTERN_EVENT"] == "login"]
    accepted, denied = entries
    told = next(e for e in lines(stack)[since:] if e["event"] == "login")
    assert {k.lower().removeprefix("postern_"): v for k, v in accepted.items() if k.startswith("POSTERN_")} == {k: v for k, v in told.items() if k != "time"}
    assert accepted["SYSLOG_IDENTIFIER"] == "posternd" and accepted["SYSLOG_FACILITY"] == "10" and accepted["PRIORITY"] == "6" and "alice@example.com" in accepted["MESSAGE"]
    assert denied["POSTERN_VERDICT"] == "deny" and denied["POSTERN_SSH_USER"] == name and denied["PRIORITY"] == "5" and "verdict=\"accept\"" not in denied["MESSAGE"].replace('\\"', "")


# ---- the kernel's audit

AUDIT_GET, AUDIT_SET, AUDIT_USER_LOGIN, AUDIT_USER_START, AUDIT_USER_END = 1000, 1001, 1112, 1105, 1106


class KernelAudit:
    """Reads along (multicast group 1, audit(7) "AUDIT_NLGRP_READLOG"), with auditing on while it does."""

    def __init__(self):
        # Two test runs must not restore each other's setting.
        self.lock = open("/run/lock/postern-test-audit", "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9)
        self.socket.bind((0, 0))
        self.socket.settimeout(10)
        self.was = self._enabled()
        self._set(1)
        self.log = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9)
        self.log.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.log.bind((0, 1))
        self.log.settimeout(10)

    def _ask(self, kind: int, body: bytes, flags: int) -> None:
        self.socket.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)

    def _enabled(self) -> int:
        self._ask(AUDIT_GET, b"", 1)
        while True:
            data = self.socket.recv(1 << 16)
            size, kind = struct.unpack_from("=IH", data)
            if kind == AUDIT_GET:
                return struct.unpack_from("=II", data, 16)[1]
            if kind == 2 and struct.unpack_from("=i", data, 16)[0]:
                raise OSError(-struct.unpack_from("=i", data, 16)[0], "the kernel's audit")

    def _set(self, enabled: int) -> None:
        self._ask(AUDIT_SET, struct.pack("=II", 1, enabled) + bytes(36), 5)
        error = None
        while error is None:
            data = self.socket.recv(1 << 16)
            if struct.unpack_from("=IH", data)[1] == 2:
                error = struct.unpack_from("=i", data, 16)[0]
        if error:
            raise OSError(-error, "the kernel's audit")

    def wait_for(self, *wanted: tuple) -> dict[int, str]:
        """The texts of these kinds of message that hold all these words."""
        found = {}
        while not all(kind in found for kind, *_ in wanted):
            data = self.log.recv(1 << 16)
            kind = struct.unpack_from("=IH", data)[1]
            text = data[16:].rstrip(b"\0\n").decode(errors="replace")
            for k, *words in wanted:
                if kind == k and all(w in text for w in words):
                    found[kind] = text
        return found

    def close(self):
        self._set(self.was)
        self.log.close()
        self.socket.close()
        self.lock.close()


@pytest.fixture
def kernel_audit():
    try:
        made = KernelAudit()
    except OSError as error:
        pytest.skip(f"this kernel, or container, has no audit: {error}")
    yield made
    made.close()


@pytest.mark.needs_root
def test_auditd_learns_of_logins_of_failures_and_of_sessions(make_stack, kernel_audit):
    # PAM writes USER_START and USER_END, hence Debian's PAM modules; "ptu…" is no name that anything else on the machine logs in by.
    stack = make_stack()
    assert stack.ssh("true", bind=stack.alice).code == 0
    # With the address: a session of an earlier test may still be about to end.
    got = kernel_audit.wait_for(*((kind, f'acct="{stack.user}"', stack.alice) for kind in (AUDIT_USER_LOGIN, AUDIT_USER_START, AUDIT_USER_END)))
    login = got[AUDIT_USER_LOGIN]
    assert "res=success" in login and f"addr={stack.alice}" in login and "op=login" in login and "terminal=ssh" in login and "posternd" in login
    assert all("res=success" in text and (f"addr={stack.alice} " in text or f"hostname={stack.alice} " in text) for text in got.values()), got

    assert stack.ssh("true", bind=stack.bob).code == 255
    failed = kernel_audit.wait_for((AUDIT_USER_LOGIN, f"addr={stack.bob}"))[AUDIT_USER_LOGIN]
    assert "res=failed" in failed and f'acct="{stack.user}"' in failed

    # A name with a space or a quote goes as hex, as with sshd: no field can be forged.
    name = 'x" res=success'
    ask_as(stack, name, stack.bob)
    failed = kernel_audit.wait_for((AUDIT_USER_LOGIN, f"acct={name.encode().hex().upper()}"))[AUDIT_USER_LOGIN]
    assert "res=failed" in failed


# ---- what a session knows

def test_a_session_knows_who_is_in_it(make_stack):
    stack = make_stack()
    stack.policy_file.write_text(stack.default_policy(accept_env=("*",)))
    stack.reload()
    r = stack.ssh('echo "$POSTERN_USER $POSTERN_NODE ${POSTERN_TAGS-none} $POSTERN_CONNECTION_ID"', bind=stack.alice, options=["SetEnv=POSTERN_USER=root@example.com POSTERN_TAGS=tag:server POSTERN_CONNECTION_ID=1"])
    user, node, *rest = r.text.split(" ")
    assert (user, node) == ("alice@example.com", "alice"), r
    assert rest[0] == "" and len(rest[1].strip()) > 10, "a user's node has no tags, and no client can say it has"
