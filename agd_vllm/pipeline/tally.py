"""Seconds and faults of a run over all its invocations: the part of `summary.json` that no output file tells."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from agd_vllm.output.storage import OutputDirectory
from agd_vllm.pipeline.decoder import Decoder
from agd_vllm.pipeline.progress import ProgressLine

TIMES = "times.json"
KEEP_SECONDS = 10.0


class Tally:
    """Starts from what earlier invocations kept in `times.json`, and keeps it up to date for those that may follow.

    An invocation that is killed outright loses its last KEEP_SECONDS at most.
    Raises OutputFailed, from every method, where the storage fails.
    """

    def __init__(self, directory: str, decoder: Decoder, progress: ProgressLine):
        self._output = OutputDirectory(directory)
        self._decoder = decoder
        self._progress = progress
        self._earlier: dict[str, Any] = {"seconds": 0.0, "load_seconds": 0.0, "faults": {}}
        self._kept = time.monotonic()
        if TIMES in self._output.names():
            self._earlier = self._output.read_json(TIMES)

    def total(self) -> dict[str, Any]:
        """`seconds` of decoding, `load_seconds` and `faults` (counts by kind)."""
        earlier, decoder = self._earlier, self._decoder
        return {
            "seconds": earlier["seconds"] + self._progress.seconds,
            "load_seconds": earlier["load_seconds"] + decoder.load_seconds,
            "faults": dict(Counter(earlier["faults"]) + Counter(decoder.faults)),
        }

    def keep(self) -> None:
        self._output.write_json(TIMES, self.total())
        self._kept = time.monotonic()

    def keep_if_due(self) -> None:
        if time.monotonic() - self._kept >= KEEP_SECONDS:
            self.keep()
