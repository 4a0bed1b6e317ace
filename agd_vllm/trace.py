"""A timeline of a run, in Chrome's trace format: open it in chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """`track` is a line of the timeline, `begun` is in seconds since the epoch."""

    track: str
    name: str
    begun: float
    seconds: float
    args: dict[str, Any] = field(default_factory=dict)


class Tracer:
    """Collects spans where they happen, in an actor, until the driver fetches them; nothing when not `enabled`."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self._spans: list[Span] = []

    def add(self, track: str, name: str, begun: float, seconds: float, **args: Any) -> None:
        if self.enabled:
            self._spans.append(Span(track, name, begun, seconds, args))

    def drain(self) -> list[Span]:
        """The spans since the last call."""
        spans, self._spans = self._spans, []
        return spans


class TraceFile:
    """Writes spans as they come; a file that was cut off is read all the same, the format needs no closing bracket.

    Raises ValueError where `path` cannot be written.
    """

    def __init__(self, path: str):
        try:
            self._file = open(path, "w", buffering=1 << 16)  # noqa: SIM115 (lives as long as the run)
        except OSError as error:
            raise ValueError(f"--trace {path}: {error.strerror}") from error
        self._tracks: dict[tuple[str, str], int] = {}
        self._processes: dict[str, int] = {}
        self._file.write("[\n")

    def write(self, process: str, spans: Iterable[Span]) -> None:
        """`process` names the group of tracks, such as an engine."""
        for span in spans:
            pid, tid = self._place(process, span.track)
            event = {"name": span.name, "ph": "X", "pid": pid, "tid": tid, "args": span.args}
            self._event(event | {"ts": round(span.begun * 1e6), "dur": round(span.seconds * 1e6)})

    def close(self) -> None:
        self._file.close()

    def _place(self, process: str, track: str) -> tuple[int, int]:
        if process not in self._processes:
            self._processes[process] = len(self._processes) + 1
            self._event({"name": "process_name", "ph": "M", "pid": self._processes[process], "args": {"name": process}})
        pid, key = self._processes[process], (process, track)
        if key not in self._tracks:
            self._tracks[key] = len(self._tracks) + 1
            named = {"name": "thread_name", "ph": "M", "pid": pid, "tid": self._tracks[key], "args": {"name": track}}
            self._event(named)
        return pid, self._tracks[key]

    def _event(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps(event) + ",\n")
