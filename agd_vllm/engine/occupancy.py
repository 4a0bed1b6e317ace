"""What an engine has to do: how long it had rows but nothing to run, and how long it has been silent with something."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Occupancy:
    """Counts open and paused sessions; `idle_seconds` grows while all the open ones are paused."""

    def __init__(self):
        self._open = self._paused = 0
        self._idle_since: float | None = None
        self._idle_seconds = 0.0
        self._last_sign = time.perf_counter()

    def sign_of_life(self) -> None:
        """The engine has given a token."""
        self._last_sign = time.perf_counter()

    @property
    def silent_seconds(self) -> float:
        """Since the last token, or since a session was opened or went on; 0 while none of them could give one."""
        return time.perf_counter() - self._last_sign if self._open > self._paused else 0.0

    @contextmanager
    def session(self) -> Iterator[None]:
        self._change(opened=1)
        try:
            yield
        finally:
            self._change(opened=-1)

    @contextmanager
    def pause(self) -> Iterator[None]:
        self._change(paused=1)
        try:
            yield
        finally:
            self._change(paused=-1)

    @property
    def paused(self) -> int:
        """Sessions that wait for scores now."""
        return self._paused

    @property
    def idle_seconds(self) -> float:
        running = 0.0 if self._idle_since is None else time.perf_counter() - self._idle_since
        return self._idle_seconds + running

    def _change(self, opened: int = 0, paused: int = 0) -> None:
        self.sign_of_life()
        self._open += opened
        self._paused += paused
        idle = self._open > 0 and self._open == self._paused
        if idle and self._idle_since is None:
            self._idle_since = time.perf_counter()
        elif not idle and self._idle_since is not None:
            self._idle_seconds = self.idle_seconds
            self._idle_since = None
