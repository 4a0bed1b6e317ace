"""What a call to an attribution worker costs, beside what bounds it: `steps` sequences of `context` tokens that are
held, each with `tokens` new ones and five candidates.

    python -m benchmarks.workers --json OUT.json
    python -m benchmarks.workers --json OUT.json --shape llama-3.1-8b --dtype bfloat16    # on a GPU

One process, without Ray and vLLM. `milliseconds`: wall time of `ForwardScorer.score`, the median of several calls after
as many as it takes until two agree; `host_milliseconds`: less the pass from ids to last tangents (on a GPU its replay).
`bytes_bound`: weights (once a pass) and cached keys and values read once, `operations_bound`: the products of linear
layers and attention, both in milliseconds at the peaks that the run has measured itself. All four are null where the
memory does not suffice.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import psutil
import torch
from transformers.utils import logging

from agd_vllm.attribution.block_pool import BLOCK_TOKENS, blocks_for
from agd_vllm.attribution.forward import PASS_TOKENS, ForwardScorer
from agd_vllm.attribution.tangent_cache import CachedSequence
from agd_vllm.records import Roi, ScoreRequest, Span
from benchmarks import random_model
from benchmarks.attribution import CANDIDATES, make_room, warm_up
from benchmarks.machine import write_result

ROI = Roi((Span(4, 20),))
REPEATS = {"cpu": 5, "cuda": 20}
# Of the copy and the product that the peaks are measured with.
COPY_BYTES, PRODUCT = {"cpu": 1 << 28, "cuda": 1 << 30}, {"cpu": 2048, "cuda": 8192}
STREAMS = 2
# q k, q' k and q k' are the scores; a v, a v' and a' v the values.
ATTENTION_PRODUCTS = 6


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes and operations per second."""

    bytes: float
    operations: float


@dataclass(frozen=True, slots=True)
class Point:
    steps: int
    tokens: int
    context: int
    milliseconds: float | None = None
    host_milliseconds: float | None = None
    bytes_bound: float | None = None
    operations_bound: float | None = None


class LayersClock:
    """Times the scorer's passes through the layers; `milliseconds` are those since it was last read."""

    def __init__(self, scorer: ForwardScorer):
        self._run = scorer.tangents.static.run
        self._on_gpu = scorer.hf.device.type == "cuda"
        self._spans: list[tuple] = []
        scorer.tangents.static.run = self._timed

    def _timed(self, *arguments) -> torch.Tensor:
        begun = self._now()
        out = self._run(*arguments)
        self._spans.append((begun, self._now()))
        return out

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> float:
        spans, self._spans = self._spans, []
        if self._on_gpu:
            torch.cuda.synchronize()
            return sum(begun.elapsed_time(ended) for begun, ended in spans)
        return 1e3 * sum(ended - begun for begun, ended in spans)


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """A copy (read and written bytes together) and a product of square matrices in the weights' dtype."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = PRODUCT[device.type]
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return Peaks(
        2 * source.numel() / _fastest(lambda: target.copy_(source), device),
        2 * size**3 / _fastest(lambda: torch.nn.functional.linear(left, right), device),
    )


def _fastest(call, device: torch.device) -> float:
    """Seconds."""
    seconds = []
    for _ in range(REPEATS[device.type]):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def measure(scorer: ForwardScorer, clock: LayersClock, peaks: Peaks, steps: int, tokens: int, context: int) -> Point:
    num_blocks = steps * blocks_for(context + tokens)
    free = psutil.virtual_memory().available if scorer.hf.device.type == "cpu" else None
    try:
        if free is not None and num_blocks * scorer.cache.shape.block_bytes > free:
            raise torch.OutOfMemoryError
        make_room(scorer, num_blocks)
        hold(scorer, steps, context)
        wall, host = _times(scorer, clock, steps, tokens, context)
    except torch.OutOfMemoryError:
        click.echo(f"{steps} steps at {context} tokens do not fit the memory", err=True)
        return Point(steps, tokens, context)
    finally:
        make_room(scorer, 0)
    moved, operations = work(scorer, steps, tokens, context)
    return Point(steps, tokens, context, wall, host, 1e3 * moved / peaks.bytes, 1e3 * operations / peaks.operations)


def hold(scorer: ForwardScorer, steps: int, context: int) -> None:
    """Sequences as they are after `context` tokens; what their caches hold makes no difference to the time."""
    pool = scorer.cache.pool
    pool.layers.fill_(0.01)
    rng = random.Random(0)
    for row in range(steps):
        sequence = CachedSequence(ROI, [rng.randrange(scorer.hf.config.vocab_size) for _ in range(context)])
        scorer.cache.add(f"row {row}", sequence)
        scorer.cache.grow(sequence, context, [])
        sequence.length = context


def _times(scorer: ForwardScorer, clock: LayersClock, steps: int, tokens: int, context: int) -> tuple[float, float]:
    """Medians in milliseconds: of a call, and of that less the layers."""
    number = 0

    def call() -> None:
        # Every time after the same `context` tokens: what came behind is cut back.
        nonlocal number
        number += 1
        batch = [ScoreRequest(f"row {row}", context, [number] * tokens, ROI, CANDIDATES) for row in range(steps)]
        assert None not in scorer.score(batch)

    warm_up(call)
    clock.milliseconds()
    times = []
    for _ in range(REPEATS[scorer.hf.device.type]):
        begun = time.perf_counter()
        call()
        wall = 1e3 * (time.perf_counter() - begun)
        times.append((wall, wall - clock.milliseconds()))
    return statistics.median(wall for wall, _ in times), statistics.median(host for _, host in times)


def work(scorer: ForwardScorer, steps: int, tokens: int, context: int) -> tuple[int, int]:
    """Bytes that a call must read, and operations that it must do."""
    hf, shape, rows = scorer.hf, scorer.cache.shape, steps * tokens
    layers = scorer.tangents.decoder.layers
    weights = [linear.weight for each in layers for linear in (each.qkv, each.o, each.gate_up, each.down)]
    elements = sum(weight.numel() for weight in weights)
    passes = -(-rows // PASS_TOKENS)
    attended = ATTENTION_PRODUCTS * hf.num_layers * hf.num_heads * hf.head_dim * (context + tokens)
    moved = (
        passes * elements * weights[0].element_size() + steps * (context + tokens) * shape.block_bytes // BLOCK_TOKENS
    )
    return moved, 2 * rows * (STREAMS * elements + attended)


def points(model: str, dtype: str, steps: list[int], tokens: list[int], contexts: list[int]) -> Iterator[Point]:
    scorer = ForwardScorer(model, dtype=dtype, cache_bytes=0)
    clock = LayersClock(scorer)
    peaks = measure_peaks(scorer.hf.device, scorer.hf.unembedding.dtype)
    for context in contexts:
        for count in tokens:
            for size in steps:
                point = measure(scorer, clock, peaks, size, count, context)
                click.echo(json.dumps(asdict(point)))
                yield point


def _integers(_context, _parameter, value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


@click.command(help=__doc__)
@click.option("--json", "output", required=True)
@click.option("--model", help="Default: the demo model.")
@click.option("--shape", type=click.Choice(list(random_model.SHAPES)), help="In place of --model: random weights.")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--steps", default="1,16,64,256", show_default=True, callback=_integers)
@click.option("--tokens", default="1,4", show_default=True, callback=_integers)
@click.option("--contexts", default="128,1024", show_default=True, callback=_integers)
def main(output, model, shape, dtype, steps, tokens, contexts):
    logging.disable_progress_bar()
    with random_model.demo_or(model, shape) as model:
        measured = [asdict(point) for point in points(model, dtype, steps, tokens, contexts)]
    result = {"points": measured, "model": Path(model).name, "dtype": dtype, "threads": torch.get_num_threads()}
    write_result(output, result)


if __name__ == "__main__":
    main()
