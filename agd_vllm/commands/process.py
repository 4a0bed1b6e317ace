"""What every command that decodes does to its process: exit statuses, logs, signals."""

from __future__ import annotations

import os
import signal

# Exit statuses of the contract.
ROWS_FAILED, UNUSABLE, OTHER = 3, 2, 1


def quiet_unless(debug: bool) -> None:
    """Keeps vLLM's log to errors; to be called before anything imports vLLM."""
    if not debug:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def end_as_interrupt() -> None:
    """A scheduler's "terminate" and a lost terminal end a run as Ctrl-C does: what is decoded is written first."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as `nohup` asks for
            signal.signal(ending, signal.default_int_handler)
