"""Greedy decoding beside inline attribution, both by `vllm.LLM` alone: tokens/s whole, of decoding, and of prompts.

    python -m benchmarks.inline --model M --input X --json OUT.json
    python -m benchmarks.inline --model M --input X --shape llama-3.1-8b --pool --json OUT.json

At each point (`--rows`, `--new` and `--prompt`, a point a place) that many rows are decoded to so many tokens, EOS
ignored, with `--prompt` random tokens put before each row's own prompt; its region stays its own. Greedy has vLLM's
best settings on this machine; both have weights, activations and equally many blocks of KV cache beside each other.
They take turns after a warm-up of the same shape, until two turns agree: kernels compile at a first one. Medians of
`--runs` turns. A turn is run to its first token, too: prompts are what that takes, decoding is the rest. No token comes
from a cache. With `--pool` the worker pool decodes the rows of points without such prompts, EOS heeded, when the others
have left the machine. With `--shape` the weights are random ones of that shape (16 GB are written to a temporary folder
for the 8B model), the tokenizer is the model's.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoConfig

from agd_vllm import Decoder
from agd_vllm.inline import engine_args
from agd_vllm.inline.arguments import cache_planes
from agd_vllm.input.reader import read_rows
from agd_vllm.models.gpu_memory import KEYS_AND_VALUES
from agd_vllm.records import DecodedRow, InputRow, PreparedRow, Roi, Span
from benchmarks import random_model
from benchmarks.machine import write_result
from benchmarks.plain import Job, PlainVLLM, side_by_side

RULE = "attnlrp"
TOP_K, MIN_PROB = 5, 0.05
# Rows, new tokens, and tokens before the prompt, of each point.
POINTS = {
    "cpu": ((32, 128, 0), (8, 32, 600)),
    "cuda": ((8, 128, 0), (32, 300, 0), (64, 300, 0), (128, 128, 0), (256, 128, 0), (64, 128, 1000)),
}
# Two turns agree; a machine whose turns never do is measured all the same.
AGREE, MOST_WARM_UPS = 0.05, 5
_keys = itertools.count(1)


def longer(row: PreparedRow, more: int, draw: random.Random) -> tuple[list[int], Roi]:
    """The row with so many random tokens before its prompt."""
    ids = [draw.choice(row.prompt_token_ids) for _ in range(more)]
    spans = tuple(Span(span.start + more, span.end + more, span.weight) for span in row.roi.spans)
    return ids + row.prompt_token_ids, Roi(spans)


def job_of(prompts: list[tuple[list[int], Roi]], new: int, tau: float | None) -> Job:
    """Greedy, or guided under a gate of `tau`."""
    from agd_vllm.inline.params import inline_params_of

    job = []
    for ids, roi in prompts:
        params: dict[str, Any] = {"max_tokens": new, "ignore_eos": True}
        if tau is not None:
            inline = inline_params_of(roi, next(_keys), RULE, tau, TOP_K, MIN_PROB)
            params |= {"extra_args": inline.as_extra_args(), "cache_salt": inline.salt}
        job.append((ids, params))
    return job


def measure(engine: PlainVLLM, prompts: list[tuple[list[int], Roi]], new: int, tau: float | None) -> dict[str, float]:
    """Tokens/s of one turn, and the share of its steps that were guided."""
    _, first, _ = engine.generate(job_of(prompts, 1, tau))
    tokens, seconds, guided = engine.generate(job_of(prompts, new, tau))
    return {
        "all": tokens / seconds,
        "decoding": (tokens - len(prompts)) / max(seconds - first, 1e-9),
        "prompts": sum(len(ids) for ids, _ in prompts) / first,
        "guided_share": guided / tokens,
    }


def warm_up(engine: PlainVLLM, prompts: list[tuple[list[int], Roi]], new: int, tau: float | None) -> None:
    engine.generate(job_of(prompts, 1, tau))
    before = float("inf")
    for _ in range(MOST_WARM_UPS):
        _, now, _ = engine.generate(job_of(prompts, new, tau))
        if abs(now - before) <= AGREE * now:
            return
        before = now


def point(
    greedy: PlainVLLM, inline: PlainVLLM, rows: list[PreparedRow], new: int, prompt: int, tau: float, runs: int
) -> dict[str, Any]:
    prompts = [longer(row, prompt, random.Random(f"{row.id} {place}")) for place, row in enumerate(rows)]
    for engine, gate in ((greedy, None), (inline, tau)):
        warm_up(engine, prompts, new, gate)
    turns = [(measure(greedy, prompts, new, None), measure(inline, prompts, new, tau)) for _ in range(runs)]
    found: dict[str, Any] = {"rows": len(rows), "new": new, "prompt": prompt}
    for key, suffix in (("all", ""), ("decoding", "_decoding"), ("prompts", "_prompts")):
        theirs, ours = (statistics.median(turn[side][key] for turn in turns) for side in (0, 1))
        found |= {f"greedy{suffix}": theirs, f"inline{suffix}": ours, f"ratio{suffix}": ours / theirs}
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


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--input", "input_path", required=True)
@click.option("--shape", type=click.Choice(list(random_model.SHAPES)), help="Random weights in place of the model's.")
@click.option("--rows", multiple=True, type=int, help="[default: 32 and 8, on a GPU 8 to 256]")
@click.option("--new", multiple=True, type=int, help="[default: 128 and 32, on a GPU 128 and 300]")
@click.option("--prompt", multiple=True, type=int, help="[default: 0 and 600, on a GPU 0 and 1000]")
@click.option("--tau", type=float, default=1.734, show_default=True)
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="bfloat16", show_default=True)
@click.option("--runs", type=int, default=3, show_default=True)
@click.option("--max-model-len", type=int, default=2048, show_default=True)
@click.option("--pool", is_flag=True, help="The worker pool, too.")
@click.option("--own-process", is_flag=True, help="Engines in processes of their own, as on a GPU, on a CPU, too.")
@click.option("--eager", is_flag=True, help="Greedy without compilation, too: loads sooner.")
@click.option("--json", "output", type=click.Path(path_type=Path), required=True)
def main(
    model, input_path, shape, rows, new, prompt, tau, dtype, runs, max_model_len, pool, own_process, eager, output
):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not len(rows) == len(new) == len(prompt):
        raise click.UsageError("--rows, --new and --prompt: name each as often as there are points")
    points = list(zip(rows, new, prompt, strict=True)) or POINTS[device]
    own_process |= device == "cuda"
    with random_model.of_shape(model, shape) as path:
        there = [row for row in read_rows([input_path]) if isinstance(row, InputRow)]
        # Files are often sorted by kind; a short one is gone through again, and no token comes from a cache.
        random.Random(0).shuffle(there)
        there = list(itertools.islice(itertools.cycle(there), max(count for count, *_ in points)))
        preparer = Decoder(path, max_model_len=max_model_len).preparer()
        prepared = [preparer.prepare(row) for row in there]
        longest = max(len(row.prompt_token_ids) for row in prepared)
        tokens = max(count * (longest + after + before + SLACK_PER_ROW) for count, after, before in points)
        tokens = max(tokens, max_model_len + SLACK_PER_ROW)
        common = {"dtype": dtype, "max_model_len": max_model_len, "enable_prefix_caching": False}
        beside = [
            common | side_by_side(cache_bytes(path, tokens, planes, dtype))
            for planes in (KEYS_AND_VALUES, cache_planes(RULE))
        ]
        own = {key: value for key, value in engine_args(path, RULE, dtype).items() if key not in ("model", "dtype")}
        with (
            PlainVLLM(path, own_process=own_process, enforce_eager=eager, **beside[0]) as greedy,
            PlainVLLM(path, own_process=own_process, **own | beside[1]) as inline,
        ):
            found = [point(greedy, inline, prepared[:count], *rest, tau, runs) for count, *rest in points]
        if pool:
            settings = {"tau": tau, "dtype": dtype, "max_model_len": max_model_len}
            with Decoder(path, engine_args={"enforce_eager": eager}, **settings) as decoder:
                for each in found:
                    if not each["prompt"]:
                        each["pool"] = pool_speed(decoder, there[: each["rows"]], each["new"], runs)
    for each in found:
        numbers = {key: round(value, 3) for key, value in each.items() if value is not None}
        click.echo(" ".join(f"{key}={value:g}" for key, value in numbers.items()))
    described = {"model": shape or Path(model).name, "dtype": dtype, "tau": tau, "runs": runs}
    write_result(output, described | {"own_process": own_process, "points": found})


if __name__ == "__main__":
    main()
