"""Settings and command lines: what is wrong is named with its place, and never ignored."""
import json
import re
import subprocess

import pytest

from harness import BIN, ROOT, SLACK, new_stack

PROGRAMS = ["posternd", "postern-relay", "postern-recorder"]


def run(program, *arguments):
    return subprocess.run([str(BIN / program), *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20 * SLACK)


@pytest.fixture(scope="module")
def files(accounts):
    """A stack's files without its daemons."""
    stack = new_stack(accounts, start=())
    yield stack
    stack.stop()


def config_of(files, program):
    return files.dir / {"posternd": "posternd.toml", "postern-relay": "relay.toml", "postern-recorder": "recorder-a.toml"}[program]


@pytest.mark.parametrize("program", PROGRAMS)
def test_check_config_accepts_good_settings(files, program):
    r = run(program, "--config", config_of(files, program), "--check-config")
    assert r.returncode == 0, r.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_check_config_names_an_unknown_key_by_file_line_and_column(files, program, tmp_path):
    text = config_of(files, program).read_text()
    broken = tmp_path / "broken.toml"
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("["))
    lines.insert(at + 1, "  no_such_key = 1")
    broken.write_text("\n".join(lines) + "\n")
    r = run(program, "--config", broken, "--check-config")
    assert r.returncode == 1
    assert re.search(rf"^{re.escape(str(broken))}:{at + 2}:\d+: .*no_such_key", r.stderr, re.M), r.stderr


@pytest.mark.parametrize("program, page", [("posternd", "SETTINGS.md"), ("postern-relay", "SETTINGS.relay.md"), ("postern-recorder", "SETTINGS.recorder.md")])
def test_every_setting_is_described(program, page, tmp_path):
    """The programs know their settings: an unknown table makes them list all tables, an unknown key the keys of its table."""
    file = tmp_path / "x.toml"
    text = (ROOT / "docs" / page).read_text()

    def listed(toml, pattern):
        file.write_text(toml)
        found = re.search(pattern, run(program, "--config", file, "--check-config").stderr)
        assert found, toml
        return found[1].split()
    tables = [t.strip("[]") for t in listed("[no_such_table]\nx = 1\n", r"no_such_table: .*\(tables: ([^)]*)\)")]
    assert len(tables) > 3
    for table in tables:
        assert f"[{table}]" in text, f"{page} has no [{table}]"
        for key in listed(f"[{table}]\nno_such_key = 1\n", rf"{table}\.no_such_key: .*\(settings of \[{table}\]: ([^)]*)\)"):
            assert re.search(rf"(`|^|\s){key}(`|\s*=)", text, re.M), f"{page}: [{table}] {key} is not described"


@pytest.mark.parametrize("program", PROGRAMS)
def test_check_config_names_broken_toml_by_place(files, program, tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("[log]\nlevel = \"info\"\nlevel = = 3\n")
    r = run(program, "--config", broken, "--check-config")
    assert r.returncode == 1
    assert re.search(rf"^{re.escape(str(broken))}:3:\d+: ", r.stderr, re.M), r.stderr


@pytest.mark.parametrize("line, named", [
    ('[limits]\nlogin_grace_time = "soon"', "login_grace_time"),
    ('[limits]\nlogin_grace_time = 30', "login_grace_time"),
    ('[limits]\nauth_attempts = -1', "auth_attempts"),
    ('[limits]\nconnections = "many"', "connections"),
    ('[recorder]\nport = 70000', "port"),
    ('[log]\nlevel = "loud"', "level"),
    ('[no_such_table]\nx = 1', "no_such_table"),
])
def test_values_that_make_no_sense_are_refused_with_their_place(files, tmp_path, line, named):
    table = line.split("\n")[0]
    text = re.sub(rf"{re.escape(table)}\n([^\[]*)", "", config_of(files, "posternd").read_text())
    broken = tmp_path / "broken.toml"
    broken.write_text(line + "\n" + text)
    r = run("posternd", "--config", broken, "--check-config")
    assert r.returncode == 1
    place = 1 if named == "no_such_table" else 2
    assert re.search(rf"^{re.escape(str(broken))}:{place}:\d+: .*{named}", r.stderr, re.M), r.stderr


def test_check_config_names_what_is_wrong_in_the_policy_and_in_the_nodes_at_once(files, tmp_path):
    policy, nodes = tmp_path / "policy.hujson", tmp_path / "nodes.toml"
    policy.write_text('{\n  // fine so far\n  "ssh": [\n    {"action": "accept", "src": ["*"], "dst": ["tag:x"], "users": ["a"], "surprise": 1},\n  ],\n}\n')
    nodes.write_text('[[node]]\nname = "a"\naddresses = ["127.0.0.999"]\nuser = "a@example.com"\n')
    text = config_of(files, "posternd").read_text()
    text = text.replace(str(files.policy_file), str(policy)).replace(str(files.nodes_file), str(nodes))
    config = tmp_path / "posternd.toml"
    config.write_text(text)
    r = run("posternd", "--config", config, "--check-config")
    assert r.returncode == 1
    assert re.search(rf"^{re.escape(str(policy))}:4:\d+: .*surprise", r.stderr, re.M), r.stderr
    assert re.search(rf"^{re.escape(str(nodes))}:3:\d+: ", r.stderr, re.M), r.stderr


@pytest.mark.parametrize("program", PROGRAMS + ["postern"])
def test_a_command_line_that_is_wrong_exits_with_2(program):
    assert run(program, "--no-such-option").returncode == 2


@pytest.mark.parametrize("program", PROGRAMS + ["postern"])
def test_every_program_says_its_version_and_helps(program):
    assert re.search(r"\d+\.\d+", run(program, "--version").stdout)
    assert run(program, "--help").returncode == 0


def test_the_version_names_the_ssh_library_how_it_was_built_and_what_it_lacks():
    said = run("posternd", "--version").stdout
    found = re.fullmatch(r"posternd [\d.]+ \(libssh (\d+)\.(\d+)\.\d+\S* (bundled|system-static)(; missing: [^;()\n]+)?\)\n", said)
    assert found, said
    series, mode, missing = (int(found[1]), int(found[2])), found[3], found[4] or ""
    assert (mode == "bundled") == (missing == ""), said
    assert ("post-quantum key exchange" in missing) == (series < (0, 12)), said
    assert run("postern-net", "--version").stdout == said.replace("posternd", "postern-net"), "and the program that links it says the same"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_daemon_whose_settings_are_missing_says_so_and_exits_with_1(program, tmp_path):
    r = run(program, "--config", tmp_path / "absent.toml")
    assert r.returncode == 1
    assert "absent.toml" in r.stderr


@pytest.mark.parametrize("program", ["postern-net", "postern-session"])
def test_the_workers_cannot_be_started_by_hand(program):
    r = run(program)
    assert r.returncode not in (0, None)


def test_the_log_names_everything_that_listens_and_the_host_keys(stack):
    log = stack.posternd.log()
    assert f"address={stack.server}:{stack.port}" in log
    known = stack.known_hosts.read_text().split()
    assert known[2] in log, "the key that a client sees is the one in the log"
    status = json.loads(stack.postern("status").text)
    assert {k["line"].split()[0] for k in status["host_keys"]} == {"ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"}
