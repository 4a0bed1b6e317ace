"""The date that a run's chat template writes: that of its first start, whenever it is resumed."""

from __future__ import annotations

from datetime import datetime

from agd_vllm.output.storage import OutputDirectory

DATE = "date.json"


def stored_date(directory: str) -> datetime | None:
    """Local time, as it was stored there; None where no date is. Raises OutputFailed where it cannot be read."""
    output = OutputDirectory(directory)
    return datetime.fromisoformat(output.read_json(DATE)["date"]) if DATE in output.names() else None


def settle_date(directory: str, now: datetime) -> datetime:
    """The date that is stored in a directory; `now`, which is stored then, where there is none.

    Raises OutputFailed where it can be neither read nor written.
    """
    stored = stored_date(directory)
    if stored is not None:
        return stored
    OutputDirectory(directory).write_json(DATE, {"date": now.isoformat(timespec="seconds")})
    return now.replace(microsecond=0)
