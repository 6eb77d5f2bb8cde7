"""Recorder A gets kill -9, B goes on; A comes back and B dies: the user notices nothing and nothing is lost."""
import pytest

import harness
import recording_scenes as scenes

ROUNDS = 20


@pytest.fixture(scope="module")
def net(accounts):
    with harness.new_stack(accounts, **scenes.settings()) as made:
        yield made


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_recorder_that_dies_in_mid_session_costs_the_user_nothing(net, number):
    """At random points; POSTERN_SEED (printed in the header) repeats them."""
    outcomes = scenes.failover_round(net, harness.rng(f"failover-{number}"))
    for outcome in outcomes:
        print(outcome)
    assert not any(o.problems for o in outcomes), "\n".join(map(str, outcomes))


def test_journal_of_the_host_is_free_after_failovers(net):
    """What is whole at a recorder does not stay on the host."""
    marker = "journal-freed-after-failover"
    assert net.ssh(f"seq 1 20000; : {marker}", tty=False).code == 0
    _, recording = scenes.wait_whole(net, marker)
    for letter in "ab":
        for path in scenes.cast_files(net, letter, finished=True):
            scenes.wait_journal_freed(net, scenes.header_of(path)["recordingID"])
    assert recording.id


def test_a_copy_that_was_moved_is_not_whole_and_says_where_the_recording_went(net):
    """Lists merge by id: the copy at the recorder that died and came back is no second recording."""
    outcome = scenes.kill_in_the_middle(net, "a", _Point(0.5)) if _chosen(net) == "a" else None
    assert outcome and not outcome.problems, outcome
    net.recorder_a.start()
    part = scenes.wait_until(lambda: [p for p in scenes.cast_files(net, "a", False)], "A's part after its return")
    assert part
    identifier = scenes.header_of(max(part, key=lambda p: p.stat().st_mtime))["recordingID"]
    whole = [p for p in scenes.cast_files(net, "b", True) if scenes.header_of(p).get("recordingID") == identifier]
    assert len(whole) == 1, f"{identifier} is whole at B {len(whole)} times"


def _chosen(net):
    scenes.choose(net, "a")
    return "a"


class _Point:
    """Stands in for random.Random: no pty, the kill at a fixed share of the bytes."""

    def __init__(self, share):
        self.share = share

    def random(self):
        return 0.5

    def randrange(self, count):
        return int(self.share * count)
