"""asyncssh behind the interface of common.py."""
import asyncio
import base64
import warnings

warnings.filterwarnings("ignore")
import asyncssh

import common


async def run(conn, request):
    pty = request.get("pty")
    more = dict(request_pty="force", term_type=pty["term"], term_size=(pty["cols"], pty["rows"]), term_modes={asyncssh.PTY_VERASE: pty["verase"]} if "verase" in pty else {}) if pty else dict(request_pty=False)
    process = await conn.create_process(request["command"], env=request.get("env") or {}, encoding=None, **more)
    out, err, seen, ended = bytearray(), bytearray(), 0, False
    changed = asyncio.Condition()
    file = open(request["stdout"], "wb") if request.get("stdout") else None

    async def pump(stream, target, sink):
        nonlocal ended
        while data := await stream.read(1 << 16):
            async with changed:
                sink.write(data) if sink else target.extend(data)
                changed.notify_all()
        if target is out:
            async with changed:
                ended = True
                changed.notify_all()
    pumps = [asyncio.ensure_future(pump(process.stdout, out, file)), asyncio.ensure_future(pump(process.stderr, err, None))]
    closed_input = False
    for what, *a in request.get("steps") or []:
        if what == "expect":
            text = a[0].encode()
            async with changed:
                await changed.wait_for(lambda: out.find(text, seen) >= 0 or ended)
            at = out.find(text, seen)
            if at < 0:
                raise common.Ended(f"ended before {text!r}: {bytes(out[-500:])!r}")
            seen = at + len(text)
        elif what == "send":
            process.stdin.write(a[0].encode())
        elif what == "resize":
            process.change_terminal_size(*a)
        elif what == "signal":
            process.send_signal(a[0])
        elif what == "eof":
            process.stdin.write_eof()
            closed_input = True
    if request.get("stdin"):
        with open(request["stdin"], "rb") as f:
            while piece := f.read(1 << 15):
                process.stdin.write(piece)
                await process.stdin.drain()
    if not closed_input and not pty:
        process.stdin.write_eof()
    await asyncio.gather(*pumps)
    await process.wait_closed()
    if file:
        file.close()
    signal = process.exit_signal
    return {"out": base64.b64encode(out).decode(), "err": base64.b64encode(err).decode(), "status": None if signal else process.exit_status,
            "signal": signal[0] if signal else None, "core": bool(signal and signal[1])}


async def sftp(conn, request):
    results = []
    async with conn.start_sftp_client() as client:
        for what, *a in request["steps"]:
            if what == "put":
                await client.put(*a)
            elif what == "get":
                await client.get(*a)
            elif what == "symlink":
                await client.symlink(*a)
            elif what == "readlink":
                results.append(await client.readlink(a[0]))
            elif what == "ls":
                results.append(sorted(n for n in await client.listdir(a[0]) if n not in (".", "..")))
    return {"results": results}


async def channels(conn, request):
    opened = [await conn.create_process(request["command"]) for _ in range(request["count"])]
    for i, process in enumerate(opened):
        process.stdin.write(f"line {i}\n")
    return {"results": [(await p.communicate())[0] for p in opened]}


async def ask_mirror(conn, request, i):
    with open(request["stdin"], "rb") as f:
        data = f.read()
    reader, writer = await conn.open_connection(*request["target"])

    async def send():
        # Piece by piece: write() itself knows no window.
        for at in range(0, len(question), 1 << 15):
            writer.write(question[at:at + (1 << 15)])
            await writer.drain()
    question = common.Mirror.question(data)
    sending = asyncio.ensure_future(send())
    size = int.from_bytes(await reader.readexactly(8), "big")
    got = await reader.readexactly(size)
    await sending
    writer.close()
    with open(f"{request['stdout']}.{i}", "wb") as f:
        f.write(got)


async def local(conn, request):
    await asyncio.gather(*(ask_mirror(conn, request, i) for i in range(request["count"])))
    return {}


async def remote(conn, request):
    left, over = request["count"], asyncio.Event()

    def accepted(_host, _port):
        async def serve(reader, writer):
            nonlocal left
            head = await reader.readexactly(8)
            data = head + await reader.readexactly(int.from_bytes(head, "big"))
            for at in range(0, len(data), 1 << 15):
                writer.write(data[at:at + (1 << 15)])
                await writer.drain()
            await reader.read()  # the other end has it all when it closes
            writer.close()
            left -= 1
            if left == 0:
                over.set()
        return serve
    listener = await conn.start_server(accepted, "127.0.0.1", 0, encoding=None)
    common.told(request["port_file"], listener.get_port())
    await over.wait()
    listener.close()
    return {}


async def talk(request):
    secrets = {"none": dict(client_keys=None), "password": dict(client_keys=None, password=request.get("password")), "key": dict(client_keys=[request.get("key")])}
    if request.get("rekey"):
        secrets[request["auth"]]["rekey_bytes"] = request["rekey"]
    algorithms = {k: request[v] for k, v in (("encryption_algs", "ciphers"), ("mac_algs", "macs")) if request.get(v)}
    rekeys = -1
    original = asyncssh.connection.SSHConnection.send_newkeys

    def counted(self, k, h):
        nonlocal rekeys
        rekeys += 1
        return original(self, k, h)
    asyncssh.connection.SSHConnection.send_newkeys = counted
    async with asyncssh.connect(request["host"], request["port"], local_addr=(request["bind"], 0), username=request["user"], known_hosts=None, config=None,
                                agent_path=request.get("agent"), agent_forwarding=bool(request.get("agent")), **algorithms, **secrets[request["auth"]]) as conn:
        answer = await {"run": run, "sftp": sftp, "channels": channels, "local": local, "remote": remote}[request["do"]](conn, request)
    answer["rekeys"] = rekeys
    return answer


if __name__ == "__main__":
    common.main(lambda request: asyncio.run(talk(request)))
