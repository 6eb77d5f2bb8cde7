"""A restart that nobody notices: postern-relay or posternd gets kill -9 with sessions running; recordings are whole all the same."""
import json
import time

import pytest

import harness
import recording_scenes as scenes
from harness import SLACK, wait_until


@pytest.fixture(scope="module")
def net(accounts):
    # Away for as long as a start takes on a slow machine: the grace must not end it.
    with harness.new_stack(accounts, **scenes.settings(posternd={"recorder": {"grace": "10s"}})) as made:
        yield made


@pytest.mark.parametrize("who", ["alice", "open_alice"])
@pytest.mark.parametrize("number", range(3))
def test_relay_that_dies_in_mid_output_costs_nothing(net, who, number):
    random = harness.rng(f"relay-{who}-{number}")
    marker = f"relay-dies-{who}-{number}"
    client = scenes.Watched(net, scenes.gated(marker, "exec seq 1 500000"), tty=random.random() < 0.5, bind=getattr(net, who))
    prefix = f"go-{marker}\n".encode()
    client.wait_for(prefix)
    client.at(len(prefix) + random.randrange(len(scenes.numbers(500000))), net.relay.process.kill)
    client.send(b"\n")
    wait_until(lambda: not net.relay.running, "the relay is dead")
    net.relay.start()
    assert client.wait(40) == 0, bytes(client.err)
    assert bytes(client.out) == prefix + scenes.numbers(500000)
    _, recording = scenes.wait_whole(net, marker)
    scenes.check_recording(recording, bytes(client.out), marker)
    scenes.wait_journal_freed(net, recording.id)


def test_relay_that_dies_under_idle_sessions_is_joined_again(net):
    with net.terminal() as terminal:
        terminal.read_until(rb"[$#] ")
        terminal.send("echo before-$((40+2))\n")
        terminal.read_until(rb"before-42\r\n")
        for n in range(3):
            net.relay.kill()
            net.relay.start()
            terminal.send(f"echo after-{n}-$((40+2))\n")
            terminal.read_until(rb"after-%d-42\r\n" % n)
        terminal.send("exit\n")
        assert terminal.wait() == 0
    recording = net.find_recording("after-2-42")
    got = recording.stream("o")
    assert terminal.screen.startswith(got) and b"before-42" in got


def test_session_that_ended_while_the_relay_was_away_is_uploaded(net):
    """The end, too, waits for the relay."""
    marker = "ends-without-relay"
    client = scenes.Watched(net, scenes.gated(marker, "echo last words"), tty=False)
    client.wait_for(f"go-{marker}\n".encode())
    net.relay.kill()
    client.send(b"\n")
    net.relay.start()
    assert client.wait(20) == 0
    _, recording = scenes.wait_whole(net, marker)
    scenes.check_recording(recording, bytes(client.out), marker)
    assert recording.last_exit() == "0"


def test_session_that_was_revoked_while_the_relay_was_away_keeps_the_end_of_its_recording(net):
    marker = "revoked-without-relay"
    client = scenes.Watched(net, f"echo shown; : {marker}; exec sleep 3601", tty=False)
    client.wait_for(b"shown\n")
    net.relay.kill()
    since = net.posternd.log_size()
    net.postern("sessions", "kill", "--all")
    assert client.wait(10) == 255
    net.posternd.wait_log("event=session_waited_for", since=since, seconds=20)  # it was killed then, once
    assert not scenes.running(net)
    net.relay.start()
    _, recording = scenes.wait_whole(net, marker)
    assert recording.stream() == b"shown\n" and recording.last_exit() in ("HUP", "TERM")


def test_session_process_that_is_killed_leaves_a_cut_recording(net):
    """A journal without an end, whose session is dead, is uploaded as cut: what was shown is at the recorder."""
    import os
    import signal
    marker = "session-killed"
    before = {p.pid for p in net.session_processes()}
    client = scenes.Watched(net, f"echo shown; : {marker}; exec sleep 3601", tty=False)
    client.wait_for(b"shown\n")
    mine = wait_until(lambda: [p for p in net.session_processes() if p.pid not in before], "its postern-session")
    for p in mine:
        os.kill(p.pid, signal.SIGKILL)
    client.wait(10)
    letter, recording = scenes.wait_whole_or_cut(net, marker)
    assert recording.path.name.endswith(".part"), "a recording without an end is not whole"
    assert recording.stream() == b"shown\n"
    for p in scenes.running(net):
        if "3601" in p.command:
            os.kill(p.pid, signal.SIGKILL)  # its keeper was killed; nobody is left to end it


def test_relay_and_recorder_die_together(net):
    random = harness.rng("together")
    for n in range(3):
        scenes.choose(net, "a")
        marker = f"together-{n}"
        client = scenes.Watched(net, scenes.gated(marker, "exec seq 1 500000"), tty=False)
        prefix = f"go-{marker}\n".encode()
        client.wait_for(prefix)

        def both():
            net.recorder_a.process.kill()
            net.relay.process.kill()
        client.at(len(prefix) + random.randrange(len(scenes.numbers(500000))), both)
        client.send(b"\n")
        wait_until(lambda: not net.relay.running and not net.recorder_a.running, "both are dead")
        net.relay.start()
        assert client.wait(40) == 0, bytes(client.err)
        letter, recording = scenes.wait_whole(net, marker)
        scenes.check_recording(recording, prefix + scenes.numbers(500000), marker)
        net.recorder_a.start()


@pytest.mark.parametrize("number", range(2))
def test_posternd_that_dies_in_mid_output_costs_nothing(net, number):
    random = harness.rng(f"posternd-{number}")
    marker = f"posternd-dies-{number}"
    client = scenes.Watched(net, scenes.gated(marker, "exec seq 1 500000"), tty=False)
    prefix = f"go-{marker}\n".encode()
    client.wait_for(prefix)
    client.at(len(prefix) + random.randrange(len(scenes.numbers(500000))), net.posternd.process.kill)
    client.send(b"\n")
    assert client.wait(40) == 0, bytes(client.err)
    assert bytes(client.out) == prefix + scenes.numbers(500000)
    _, recording = scenes.wait_whole(net, marker)
    scenes.check_recording(recording, bytes(client.out), marker)
    wait_until(lambda: not net.posternd.running, "posternd is dead")
    net.posternd.start()
    net.learn_host_key()
    assert net.ssh("echo back", tty=False).out == b"back\n"
