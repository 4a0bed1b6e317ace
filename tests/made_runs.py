"""Run directories written by the real writers, with rows, guided steps and relevance that tests make up."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from agd_vllm.output.relevance_writer import RelevanceWriter, TokenRelevance
from agd_vllm.output.summary import count_outputs, open_run, write_summary
from agd_vllm.output.writer import RunWriter
from agd_vllm.records import DecodedRow, GuidedStep, Span


def made_row(
    tokenizer: PreTrainedTokenizerFast, id: str, prompt: str, answer: str, guided: Iterable[int] = (), metadata="null"
) -> DecodedRow:
    """A row whose answer is `answer`; every second one of its guided steps changed the token."""
    draw = random.Random(id)
    prompt_ids, token_ids = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
    steps = []
    for number, step in enumerate(guided):
        taken = token_ids[step]
        others = [token for token in (500 + number, 600 + number, 28) if token != taken]
        candidates = [others[0], taken, *others[1:]] if number % 2 == 0 else [taken, *others]
        probabilities = sorted((draw.random() / 2 for _ in candidates), reverse=True)
        scores = [draw.uniform(-3, 3) for _ in candidates]
        steps.append(
            GuidedStep(step, draw.uniform(1.8, 6), candidates, probabilities, scores, taken, candidates[0]),
        )
    spans = (Span(1, 4, 1.0), Span(5, 6, -0.5))
    return DecodedRow(id, answer, token_ids, prompt_ids, spans, "length", steps, metadata)


def write_run(directory: Path, rows: Iterable[DecodedRow], model: str, **parameters) -> Path:
    """A finished run of these rows, as `agd-vllm decode` leaves it."""
    identity = {"inputs": ["rows.jsonl"], "model": model, "strategy": "agd", "tau": 1.734, "rule": "attnlrp"}
    identity |= {"dtype": "float32", "attribution_dtype": None, "engine_args": {}, **parameters}
    open_run(str(directory), identity, resume=True)
    with RunWriter(str(directory), part_rows=200) as writer:
        for row in rows:
            writer.add(row)
    measured = {"seconds": 2.0, "load_seconds": 1.0, "tokens_per_second": 12.5, "faults": {}}
    write_summary(str(directory), {**count_outputs(str(directory)), **measured, **identity, "versions": {"ray": "2"}})
    return directory


def write_relevance(directory: Path, row: DecodedRow, step: int) -> None:
    """Made up relevance of a guided step's chosen and greedy token."""
    found = next(guided for guided in row.steps if guided.step == step)
    draw = np.random.default_rng(step)
    context = len(row.prompt_token_ids) + step
    relevances = [
        TokenRelevance(step, token, 1.5, draw.normal(size=context).astype(np.float32))
        for token in dict.fromkeys((found.chosen_id, found.greedy_id))
    ]
    with RelevanceWriter(str(directory)) as writer:
        writer.add(row.id, relevances)


def decoded(id, metadata="null"):
    """A row as the decoder would hand it over, a function of its id."""
    length = sum(id.encode()) % 5
    steps = [GuidedStep(i, 2.5, [i, i + 1], [0.5, 0.25], [0.1, -0.2], i + i % 2, i) for i in range(length)]
    return DecodedRow(id, f"ü{id}", list(range(length)), [1, 2, 3], (Span(0, 2, -0.5),), "length", steps, metadata)
