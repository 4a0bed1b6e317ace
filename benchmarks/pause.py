"""From PAUSE to resume: what a guided step costs beside vLLM's own step and the scoring.

    python -m benchmarks.pause --model M --json OUT.json

Rows of a tiny random model with the tokenizer of M, `rows` of them side by side, each guided at every step (tau 0, no
floor), by the real engine actor (vLLM in processes of its own), pool and gate; the attribution worker, a Ray actor as
always, answers at once. The median of several turns, after one that warms up:

`milliseconds`: wall time of a turn over its guided steps. `pause_to_resume_milliseconds` (median, p90): wall time from
the end of a pass in which a row pauses to the begin of one in which a row goes on, first come, first served: with one
row both are the same row. `loop_milliseconds`: CPU time of the actor's event loop over guided steps,
`actor_milliseconds`: of all threads of its process, vLLM's and Ray's sockets among them. `parts`: shares of the loop's
own time by cProfile in one more turn, which slows Python's calls down more than what is compiled.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import os
import pstats
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence

import click
import ray
from ray._private.async_compat import get_new_event_loop

from agd_vllm.attribution.batch_bounds import BatchBounds
from agd_vllm.attribution.worker import ScoredBatch
from agd_vllm.engine.settings import EngineSettings
from agd_vllm.models.inspect import inspect_model
from agd_vllm.pipeline import placement
from agd_vllm.pipeline.replica import Replica
from agd_vllm.pipeline.teams import Demand
from agd_vllm.records import DecodedRow, PreparedRow, Roi, ScoreRequest, Span
from agd_vllm.strategies.agd import Agd
from agd_vllm.trace import Span as Traced
from benchmarks.machine import write_result
from benchmarks.random_model import SHAPES, of_shape

ROI = Roi((Span(0, 4),))
PROMPT = 16
TRACK = "vLLM", "engine step"
# A function belongs to the first part whose word its file or name has; what is built in, to those who call it.
PARTS = {
    "vllm_output": ("v1/engine/output_processor", "v1/engine/detokenizer", "v1/engine/logprobs", "vllm/outputs"),
    "vllm_input": (
        "v1/engine/input_processor",
        "vllm/renderers",
        "vllm/inputs",
        "vllm/sampling_params",
        "vllm/tokenizers",
        "vllm/config",
        "vllm/platforms",
        "v1/sample/logits_processor",
        "engine/gate_params",
        "engine/batch_rows",
    ),
    "agd_vllm": ("agd_vllm/", "benchmarks/"),
    "vllm_client": ("v1/engine/async_llm", "v1/engine/core_client", "v1/serial_utils", "vllm/"),
    "sockets": ("zmq/",),
    "ray": ("ray/",),
    "asyncio": ("asyncio/", "uvloop"),
}


class AnswersAtOnce:
    """In an AttributionWorker's place: the most probable candidate's score is the highest."""

    def score(self, requests: Sequence[ScoreRequest], released: Sequence[str]) -> ScoredBatch:
        return ScoredBatch([[-float(at) for at in range(len(each.candidate_ids))] for each in requests], time.time(), 0)


def made_rows(turn: int, count: int, steps: int, vocab_size: int) -> list[PreparedRow]:
    draw = random.Random(turn)
    prompts = ([draw.randrange(vocab_size) for _ in range(PROMPT)] for _ in range(count))
    return [PreparedRow(f"{turn}-{row}", prompt, ROI, steps) for row, prompt in enumerate(prompts)]


async def decoded(replica: Replica, rows: list[PreparedRow]) -> tuple[list[DecodedRow], list[Traced]]:
    """All of them, and the engine's steps meanwhile."""
    await replica.submit(rows, 1)
    ended, spans = [], []
    while len(ended) < len(rows):
        found, progress = await replica.collect(1.0)
        ended += found
        spans += progress.spans
    for row in ended:
        if not isinstance(row, DecodedRow) or row.num_guided != len(row.token_ids):
            raise click.ClickException(f"a row was not guided at every step: {row}")
    return ended, [span for span in spans if (span.track, span.name) == TRACK]


def waits(steps: list[Traced], rows: int) -> list[float]:
    """Seconds from a pass in which a row pauses to one in which a row goes on; `rows` of them begin with no pause."""
    steps = sorted(steps, key=lambda step: step.begun)
    paused = [step.begun + step.seconds for step in steps for _ in range(step.args["rows"])]
    resumed = [step.begun for step in steps for _ in range(step.args["rows"])][rows:]
    return [end - begin for begin, end in zip(paused, resumed, strict=False)]


async def measured(replica: Replica, rows: list[PreparedRow]) -> dict[str, float]:
    wall, loop, actor = time.perf_counter(), time.thread_time(), time.process_time()
    ended, steps = await decoded(replica, rows)
    wall, loop, actor = time.perf_counter() - wall, time.thread_time() - loop, time.process_time() - actor
    guided = sum(row.num_guided for row in ended)
    seconds = waits(steps, len(rows))
    return {
        "milliseconds": 1e3 * wall / guided,
        "pause_to_resume_milliseconds": 1e3 * statistics.median(seconds),
        "pause_to_resume_p90_milliseconds": 1e3 * statistics.quantiles(seconds, n=10)[-1],
        "loop_milliseconds": 1e3 * loop / guided,
        "actor_milliseconds": 1e3 * actor / guided,
        "rows_per_pass": guided / len(steps),
    }


async def profiled(replica: Replica, rows: list[PreparedRow]) -> dict[str, float]:
    profile = cProfile.Profile()
    profile.enable()
    await decoded(replica, rows)
    profile.disable()
    seconds: Counter[str] = Counter(dict.fromkeys([*PARTS, "other"], 0.0))
    for (file, _, name), (_, _, own, _, callers) in pstats.Stats(profile).stats.items():
        part = _part(f"{file}/{name}")
        if part != "other" or not callers:
            seconds[part] += own
            continue
        for (caller, _, called_in), (_, _, share, _) in callers.items():
            seconds[_part(f"{caller}/{called_in}")] += share
    total = sum(seconds.values())
    return {part: round(share / total, 3) for part, share in seconds.items()}


def _part(function: str) -> str:
    return next((part for part, words in PARTS.items() if any(word in function for word in words)), "other")


async def points(model: str, rows: list[int], steps: int, turns: int) -> list[dict]:
    info, tokenizer = inspect_model(model, pauses=True, attribution=True)
    engine = EngineSettings(
        dtype="float32",
        max_model_len=2048,
        engine_args={"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "enable_prefix_caching": False},
    )
    replica = Replica(info, engine, Agd(tau=0.0, min_prob=0.0), traced=True, debug=False)
    await replica.start()
    worker = ray.remote(AnswersAtOnce).options(num_cpus=0).remote()
    await replica.attach([worker], True, None, BatchBounds())
    try:
        return [await _point(replica, len(tokenizer), count, steps, turns) for count in rows]
    finally:
        await replica.stop()


async def _point(replica: Replica, vocab_size: int, rows: int, steps: int, turns: int) -> dict:
    jobs = iter(made_rows(turn, rows, max(2, steps // rows), vocab_size) for turn in range(turns + 2))
    await decoded(replica, next(jobs))
    found = [await measured(replica, next(jobs)) for _ in range(turns)]
    medians = {name: round(statistics.median(each[name] for each in found), 4) for name in found[0]}
    point = {"rows": rows, "guided_steps": rows * max(2, steps // rows), **medians}
    point["parts"] = await profiled(replica, next(jobs))
    click.echo(json.dumps(point))
    return point


def _integers(_context, _parameter, value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--json", "output", required=True)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="tiny", show_default=True)
@click.option("--rows", default="1,16,64", show_default=True, callback=_integers, help="Side by side.")
@click.option("--steps", type=int, default=1024, show_default=True, help="Guided steps of a turn, all rows together.")
@click.option("--turns", type=int, default=5, show_default=True)
def main(model, output, shape, rows, steps, turns):
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    cluster = placement.connect(Demand(engines=1, workers=1, gpus_per_engine=1), debug=False)
    try:
        with of_shape(model, shape) as folder, asyncio.Runner(loop_factory=get_new_event_loop) as runner:
            found = runner.run(points(folder, rows, steps, turns))
    finally:
        placement.disconnect(cluster)
    write_result(output, {"points": found, "model": shape, "turns": turns})


if __name__ == "__main__":
    main()
