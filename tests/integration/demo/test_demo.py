"""scripts/demo as a newcomer and as a script use it: its addresses and users are fixed, so this runs only when no demo does."""
import os
import pwd
import re
import signal
import subprocess
import time

import pytest

from harness import BUILT, IS_ROOT, ROOT, SLACK, Recording, Terminal, processes, wait_until

DEMO = ROOT / "build/demo"
NAMES = ["postern-net", "postern-relay", "postern-recorder", "postern-demo"]


def demo(*arguments, timeout=300):
    return subprocess.run([str(ROOT / "scripts/demo"), *arguments, "--no-build"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout * SLACK)


def users() -> set[str]:
    """Of the demo's; other tests make and remove theirs at the same time."""
    return {e.pw_name for e in pwd.getpwall()} & set(NAMES)


def env() -> dict[str, str]:
    """build/demo/env as a shell reads it."""
    shell = subprocess.run(["sh", "-c", '. "$1" && set', "sh", str(DEMO / "env")], capture_output=True, text=True, check=True)
    return {k: v.strip("'") for k, _, v in (line.partition("=") for line in shell.stdout.splitlines()) if re.match(r"(POSTERN|RECORDER|RELAY)", k)}


@pytest.fixture(scope="module")
def running():
    if BUILT != ROOT / "build/dev/bin":
        pytest.skip("the demo runs the dev build")
    if demo("status").returncode == 0 or (DEMO / "env").exists():
        pytest.skip("a demo is running: its addresses are taken")
    before = users()
    started = demo("start")
    assert started.returncode == 0, started.stderr
    yield started.stdout
    stopped = demo("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert not (DEMO / "env").exists()
    assert users() == before, "the users that it made are gone, and no others"
    ours = [p for p in processes().values() if str(DEMO) in p.command]
    assert not ours, ours


def ssh_line(printed: str, number: int = 0) -> list[str]:
    return re.findall(r"^ +(ssh .*)$", printed, re.M)[number].split()


def test_the_printed_line_logs_in_without_a_question(running):
    line = ssh_line(running)
    done = subprocess.run([line[0], "-o", "BatchMode=yes", *line[1:], "id -un; pwd; ls -A"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30 * SLACK)
    user = env()["POSTERN_USER"]
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert out[:2] == [user, pwd.getpwnam(user).pw_dir]
    if IS_ROOT:
        assert user == "postern-demo" and out[2:] == [], "an empty home"
    with Terminal(line) as t:
        t.read_until(r"[$#] $")
        t.send("exit 4\r")
        assert t.wait() == 4


def test_the_printed_line_of_bob_is_refused(running):
    line = ssh_line(running, 1)
    done = subprocess.run([*line, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30 * SLACK)
    assert done.returncode == 255 and "tailnet policy does not permit you to SSH to this node" in done.stderr


def test_env_tells_scripts_what_they_need(running):
    e = env()
    assert (e["POSTERN_HOST"], e["POSTERN_PORT"]) == ("127.0.0.2", ssh_line(running)[ssh_line(running).index("-p") + 1])
    for name in ("POSTERND_PID", "RELAY_PID", "RECORDER_A_PID", "RECORDER_B_PID"):
        assert os.path.exists(f"/proc/{e[name]}"), name
    for name in ("POSTERN_POLICY", "POSTERN_CONFIG", "RECORDER_A_DIR", "RECORDER_B_DIR"):
        assert os.path.exists(e[name]), name
    assert re.fullmatch(r"http://127\.0\.2\.1:\d+", e["RECORDER_A_URL"]) and re.fullmatch(r"http://127\.0\.2\.2:\d+", e["RECORDER_B_URL"])


def test_each_program_runs_as_its_own_user(running):
    if not IS_ROOT:
        pytest.skip("needs root")
    e = env()
    owner = lambda pid: pwd.getpwuid(os.stat(f"/proc/{pid}").st_uid).pw_name
    assert [owner(e[n]) for n in ("POSTERND_PID", "RELAY_PID", "RECORDER_A_PID", "RECORDER_B_PID")] == ["root", "postern-relay", "postern-recorder", "postern-recorder"]


def test_starting_twice_is_harmless(running):
    before = env()
    assert demo("start").returncode == 0
    assert env() == before
    assert demo("status").returncode == 0


def test_a_recorder_dies_and_the_recording_goes_on_at_the_other_and_restart_brings_it_back(running):
    e = env()
    line = ssh_line(running)
    with Terminal(line) as t:
        t.read_until(r"[$#] $")
        t.send("seq 1 300000; echo the-$((1+1))-end\r")
        t.read_until(r"\r\n2000\r\n")
        os.kill(int(e["RECORDER_A_PID"]), signal.SIGKILL)
        t.read_until(r"the-2-end\r\n", 60)
        t.send("exit\r")
        assert t.wait() == 0
    assert demo("status").returncode != 0, "nothing restarts by itself"

    def whole_at_b():
        for root, _, names in os.walk(e["RECORDER_B_DIR"]):
            for name in names:
                if name.endswith(".cast"):
                    r = Recording.load(os.path.join(root, name))
                    if b"the-2-end" in r.stream("o"):
                        return r
        return None
    recording = wait_until(whole_at_b, "recorder B has the whole recording", 30)
    text = recording.stream("o")
    assert re.search(rb"[\r\n]1\r\n2\r\n", text) and b"\r\n299999\r\n300000\r\n" in text  # before the 1: with TERM=dumb bash says nothing of pasting
    assert demo("restart", "recorder-a").returncode == 0
    assert demo("status").returncode == 0
    assert env()["RECORDER_A_PID"] != e["RECORDER_A_PID"]


@pytest.mark.parametrize("part", ["posternd", "relay"])
def test_restart_of_a_daemon_is_not_noticed_by_a_session(running, part):
    with Terminal(ssh_line(running)) as t:
        t.read_until(r"[$#] $")
        assert demo("restart", part).returncode == 0
        t.send("echo still-$((1+1))\r")
        t.read_until(r"still-2\r\n", 20)
        t.send("exit 6\r")
        assert t.wait() == 6


def test_the_printed_commands_list_and_play_recordings(running):
    e = env()
    # As somebody types them: the lines that begin with the program's path.
    lines = [m[1] for m in re.finditer(rf"^ +({re.escape(e['POSTERN_BIN'])}/postern .*)$", running, re.M)]
    assert len(lines) == 3, lines
    for line in lines:
        done = subprocess.run(["bash", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120 * SLACK)
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout


def test_a_wrong_word_says_how_to_use_it(running):
    done = demo("destroy")
    assert done.returncode == 2 and "scripts/demo start" in done.stderr
    assert demo("restart", "everything").returncode == 2


def test_stop_ends_sessions_and_start_works_again_afterwards(running):
    with Terminal(ssh_line(running)) as t:
        t.read_until(r"[$#] $")
        t.send("trap '' HUP TERM; sleep 1004\r")
        stopped = demo("stop")
        assert stopped.returncode == 0, stopped.stderr
        assert t.wait() == 255
        assert not any(p.command == "sleep 1004" for p in processes().values())
    again = demo("start")
    assert again.returncode == 0, again.stderr
    assert demo("status").returncode == 0


def test_ctrl_c_in_the_foreground_stops_everything(running):
    assert demo("stop").returncode == 0
    try:
        with Terminal([str(ROOT / "scripts/demo"), "--no-build"], env={**os.environ, "TERM": "dumb"}) as t:
            t.read_until(r"Ctrl-C stops everything", 120)
            pid = env()["POSTERND_PID"]
            t.send("\x03")
            t.wait(60)
        assert not os.path.exists(f"/proc/{pid}")
        assert demo("status").returncode == 3
        if IS_ROOT:
            assert "postern-demo" not in users()
    finally:
        demo("start")
