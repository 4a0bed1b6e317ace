"""Engines and attribution workers that outlive a run: loaded once for all runs that they can serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agd_vllm.pipeline.decoder import Decoder


class Engines:
    """Of the run that was last, for the next one. To be closed by leaving its `with`."""

    def __init__(self):
        self._of: Decoder | None = None

    @contextmanager
    def serving(self, decoder: Decoder) -> Iterator[None]:
        """`decoder` with the engines of the run before, where they serve it, else with its own, which are kept."""
        if self._of is None or not decoder.take_over(self._of):
            self.close()
        self._of = decoder
        try:
            decoder.start()
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        before, self._of = self._of, None
        if before is not None:
            before.close()

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
