"""Counts the starts of vLLM and Ray, in child processes too (starts/agd_starts.py), prints which tests made them, and
fails a session that makes more than `--most-starts`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("starts")
# Tests have engines in their own process, too.
sys.path.append(str(FOLDER))

from agd_starts import FILE  # noqa: E402

SHOWN = 10


class Starts:
    """Of this process's tests: by what was started, and by test."""

    def __init__(self) -> None:
        self._file = Path(tempfile.mkdtemp(prefix="starts")) / "starts.txt"
        self._file.touch()
        self.kinds: Counter[str] = Counter()
        self.tests: Counter[str] = Counter()
        folders = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ |= {
            FILE: str(self._file),
            "PYTHONPATH": os.pathsep.join(folders),
            "RAY_RUNTIME_ENV_HOOK": "agd_starts.ray_init",
            "RAY_START_HOOK": "agd_starts.ray_start",
        }

    def all(self) -> list[str]:
        return self._file.read_text().split()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = len(self.all())
        done = yield
        added = self.all()[before:]
        self.kinds.update(added)
        if added:
            self.tests[item.nodeid] += len(added)
        return done

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # Of a worker of pytest-xdist, to the session that shares the tests out.
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["starts"] = (dict(self.kinds), dict(self.tests))


class Report:
    """Of the whole session, at its end."""

    def __init__(self, own: Starts | None, most: int | None) -> None:
        self._own, self._most = own, most
        self._kinds: Counter[str] = Counter()
        self._tests: Counter[str] = Counter()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        kinds, tests = getattr(node, "workeroutput", {}).get("starts", ({}, {}))
        self._kinds.update(kinds)
        self._tests.update(tests)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._own is not None:
            self._kinds, self._tests = self._own.kinds, self._own.tests
        if self._too_many() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _too_many(self) -> bool:
        return self._most is not None and self._kinds.total() > self._most

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if not self._kinds:
            return
        terminalreporter.section("starts")
        counts = ", ".join(f"{self._kinds[kind]} of {kind}" for kind in sorted(self._kinds))
        terminalreporter.line(f"{self._kinds.total()} starts: {counts}; most of them by")
        for test, count in self._tests.most_common(SHOWN):
            terminalreporter.line(f"{count:3d} {test}")
        if self._too_many():
            terminalreporter.line(f"FAILED: more than the {self._most} starts of --most-starts", red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--most-starts", type=int, help="fail where tests start vLLM and Ray more often")


def pytest_configure(config: pytest.Config) -> None:
    worker = hasattr(config, "workerinput")
    shares_out = bool(config.getoption("numprocesses", None))
    own = None if shares_out else Starts()
    if own is not None:
        config.pluginmanager.register(own, "own starts")
    if not worker:
        config.pluginmanager.register(Report(own, config.getoption("--most-starts")), "starts of all")
