"""Scores of a run's steps by inline attribution, for benchmarks.faithfulness: a job on standard input, its scores as
the last line of output."""

from __future__ import annotations

import json
import sys

from agd_vllm.records import Roi, Span
from tests.inline.inline_model import InlineModel

# Prompts go in so many tokens at a time, steps one after another.
CHUNK = 512
# Rows that grow side by side.
ROWS = 16


def main() -> None:
    job = json.load(sys.stdin)
    model = InlineModel(job["model"], job["rule"], job["dtype"])
    rows: dict[str, list[int]] = {}
    for number, (row, *_) in enumerate(job["steps"]):
        rows.setdefault(row, []).append(number)
    scores: list[list[float]] = [[] for _ in job["steps"]]
    names = list(rows)
    for first in range(0, len(names), ROWS):
        together = [rows[name] for name in names[first : first + ROWS]]
        sequences, candidates = [], []
        for numbers in together:
            steps = [job["steps"][number] for number in numbers]
            _, tokens, spans, _ = max(steps, key=lambda step: len(step[1]))
            sequences.append((tokens, Roi(tuple(Span(*span) for span in spans))))
            candidates.append({len(tokens): ids for _, tokens, _, ids in steps})
        for numbers, found in zip(together, model.scores(sequences, candidates, CHUNK), strict=True):
            for number in numbers:
                scores[number] = found[len(job["steps"][number][1])]
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
