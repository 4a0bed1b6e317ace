"""A seeded random choice among candidates, in the place of attribution."""

from __future__ import annotations

import random
from dataclasses import dataclass

from agd_vllm.records import Gate, Roi


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
        """Nothing is held."""
