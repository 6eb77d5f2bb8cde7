import pytest

import harness
from puppet import Puppet


@pytest.fixture(scope="module")
def puppet(accounts):
    if not harness.IS_ROOT:
        pytest.skip("needs root: the programs' own identities are the point")
    made = Puppet(accounts, posternd={"limits": {"login_grace_time": "2s", "crash_penalty": "1s", "unauthenticated_connections_per_source": 100}})
    try:
        made.honest_login()
        made.settled()
        made.descriptors = harness.wait_until(made.calm_descriptors, "a full warm pool")
        yield made
    finally:
        made.stop()


@pytest.fixture
def net(puppet):
    """The module's hostile net; afterwards posternd still runs (only a test can start it again), lets an honest peer in, holds no descriptor more, and nothing is left."""
    yield puppet
    puppet.release()
    assert puppet.stack.posternd.running, "posternd died:\n" + puppet.stack.posternd.tail()
    puppet.honest_login()
    puppet.settled()
    harness.wait_until(lambda: puppet.count_descriptors() <= puppet.descriptors + 1, "posternd has closed what it was sent", 5)
