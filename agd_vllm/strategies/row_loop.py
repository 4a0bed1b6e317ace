"""One row from prompt to result, whatever the strategy."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from agd_vllm.attribution.pool import AttributionPool
from agd_vllm.engine.engine import Engine
from agd_vllm.engine.stops import StopCheck
from agd_vllm.faults import FaultLog
from agd_vllm.records import DecodedRow, PreparedRow
from agd_vllm.strategies.row_decoding import RowDecoding
from agd_vllm.strategies.strategy import Strategy


async def decode_row(
    engine: Engine,
    pool: AttributionPool | None,
    row: PreparedRow,
    tokenizer: PreTrainedTokenizerFast,
    eos_ids: frozenset[int],
    faults: FaultLog,
    strategy: Strategy,
    seed: int = 0,
) -> DecodedRow:
    """Decodes `row`; `pool` scores candidates where the strategy has attribution workers, `seed` is that of random
    choices.

    Raises RowRefused (too large), SessionFailed, WorkerLost or RequestKillsWorker.
    """
    decoding = RowDecoding(engine, pool, row, StopCheck(row, eos_ids, tokenizer), faults, seed)
    reason = await strategy.decode(decoding)
    return DecodedRow(
        id=row.id,
        text=decoding.stops.text(),
        token_ids=decoding.stops.token_ids,
        prompt_token_ids=row.prompt_token_ids,
        roi_spans=row.roi.spans,
        finish_reason=reason,
        steps=decoding.steps,
        entropies=decoding.entropies,
    )
