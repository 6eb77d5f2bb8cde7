"""ssh-audit (scripts/fetch-clients) finds nothing in what the server offers but what is known, and said here with its reason."""
import json
import subprocess

import pytest

from harness import ROOT, SLACK

AUDIT = ROOT / "build/tools/clients/ssh-audit"
NOT_POST_QUANTUM = "does not provide protection against post-quantum attacks"

# Clients of docs/CLIENTS.md have nothing better; who has is given it, because the client's order decides and clients put it first. A row that no
# longer describes a finding fails the test.
KNOWN = {
    ("kex", "curve25519-sha256", NOT_POST_QUANTUM): "dropbear 2022.83, libssh 0.10 and libssh2 1.10 have no post-quantum key exchange",
    ("kex", "curve25519-sha256@libssh.org", NOT_POST_QUANTUM): "paramiko 2.12 knows it by this name only",
    ("kex", "diffie-hellman-group16-sha512", NOT_POST_QUANTUM): "clients in FIPS mode may use neither curve25519 nor sntrup761",
    ("mac", "hmac-sha2-256", "using encrypt-and-MAC mode"): "libssh2 1.10 (curl) has neither AEAD ciphers nor EtM",
    # A host key of this kind is in known_hosts of clients that learned it from sshd on the same machine.
    ("key", "ecdsa-sha2-nistp256", "using elliptic curves that are suspected as being backdoored by the U.S. National Security Agency"): "host keys are made of all three kinds",
    ("key", "ecdsa-sha2-nistp256", "using weak random number generator could reveal the key"): "host keys are made of all three kinds; OpenSSL's signatures do not depend on that",
}


def audit(stack) -> dict:
    if not (AUDIT / "ssh_audit").is_dir():
        reasons = [line.partition("\t")[2] for line in (AUDIT.parent / "missing").read_text().splitlines() if line.startswith("ssh-audit\t")] if (AUDIT.parent / "missing").exists() else []
        pytest.skip(f"ssh-audit is not there: {reasons[0] if reasons else 'scripts/fetch-clients has not been run (scripts/test does it)'}")
    # It cannot choose its own address, and strangers are shown no algorithms.
    stack.write_nodes('[[node]]\nname = "auditor"\naddresses = ["127.0.0.1"]\nuser = "bob@example.com"\n')
    stack.reload()
    done = subprocess.run(["/usr/bin/python3", "-m", "ssh_audit.ssh_audit", "--json", "--skip-rate-test", "-p", str(stack.port), stack.server], cwd=stack.dir, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=120 * SLACK, env={**stack.client_env(), "PYTHONPATH": str(AUDIT), "PYTHONDONTWRITEBYTECODE": "1"})
    stack.write_nodes()
    stack.reload()
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def findings(stack):
    return audit(stack)


def bad_things(findings) -> set[tuple[str, str, str]]:
    found = set()
    for kind in ("kex", "key", "enc", "mac"):
        assert findings[kind], f"ssh-audit saw no {kind} at all"
        for entry in findings[kind]:
            for level in ("fail", "warn"):
                found |= {(kind, entry["algorithm"], text) for text in entry.get("notes", {}).get(level, [])}
    assert not findings.get("cves"), findings["cves"]
    return found


def test_ssh_audit_finds_nothing_but_what_is_known(findings):
    found = bad_things(findings)
    assert found == set(KNOWN), f"new: {sorted(found - set(KNOWN))}; gone: {sorted(set(KNOWN) - found)}"


def test_ssh_audit_sees_strict_key_exchange_and_post_quantum_first(findings):
    names = [entry["algorithm"] for entry in findings["kex"]]
    assert "kex-strict-s-v00@openssh.com" in names
    assert names[0].startswith("mlkem768x25519") and names[1].startswith("sntrup761x25519")
    assert not [entry["algorithm"] for entry in findings["enc"] if "cbc" in entry["algorithm"]]


def test_strict_algorithms_leave_ssh_audit_nothing_to_say_and_current_clients_get_in(make_stack):
    stack = make_stack(posternd={"ssh": {"algorithms": "strict"}})
    assert bad_things(audit(stack)) == set()
    assert stack.ssh("true", bind=stack.plain_alice).code == 0
    refused = stack.ssh("true", bind=stack.plain_alice, options=["KexAlgorithms=curve25519-sha256"])
    assert refused.code == 255 and "no matching key exchange method" in refused.errors


OLD = {"KexAlgorithms": ["ecdh-sha2-nistp256", "ecdh-sha2-nistp384", "ecdh-sha2-nistp521", "diffie-hellman-group14-sha256"], "MACs": ["hmac-sha2-512"]}


def test_legacy_algorithms_let_old_clients_in_and_only_where_they_are_asked_for(make_stack, stack):
    old = make_stack(posternd={"ssh": {"algorithms": "legacy"}})
    for option, names in OLD.items():
        for name in names:
            options = [f"{option}={name}", "Ciphers=aes128-ctr"]
            assert old.ssh("true", bind=old.plain_alice, options=options).code == 0, name
            refused = stack.ssh("true", bind=stack.plain_alice, options=options)
            assert refused.code == 255 and "no matching" in refused.errors, name
    best = old.ssh("true", bind=old.plain_alice, options=["LogLevel=DEBUG1", "KexAlgorithms=diffie-hellman-group14-sha256,ecdh-sha2-nistp256,curve25519-sha256"])
    assert best.code == 0 and "kex: algorithm: diffie-hellman-group14-sha256" in best.errors, "the client's order decides (RFC 4253 section 7.1)"
    gone = old.ssh("true", bind=old.plain_alice, options=["KexAlgorithms=diffie-hellman-group14-sha1"])
    assert gone.code == 255 and "no matching key exchange method" in gone.errors, "never SHA-1"
