"""Deaths of engines: when there is no hope any more, and which rows are to blame."""

from __future__ import annotations

from agd_vllm.records import RowError

MAX_RESTARTS_IN_A_ROW = 5
# So many poison rows with none decoded in between, or so many deaths before the first row: it is not the rows.
MAX_POISON_IN_A_ROW, MAX_DEATHS_AT_FIRST = 10, 5
KEPT = "what was decoded is kept, and the same command resumes from there"


class Deaths:
    """Raises RuntimeError where engines die MAX_RESTARTS_IN_A_ROW times with nothing gained in between (no row decoded,
    no poison row found, no rows cleared of suspicion), MAX_DEATHS_AT_FIRST times before they have decoded any row, or
    in each of MAX_POISON_IN_A_ROW rows.

    A poison row is told of once another row has been decoded, or at the end: until then the engine may be to blame.
    """

    def __init__(self) -> None:
        self._any_row = False
        self.forget()

    def forget(self) -> None:
        """The next decode() begins."""
        self._in_a_row = self._at_first = 0
        self._poison: list[RowError] = []

    def row_ended(self) -> None:
        self._in_a_row, self._any_row = 0, True

    def clear(self) -> list[RowError]:
        """The poison rows found, which are to blame."""
        poison, self._poison = self._poison, []
        return poison

    def add(self, reason: str, rows: int, poison: RowError | None) -> None:
        """An engine died of `reason` with so many `rows` in flight, one of which may have turned out to be `poison`."""
        # Suspects that were halved are a gain, too: that comes to an end.
        self._in_a_row = 0 if poison or rows > 1 else self._in_a_row + 1
        self._at_first += not self._any_row
        if poison:
            self._poison.append(poison)
        if self._in_a_row > MAX_RESTARTS_IN_A_ROW:
            what = f"the engine died {self._in_a_row} times in a row"
        elif self._at_first >= MAX_DEATHS_AT_FIRST:
            what = f"{self._at_first} engines died before a row was decoded"
        elif len(self._poison) >= MAX_POISON_IN_A_ROW:
            what = f"the engine died in each of {len(self._poison)} rows in a row"
        else:
            return
        raise RuntimeError(f"{what}, the last time: {reason}; {KEPT}")
