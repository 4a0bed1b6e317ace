"""What a run directory holds of the rows that are evaluated: answers, tokens and guided steps."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from agd_vllm.output.run_reader import RunReader
from agd_vllm.records import DecodedRow


@dataclass(frozen=True, slots=True)
class Step:
    """A guided step: its number, whether the choice was another than the greedy token, and that token's score."""

    step: int
    changed: bool
    greedy_score: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One decoded row."""

    id: str
    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    metadata: dict[str, Any]
    steps: list[Step] = field(default_factory=list)


def read_outcomes(directory: str, ids: Collection[str]) -> dict[str, Outcome]:
    """The decoded rows among `ids`, by id; a run may hold more, decoded under a larger limit.

    Raises OutputFailed where a part cannot be read.
    """
    return {row.id: _outcome(row) for row in RunReader(directory).rows(ids)}


def _outcome(row: DecodedRow) -> Outcome:
    steps = [Step(step.step, step.changed, step.scores[step.candidate_ids.index(step.greedy_id)]) for step in row.steps]
    return Outcome(row.id, row.text, row.prompt_token_ids, row.token_ids, json.loads(row.metadata), steps)
