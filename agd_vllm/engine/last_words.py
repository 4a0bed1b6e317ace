"""What vLLM's engine died of: it writes that to its own process's log, and tells its client only that it is dead."""

from __future__ import annotations

import logging
import os

from agd_vllm.engine.channel import SOCKET_VARIABLE, GateSender
from agd_vllm.faults import reason


class _LastWords(logging.Handler):
    def __init__(self, sender: GateSender):
        super().__init__(logging.ERROR)
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self._sender.send_failure(reason(record.exc_info[1]))


def report_failures() -> None:
    """Called in the process that loads and samples: errors that vLLM logs with their exception go to the actor, too, if
    one listens."""
    path = os.environ.get(SOCKET_VARIABLE)
    if path:
        logging.getLogger("vllm").addHandler(_LastWords(GateSender(path)))
