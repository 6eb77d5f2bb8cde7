"""Fixtures of the integration tests; what they give is described in harness.py."""
import signal
import warnings

warnings.filterwarnings("ignore", message=".*has been deprecated")  # asyncssh 2.10 imports ciphers that cryptography will drop

import pytest

import harness


def pytest_configure(config):
    # A run in the background of a script begins with SIGINT ignored; the programs under test, and sshd beside them, are not to inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    harness.become_subreaper()


def pytest_report_header(config):
    return f"postern: programs in {harness.BIN}, POSTERN_SEED={harness.SEED}, slack {harness.SLACK}, {'root' if harness.IS_ROOT else 'ordinary user'}"


def pytest_collection_modifyitems(items):
    if not harness.IS_ROOT:
        for item in items:
            if item.get_closest_marker("needs_root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="session")
def accounts():
    made = harness.Accounts()
    yield made
    made.remove()


@pytest.fixture(scope="module")
def stack(accounts):
    """A running network, shared by a module's tests. A test that breaks a daemon mends it before it ends."""
    made = harness.new_stack(accounts)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def make_stack(accounts):
    """make_stack(posternd={"limits": {…}}, policy=…, start=(…)) -> a running Stack of this test alone."""
    made = []

    def make(**kw):
        made.append(harness.new_stack(accounts, **kw))
        return made[-1].start()
    yield make
    problems = []
    for one in reversed(made):
        try:
            one.stop()
        except AssertionError as e:
            problems.append(str(e))
    assert not problems, "\n".join(problems)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    item.postern_log_sizes = {id(s): {d.name: d.log_size() for d in s.daemons()} for s in harness.running_stacks()}
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed:
        for s in harness.running_stacks():
            report.sections.append((f"daemons of {s.net}.0/24 during this test", s.logs(item.postern_log_sizes.get(id(s)))))
