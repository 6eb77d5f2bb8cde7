"""How clients come to know this server: its fingerprints, known_hosts lines and SSHFP records, sshd's own keys, and a change of keys."""
import contextlib
import json
import re
import socketserver
import subprocess
import threading

import pytest

from clients.drivers import OpenSSHForky
from harness import BIN, SLACK, new_stack, wait_until

TYPES = ("ed25519", "ecdsa", "rsa")


def keys_of(stack) -> list[dict]:
    return json.loads(stack.postern("host-keys", "--json").text)["host_keys"]


def public_file(stack, key: dict) -> str:
    path = stack.dir / "one.pub"
    path.write_text(key["line"] + " x\n")
    return str(path)


def run(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, timeout=20 * SLACK).stdout


def updating(stack, known, program=None, algorithms=None, command="true"):
    """A login by a client that takes over the keys that the server announces, into `known`."""
    options = ["UpdateHostKeys=yes", f"UserKnownHostsFile={known}", "LogLevel=DEBUG3"] + ([f"HostKeyAlgorithms={algorithms}"] if algorithms else [])
    line = stack.ssh_command(command, bind=stack.plain_alice, options=options)
    if program:
        line[0] = program
    return subprocess.run(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=stack.client_env(), timeout=60 * SLACK)


def known_blobs(known) -> set[str]:
    return {line.split()[2] for line in known.read_text().splitlines() if line.strip()}


def test_fingerprints_and_sshfp_are_those_of_ssh_keygen(stack):
    text = stack.postern("host-keys", "--name", "srv.example.com").text
    for key in keys_of(stack):
        path = public_file(stack, key)
        assert " ".join(run("ssh-keygen", "-lf", path).split()[:2]) in text
        assert key["fingerprint"] in text
        sha256 = [line for line in run("ssh-keygen", "-r", "srv.example.com", "-f", path).splitlines() if re.search(r"SSHFP \d 2 ", line)]
        assert sha256 and all(line in text for line in sha256)
    assert stack.postern("host-keys", "--fingerprints").text.count("SHA256:") == 3


def test_a_line_for_known_hosts_is_enough_for_a_strict_client(stack):
    known = stack.dir / "from-host-keys"
    known.write_text(stack.postern("host-keys", "--known-hosts").text)
    for algorithm in ("ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512", "rsa-sha2-256"):
        r = stack.ssh("true", bind=stack.plain_alice, options=[f"UserKnownHostsFile={known}", f"HostKeyAlgorithms={algorithm}"])
        assert r.code == 0, r.errors


@pytest.mark.parametrize("algorithms", ["ssh-ed25519,ecdsa-sha2-nistp256,rsa-sha2-512", "rsa-sha2-256,ssh-ed25519,ecdsa-sha2-nistp256", "rsa-sha2-512,ssh-ed25519,ecdsa-sha2-nistp256"],
                         ids=lambda a: a.split(",")[0])
@pytest.mark.parametrize("program", ["ssh", "forky"])
def test_a_client_that_knows_one_key_learns_the_others_with_proof(stack, program, algorithms):
    if program == "forky" and (why := OpenSSHForky().missing()):
        pytest.skip(why)
    keys = {k["type"]: k for k in keys_of(stack)}
    known = stack.dir / f"learning-{program}-{algorithms[:12]}"
    known.write_text(f"[{stack.server}]:{stack.port} {keys['ssh-rsa' if algorithms.startswith('rsa') else 'ssh-ed25519']['line']}\n")
    said = updating(stack, known, OpenSSHForky().program("ssh") if program == "forky" else None, algorithms, "sleep 0.3")
    assert said.returncode == 0, said.stderr
    assert said.stderr.count("Learned new hostkey") == 2, said.stderr
    assert known_blobs(known) == {k["line"].split()[1] for k in keys.values()}


def test_keys_are_changed_without_a_client_that_complains_and_without_an_end(make_stack):
    stack = make_stack(start=("posternd",))
    stack.learn_host_key()
    known = stack.dir / "known"
    known.write_text(stack.known_hosts.read_text())
    before = keys_of(stack)
    live = stack.popen("echo up; read a; head -c 3000000 /dev/zero | tr '\\0' x; echo; echo $a", bind=stack.plain_alice, options=["RekeyLimit=1M"])
    assert live.stdout.readline() == b"up\n"

    assert "no keys to come" in stack.postern("host-keys", "rotate", "--finish", check=False).errors
    stack.postern("host-keys", "rotate")
    during = keys_of(stack)
    assert [k["line"] for k in during if k["use"] == "offered"] == [k["line"] for k in before]
    coming = [k["line"] for k in during if k["use"] == "announced"]
    assert len(coming) == 3
    assert updating(stack, known, command="sleep 0.3").returncode == 0
    assert {line.split()[1] for line in coming} <= known_blobs(known)

    stack.postern("host-keys", "rotate", "--finish")
    after = keys_of(stack)
    assert [k["line"] for k in after if k["use"] == "offered"] == coming
    assert {k["line"] for k in after if k["use"] == "retired"} == {k["line"] for k in before}
    r = updating(stack, known)
    assert r.returncode == 0 and "REMOTE HOST IDENTIFICATION" not in r.stderr, r.stderr
    assert "REMOTE HOST IDENTIFICATION" in stack.ssh("true", bind=stack.plain_alice, options=[f"UserKnownHostsFile={stack.known_hosts}"]).errors

    # The one that was there before goes on through key exchanges of its own, also after a restart.
    stack.posternd.restart()
    wait_until(lambda: stack.postern("sessions", "ls").text.count(stack.plain_alice) == 1, "the live connection is back")
    out, _ = live.communicate(b"more\n", timeout=30 * SLACK)
    assert live.returncode == 0 and len(out) == 3_000_000 + 6 and out.endswith(b"\nmore\n")
    assert "line" in keys_of(stack)[0] and [k["line"] for k in keys_of(stack) if k["use"] == "offered"] == coming


def test_sshds_own_keys_are_used_where_they_are_named(make_stack):
    folder = None

    def keys(names):
        return {"host_keys": {"files": [str(folder / n) for n in names]}}

    import pathlib
    import tempfile
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        for name, options in (("ed", ["-t", "ed25519"]), ("ed-to-come", ["-t", "ed25519"]), ("e384", ["-t", "ecdsa", "-b", "384"]), ("rsa", ["-t", "rsa", "-b", "2048"])):
            run("ssh-keygen", "-q", "-N", "", "-f", str(folder / name), *options)
        stack = make_stack(posternd=keys(["ed", "e384", "rsa", "ed-to-come"]), start=("posternd",))
        known = stack.dir / "known"
        known.write_text(f"[{stack.server}]:{stack.port} " + (folder / "ed.pub").read_text())
        assert updating(stack, known, command="sleep 0.3").returncode == 0
        assert known_blobs(known) == {(folder / f"{n}.pub").read_text().split()[1] for n in ("ed", "ed-to-come", "e384", "rsa")}
        r = stack.ssh("true", bind=stack.plain_alice, options=[f"UserKnownHostsFile={known}", "HostKeyAlgorithms=ecdsa-sha2-nistp384"])
        assert r.code == 0, r.errors
        refused = stack.postern("host-keys", "rotate", check=False)
        assert refused.code != 0 and "host_keys.files" in refused.errors


def test_a_proof_is_given_once_and_for_our_keys_only(stack):
    """By hand: OpenSSH's clients ask once, and only for what was announced."""
    import paramiko
    t = paramiko.Transport(stack.connect(stack.plain_alice))
    try:
        t.start_client(timeout=20 * SLACK)
        t.auth_none(stack.user)
        import base64
        blob = base64.b64decode(keys_of(stack)[0]["line"].split()[1])

        def prove(*blobs):
            return t.global_request("hostkeys-prove-00@openssh.com", [b for b in blobs], wait=True)
        foreign = paramiko.RSAKey.generate(2048).asbytes()
        assert prove(foreign) is None
        # A refused one counts: no oracle to try keys on.
        assert prove(blob) is None
    finally:
        t.close()
    t = paramiko.Transport(stack.connect(stack.plain_alice))
    try:
        t.start_client(timeout=20 * SLACK)
        t.auth_none(stack.user)
        proof = t.global_request("hostkeys-prove-00@openssh.com", [blob], wait=True)
        signature = paramiko.Message(proof.get_binary())
        signed = paramiko.Message()
        signed.add_string("hostkeys-prove-00@openssh.com")
        signed.add_string(t.session_id)
        signed.add_string(blob)
        assert paramiko.Ed25519Key(data=blob).verify_ssh_sig(signed.asbytes(), signature)
        assert t.global_request("hostkeys-prove-00@openssh.com", [blob], wait=True) is None
    finally:
        t.close()


def test_a_new_client_hides_its_keystrokes_among_pings(stack):
    """ping@openssh.com: OpenSSH from 9.5 on sends chaff (ObscureKeystrokeTiming) to servers that answer pings, and only to those."""
    if why := OpenSSHForky().missing():
        pytest.skip(why)
    log = stack.dir / "client-log"
    line = stack.ssh_command(None, tty=True, bind=stack.plain_alice, arguments=["-E", str(log)], options=["LogLevel=DEBUG3"])
    line[0] = OpenSSHForky().program("ssh")
    from harness import Terminal
    with Terminal(line, env=stack.client_env()) as t:
        t.read_until(r"[$#] $")
        for _ in range(5):
            t.send("echo a$((1+1))b\r")
            t.read_until("a2b")
        wait_until(lambda: "obfuscate_keystroke_timing: stopping" in log.read_text() or "chaff" in log.read_text(), "the client has sent chaff", 20)
        t.send("exit 4\r")
        assert t.wait() == 4
    text = log.read_text()
    assert "ping@openssh.com" in text
    assert re.search(r"[1-9]\d* chaff packets sent", text) or "chaff" in text, text[-3000:]


@pytest.fixture(scope="module")
def scannable(accounts):
    """ssh-keyscan comes from 127.0.0.1, which is a node here, as a client in a network is."""
    with new_stack(accounts) as stack:
        stack.write_nodes('[[node]]\nname = "scanner"\naddresses = ["127.0.0.1"]\nuser = "scanner@example.com"\n')
        stack.reload()
        yield stack


def known_hosts(stack, host: str, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(BIN / "postern"), "known-hosts", "--nodes", str(stack.nodes_file), *more, "--", host], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=30 * SLACK)


def test_a_client_in_the_network_trusts_a_host_key_by_the_networks_word(scannable):
    """ssh's KnownHostsCommand: no known_hosts file, strict checking, and still no question."""
    stack = scannable
    ask = f"KnownHostsCommand={BIN}/postern known-hosts --nodes {stack.nodes_file} %H"
    strict = [ask, "UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=yes"]
    r = stack.ssh("true", bind=stack.plain_alice, options=strict)
    assert r.code == 0 and not r.errors, r.errors
    nodes = stack.nodes_file.read_text()
    try:  # an address that the network does not know
        stack.nodes_file.write_text(nodes.replace(f'"{stack.server}"', '"127.0.0.77"'))
        r = stack.ssh("true", bind=stack.plain_alice, options=strict)
        assert r.code == 255 and "Host key verification failed" in r.errors, r.errors
    finally:
        stack.nodes_file.write_text(nodes)


def test_known_hosts_names_nodes_only(scannable):
    stack = scannable
    key = next(k["line"] for k in keys_of(stack) if k["type"] == "ssh-ed25519")
    here = f"[{stack.server}]:{stack.port}"
    assert known_hosts(stack, here).stdout == f"{here} {key}\n"
    assert known_hosts(stack, stack.server, "--port", str(stack.port)).stdout == f"{stack.server} {key}\n"
    # "localhost" leads to a node, but is not what the network calls it.
    for nothing in (f"[localhost]:{stack.port}", f"[127.0.0.99]:{stack.port}", f"[{stack.server}]:1", "no-such-name.invalid"):
        r = known_hosts(stack, nothing)
        assert (r.returncode, r.stdout) == (0, ""), nothing
    for bad in ("*", "a,b", "a b", "!x", "[a", "[a]:0x", "[a]:99999", "a\nb", "", "|1|a"):
        r = known_hosts(stack, bad)
        assert (r.returncode, r.stdout) == (0, "") and "is no host" in r.stderr, bad


@contextlib.contextmanager
def tailscaled_that_says(path, status: dict):
    """A stand-in for its LocalAPI that has this status and answers nothing else."""
    class Answer(socketserver.StreamRequestHandler):
        def handle(self):
            target = self.rfile.readline().split()[1]
            body = json.dumps(status).encode() if target == b"/localapi/v0/status" else b"no"
            self.wfile.write(b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (b"200 OK" if len(body) > 2 else b"404 No", len(body), body))

    with socketserver.ThreadingUnixStreamServer(str(path), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def with_hosts(stack, *words: str) -> subprocess.CompletedProcess:
    """A program whose resolver says of the names in stack.dir/hosts what stands there."""
    return subprocess.run(["unshare", "--mount", "--propagation", "private", "sh", "-c", 'mount --bind "$1" /etc/hosts && shift && exec "$@"', "sh", str(stack.dir / "hosts"), *words],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30 * SLACK)


@pytest.mark.needs_root
def test_known_hosts_vouches_for_no_name_of_another_domain(scannable):
    """Whoever has a machine in the network chooses what it is called, and a resolver can be lied to: github.com is not the node "github"."""
    stack = scannable
    port = str(stack.port)
    theirs = ("github", "github.lab.example.com", "GitHub.Lab.Example.com", "github.lab.example.com.")
    nobodys = ("github.com", "github.lab.example.com.evil.org", "github.lab", "lab.example.com", "github.", "nothing", "calls-itself.org", "calls-itself", "127.1")
    (stack.dir / "hosts").write_text("".join(f"{stack.server} {name}\n" for name in (*theirs, *nobodys)))
    key = next(k["line"] for k in keys_of(stack) if k["type"] == "ssh-ed25519")
    node = {"ID": "2", "HostName": "calls-itself.org", "DNSName": "github.lab.example.com.", "UserID": 1, "TailscaleIPs": [stack.server]}
    status = {"BackendState": "Running", "TUN": True, "User": {"1": {"LoginName": "mallory@example.com"}}, "Peer": {"k": node},
              "Self": {"ID": "1", "HostName": "laptop", "DNSName": "laptop.lab.example.com.", "UserID": 1, "TailscaleIPs": ["127.0.0.1"]}}

    def check(source, known, unknown):
        for name in (*known, stack.server):
            r = with_hosts(stack, f"{BIN}/postern", "known-hosts", *source, "--port", port, name)
            assert (r.returncode, r.stdout, r.stderr) == (0, f"{name} {key}\n", ""), (source, name, r)
        for name in unknown:
            r = with_hosts(stack, f"{BIN}/postern", "known-hosts", *source, "--port", port, name)
            assert (r.returncode, r.stdout) == (0, ""), (source, name, r)

    nodes = stack.dir / "names.toml"
    for name, known in (("github", ("github",)), ("github.lab.example.com", theirs)):
        nodes.write_text(f'[[node]]\nname = "{name}"\naddresses = ["{stack.server}"]\nuser = "mallory@example.com"\n')
        check(["--nodes", str(nodes)], known, [n for n in (*theirs, *nobodys) if n not in known and n.lower() not in known])
    path = stack.dir / "tailscaled.sock"
    with tailscaled_that_says(path, status):
        check(["--tailscaled", str(path)], theirs, nobodys)
        node["DNSName"] = ""  # then it has no name but the one that it gave itself
        check(["--tailscaled", str(path)], (), (*theirs, *nobodys))
        node["DNSName"] = "github.lab.example.com."
        status["TUN"] = False  # no tunnel: anybody may have that address where this machine is
        r = with_hosts(stack, f"{BIN}/postern", "known-hosts", "--tailscaled", str(path), "--port", port, "github")
        assert (r.returncode, r.stdout) == (0, "") and "TUN" in r.stderr, r


def test_known_hosts_says_that_the_network_cannot_be_asked_and_lets_ssh_go_on(scannable, tmp_path):
    r = subprocess.run([str(BIN / "postern"), "known-hosts", "--tailscaled", str(tmp_path / "none"), "server"], capture_output=True, text=True, timeout=30 * SLACK)
    assert (r.returncode, r.stdout) == (0, "") and "tailscaled" in r.stderr and len(r.stderr.splitlines()) == 1
