"""Is forward mode the same attribution? Real gated steps of a finished run, scored again by reverse mode and by it.

    python -m benchmarks.faithfulness RUN_DIR --model M --json OUT.json

RUN_DIR is written by `agd-vllm decode`: its prompts, regions, outputs and candidates are taken as they are. Each step
is scored by lxt in float32 (the oracle), by forward mode in float32 and in bfloat16, sequences growing from step to
step as in a run. Errors are relative to the largest |score| of their step.

Conservation, the sum of relevance over all tokens against the logit that it explains, and the first token's share of
relevance are measured too: on real steps for the model of the run, on random tokens for tiny random models of every
architecture.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
from transformers.utils import logging

from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.attribution.reference import ReferenceScorer, Relevance
from agd_vllm.attribution.scorer import RULES, Scorer
from agd_vllm.records import Roi, ScoreRequest, Span
from benchmarks.machine import write_result
from tests.attribution import tiny


@dataclass(frozen=True, slots=True)
class Step:
    """One gated step of the run: the tokens before it, the row's region, the candidates and the one chosen."""

    row: str
    tokens: list[int]
    roi: Roi
    candidates: tuple[int, ...]
    chosen: int


def read_steps(run: Path, max_context: int) -> list[Step]:
    """The gated steps of a run with at most `max_context` tokens before them, row by row in order."""
    rows = {row["id"]: row for row in pq.read_table(run / "results").to_pylist()}
    found = []
    for step in sorted(pq.read_table(run / "steps").to_pylist(), key=lambda step: (step["id"], step["step"])):
        row = rows[step["id"]]
        tokens = row["prompt_token_ids"] + row["token_ids"][: step["step"]]
        roi = Roi(tuple(Span(span["start"], span["end"], span["weight"]) for span in row["roi_spans"]))
        if roi and len(tokens) <= max_context:
            found.append(Step(step["id"], tokens, roi, tuple(step["candidate_ids"]), step["chosen_id"]))
    return found


def spread(steps: list[Step], count: int) -> list[Step]:
    """At most `count` of the steps, evenly over all rows and lengths."""
    return [steps[index * len(steps) // count] for index in range(count)] if len(steps) > count else steps


def score_all(scorer: Scorer, steps: Iterable[Step], name: str) -> list[list[float]]:
    """Scores of every step, one request at a time; a stateful scorer is sent only what it does not hold."""
    scores, held = [], {}
    begun = time.monotonic()
    for number, step in enumerate(steps, start=1):
        start = held.get(step.row, 0) if scorer.stateful else 0
        request = ScoreRequest(step.row, start, step.tokens[start:], step.roi, step.candidates)
        (answer,) = scorer.score([request])
        if answer is None:
            (answer,) = scorer.score([ScoreRequest(step.row, 0, step.tokens, step.roi, step.candidates)])
        held[step.row] = len(step.tokens)
        scores.append(answer)
        if number % 50 == 0:
            click.echo(f"{name}: {number} steps, {time.monotonic() - begun:.0f} s", err=True)
    return scores


def score_inline(model: str, rule: str, dtype: str, steps: Sequence[Step]) -> list[list[float]]:
    """Scores of every step by vLLM's model class with tangents, its rows growing from step to step side by side. In a
    process of its own: vLLM takes the threads of a process over."""
    job = {
        "model": model,
        "rule": rule,
        "dtype": dtype,
        "steps": [
            [step.row, step.tokens, [[s.start, s.end, s.weight] for s in step.roi.spans], step.candidates]
            for step in steps
        ],
    }
    command = [sys.executable, "-m", "benchmarks.inline_scores"]
    done = subprocess.run(command, input=json.dumps(job), text=True, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(scores: Sequence[list[float]], oracle: Sequence[list[float]]) -> dict[str, Any]:
    """Relative errors of `scores` and how often they choose as `oracle` does.

    A step where they differ is a tie if the oracle's two scores lie within 1e-4 of its largest |score|.
    """
    errors, same, ties = [], 0, 0
    for ours, theirs in zip(scores, oracle, strict=True):
        largest = max(map(abs, theirs))
        errors.append(max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / largest)
        our_choice, their_choice = ours.index(max(ours)), theirs.index(max(theirs))
        same += our_choice == their_choice
        ties += our_choice != their_choice and theirs[their_choice] - theirs[our_choice] <= 1e-4 * largest
    errors.sort()
    return {
        "max_error": errors[-1],
        "median_error": statistics.median(errors),
        "p99_error": errors[int(0.99 * (len(errors) - 1))],
        "same_argmax": same / len(errors),
        "different_by_a_tie": ties,
    }


def conservation(relevances: Sequence[Relevance]) -> dict[str, Any]:
    """How much of the logit the tokens' relevances sum up to: quartiles of the ratio, and the error's mean size; and
    the first token's share of all |relevance|, which attribution skews towards."""
    ratios = [sum(relevance.tokens) / relevance.logit for relevance in relevances]
    errors = [abs(sum(relevance.tokens) - relevance.logit) for relevance in relevances]
    first = [abs(relevance.tokens[0]) / sum(map(abs, relevance.tokens)) for relevance in relevances]
    return {
        "targets": len(ratios),
        "sum_over_logit": _quartiles(ratios),
        "first_token_share": _quartiles(first),
        "mean_abs_error": statistics.mean(errors),
        "mean_abs_logit": statistics.mean(abs(relevance.logit) for relevance in relevances),
    }


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("quartile_1", "median", "quartile_3"), statistics.quantiles(values, n=4), strict=True))


def random_models_conservation(rule: str) -> list[dict[str, Any]]:
    rng, found = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        for name in tiny.configs():
            scorer = ReferenceScorer(str(tiny.save(name, Path(folder))), rule=rule)
            tokens = [rng.randrange(3, tiny.VOCABULARY) for _ in range(40)]
            targets = [(position, rng.randrange(tiny.VOCABULARY)) for position in range(7, 40)]
            measured = conservation(scorer.relevance(tokens, targets))
            found.append(
                {"model": f"tiny {name}", "architecture": scorer.hf.architecture, "weights": "random"} | measured
            )
    return found


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", required=True)
@click.option("--rule", type=click.Choice(RULES), default="attnlrp", show_default=True)
@click.option("--scorer", type=click.Choice(["inline"]), help="Measured beside the workers' forward mode.")
@click.option("--max-steps", type=int, default=600, show_default=True, help="Spread evenly over the run's steps.")
@click.option("--max-context", type=int, default=1024, show_default=True)
@click.option("--conservation-steps", type=int, default=100, show_default=True)
@click.option("--json", "output", required=True)
def main(run, model, rule, scorer, max_steps, max_context, conservation_steps, output):
    logging.disable_progress_bar()
    steps = spread(read_steps(run, max_context), max_steps)
    if not steps:
        raise click.ClickException(f"{run} holds no gated step with a token region and at most {max_context} tokens")
    reference = ReferenceScorer(model, rule=rule)
    oracle = score_all(reference, steps, "lxt")
    float32 = score_all(ForwardScorer(model, rule=rule), steps, "forward float32")
    bfloat16 = score_all(ForwardScorer(model, rule=rule, dtype="bfloat16"), steps, "forward bfloat16")
    inline = {dtype: score_inline(model, rule, dtype, steps) for dtype in ("float32", "bfloat16")} if scorer else {}
    explained = [
        reference.relevance(step.tokens, [(len(step.tokens) - 1, step.chosen)])[0]
        for step in spread(steps, conservation_steps)
    ]
    of_run = {"model": Path(model).name, "architecture": reference.hf.architecture, "weights": "trained"}
    contexts = [len(step.tokens) for step in steps]
    result = {
        "model": Path(model).name,
        "rule": rule,
        "steps": len(steps),
        "rows": len({step.row for step in steps}),
        "context_tokens": {"min": min(contexts), "median": statistics.median(contexts), "max": max(contexts)},
        "float32_against_lxt": compare(float32, oracle),
        "bfloat16_against_float32": compare(bfloat16, float32),
        **({"inline_float32_against_lxt": compare(inline["float32"], oracle)} if inline else {}),
        **({"inline_bfloat16_against_float32": compare(inline["bfloat16"], inline["float32"])} if inline else {}),
        "conservation": [of_run | conservation(explained), *random_models_conservation(rule)],
    }
    write_result(output, result)
    click.echo(json.dumps({key: value for key, value in result.items() if key != "conservation"}, indent=2))


if __name__ == "__main__":
    main()
