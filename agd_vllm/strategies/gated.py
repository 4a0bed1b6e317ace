"""Strategies with AGD's gate: a choice among candidates where the next token is uncertain (arXiv 2509.26307)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from agd_vllm.engine.channel import MAX_TOP_K
from agd_vllm.engine.events import Finished
from agd_vllm.engine.settings import GateSettings
from agd_vllm.records import Gate, GuidedStep, Roi
from agd_vllm.strategies.greedy import decode_greedily
from agd_vllm.strategies.strategy import Strategy, option

if TYPE_CHECKING:
    from agd_vllm.strategies.row_decoding import RowDecoding


class CandidateScorer(Protocol):
    """What scores the candidates of a gate; an AttributionPool is one."""

    async def score(self, sequence: str, token_ids: list[int], roi: Roi, gate: Gate) -> list[float]: ...

    def prefill(self, sequence: str, token_ids: list[int], roi: Roi) -> None: ...

    def release(self, sequence: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Gated(Strategy):
    """At gated steps the candidate of the highest score, elsewhere the greedy token (arXiv 2509.26307, algorithm 1).

    Rows without a region are decoded greedily.
    """

    tau: float = option(1.734, "Gate threshold in nats; 0 guides every step.")
    top_k: int = option(5, "Size of the candidate set.")
    min_prob: float = option(0.05, "Candidate floor pi_min.")
    roi_heads: str | None = option(
        None,
        'Attention heads as region of every row: JSON {"heads": [[layer, head], ...]}; alone or with token spans.',
        metavar="FILE",
    )

    def checks(self) -> Iterator[tuple[bool, str]]:
        yield from super().checks()
        yield self.tau >= 0, f"tau {self.tau}: must be 0 or more (nats)"
        yield 2 <= self.top_k <= MAX_TOP_K, f"top_k {self.top_k}: a choice is among 2 to {MAX_TOP_K} candidates"
        yield 0 <= self.min_prob <= 1, f"min_prob {self.min_prob}: must lie between 0 and 1"

    @property
    def heads(self) -> str | None:
        return self.roi_heads

    @property
    def gate(self) -> GateSettings:
        return GateSettings(self.tau, self.top_k, self.min_prob)

    @abstractmethod
    def scorer_of(self, decoding: RowDecoding) -> CandidateScorer | None:
        """Who scores the row's candidates; None for nobody: the row is then decoded greedily."""

    async def decode(self, decoding: RowDecoding) -> str:
        scorer, row = self.scorer_of(decoding), decoding.row
        if scorer is None or not row.roi:
            return await decode_greedily(decoding)
        try:
            return await decoding.in_sessions(lambda: self._session(decoding, scorer))
        finally:
            scorer.release(row.id)

    async def _session(self, decoding: RowDecoding, scorer: CandidateScorer) -> str:
        row, stops = decoding.row, decoding.stops
        async with decoding.engine.session(row, stops, self.gate) as session:
            scorer.prefill(row.id, row.prompt_token_ids, row.roi)
            event = await session.next()
            while not isinstance(event, Finished):
                with decoding.engine.occupancy.pause():
                    scored = await scorer.score(row.id, row.prompt_token_ids + stops.token_ids, row.roi, event)
                step = GuidedStep.of(event, scored)
                record_nan(decoding, step)
                decoding.steps.append(step)
                event = session.select(step.chosen_id) or await session.next()
            return event.reason


def record_nan(decoding: RowDecoding, step: GuidedStep) -> None:
    """A fault for a step whose scores are not all numbers."""
    if any(map(math.isnan, step.scores)):
        decoding.faults.record("nan_scores", row=decoding.row.id, step=step.step)
