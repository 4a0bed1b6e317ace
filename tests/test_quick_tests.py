"""`--quick` leaves out what is long, and fails what starts an engine or takes long."""

import subprocess
import sys

from conftest import CHECKOUT

TESTS = """
import agd_starts, pytest, time

def test_quick():
    pass

def test_starts():
    agd_starts.note("vLLM")

def test_takes_long():
    until = time.process_time() + 6
    while time.process_time() < until:
        pass

@pytest.fixture
def made():
    agd_starts.note("Ray")

def test_needs_what_starts(made):
    pass

@pytest.mark.long
def test_long():
    pass
"""


def test_what_is_not_quick_fails(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = long: minutes")
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT / "tests"))
    for name in ("AGD_STARTS_FILE", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "counted_starts", "-p", "quick_tests", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "PASSED test_some.py::test_quick\n" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_some.py::test_starts - Failed: a quick test starts vLLM" in done.stdout
    assert "FAILED test_some.py::test_takes_long - Failed: a quick test takes 6." in done.stdout
    assert "ERROR test_some.py::test_needs_what_starts - Failed: a quick test starts Ray" in done.stdout
    assert "2 failed, 1 passed, 1 deselected, 1 error" in done.stdout
