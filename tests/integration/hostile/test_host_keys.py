"""Private host keys are in posternd's memory and nowhere else."""
import os
import re

import pytest

from harness import descendants
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key


def secrets(folder) -> dict[str, bytes]:
    """Bytes that nobody has who has not the private key, in the two orders in which they may lie in memory."""
    found = {}
    for name in ("ed25519", "ecdsa", "rsa"):
        key = load_pem_private_key((folder / f"ssh_host_{name}.pem").read_bytes(), None)
        if name == "ed25519":
            numbers = [key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())]
        elif name == "ecdsa":
            numbers = [key.private_numbers().private_value.to_bytes(32, "big")]
        else:
            numbers = [n.to_bytes(256, "big").lstrip(b"\0")[:64] for n in (key.private_numbers().p, key.private_numbers().q)]
            numbers += [n.to_bytes(256, "big").lstrip(b"\0")[::-1][:64] for n in (key.private_numbers().p, key.private_numbers().q)]
        for n in numbers:
            found[f"{name} {len(found)}"] = n
            found[f"{name} {len(found)} reversed"] = n[::-1]
    return found


def held_by(pid: int, needles: dict[str, bytes]) -> set[str]:
    held = set()
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            m = re.match(r"([0-9a-f]+)-([0-9a-f]+) r", line)
            if not m or "[v" in line:
                continue
            try:
                memory.seek(int(m[1], 16))
                piece = memory.read(int(m[2], 16) - int(m[1], 16))
            except (OSError, ValueError, OverflowError):
                continue
            held |= {name for name, n in needles.items() if n in piece}
    return held


@pytest.mark.skipif("asan" in os.environ.get("POSTERN_BIN", ""), reason="the sanitizer's shadow memory is terabytes to read")
@pytest.mark.needs_root
def test_no_private_host_key_is_in_the_memory_of_what_serves_clients(make_stack):
    stack = make_stack(start=("relay", "posternd"))
    client = stack.popen("echo in; sleep 600", bind=stack.plain_alice)
    assert client.stdout.read(3) == b"in\n"
    needles = secrets(stack.dir / "host-keys")
    if not held_by(stack.posternd.pid, needles):
        pytest.skip("this kernel does not let root read a process's memory")
    of = {p.pid: p for p in descendants(stack.posternd.pid) if p.state != "Z"}
    assert sum(p.name.startswith("postern-net") for p in of.values()) >= 2 and any(p.name.startswith("postern-session") for p in of.values()), of
    for p in of.values():
        assert not held_by(p.pid, needles), f"{p} holds a private host key"
    client.kill()
