"""Fixtures that end with the last test of their group (two_workers.py): an engine that is kept until the session ends
holds two GiB of memory while the engines of other groups run."""

import pytest
from two_workers import group

# Their scope is the session, since files share them. A later test that asks for one gets a new one.
OF_A_GROUP = ("engine", "tight_engine")
_made = {}


def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    if fixturedef.argname in OF_A_GROUP and fixturedef.scope == "session":
        _made[fixturedef.argname] = fixturedef, request


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None):
    done = yield
    if nextitem is None or group(nextitem.nodeid) != group(item.nodeid):
        while _made:
            _, (fixturedef, request) = _made.popitem()
            fixturedef.finish(request)
    return done
