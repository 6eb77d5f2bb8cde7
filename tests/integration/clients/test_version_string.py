"""What stands after SSH-2.0- decides what clients do.

OpenSSH's sftp-server takes the arguments of SSH_FXP_SYMLINK in the other order than the draft says (its PROTOCOL, 4.1). libssh, asyncssh and
ssh2 for Node swap theirs only where the version names OpenSSH; paramiko, pkg/sftp, libssh2 and OpenSSH always send OpenSSH's order. So no
order of the server's could please all of them, but a version can. libssh and ssh2 open unix sockets only to an OpenSSH, and want its number: libssh 0.10 one digit, ssh2 one that is >= 5; paramiko and others take "OpenSSH_1…" for an old one.
The default has it all. POSTERN_TEST_VERSION_STRING tries another one.
"""
import os
import subprocess

import pytest

from clients.drivers import CLIENTS

from harness import SLACK, new_stack


@pytest.fixture(scope="module")
def stack(accounts):
    version = os.environ.get("POSTERN_TEST_VERSION_STRING")
    made = new_stack(accounts, posternd={"ssh": {"version_string": version}} if version else None)
    made.write_nodes('[[node]]\nname = "loopback"\naddresses = ["127.0.0.1"]\nuser = "alice@example.com"\n')
    made.start()
    yield made
    made.stop()


@pytest.fixture
def client(request):
    chosen = CLIENTS[request.param]
    if why := chosen.missing():
        pytest.skip(f"{chosen.title} is left out: {why}")
    return chosen


@pytest.fixture
def folder(stack):
    path = stack.dir / "links"
    path.mkdir()
    path.chmod(0o777)
    yield path
    for link in path.iterdir():
        link.unlink()
    path.rmdir()


@pytest.mark.parametrize("client", [c.name for c in CLIENTS.values() if c.can("symlink")], indirect=True)
def test_every_client_makes_its_symlinks_the_right_way_round(stack, client, folder):
    r = client.sftp(stack, [("symlink", "the-target", folder / "the-link")])
    assert not r.error, r
    assert os.readlink(folder / "the-link") == "the-target"


@pytest.mark.parametrize("client", ["libssh", "node-ssh2"], indirect=True)
def test_a_client_that_opens_unix_sockets_to_openssh_only_asks_for_them(stack, client):
    # Whether it gets one is the server's answer (forwarding); here it must ask at all.
    r = client.unix(stack, f"{stack.dir}/no-such-socket")
    assert "OpenSSH" not in r.error and r.error, r


@pytest.mark.parametrize("client", list(CLIENTS), indirect=True)
def test_every_client_gets_in_and_out(stack, client):
    r = client.run(stack, "echo out; exit 3")
    assert (r.out, r.status) == (b"out\n", 3), r


@pytest.mark.parametrize("recorded", [False, True], ids=["not recorded", "recorded"])
@pytest.mark.parametrize("client", ["openssh", "openssh-forky"], indirect=True)
def test_yes_ends_when_its_reader_has_gone(stack, client, recorded):
    """`ssh host yes | head -1`: OpenSSH's client says so by eow@openssh.com, and to an OpenSSH only (channels.c, chan_send_eow2)."""
    line, environment = client.command(stack, "yes", recorded=recorded)
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    stack.clients.append(process)
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    try:
        assert process.wait(6 * SLACK) == 255  # as with sshd: yes died of SIGPIPE
    finally:
        process.kill()
        process.wait()
