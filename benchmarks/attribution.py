"""What one guided step (k = 5 candidates) costs: lxt against forward mode, whole prefix and cached.

    python -m benchmarks.attribution --json OUT.json
    python -m benchmarks.attribution --json OUT.json --shape llama-3.1-8b --dtype bfloat16 --batches 1 \
        --contexts 512,1024,2048,4096,8192 --lxt-contexts 512,1024,2048,4096,8192    # on a GPU

`lxt`: reverse mode, one forward with graph and a backward pass per candidate. `forward-full`: the tangent pass over the
whole prefix, nothing cached. `forward-cached`: one new token after a cached prefix. Seconds are of the whole batch, the
median of `repeats` runs after as many as it takes until two agree, `fastest` and `slowest` their spread (a point that
takes long is run once); `peak_bytes` beside the weights; all are null where the GPU's memory does not suffice. With
`--shape` the weights are random ones (16 GB are written to a temporary folder for the 8B model).
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils import logging

from agd_vllm.attribution.block_pool import blocks_for
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.attribution.reference import ReferenceScorer
from agd_vllm.records import Roi, ScoreRequest, Span
from benchmarks import random_model
from benchmarks.machine import write_result

CANDIDATES = (1000, 1001, 1002, 1003, 1004)
ROI = Roi((Span(4, 36),))
FULL_BATCH_CONTEXT = 512  # a batch of longer prefixes takes minutes, and is 16 times one of them
GPU_REPEATS = 5
# Runs before the first that counts: until two in a row differ by so much at most.
WARM_UPS, AGREEMENT = 10, 0.2
CACHED_REPEATS = 15


def sequences(batch: int, length: int, vocabulary: int, *, same_start: bool) -> list[list[int]]:
    """Random tokens; with `same_start` all but the last 32 are alike, so that their prefix is computed once."""
    rng = random.Random(length)
    tokens = [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(batch)]
    return [tokens[0][:-32] + row[-32:] for row in tokens] if same_start else tokens


def requests(tokens: list[list[int]], start: int = 0) -> list[ScoreRequest]:
    return [ScoreRequest(f"row {row}", start, ids[start:], ROI, CANDIDATES) for row, ids in enumerate(tokens)]


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds (median, spread) and bytes; None where memory did not suffice."""

    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    repeats: int = 0
    peak_bytes: int | None = None


def measure(step: Callable[[], object], repeats: int, prepare: Callable[[], object] | None = None) -> Measured:
    """`step` over `repeats` runs, and its peak of memory beyond what was held before `prepare`.

    Runs before are not counted: in the first ones kernels are compiled, memory is asked for and caches fill. On a GPU
    there are more of both; a single run on a CPU, which takes long, has none before.
    """
    held = _held()
    try:
        if prepare is not None:
            prepare()
        if torch.cuda.is_available():
            repeats = max(repeats, GPU_REPEATS)
        if repeats > 1:
            warm_up(step)
        _reset_peak()
        seconds = [_seconds(step) for _ in range(repeats)]
    except torch.OutOfMemoryError:
        return Measured()
    return Measured(statistics.median(seconds), min(seconds), max(seconds), repeats, _peak() - held)


def warm_up(step: Callable[[], object]) -> None:
    """Runs `step` until two runs in a row agree, WARM_UPS times at most."""
    before = _seconds(step)
    for _ in range(WARM_UPS - 1):
        now = _seconds(step)
        if abs(now - before) <= AGREEMENT * before:
            return
        before = now


def _seconds(step: Callable[[], object]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def measure_lxt(scorer: ReferenceScorer, context: int, repeats: int) -> Measured:
    batch = requests(sequences(1, context, scorer.hf.config.vocab_size, same_start=False))
    return measure(lambda: scorer.score(batch), repeats)


def measure_full(scorer: ForwardScorer, context: int, batch: int, repeats: int) -> Measured:
    tokens = sequences(batch, context, scorer.hf.config.vocab_size, same_start=False)

    def step() -> None:
        scorer.score(requests(tokens))
        for row in range(batch):
            scorer.release(f"row {row}")
        scorer.cache.evict(scorer.cache.pool.num_blocks)

    result = measure(step, repeats, lambda: make_room(scorer, batch * blocks_for(context)))
    make_room(scorer, 0)
    return result


def measure_cached(scorer: ForwardScorer, context: int, batch: int, repeats: int) -> Measured:
    """Its memory includes the cache, which has room for all of the batch: nothing is evicted."""
    tokens = sequences(batch, context - 1, scorer.hf.config.vocab_size, same_start=batch > 1)

    def step() -> None:
        for ids in tokens:
            ids.append(len(ids))
        assert None not in scorer.score(requests(tokens, start=len(tokens[0]) - 1))

    def prepare() -> None:
        make_room(scorer, batch * blocks_for(context + 1 + WARM_UPS + repeats))
        scorer.score(requests(tokens))
        step()

    result = measure(step, repeats, prepare)
    make_room(scorer, 0)
    return result


def make_room(scorer: ForwardScorer, num_blocks: int) -> None:
    """An empty cache of that many blocks in the place of the scorer's."""
    scorer.make_cache(num_blocks * scorer.tangents.shape.block_bytes)


def points(model: str, contexts: list[int], lxt_contexts: list[int], batches: list[int], dtype: str) -> Iterator[dict]:
    """Measure point by point; expensive ones are run once, cheap ones several times. One scorer is held at a time."""
    if lxt_contexts:
        lxt = ReferenceScorer(model, dtype=dtype)
        measure_lxt(lxt, 64, 1)
        for context in lxt_contexts:
            yield _point(context, 1, "lxt", measure_lxt(lxt, context, 3 if context <= 512 else 1))
        del lxt
        _free()
    forward = ForwardScorer(model, dtype=dtype, cache_bytes=0)
    measure_full(forward, 64, 1, 1)
    for context in contexts:
        for batch in batches:
            if batch == 1 or context <= FULL_BATCH_CONTEXT:
                repeats = 3 if batch == 1 and context <= 512 else 1
                yield _point(context, batch, "forward-full", measure_full(forward, context, batch, repeats))
            yield _point(context, batch, "forward-cached", measure_cached(forward, context, batch, CACHED_REPEATS))


def ratios(measured: list[dict]) -> dict[str, float]:
    """The figures that the targets name, where their points were measured."""
    fitting = {(p["scorer"], p["batch"], p["context"]): p for p in measured if p["seconds"] is not None}
    seconds = {key: point["seconds"] for key, point in fitting.items()}
    cached = {context: s for (scorer, batch, context), s in seconds.items() if (scorer, batch) == ("forward-cached", 1)}
    result = {
        f"lxt_over_cached_{context}": seconds["lxt", 1, context] / cached[context]
        for context in cached
        if ("lxt", 1, context) in seconds
    }
    result |= {
        f"lxt_peak_over_cached_{context}": fitting["lxt", 1, context]["peak_bytes"]
        / fitting["forward-cached", 1, context]["peak_bytes"]
        for context in cached
        if ("lxt", 1, context) in fitting
    }
    if len(cached) > 1:
        result["cached_growth"] = cached[max(cached)] / cached[min(cached)]
    for (scorer, batch, context), s in seconds.items():
        if scorer == "forward-cached" and batch > 1 and context in cached:
            result[f"cached_batch_{batch}_over_1_at_{context}"] = s / cached[context]
    return result


def _point(context: int, batch: int, scorer: str, measured: Measured) -> dict[str, Any]:
    point = {"context": context, "batch": batch, "scorer": scorer, **asdict(measured)}
    click.echo(json.dumps(point))
    return point


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _held() -> int:
    """Bytes in use now; on a CPU the process's, after freed memory has gone back to the system."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _integers(_context, _parameter, value: str) -> list[int]:
    return [int(part) for part in value.split(",") if part]


@click.command(help=__doc__)
@click.option("--json", "output", required=True)
@click.option("--model", help="Default: the demo model.")
@click.option("--shape", type=click.Choice(list(random_model.SHAPES)), help="In place of --model: random weights.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--contexts", default="128,512,1024,2048,4096", show_default=True, callback=_integers)
@click.option("--lxt-contexts", default="128,512,1024,2048", show_default=True, callback=_integers)
@click.option("--batches", default="1,16", show_default=True, callback=_integers)
def main(output, model, shape, dtype, contexts, lxt_contexts, batches):
    logging.disable_progress_bar()
    with random_model.demo_or(model, shape) as model:
        _free()
        measured = list(points(model, contexts, lxt_contexts, batches, dtype))
    result = {
        "points": measured,
        "ratios": ratios(measured),
        "model": Path(model).name,
        "dtype": dtype,
        "candidates": len(CANDIDATES),
        "threads": torch.get_num_threads(),
    }
    write_result(output, result)
    click.echo(json.dumps(result["ratios"], indent=2))


if __name__ == "__main__":
    main()
