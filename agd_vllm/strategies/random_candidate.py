"""AGD's control: the same gate and candidates, a seeded random choice among them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agd_vllm.records import Gate, Roi
from agd_vllm.strategies.gated import CandidateScorer, Gated

if TYPE_CHECKING:
    from agd_vllm.strategies.row_decoding import RowDecoding


@dataclass(frozen=True, kw_only=True)
class RandomCandidate(Gated):
    """A random candidate at gated steps, elsewhere the greedy token."""

    name = "random-candidate"
    summary = "a control for agd: the same uncertain steps and candidates, chosen at random (--seed)"

    def scorer_of(self, decoding: RowDecoding) -> CandidateScorer | None:
        return Draws(decoding.seed)


@dataclass(frozen=True, slots=True)
class Draws:
    """Uniform draws from [0, 1) as scores, so that every candidate is as likely as any other.

    They depend on seed, row and step only: the same on any engine and after a resume.
    """

    seed: int

    async def score(self, sequence: str, token_ids: list[int], roi: Roi, gate: Gate) -> list[float]:
        # Random hashes a text whole (SHA-512), the same in every process.
        draw = random.Random(f"{self.seed} {gate.step} {sequence}")
        return [draw.random() for _ in gate.candidate_ids]

    def prefill(self, sequence: str, token_ids: list[int], roi: Roi) -> None:
        """Nothing to prepare."""

    def release(self, sequence: str) -> None:
        """Nothing to release."""
