"""A session counts the starts of its tests, in child processes too, and fails above a number."""

import os
import subprocess
import sys

import pytest
from conftest import CHECKOUT

# A process in which Ray starts twice.
TESTS = """
import subprocess, sys
def test_two():
    twice = "import agd_starts; agd_starts.ray_start(None, True); agd_starts.ray_init(None)"
    subprocess.run([sys.executable, "-c", twice], check=True)
def test_none():
    pass
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_starts_are_counted_and_too_many_fail(tmp_path, workers):
    (tmp_path / "test_starts.py").write_text(TESTS)
    # Not those of this session.
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "AGD_STARTS_FILE")}
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(CHECKOUT / "tests")
    for most, code in ((2, 0), (1, 1)):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "counted_starts", *workers, "--most-starts", f"{most}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        assert "2 starts: 2 of Ray" in done.stdout
        assert "2 test_starts.py::test_two" in done.stdout and "test_none" not in done.stdout
        assert ("more than the 1 starts" in done.stdout) == (code == 1)
