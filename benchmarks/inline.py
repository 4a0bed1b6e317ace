"""Greedy decoding beside inline attribution, both by `vllm.LLM` alone: tokens/s whole, of decoding, and of prompts.

    python -m benchmarks.inline --model M --input X --json OUT.json

At each point (`--rows`, `--new` and `--prompt`, a point a place) that many rows are decoded to so many tokens, EOS
ignored, with `--prompt` random tokens put before each row's own prompt; its region stays its own. Greedy has vLLM's
best settings on this machine. Both take turns after a warm-up of the same shape; medians of `--runs` turns. A turn is
run to its first token, too: prompts are what that takes, decoding is the rest. No token comes from a cache.
"""

from __future__ import annotations

import itertools
import random
import statistics
from pathlib import Path
from typing import Any

import click

from agd_vllm import Decoder
from agd_vllm.inline import engine_args
from agd_vllm.input.reader import read_rows
from agd_vllm.records import InputRow, PreparedRow, Roi, Span
from benchmarks.machine import write_result
from benchmarks.plain import Job, PlainVLLM, side_by_side

CACHE_BYTES = 2 << 30
TOP_K, MIN_PROB = 5, 0.05
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
            inline = inline_params_of(roi, next(_keys), "attnlrp", tau, TOP_K, MIN_PROB)
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


def point(
    greedy: PlainVLLM, inline: PlainVLLM, rows: list[PreparedRow], new: int, prompt: int, tau: float, runs: int
) -> dict[str, Any]:
    prompts = [longer(row, prompt, random.Random(row.id)) for row in rows]
    turns = [(measure(greedy, prompts, new, None), measure(inline, prompts, new, tau)) for _ in range(runs + 1)][1:]
    found: dict[str, Any] = {"rows": len(rows), "new": new, "prompt": prompt}
    for key, suffix in (("all", ""), ("decoding", "_decoding"), ("prompts", "_prompts")):
        theirs, ours = (statistics.median(turn[side][key] for turn in turns) for side in (0, 1))
        found |= {f"greedy{suffix}": theirs, f"inline{suffix}": ours, f"ratio{suffix}": ours / theirs}
    found["guided_share"] = statistics.median(turn[1]["guided_share"] for turn in turns)
    found["pool"] = None
    return found


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--input", "input_path", required=True)
@click.option("--rows", multiple=True, type=int, default=(32, 8), show_default=True)
@click.option("--new", multiple=True, type=int, default=(128, 32), show_default=True)
@click.option("--prompt", multiple=True, type=int, default=(0, 600), show_default=True)
@click.option("--tau", type=float, default=1.734, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--runs", type=int, default=3, show_default=True)
@click.option("--max-model-len", type=int, default=2048, show_default=True)
@click.option("--eager", is_flag=True, help="Greedy without compilation, too: loads sooner.")
@click.option("--json", "output", type=click.Path(path_type=Path), required=True)
def main(model, input_path, rows, new, prompt, tau, dtype, runs, max_model_len, eager, output):
    if not len(rows) == len(new) == len(prompt):
        raise click.UsageError("--rows, --new and --prompt: name each as often as there are points")
    preparer = Decoder(model, max_model_len=max_model_len).preparer()
    there = [row for row in read_rows([input_path]) if isinstance(row, InputRow)]
    if len(there) < max(rows):
        raise click.ClickException(f"{input_path} has {len(there)} rows, a point asks for {max(rows)}")
    # Files are often sorted by kind.
    there = [preparer.prepare(row) for row in random.Random(0).sample(there, max(rows))]
    common = {"dtype": dtype, "max_model_len": max_model_len, "enable_prefix_caching": False}
    common |= side_by_side(CACHE_BYTES)
    inline_args = {key: value for key, value in engine_args(model).items() if key not in ("model", "dtype")}
    with (
        PlainVLLM(model, own_process=False, enforce_eager=eager, **common) as greedy,
        PlainVLLM(model, own_process=False, **inline_args, **common) as inline,
    ):
        points = [
            point(greedy, inline, there[:count], tokens, more, tau, runs)
            for count, tokens, more in zip(rows, new, prompt, strict=True)
        ]
    for each in points:
        numbers = {key: round(value, 3) for key, value in each.items() if value is not None}
        click.echo(" ".join(f"{key}={value:g}" for key, value in numbers.items()))
    write_result(output, {"model": Path(model).name, "dtype": dtype, "tau": tau, "runs": runs, "points": points})


if __name__ == "__main__":
    main()
