"""No recorder at all. Under enforceRecorder nothing starts and what runs is ended with everything it started; else the session runs on."""
import json
import os
import re
import time

import pytest

import harness
import recording_scenes as scenes
from harness import SLACK, wait_until


@pytest.fixture
def net(accounts):
    made = harness.new_stack(accounts, **scenes.settings())
    with made:
        yield made


@pytest.fixture
def alone(accounts):
    """No recorder from the start, as after a reboot of all of them."""
    made = harness.new_stack(accounts, start=("relay", "posternd"), **scenes.settings())
    with made:
        yield made


def listing(net, *recorders: str) -> list[dict]:
    """`postern recordings ls --json` of the host's relay and these recorders ("a", "b")."""
    ask = ["--relay", net.relay_settings["control"]["socket"]] + [x for letter in recorders for x in ("--recorder", net.recorder_url(letter))]
    return [json.loads(line) for line in net.postern("recordings", "ls", "--json", *ask).text.splitlines()]


# ------------------------------------------------------------------------------------------- a new session

def test_new_session_that_must_be_recorded_is_refused_and_nothing_runs(alone, tmp_path):
    os.chmod(tmp_path, 0o777)
    proof = alone.dir / "proof"
    proof.mkdir(mode=0o777)
    proof.chmod(0o777)
    done = alone.ssh(f"touch {proof}/command-ran", tty=False)
    assert done.code == 254, done
    assert b"record" in done.err.lower(), done
    assert done.out == b""
    assert done.seconds < (1.0 + 2.0) * SLACK, f"refused after {done.seconds:.2f} s"
    assert not list(proof.iterdir()), "the command ran"
    assert not scenes.running(alone), "something runs as the user"


def test_login_shell_that_must_be_recorded_is_refused_with_a_message(alone):
    with alone.terminal() as terminal:
        assert terminal.wait() == 254, terminal.screen
        assert b"record" in terminal.screen.lower(), terminal.screen
    assert not scenes.running(alone)


def test_sftp_that_must_be_recorded_is_refused(alone):
    done = alone.ssh("sftp", tty=False, arguments=["-s"])
    assert done.code == 254, done
    assert not scenes.running(alone)


def test_sessions_start_again_when_a_recorder_is_back(alone):
    assert alone.ssh("true", tty=False).code == 254
    alone.recorder_b.start()
    done = wait_until(lambda: (lambda r: r if r.code == 0 else None)(alone.ssh("echo again", tty=False)), "sessions start again", 10)
    assert done.out == b"again\n"


# ------------------------------------------------------------------------------------------- a running session

STUBBORN = ("trap '' HUP TERM INT; nohup sleep 3601 >/dev/null 2>&1 & setsid sleep 3602 >/dev/null 2>&1 & "
            "(trap '' HUP TERM; setsid sh -c 'trap \"\" HUP TERM; sleep 3603' >/dev/null 2>&1 &) ; "
            "(setsid sh -c 'sleep 3604 & exec sleep 3605' >/dev/null 2>&1 </dev/null &) ; ")


def lose_all(net):
    net.recorder_a.kill()
    net.recorder_b.kill()


@pytest.mark.parametrize("tty", [False, True], ids=["no-pty", "pty"])
def test_running_session_ends_with_a_message_and_its_whole_tree(net, tty):
    marker = f"ended-{'pty' if tty else 'pipes'}"
    command = f"{STUBBORN} i=0; while :; do echo tick-{marker}-$i; i=$((i+1)); sleep 0.05; done"
    client = scenes.Watched(net, command, tty=tty)
    client.wait_for(f"tick-{marker}-5".encode())
    wait_until(lambda: len([p for p in scenes.running(net) if p.name == "sleep" and "360" in p.command]) >= 5, "all five children run")
    lost = time.monotonic()
    lose_all(net)
    code = client.wait(scenes.GRACE + 8)
    seconds = client.ended - lost
    assert code != 0
    said = bytes(client.err + client.out)
    assert re.search(rb"(?i)record", said[-2000:]), f"no message: {said[-400:]!r}"
    assert seconds < (scenes.GRACE + 4) * SLACK, f"ended after {seconds:.1f} s"
    assert seconds > scenes.GRACE * 0.5, f"ended after {seconds:.1f} s: a recorder could have come back"
    wait_until(lambda: not scenes.running(net), f"no process of {net.user} is left: {[str(p) for p in scenes.running(net)]}", 6)
    # What was shown is in the journal, and arrives.
    net.recorder_b.start()
    letter, recording = scenes.wait_whole_or_cut(net, f"tick-{marker}")
    shown = bytes(client.out)
    got = recording.stream("o")
    last = shown.rfind(f"tick-{marker}-".encode())
    end = shown.find(b"\n", last) + 1 or len(shown)
    assert got[:end] == shown[:end], f"recorded {got[-200:]!r}, shown {shown[-200:]!r}"
    assert letter == "b"


def test_a_client_that_waits_for_a_job_that_was_left_behind_is_let_go_when_the_recorders_are_gone(net):
    client = scenes.Watched(net, "sleep 3606 & echo left", tty=False)
    client.wait_for(b"left\n")
    wait_until(lambda: [p for p in scenes.running(net)] and all(p.name == "sleep" for p in scenes.running(net)), "the shell has ended")
    lose_all(net)
    assert client.wait(scenes.GRACE + 8) == 0, "its status was told before"
    wait_until(lambda: not scenes.running(net), "the job is ended as well", 6)


def test_a_recorder_that_is_back_within_the_grace_saves_the_session(net):
    marker = "saved"
    client = scenes.Watched(net, scenes.gated(marker, "seq 1 1000"), tty=False)
    client.wait_for(f"go-{marker}\n".encode())
    lose_all(net)
    net.recorder_b.start()
    client.send(b"\n")
    assert client.wait() == 0, bytes(client.err)
    _, recording = scenes.wait_whole(net, marker)
    scenes.check_recording(recording, bytes(client.out), marker)


# ------------------------------------------------------------------------------------------- fail open

def test_without_enforcement_the_session_runs_and_the_recording_arrives_later(alone):
    marker = "open-later"
    done = alone.ssh(f"seq 1 5000; : {marker}", tty=False, bind=alone.open_alice)
    assert done.code == 0 and done.out == scenes.numbers(5000), done.errors
    entries = [e for e in listing(alone) if marker in json.dumps(e)]
    assert len(entries) == 1, listing(alone)
    assert entries[0]["state"] == "not on a recorder yet" and entries[0]["length"] > len(done.out), entries
    assert "gap" not in entries[0], f"everything is in the journal, yet: {entries}"
    alone.recorder_a.start()
    letter, recording = scenes.wait_whole(alone, marker)
    assert letter == "a"
    scenes.check_recording(recording, done.out, marker)
    scenes.wait_journal_freed(alone, recording.id)
    wait_until(lambda: all(e["state"] == "whole" for e in listing(alone, "a") if e["id"] == recording.id), "the list says whole")


def test_a_session_that_may_run_unrecorded_survives_the_loss_of_all_recorders(net):
    marker = "open-survives"
    client = scenes.Watched(net, scenes.gated(marker, "seq 1 200000"), tty=False, bind=net.open_alice)
    client.wait_for(f"go-{marker}\n".encode())
    scenes.wait_copy(net, marker, "a")
    lose_all(net)
    client.send(b"\n")
    assert client.wait() == 0
    assert bytes(client.out) == f"go-{marker}\n".encode() + scenes.numbers(200000)
    net.recorder_b.start()
    letter, recording = scenes.wait_whole(net, marker)
    assert letter == "b"
    scenes.check_recording(recording, bytes(client.out), marker)


def test_the_last_words_of_a_job_that_was_left_behind_do_not_wait_for_a_relay_that_is_away(net):
    since = net.posternd.log_size()
    client = scenes.Watched(net, "exec 3<&0; { read go; echo last words; } <&3 & exec 3<&-; echo left", tty=False, bind=net.open_alice)
    client.wait_for(b"left\n")
    net.posternd.wait_log("event=session_end", since=since)
    net.relay.kill()
    client.send(b"\n")
    code = client.wait(scenes.GRACE + 8)
    net.relay.start()
    assert code == 0 and bytes(client.out) == b"left\nlast words\n"
    _, recording = scenes.wait_whole(net, "last words")
    assert recording.stream() == b"left\nlast words\n" and recording.last_exit() == "0", "what the relay takes in the end is recorded as well"


# ------------------------------------------------------------------------------------------- gaps

@pytest.fixture
def small_journal(accounts):
    """No recorder, and a host whose journal has 6 MiB of disk."""
    import pwd
    import subprocess
    made = harness.new_stack(accounts, start=("relay", "posternd"), **scenes.settings(relay={"journal": {"min_free": "1MiB"}}))
    journal = made.dir / "relay/journal"
    journal.mkdir(mode=0o700)
    entry = pwd.getpwnam(accounts.relay)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=6m,uid={entry.pw_uid},gid={entry.pw_gid},mode=0700", "tmpfs", journal], check=True)
    try:
        with made:
            yield made
    finally:
        subprocess.run(["umount", "-l", journal], check=True)


@pytest.mark.needs_root
def test_what_no_journal_took_is_told_as_a_gap(small_journal):
    """Fail open: the user works on, the admin is told that a part is missing; the part before it is kept."""
    net = small_journal
    marker = "journal-full"
    done = net.ssh(f"seq 1 2000000; : {marker}", tty=False, bind=net.open_alice, timeout=60)
    assert done.code == 0, done.errors
    assert done.out == scenes.numbers(2000000)
    entries = [e for e in listing(net) if marker in json.dumps(e)]
    assert len(entries) == 1 and "gap" in entries[0], listing(net)
    assert re.search(r"event=\S*gap", net.posternd.log() + net.relay.log()), "the gap is logged"
    net.recorder_a.start()
    letter, recording = scenes.wait_whole_or_cut(net, marker)
    got = recording.stream("o")
    assert len(got) > 1 << 20 and scenes.numbers(2000000).startswith(got[: got.rfind(b"\n") + 1])
    assert any("gap" in e for e in listing(net) if e.get("id") == recording.id), "the gap is told afterwards, too"
