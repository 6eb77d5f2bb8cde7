"""A client that misuses a key exchange after the login: it may send channel messages in it (asyncssh does, sshd takes them), and nothing grows by it."""
import asyncio
import pathlib
import pwd

import asyncssh
import pytest

from harness import SLACK, new_stack

KEXINIT, GLOBAL_REQUEST = 20, 80
KEEPALIVE = b"\x00\x00\x00\x15keepalive@openssh.com\x01"


@pytest.fixture(scope="module")
def stack(accounts):
    with new_stack(accounts, start=("relay", "posternd")) as made:
        yield made


async def in_the_middle(stack, command="cat"):
    """A connection that has begun a key exchange, and never goes on with it."""
    conn = await stack.asyncssh(bind=stack.plain_alice)
    process = await conn.create_process(command, encoding=None)
    conn._packet_handlers = {**conn._packet_handlers, KEXINIT: lambda *_: True}
    conn._send_kexinit()
    conn._kexinit_sent = True
    return conn, process


def test_what_a_client_sends_before_its_newkeys_arrives_and_its_answer_waits(stack):
    async def talk():
        conn, process = await in_the_middle(stack, "tee ~/in-the-middle")
        for _ in range(1000):
            conn.send_packet(GLOBAL_REQUEST, KEEPALIVE)
        process.stdin.write(b"in the middle")
        while not (file.exists() and file.read_bytes() == b"in the middle"):
            assert not conn._transport.is_closing(), "the connection stands"
            await asyncio.sleep(0.02)
        answer = asyncio.ensure_future(process.stdout.read(1))
        assert not (await asyncio.wait([answer], timeout=0.3))[0], "RFC 4253 section 7.1 binds us, too"
        conn.abort()
        await asyncio.wait([answer])
    file = pathlib.Path(pwd.getpwnam(stack.user).pw_dir) / "in-the-middle"
    try:
        asyncio.run(asyncio.wait_for(talk(), 20 * SLACK))
    finally:
        file.unlink(missing_ok=True)


async def ask_without_end(conn, what):
    """Answers of more than 2 MiB would have to wait for the end of the key exchange (Connection::max_unsent)."""
    if what == "many small":
        for _ in range(40):
            for _ in range(1000):
                conn.send_packet(GLOBAL_REQUEST, KEEPALIVE)
            await asyncio.sleep(0)
    else:
        for _ in range(100):
            conn.send_packet(192, asyncssh.packet.String(bytes(30_000)))  # ping@openssh.com


ENDLESS = pytest.mark.parametrize("what", ["many small", "some large"])


@ENDLESS
def test_a_client_that_asks_without_end_in_an_unfinished_key_exchange_is_cut_off(stack, what):
    async def talk():
        conn, _ = await in_the_middle(stack)
        await ask_without_end(conn, what)
        await asyncio.wait_for(conn.wait_closed(), 20 * SLACK)
    asyncio.run(talk())


@ENDLESS
def test_a_client_that_does_not_answer_the_servers_key_exchange_is_cut_off_when_it_asks_without_end(accounts, what):
    with new_stack(accounts, start=("relay", "posternd"), posternd={"ssh": {"rekey_bytes": "64KiB"}}) as stack:
        async def talk():
            conn = await stack.asyncssh(bind=stack.plain_alice)
            process = await conn.create_process("head -c 200000 /dev/zero; cat", encoding=None)
            conn._packet_handlers = {**conn._packet_handlers, KEXINIT: lambda *_: True}
            await process.stdout.read(1)
            await ask_without_end(conn, what)
            await asyncio.wait_for(conn.wait_closed(), 20 * SLACK)
        asyncio.run(talk())


@pytest.mark.parametrize("padding", [0, 3, 255])
def test_a_packet_without_a_type_in_a_key_exchange_opens_no_way_round_it(stack, padding):
    """Its padding covers all, or lies: the connection ends, or stands and is still in its key exchange."""
    async def talk():
        conn, _ = await in_the_middle(stack)
        body = bytes([padding]) + bytes(11)
        head = len(body).to_bytes(4, "big")
        packet, mac = conn._send_encryption.encrypt_packet(conn._send_seq, head, body)
        conn._send(packet + mac)
        conn._send_seq += 1
        conn.send_packet(KEXINIT, bytes(16) + bytes(4) * 10 + bytes(5))  # a second one: refused in the middle of the first
        await asyncio.wait_for(conn.wait_closed(), 20 * SLACK)
    asyncio.run(talk())
