"""An engine that tests share ends with the last of its group."""

import os
import subprocess
import sys

from conftest import CHECKOUT

FIXTURE = """
import pytest

@pytest.fixture(scope="session")
def engine():
    print("<started>")
    yield
    print("<ended>")
"""


def test_an_engine_ends_with_its_group_and_a_later_test_has_a_new_one(tmp_path):
    (tmp_path / "conftest.py").write_text(FIXTURE)
    # Of files that no group names each is a group.
    (tmp_path / "test_a.py").write_text("def test_1(engine): print('<a1>')\ndef test_2(): print('<a2>')")
    (tmp_path / "test_b.py").write_text("def test_1(): print('<b1>')\ndef test_2(engine): print('<b2>')")
    command = [sys.executable, "-m", "pytest", "-sq", "-p", "two_workers", "-p", "group_fixtures", "."]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT / "tests")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout
    events = [part.partition(">")[0] for part in done.stdout.split("<")[1:]]
    assert events == ["started", "a1", "a2", "ended", "b1", "started", "b2", "ended"]
