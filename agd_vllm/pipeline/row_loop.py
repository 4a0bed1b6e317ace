"""Attribution-guided decoding of one row (arXiv 2509.26307, algorithm 1): pause, score, select, resume."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from agd_vllm.attribution.pool import AttributionPool
from agd_vllm.engine.engine import Engine
from agd_vllm.engine.events import Finished, SessionStalled
from agd_vllm.engine.stops import StopCheck
from agd_vllm.faults import FaultLog
from agd_vllm.records import DecodedRow, Gate, GuidedStep, PreparedRow

if TYPE_CHECKING:  # it imports vLLM, which the driver does not need
    from agd_vllm.engine.session import Session

# A session that stalls is opened anew, from the tokens so far; a row that stalls again and again is given up.
SESSIONS_PER_ROW = 3


async def decode_row(
    engine: Engine,
    pool: AttributionPool | None,
    row: PreparedRow,
    tokenizer: PreTrainedTokenizerFast,
    eos_ids: frozenset[int],
    faults: FaultLog,
) -> DecodedRow:
    """Decodes `row`; gated only if there are workers and the row has a region.

    Raises RowRefused (too large), SessionFailed, WorkerLost or RequestKillsWorker.
    """
    gated = pool is not None and bool(row.roi)
    stops = StopCheck(row, eos_ids, tokenizer)
    steps: list[GuidedStep] = []
    try:
        for attempt in range(1, SESSIONS_PER_ROW + 1):
            try:
                async with engine.session(row, gated, stops) as session:
                    if gated:
                        pool.prefill(row.id, row.prompt_token_ids, row.roi)
                    reason = await _run_session(session, engine, pool, row, stops, steps, faults)
                break
            except SessionStalled:
                faults.record("sessions_resubmitted", row=row.id, step=len(stops.token_ids))
                if attempt == SESSIONS_PER_ROW:
                    raise
    finally:
        if gated:
            pool.release(row.id)
    return DecodedRow(
        id=row.id,
        text=stops.text(),
        token_ids=stops.token_ids,
        prompt_token_ids=row.prompt_token_ids,
        roi_spans=row.roi.spans,
        finish_reason=reason,
        steps=steps,
    )


async def _run_session(
    session: Session,
    engine: Engine,
    pool: AttributionPool | None,
    row: PreparedRow,
    stops: StopCheck,
    steps: list[GuidedStep],
    faults: FaultLog,
) -> str:
    """Runs a session to the row's end, adding to `stops` and `steps`; returns the finish reason."""
    event = await session.next()
    while not isinstance(event, Finished):
        with engine.occupancy.pause():
            scores = await pool.score(row.id, row.prompt_token_ids + stops.token_ids, row.roi, event)
        step = guided_step(event, scores)
        if any(map(math.isnan, scores)):
            faults.record("nan_scores", row=row.id, step=step.step)
        steps.append(step)
        event = session.select(step.chosen_id) or await session.next()
    return event.reason


def guided_step(gate: Gate, scores: list[float]) -> GuidedStep:
    """The candidate of the highest score, the more probable one among equals; the greedy token where a score is NaN."""
    best = 0 if any(map(math.isnan, scores)) else max(range(len(scores)), key=scores.__getitem__)
    return GuidedStep(
        step=gate.step,
        entropy=gate.entropy,
        candidate_ids=list(gate.candidate_ids),
        candidate_probs=list(gate.candidate_probs),
        scores=scores,
        chosen_id=gate.candidate_ids[best],
        greedy_id=gate.candidate_ids[0],
    )
