"""What a run directory holds of the rows that are evaluated: answers, tokens and guided steps."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from agd_vllm.output.storage import OutputDirectory
from agd_vllm.output.summary import SUMMARY


@dataclass(frozen=True, slots=True)
class Step:
    """A guided step: whether the choice was another than the greedy token, and that token's score."""

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
    output = OutputDirectory(directory)
    results, steps = output.parts("results"), output.parts("steps")
    taken: defaultdict[str, list[Step]] = defaultdict(list)
    # Steps without results of the same number are of a run that died before their rows were written.
    for number in sorted(steps.keys() & results.keys()):
        for row in _rows(output, steps[number], ["id", "candidate_ids", "scores", "chosen_id", "greedy_id"]):
            score = row["scores"][row["candidate_ids"].index(row["greedy_id"])]
            taken[row["id"]].append(Step(row["chosen_id"] != row["greedy_id"], score))
    found = {}
    for name in results.values():
        for row in _rows(output, name, ["id", "text", "prompt_token_ids", "token_ids", "metadata"]):
            if row["id"] in ids:
                row["metadata"] = json.loads(row["metadata"])
                found[row["id"]] = Outcome(**row, steps=taken[row["id"]])
    return found


def read_summary(directory: str) -> dict[str, Any]:
    output = OutputDirectory(directory)
    with output.open(SUMMARY) as file, output.faults(SUMMARY):
        return json.load(file)


def _rows(output: OutputDirectory, name: str, columns: list[str]) -> list[dict[str, Any]]:
    with output.open(name) as file, output.faults(name):
        return pq.read_table(file, columns=columns).to_pylist()
