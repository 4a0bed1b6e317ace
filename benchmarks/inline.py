"""Greedy decoding beside inline attribution, both by `vllm.LLM` alone: tokens/s whole, of decoding, and of prompts.

    python -m benchmarks.inline --model M --input X --json OUT.json
    python -m benchmarks.inline --model M --input X --shape llama-3.1-8b --pool --json OUT.json

At each point (`--rows`, `--new` and `--prompt`, a point a place) that many rows are decoded to so many tokens, EOS
ignored, with `--prompt` random tokens put before each row's own prompt; its region stays its own. Greedy has vLLM's
best settings on this machine; both have weights, activations and equally many blocks of KV cache beside each other.
They take turns after a warm-up of the same shape, until two turns agree: kernels compile at a first one. Medians of
`--runs` turns. A turn is run to its first token, too: prompts are what that takes, decoding is the rest. No token comes
from a cache. `--continuous ROWS,SIDE_BY_SIDE` is one more point, of continuous batching: so many rows are decoded side
by side, the next one is added when one ends, and each has a length of its own, drawn once; its figure is all tokens
over the time from the first row's start to the last one's end. With `--pool` the worker pool decodes the rows of the
other points without such prompts, until EOS, when the others have left the machine. A figure is in the file as soon as
it is there. With `--shape` the weights are random ones of that shape (16 GB are written to a temporary folder for the
8B model), the tokenizer is the model's.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoConfig

from agd_vllm import Decoder
from agd_vllm.engine.engine import CPU_BATCH_TOKENS
from agd_vllm.inline import engine_args
from agd_vllm.inline.arguments import cache_planes
from agd_vllm.input.reader import read_rows
from agd_vllm.models.gpu_memory import KEYS_AND_VALUES
from agd_vllm.records import DecodedRow, InputRow, PreparedRow, Roi, Span
from benchmarks import random_model
from benchmarks.machine import write_result
from benchmarks.plain import REST_S, Job, PlainVLLM, side_by_side

RULE = "attnlrp"
TOP_K, MIN_PROB = 5, 0.05
# Rows, new tokens, and tokens before the prompt, of each point.
POINTS = {
    "cpu": ((32, 128, 0), (8, 32, 600)),
    "cuda": ((8, 128, 0), (32, 300, 0), (64, 300, 0), (128, 128, 0), (256, 128, 0), (64, 128, 1000)),
}
# Rows, and how many of them side by side; new tokens of the shortest and the longest.
CONTINUOUS = {"cpu": None, "cuda": (256, 64)}
LENGTHS = {"cpu": (8, 32), "cuda": (32, 512)}
# As `decode` has it.
OWN_ARGS = {"cpu": {"max_num_batched_tokens": CPU_BATCH_TOKENS}, "cuda": {}}
# Two turns agree; a machine whose turns never do is measured all the same.
AGREE, MOST_WARM_UPS = 0.05, 5
_keys = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Work:
    """`rows` of `shortest` to `longest` new tokens, after `prompt` more tokens of prompt."""

    rows: int
    shortest: int
    longest: int
    prompt: int
    side_by_side: int

    @property
    def continuous(self) -> bool:
        return self.side_by_side < self.rows

    def lengths(self) -> list[int]:
        """New tokens of each row, the same ones every time."""
        draw = random.Random(self.rows)
        return [draw.randint(self.shortest, self.longest) for _ in range(self.rows)]


def longer(row: PreparedRow, more: int, draw: random.Random) -> tuple[list[int], Roi]:
    """The row with so many random tokens before its prompt."""
    ids = [draw.choice(row.prompt_token_ids) for _ in range(more)]
    spans = tuple(Span(span.start + more, span.end + more, span.weight) for span in row.roi.spans)
    return ids + row.prompt_token_ids, Roi(spans)


def job_of(prompts: list[tuple[list[int], Roi]], lengths: list[int], tau: float | None) -> Job:
    """Greedy, or guided under a gate of `tau`."""
    from agd_vllm.inline.params import inline_params_of

    job = []
    for (ids, roi), new in zip(prompts, lengths, strict=True):
        params: dict[str, Any] = {"max_tokens": new, "ignore_eos": True}
        if tau is not None:
            inline = inline_params_of(roi, next(_keys), RULE, tau, TOP_K, MIN_PROB)
            params["extra_args"] = inline.as_extra_args()
        job.append((ids, params))
    return job


def measure(engine: PlainVLLM, prompts: list[tuple[list[int], Roi]], work: Work, tau: float | None) -> dict[str, float]:
    """Tokens/s of one turn, and the share of its steps that were guided."""
    if work.continuous:
        tokens, seconds, guided = engine.generate(job_of(prompts, work.lengths(), tau), work.side_by_side)
        return {"all": tokens / seconds, "guided_share": guided / tokens}
    _, first, _ = engine.generate(job_of(prompts, [1] * work.rows, tau))
    tokens, seconds, guided = engine.generate(job_of(prompts, work.lengths(), tau))
    return {
        "all": tokens / seconds,
        "decoding": (tokens - len(prompts)) / max(seconds - first, 1e-9),
        "prompts": sum(len(ids) for ids, _ in prompts) / first,
        "guided_share": guided / tokens,
    }


def warm_up(engine: PlainVLLM, prompts: list[tuple[list[int], Roi]], work: Work, tau: float | None) -> None:
    if work.continuous:
        # Batches of every kind that it has; a whole turn would take as long as what is measured.
        engine.generate(job_of(prompts, [work.shortest] * work.rows, tau), work.side_by_side)
        return
    engine.generate(job_of(prompts, [1] * work.rows, tau))
    before = float("inf")
    for _ in range(MOST_WARM_UPS):
        _, now, _ = engine.generate(job_of(prompts, work.lengths(), tau))
        if abs(now - before) <= AGREE * now:
            return
        before = now


def point(
    greedy: PlainVLLM, inline: PlainVLLM, rows: list[PreparedRow], work: Work, tau: float, runs: int
) -> dict[str, Any]:
    prompts = [longer(row, work.prompt, random.Random(f"{row.id} {place}")) for place, row in enumerate(rows)]
    for engine, gate in ((greedy, None), (inline, tau)):
        warm_up(engine, prompts, work, gate)
    turns = [(measure(greedy, prompts, work, None), measure(inline, prompts, work, tau)) for _ in range(runs)]
    found: dict[str, Any] = {
        "rows": work.rows,
        "new": None if work.continuous else work.longest,
        "prompt": work.prompt,
        "side_by_side": work.side_by_side,
        "lengths": [work.shortest, work.longest],
    }
    for key, suffix in (("all", ""), ("decoding", "_decoding"), ("prompts", "_prompts")):
        theirs, ours, ratio = None, None, None
        if key in turns[0][0]:
            theirs, ours = (statistics.median(turn[side][key] for turn in turns) for side in (0, 1))
            ratio = ours / theirs
        found |= {f"greedy{suffix}": theirs, f"inline{suffix}": ours, f"ratio{suffix}": ratio}
    found["guided_share"] = statistics.median(turn[1]["guided_share"] for turn in turns)
    found["pool"] = None
    return found


def pool_speed(decoder: Decoder, rows: list[InputRow], new: int, runs: int) -> float:
    """Tokens/s of the worker pool on these rows, after one turn to warm up."""
    speeds = []
    for turn in range(runs + 1):
        given = [dataclasses.replace(row, id=f"{new} {turn} {place}", max_tokens=new) for place, row in enumerate(rows)]
        begun = time.perf_counter()
        decoded = [outcome for outcome in decoder.outcomes(given) if isinstance(outcome, DecodedRow)]
        speeds.append(sum(len(row.token_ids) for row in decoded) / (time.perf_counter() - begun))
        if len(decoded) < len(rows):
            raise click.ClickException(f"{len(rows) - len(decoded)} rows failed in the pool")
    return statistics.median(speeds[1:])


def cache_bytes(model: str, tokens: int, planes: int, dtype: str) -> int:
    """KV cache of so many tokens."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return tokens * planes * config.num_hidden_layers * config.num_key_value_heads * head_dim * _DTYPES[dtype]


_DTYPES = {"bfloat16": 2, "float32": 4}
# The last block of a row, of 128 tokens on a CPU, is not full, and one is vLLM's own.
SLACK_PER_ROW = 256


def works(
    rows: list[int], new: list[int], prompt: list[int], continuous: tuple[int, int] | None, device: str
) -> list[Work]:
    """What was named, or else what this device has."""
    points = list(zip(rows, new, prompt, strict=True))
    if not points and continuous is None:
        points, continuous = POINTS[device], CONTINUOUS[device]
    found = [Work(count, tokens, tokens, more, count) for count, tokens, more in points]
    return found if continuous is None else [*found, Work(continuous[0], *LENGTHS[device], 0, continuous[1])]


def _continuous(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+),(\d+)", value)
    if match is None or not 0 < int(match[2]) < int(match[1]):
        raise click.BadParameter("name rows and fewer of them side by side, such as 256,64")
    return int(match[1]), int(match[2])


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--input", "input_path", required=True)
@click.option("--shape", type=click.Choice(list(random_model.SHAPES)), help="Random weights in place of the model's.")
@click.option("--rows", multiple=True, type=int, help="[default: 32 and 8, on a GPU 8 to 256]")
@click.option("--new", multiple=True, type=int, help="[default: 128 and 32, on a GPU 128 and 300]")
@click.option("--prompt", multiple=True, type=int, help="[default: 0 and 600, on a GPU 0 and 1000]")
@click.option(
    "--continuous", metavar="ROWS,SIDE_BY_SIDE", callback=_continuous, help="[default: none, on a GPU 256,64]"
)
@click.option("--tau", type=float, default=1.734, show_default=True)
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="bfloat16", show_default=True)
@click.option("--runs", type=int, default=3, show_default=True)
@click.option("--rest", type=float, default=REST_S, show_default=True, help="Seconds before and after a turn.")
@click.option("--max-model-len", type=int, default=2048, show_default=True)
@click.option("--pool", is_flag=True, help="The worker pool, too.")
@click.option("--own-process", is_flag=True, help="Engines in processes of their own, as on a GPU, on a CPU, too.")
@click.option("--eager", is_flag=True, help="Greedy without compilation, too: loads sooner.")
@click.option("--json", "output", type=click.Path(path_type=Path), required=True)
def main(
    model,
    input_path,
    shape,
    rows,
    new,
    prompt,
    continuous,
    tau,
    dtype,
    runs,
    rest,
    max_model_len,
    pool,
    own_process,
    eager,
    output,
):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not len(rows) == len(new) == len(prompt):
        raise click.UsageError("--rows, --new and --prompt: name each as often as there are points")
    points = works(rows, new, prompt, continuous, device)
    own_process |= device == "cuda"
    described = {"model": shape or Path(model).name, "dtype": dtype, "tau": tau, "runs": runs}
    found: list[dict[str, Any]] = []

    def save() -> None:
        """What comes later may fail, or a machine's time end."""
        write_result(output, described | {"own_process": own_process, "points": found})

    with random_model.of_shape(model, shape) as path:
        there = [row for row in read_rows([input_path]) if isinstance(row, InputRow)]
        # Files are often sorted by kind; a short one is gone through again, and no token comes from a cache.
        random.Random(0).shuffle(there)
        there = list(itertools.islice(itertools.cycle(there), max(work.rows for work in points)))
        preparer = Decoder(path, max_model_len=max_model_len).preparer()
        prepared = [preparer.prepare(row) for row in there]
        longest = max(len(row.prompt_token_ids) for row in prepared)
        tokens = max(work.side_by_side * (longest + work.longest + work.prompt + SLACK_PER_ROW) for work in points)
        tokens = max(tokens, max_model_len + SLACK_PER_ROW)
        common = {"dtype": dtype, "max_model_len": max_model_len, "enable_prefix_caching": False, "rest": rest}
        beside = [
            common | side_by_side(cache_bytes(path, tokens, planes, dtype))
            for planes in (KEYS_AND_VALUES, cache_planes(RULE))
        ]
        own = {key: value for key, value in engine_args(path, RULE, dtype).items() if key not in ("model", "dtype")}
        own |= OWN_ARGS[device] | beside[1]
        with (
            PlainVLLM(path, own_process=own_process, enforce_eager=eager, **beside[0]) as greedy,
            PlainVLLM(path, own_process=own_process, **own) as inline,
        ):
            for work in points:
                found.append(point(greedy, inline, prepared[: work.rows], work, tau, runs))
                save()
                numbers = {key: value for key, value in found[-1].items() if isinstance(value, int | float)}
                click.echo(" ".join(f"{key}={round(value, 3):g}" for key, value in numbers.items()))
        if pool:
            settings = {"tau": tau, "dtype": dtype, "max_model_len": max_model_len}
            # On a CPU the cache of greedy; on a GPU the decoder shares the memory out between engine and worker.
            cache = {name: size for name, size in beside[0].items() if name == "kv_cache_memory_bytes"}
            pool_args = {"enforce_eager": eager} | (cache if device == "cpu" else {})
            with Decoder(path, engine_args=pool_args, **settings) as decoder:
                for work, each in zip(points, found, strict=True):
                    if not work.prompt and not work.continuous:
                        each["pool"] = pool_speed(decoder, there[: work.rows], work.longest, runs)
                        save()
                        click.echo(f"rows={work.rows} new={work.longest} pool={each['pool']:.0f}")


if __name__ == "__main__":
    main()
