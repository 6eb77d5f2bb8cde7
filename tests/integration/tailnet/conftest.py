import pytest

from tailnet.lab import network


@pytest.fixture(scope="module")
def tailnet(accounts):
    with network(accounts, "server,alice-laptop,bob-laptop,ci") as stack:
        yield stack
