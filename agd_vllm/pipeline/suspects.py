"""Rows that were in flight when an engine died: the one that kills engines is found by halving."""

from __future__ import annotations

from collections import Counter, deque

from agd_vllm.records import PreparedRow

# A row that was alone in an engine when it died, this many times, killed it.
POISON_DEATHS = 2


class Suspects:
    """Groups of rows to decode again, each group alone in an engine.

    A group in which no engine dies is done with, one in which an engine dies is halved, and a single row in which
    engines die POISON_DEATHS times is poison. So one death costs two groups, and a poison row among n about log2(n)
    deaths; the innocent ones among them are decoded side by side all the while, and between the deaths: where engines
    die in every group it is not the rows.
    """

    def __init__(self) -> None:
        self._groups: deque[list[PreparedRow]] = deque()
        self._alone_deaths: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._groups)

    def take(self) -> list[PreparedRow]:
        """The next group: a row alone at once, halves of the latest death after the half that they were parted from."""
        return self._groups.popleft()

    def add(self, rows: list[PreparedRow]) -> PreparedRow | None:
        """An engine died with `rows` in flight. Returns the poison row, if it is found by now: that one is not kept."""
        if len(rows) == 1 and self._is_poison(rows[0]):
            return rows[0]
        if len(rows) == 1:
            self._groups.appendleft(rows)
        else:
            half = (len(rows) + 1) // 2
            self._groups.extend(group for group in (rows[:half], rows[half:]) if group)
        return None

    def _is_poison(self, row: PreparedRow) -> bool:
        self._alone_deaths[row.id] += 1
        return self._alone_deaths[row.id] >= POISON_DEATHS

    def clear(self) -> None:
        self._groups.clear()
        self._alone_deaths.clear()
