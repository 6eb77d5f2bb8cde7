"""A postern-net that was taken over before its client logged in: it gets nothing, is killed, and the next honest client gets in."""
import os
import re
import signal
import socket
import struct
import time

import pytest

from harness import SLACK, rng, wait_until
from puppet import (ASK_LOGIN, ASK_SIGN, NOTE, SERVE, SIGNATURE, VERDICT, ask_login, ask_sign, note)

HASH = b"\x5a" * 32
NULL = os.open("/dev/null", os.O_RDWR)


def first(kind, body=b"", **kw):
    return lambda w, user: w.tell(kind, body, **kw)


def signed_then(kind, body=b"", **kw):
    def run(w, user):
        w.sign()
        w.tell(kind, body, **kw)
    return run


def every_other_type():
    """Types that no worker ever sends, with the body that the real message has, and with others."""
    real = {0: 0, 1: 3400, 2: 8, 10: 516, 11: 16, 12: 16, SERVE: 88, SIGNATURE: 1028, VERDICT: 1032, 33: 4, 34: 8, 255: 0, 65535: 12}
    for kind, size in real.items():
        yield f"type {kind}", first(kind, bytes(size))
        yield f"type {kind} after the signature", signed_then(kind, bytes(size))
        yield f"type {kind} empty", first(kind)


def login_twice(w, user):
    w.sign()
    w.tell(ASK_LOGIN, ask_login(user.encode()))
    w.tell(ASK_LOGIN, ask_login(b"root"))


KILLED = dict([
    *every_other_type(),
    *[(f"a question for a signature of {n} bytes", first(ASK_SIGN, bytes(n))) for n in (0, 1, 75, 77, 4096)],
    *[(f"a hash of {n} bytes", first(ASK_SIGN, ask_sign(b"h" * n))) for n in (0, 1, 20, 31, 33, 47, 49, 63)],
    ("a hash longer than its field", first(ASK_SIGN, ask_sign(HASH, length=65))),
    ("a hash of 4 GiB", first(ASK_SIGN, ask_sign(HASH, length=0xFFFFFFFF))),
    *[(f"SSHSIG data of {n} bytes", first(ASK_SIGN, ask_sign(b"SSHSIG".ljust(n, b"x")))) for n in (32, 48, 64)],
    ("a proof of a key before there is a login", first(ASK_SIGN, ask_sign(b"", purpose=1))),
    ("a proof of a key after the signature", signed_then(ASK_SIGN, ask_sign(b"", purpose=1))),
    ("a purpose that there is not", first(ASK_SIGN, ask_sign(HASH, purpose=2))),
    ("a second signature", signed_then(ASK_SIGN, ask_sign(HASH))),
    ("a login before the key exchange", first(ASK_LOGIN, ask_login(b"root"))),
    ("two logins", login_twice),
    ("a method that there is not", signed_then(ASK_LOGIN, ask_login(b"root", method=4))),
    ("a name longer than its field", signed_then(ASK_LOGIN, ask_login(b"root", length=257))),
    ("a name of 4 GiB", signed_then(ASK_LOGIN, ask_login(b"root", length=0xFFFFFFFF))),
    ("a version longer than its field", signed_then(ASK_LOGIN, ask_login(b"root", version_length=256))),
    *[(f"a login of {n} bytes", signed_then(ASK_LOGIN, bytes(n))) for n in (0, 523, 525, 8192)],
    *[(f"protocol version {v}", first(ASK_SIGN, ask_sign(HASH), version=v)) for v in (0, 2, 65535)],
    *[(f"a datagram of {n} bytes", first(0, raw=b"\x01\x00\x1e\x00\x44\x00\x00"[:n])) for n in (0, 1, 4, 7)],
    ("a header that promises more", first(ASK_SIGN, ask_sign(HASH), size=77)),
    ("a header that promises less", first(ASK_SIGN, ask_sign(HASH), size=3)),
    ("a header that promises 4 GiB", first(ASK_SIGN, ask_sign(HASH), size=0xFFFFFFFF)),
    ("more than a message may have", first(ASK_SIGN, bytes(16 * 1024 + 1))),
    ("much more than a message may have", first(ASK_SIGN, bytes(100_000))),
    *[(f"{n} descriptors with a question", first(ASK_SIGN, ask_sign(HASH), fds=[NULL] * n)) for n in (1, 8, 9, 64)],
    ("a descriptor with a login", signed_then(ASK_LOGIN, ask_login(b"root"), fds=[NULL])),
    ("a descriptor with a note", first(NOTE, note(b"x"), fds=[NULL])),
    ("a note longer than its field", first(NOTE, struct.pack("<I", 257) + bytes(256))),
])


@pytest.mark.parametrize("what", KILLED)
def test_a_worker_that_breaks_the_protocol_is_killed(net, what):
    before = net.stack.posternd.log_size()
    w = net.worker()
    KILLED[what](w, net.user)
    w.wait_killed()
    log = net.stack.posternd.log(before)
    # A login that was right may be over before the second one comes; that one still ends it.
    assert "session_start" not in log and (what == "two logins" or "verdict=accept" not in log)
    assert 'local_user="root"' not in log


def test_messages_in_random_order_and_size_end_the_worker(net):
    """40 workers at once, each with its own salad; printed seed (POSTERN_SEED)."""
    random = rng("before the verdict")
    before = net.stack.posternd.log_size()
    workers = [net.worker() for _ in range(40)]
    for w in workers:
        for _ in range(random.randrange(1, 12)):
            kind = random.choice([ASK_SIGN, ASK_LOGIN, NOTE, random.randrange(65536)])
            body = random.choice([b"", random.randbytes(random.randrange(2000)), ask_sign(random.randbytes(32)), ask_login(random.randbytes(10)), note(b"x")])
            w.tell(kind, body, fds=[NULL] if random.random() < 0.1 else [])
    for w in workers:
        w.tell(255)
    for w in workers:
        w.wait_killed()
    assert "verdict=accept" not in net.stack.posternd.log(before)


@pytest.mark.parametrize("key,digest", [(3, 0), (0xFFFFFFFF, 0), (0, 3), (0, 200), (1, 2), (1, 3), (2, 0), (2, 2)])
def test_a_wrong_key_or_digest_signs_nothing(net, key, digest):
    w = net.worker()
    assert w.sign(HASH, key=key, digest=digest) == b""


def test_each_host_key_signs_one_exchange_hash(net):
    for key, digest, name in ((0, 0, b"ssh-ed25519"), (1, 0, b"ecdsa-sha2-nistp256"), (2, 1, b"rsa-sha2-256"), (2, 3, b"rsa-sha2-512")):
        signature = net.worker().sign(HASH, key=key, digest=digest)
        assert signature[4 : 4 + len(name)] == name


HIDDEN = [b"", b"\0", b"0", b"1000", b"+1000", b"-1000", b"root\0", b"\0root", b"root\n", b"root\x1b[2J", b" root", b"root ", b"../root", b"root/", b"r:x",
          b"a" * 33, b"a" * 256, "rööt".encode(), b"\xff\xfe", b"root", b"daemon", b"nobody"]


@pytest.mark.parametrize("name", HIDDEN, ids=lambda n: f"{n[:12]!r} of {len(n)}")
def test_a_name_that_no_rule_gives_is_denied_and_who_stays_is_killed(net, name):
    before = net.stack.posternd.log_size()
    w = net.worker()
    w.sign()
    w.tell(ASK_LOGIN, ask_login(name))
    accepted, why = w.verdict()
    assert not accepted and why
    begin = time.monotonic()
    log = net.stack.posternd.log(before)
    assert "verdict=deny" in log and "session_start" not in log
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", log), "a stranger's control characters are in the log"
    if len(name) % 4 == 0:  # some stay: 2 s each
        w.wait_killed(3)
        assert time.monotonic() - begin > 0.5, "it had no time to show the reason"


def test_after_a_denial_nothing_is_answered_any_more(net):
    w = net.worker(net.stack.bob)
    w.sign()
    w.tell(ASK_LOGIN, ask_login(net.user.encode()))
    assert w.verdict()[0] is False
    w.tell(ASK_LOGIN, ask_login(net.user.encode()))
    w.wait_killed()


def test_a_flood_of_notes_does_not_flood_the_log(net):
    before = net.stack.posternd.log_size()
    w = net.worker()
    deadline = time.monotonic() + 5 * SLACK
    while w.alive() and time.monotonic() < deadline:
        w.tell(NOTE, note(b"\n\x1b]0;x\x07" * 30))
    w.wait_killed()
    log = net.stack.posternd.log(before)
    assert 0 < log.count("event=net_note") <= 32 and "\x1b" not in log


def test_a_worker_that_says_nothing_is_killed_after_the_login_time(net):
    silent, halfway = net.worker(), net.worker()
    halfway.sign()
    silent.wait_killed(4)
    halfway.wait_killed(4)


def test_a_worker_that_closes_its_socket_is_killed(net):
    w = net.worker()
    w.broker.close()
    w.wait_killed()
    after_question = net.worker()
    after_question.sign()
    after_question.tell(ASK_LOGIN, ask_login(net.user.encode()))
    after_question.broker.close()
    after_question.wait_killed()


def test_a_worker_that_exits_ends_its_client(net):
    w = net.worker()
    w.order("exit 1")
    w.wait_killed()
    os.close(w.client_end)
    w.client_end = -1
    w.tcp.settimeout(5 * SLACK)
    assert w.tcp.recv(1) == b""


def test_a_crash_brings_a_fresh_zygote_once_a_minute_and_then_the_source_waits(net):
    posternd = net.stack.posternd
    seen = posternd.log_size()
    w = net.worker(net.stack.bob)
    w.order(f"signal {signal.SIGSEGV}")
    w.wait_killed()
    posternd.wait_log(r"event=net_crashed .*signal=11", seen)
    posternd.wait_log(r"event=zygote_ready program=postern-net", seen)
    net.honest_login()

    seen = posternd.log_size()
    w = net.worker(net.stack.bob)
    w.order(f"signal {signal.SIGABRT}")
    w.wait_killed()
    posternd.wait_log(r"event=penalty", seen)
    assert "zygote_ready" not in posternd.log(seen)
    refused = net.stack.connect(net.stack.bob)
    said = b""
    while piece := refused.recv(1000):
        said += piece
    assert b"too many failed attempts from here" in said, "the source of a crash is let in at once"
    refused.close()
    posternd.wait_log(r"event=connection_refused .*why=penalty", seen)
    net.honest_login()  # others are not punished

    def in_again():
        with net.stack.connect(net.stack.bob) as s:
            s.settimeout(0.3)
            try:
                return b"too many failed attempts" not in s.recv(1000)
            except socket.timeout:
                return True
    wait_until(in_again, "the source may come again after limits.crash_penalty", 5, every=0.2)


def test_posternd_starts_its_programs_with_nothing_of_its_own(net):
    w = net.worker()
    fds = dict(w.about["fds"])
    assert set(fds) == {"0", "1", "2", "3"}, f"inherited: {fds}"
    assert fds["3"].startswith("socket:")
    names = {v.split("=")[0] for v in w.about["env"]}
    assert names <= {"LC_ALL", "PATH", "ASAN_OPTIONS", "POSTERN_TITLE"}, names
