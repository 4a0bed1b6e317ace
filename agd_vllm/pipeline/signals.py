"""Signals that end a run: the driver heeds the first one, the processes of its own Ray none.

Schedulers, systemd and lost terminals signal every process of a group or a job, `timeout` signals the driver twice.
Ray shields its processes from Ctrl-C in the same way: all are ended by the driver, once it has written what it has.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Beside SIGINT, which Python and Ray heed by themselves.
ENDINGS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def as_interrupt() -> Iterator[None]:
    """The first ending signal raises KeyboardInterrupt as Ctrl-C does, later ones would break off what that began."""
    before = {ending: signal.getsignal(ending) for ending in ENDINGS}

    def interrupt(number: int, frame: Any) -> None:
        for ending in ENDINGS:
            signal.signal(ending, signal.SIG_IGN)
        signal.default_int_handler(number, frame)

    for ending, handler in before.items():
        if handler != signal.SIG_IGN:  # as `nohup` asks for
            signal.signal(ending, interrupt)
    try:
        yield
    finally:
        for ending, handler in before.items():
            signal.signal(ending, handler)


@contextmanager
def not_for_children() -> Iterator[None]:
    """Processes begun inside, and all that these begin, never hear of an ending signal; the caller does afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heard_by_children() -> None:
    """In a process that was begun so: those that the calling thread begins from now on hear ending signals."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
