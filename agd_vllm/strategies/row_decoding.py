"""A row on its way through a strategy; a session that stalls is opened anew from the tokens so far."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from agd_vllm.attribution.pool import AttributionPool
from agd_vllm.engine.channel import ReportsLost
from agd_vllm.engine.engine import Engine
from agd_vllm.engine.events import SessionFailed, SessionStalled
from agd_vllm.engine.stops import StopCheck
from agd_vllm.faults import FaultLog
from agd_vllm.records import GuidedStep, PreparedRow

# A row that stalls again and again is given up.
SESSIONS_PER_ROW = 3


@dataclass(slots=True)
class RowDecoding:
    """A row on its way: what a strategy works with, and what it adds tokens, guided steps and entropies to."""

    engine: Engine
    pool: AttributionPool | None
    row: PreparedRow
    stops: StopCheck
    faults: FaultLog
    seed: int = 0
    steps: list[GuidedStep] = field(default_factory=list)
    entropies: list[float] | None = None

    async def in_sessions(self, run: Callable[[], Awaitable[str]]) -> str:
        """Awaits `run`, which opens the row's session and decodes to its end, again after each stall."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await run()
            except SessionStalled:
                self.faults.record("sessions_resubmitted", row=self.row.id, step=len(self.stops.token_ids))
                if attempt == SESSIONS_PER_ROW:
                    raise

    async def with_all_reports(self, run: Callable[[], Awaitable[str]]) -> str:
        """Awaits `run`, which decodes the row to its end, again from the prompt where reports of it were lost."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await run()
            except ReportsLost as lost:
                self.faults.record("reports_lost", row=self.row.id, reason=str(lost))
                if attempt == SESSIONS_PER_ROW:
                    raise SessionFailed(str(lost)) from lost
                self.stops.restart()
