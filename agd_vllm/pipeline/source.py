"""The way in: parsed rows are prepared as engines have room, refused ones set aside, those in flight remembered."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable

from agd_vllm.pipeline.replica import RowFailed
from agd_vllm.prompts.prepare import Preparer
from agd_vllm.records import DecodedRow, InputRow, PreparedRow, RowError, RowRefused

# An input may be slow, or wait for its own source: after this many seconds what has come is enough.
TAKE_S = 0.1


class Source:
    """Parsed rows on their way to the engines: prepares them, remembers those in flight by id, sets errors aside."""

    def __init__(self, items: Iterable[InputRow | RowError], preparer: Preparer):
        self._items = iter(items)
        self._preparer = preparer
        self._in_flight: dict[str, InputRow] = {}
        self._refused: list[RowError] = []
        self.exhausted = False

    def take(self, count: int) -> list[PreparedRow]:
        """Up to `count` rows; fewer where the items end or come slowly, or after as many refused ones."""
        rows: list[PreparedRow] = []
        begun = time.monotonic()
        while (taken := len(rows) + len(self._refused)) < count:
            if taken and time.monotonic() - begun > TAKE_S:
                break
            item = next(self._items, None)
            if item is None:
                self.exhausted = True
                break
            if isinstance(item, RowError):
                self._refused.append(item)
                continue
            try:
                rows.append(self._preparer.prepare(item))
            except RowRefused as refused:
                self._refused.append(RowError.of(item, refused.type, str(refused)))
            else:
                self._in_flight[item.id] = item
        return rows

    def refused(self) -> list[RowError]:
        refused, self._refused = self._refused, []
        return refused

    def outcome(self, ended: DecodedRow | RowFailed) -> DecodedRow | RowError:
        row = self._in_flight.pop(ended.id)
        if isinstance(ended, RowFailed):
            return RowError.of(row, ended.type, ended.message)
        return dataclasses.replace(ended, metadata=row.metadata)
