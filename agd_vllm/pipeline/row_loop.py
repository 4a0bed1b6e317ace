"""Attribution-guided decoding of one row (arXiv 2509.26307, algorithm 1): pause, score, select, resume."""

from __future__ import annotations

import math
from collections import Counter

from transformers import PreTrainedTokenizerFast

from agd_vllm.attribution.pool import AttributionPool
from agd_vllm.engine.engine import Engine
from agd_vllm.engine.events import Finished, SessionStalled
from agd_vllm.engine.stops import StopCheck
from agd_vllm.records import DecodedRow, Gate, GuidedStep, PreparedRow

# A session that stalls is opened anew, from the tokens so far; a row that stalls again and again is given up.
SESSIONS_PER_ROW = 3


async def decode_row(
    engine: Engine,
    pool: AttributionPool | None,
    row: PreparedRow,
    tokenizer: PreTrainedTokenizerFast,
    eos_ids: frozenset[int],
    faults: Counter[str],
) -> DecodedRow:
    """Decodes `row`; gated only if there are workers and the row has a region.

    Raises RowRefused (too large), SessionFailed or WorkerLost.
    """
    gated = pool is not None and bool(row.roi)
    stops = StopCheck(row, eos_ids, tokenizer)
    steps: list[GuidedStep] = []
    try:
        for attempt in range(SESSIONS_PER_ROW):
            try:
                async with engine.session(row, gated, stops) as session:
                    event = await session.next()
                    while not isinstance(event, Finished):
                        context = row.prompt_token_ids + stops.token_ids
                        scores = await pool.score(row.id, context, row.roi, event)
                        step = guided_step(event, scores)
                        faults["nan_scores"] += any(map(math.isnan, scores))
                        steps.append(step)
                        event = session.select(step.chosen_id) or await session.next()
                break
            except SessionStalled:
                faults["sessions_resubmitted"] += 1
                if attempt + 1 == SESSIONS_PER_ROW:
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
        finish_reason=event.reason,
        steps=steps,
    )


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
