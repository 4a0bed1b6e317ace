"""What goes wrong and is mended while a run goes on: counted for `summary.json`, one event each for `--log-json`."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from agd_vllm.low_memory import killed_for_memory

_ANSI_CODE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# How a traceback begins its last line.
_OWN_CLASS = re.compile(r"^agd_vllm(\.\w+)+: ")
_CLASS_PATH = re.compile(r"^(?:\w+\.)+(\w+: )")
MAX_REASON = 500

log = logging.getLogger("agd_vllm")


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` as `summary.json` counts it, `time` in seconds since the epoch, `detail` in JSON's types."""

    kind: str
    time: float
    detail: dict[str, Any]


class FaultLog:
    """Collects faults where they happen; actors hand theirs over with `drain`, the driver takes them with `absorb`.

    With `path` every fault is a line of JSON there, written at once (appended: a resumed run goes on).
    Raises ValueError where `path` cannot be written.
    """

    def __init__(self, path: str | None = None):
        self.counts: Counter[str] = Counter()
        self._fresh: list[Fault] = []
        self._file = None
        self._warned = False
        if path is not None:
            try:
                self._file = open(path, "a", buffering=1)  # noqa: SIM115 (lives as long as the run)
            except OSError as error:
                raise ValueError(f"--log-json {path}: {error.strerror}") from error

    def record(self, kind: str, **detail: Any) -> None:
        self.absorb([Fault(kind, time.time(), detail)])

    def absorb(self, faults: list[Fault]) -> None:
        for fault in faults:
            self.counts[fault.kind] += 1
            self._write(fault)
        if self._file is None:
            self._fresh += faults

    def _write(self, fault: Fault) -> None:
        """A log that cannot be written is no reason to stop: the faults are counted all the same."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(asdict(fault)) + "\n")
        except OSError as error:
            if not self._warned:
                log.warning("--log-json: %s; faults are only counted from here on", error.strerror)
            self._warned = True

    def drain(self) -> list[Fault]:
        """The faults since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh


def last_line(error: BaseException) -> str:
    """The last line of an error, which may hold a remote traceback, in colours; classes without their modules, and
    errors of our own without their class. A process that Ray killed for its memory has a line of ours instead."""
    if killed := killed_for_memory(str(error)):
        return killed
    lines = [line.strip() for line in _ANSI_CODE.sub("", str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return _CLASS_PATH.sub(r"\1", _OWN_CLASS.sub("", lines[-1]))


def reason(error: BaseException) -> str:
    """What an error of others says, in one line: its class and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:MAX_REASON]}" if lines else type(error).__name__
