"""AGD's tokens/s beside plain vLLM greedy and the paper's loop: one run, the same rows.

    python -m benchmarks.throughput --model M --input X --limit 32 --max-tokens 128 --json OUT.json

`greedy`: `vllm.LLM` on all cores (or `--greedy-cores` of them) with its own best settings, on a CPU stepped by its own
process. `agd`: this project with its defaults. They are loaded side by side and take turns, so that a change in the
machine's speed meets both; medians of `--runs` turns after a warm-up. Every turn has `--limit` rows of its own, the
same for both: no cache has seen them. With `--scorer inline` the pool, whose cores it needs, makes room for inline
attribution, which takes turns with greedy in its place. With `--shape` the weights are random ones of that shape, the
tokenizer is the model's.
`paper`: the paper's loop (benchmarks/paper.py) once and before the others, whose memory it may need, on as many rows of
one more turn as end within `--paper-seconds`; AGD's own figure for the ratio is taken on those same rows, which it has
not seen either.
`overhead_ms_per_guided_step`: CPU time of all processes of the run but vLLM's engine and the scorer.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import click
import torch

from agd_vllm import Decoder
from agd_vllm.input.reader import read_rows
from agd_vllm.records import DecodedRow, InputRow
from benchmarks import random_model
from benchmarks.machine import write_result
from benchmarks.plain import PlainVLLM, side_by_side
from benchmarks.processes import OVERHEAD, cpu_seconds

MAX_MODEL_LEN = 2048
# KV cache of plain vLLM on a CPU, of either engine on a GPU.
CACHE_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}


def decode(decoder: Decoder, rows: list[InputRow], plain: PlainVLLM) -> tuple[list[DecodedRow], dict[str, float]]:
    """The decoded rows and what the turn cost."""
    cpu, idle, begun = cpu_seconds([plain.pid]), decoder.engine_idle_seconds, time.perf_counter()
    outcomes = [outcome for outcome in decoder.outcomes(rows) if outcome is not None]
    seconds = time.perf_counter() - begun
    cpu = {kind: after - cpu[kind] for kind, after in cpu_seconds([plain.pid]).items()}
    decoded = [outcome for outcome in outcomes if isinstance(outcome, DecodedRow)]
    if len(decoded) < len(outcomes):
        raise click.ClickException(f"{len(outcomes) - len(decoded)} rows failed")
    tokens, guided = sum(len(row.token_ids) for row in decoded), sum(row.num_guided for row in decoded)
    return decoded, {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "guided_share": guided / tokens,
        "idle_share": (decoder.engine_idle_seconds - idle) / seconds / decoder.options.engines,
        "overhead_ms_per_guided_step": 1e3 * sum(cpu[kind] for kind in OVERHEAD) / guided if guided else None,
        "cpu_share": {kind: spent / seconds for kind, spent in cpu.items()},
    }


def rows_of_turns(path: str, limit: int, max_tokens: int, turns: int) -> list[list[InputRow]]:
    """`limit` rows for each turn, none of them twice."""
    rows = [row for row in read_rows([path]) if isinstance(row, InputRow)]
    if len(rows) < limit * turns:
        raise click.ClickException(f"{path} has {len(rows)} rows, {turns} turns of {limit} rows need {limit * turns}")
    # Files are often sorted by kind: every turn gets rows from everywhere.
    return [
        [dataclasses.replace(row, max_tokens=max_tokens) for row in rows[turn::turns][:limit]] for turn in range(turns)
    ]


def take_turns(decoder: Decoder, plain: PlainVLLM, turns: list[list[InputRow]]) -> tuple[list[dict], list[dict]]:
    """The decoder's and greedy's figures of every turn but the first, which warms both up."""
    ours, theirs = [], []
    for rows in turns:
        decoded, figures = decode(decoder, rows, plain)
        job = [(row.prompt_token_ids, {"max_tokens": rows[0].max_tokens}) for row in decoded]
        tokens, seconds, _ = plain.generate(job)
        ours.append(figures)
        theirs.append({"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds})
    return ours[1:], theirs[1:]


def run_paper(decoder: Decoder, rows: list[InputRow], dtype: str, seconds: float) -> list[dict[str, float]]:
    """What benchmarks/paper.py says of each row that it ended in time."""
    options, preparer = decoder.options, decoder.preparer()
    prepared = [preparer.prepare(row) for row in rows]
    job = {
        "model": decoder.model.path,
        "dtype": dtype,
        "tau": options.tau,
        "top_k": options.top_k,
        "min_prob": options.min_prob,
        "seconds": seconds,
        "rows": [
            {
                "prompt_token_ids": row.prompt_token_ids,
                "max_tokens": row.max_tokens,
                "eos_ids": sorted(decoder.model.eos_ids),
                "spans": [[span.start, span.end, span.weight] for span in row.roi.spans],
            }
            for row in prepared
        ],
    }
    command = [sys.executable, "-m", "benchmarks.paper"]
    done = subprocess.run(command, input=json.dumps(job), text=True, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of what is a number in all runs."""
    numbers = [key for key in runs[0] if all(isinstance(run[key], float | int) for run in runs)]
    return {key: statistics.median(run[key] for run in runs) for key in numbers}


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--input", "input_path", required=True)
@click.option("--shape", type=click.Choice(list(random_model.SHAPES)), help="Random weights in place of the model's.")
@click.option("--limit", type=int, default=32, show_default=True)
@click.option("--max-tokens", type=int, default=128, show_default=True)
@click.option("--tau", type=float, default=1.734, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--runs", type=int, default=3, show_default=True)
@click.option("--paper-seconds", type=float, default=300, show_default=True, help="0 leaves the paper's loop out.")
@click.option("--greedy-cores", type=int, help="Cores of plain vLLM on a machine without GPUs [default: all].")
@click.option(
    "--scorer", type=click.Choice(["forward", "inline"]), default="forward", help="inline: measured beside the pool."
)
@click.option("--engines", type=int, default=1, show_default=True)
@click.option("--attribution-workers", type=int, default=1, show_default=True)
@click.option("--eager", is_flag=True, help="Without compilation, for both engines.")
@click.option("--trace", help="A timeline of AGD's turns.")
@click.option("--json", "output", required=True)
def main(
    model,
    input_path,
    shape,
    limit,
    max_tokens,
    tau,
    dtype,
    runs,
    paper_seconds,
    greedy_cores,
    scorer,
    eager,
    output,
    **decoder_options,
):
    path = click.get_current_context().with_resource(random_model.of_shape(model, shape))
    sides = 2 if scorer == "inline" else 1
    *turns, papers = rows_of_turns(input_path, limit, max_tokens, sides * (runs + 1) + 1)
    result: dict[str, Any] = {"rows": limit, "max_tokens": max_tokens, **decoder_options}
    result["tau"] = tau if math.isfinite(tau) else None
    del result["trace"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine_args = {"enforce_eager": eager} | side_by_side(CACHE_BYTES[device])
    cores = sorted(os.sched_getaffinity(0))[:greedy_cores] if device == "cpu" else None
    paper_runs = []
    common = {"tau": tau, "dtype": dtype, "max_model_len": MAX_MODEL_LEN}
    decoder = Decoder(path, engine_args=engine_args, **common, **decoder_options)
    if paper_seconds:
        paper_runs = run_paper(decoder, papers, dtype, paper_seconds)
        if not paper_runs:
            raise click.ClickException("the paper's loop ended no row in time; raise --paper-seconds")
    own_process = device == "cuda"
    with PlainVLLM(path, cores, own_process, dtype=dtype, max_model_len=MAX_MODEL_LEN, **engine_args) as plain:
        with decoder:
            agd_runs, greedy_runs = take_turns(decoder, plain, turns[: runs + 1])
            if paper_runs:
                _, agd_there = decode(decoder, papers[: len(paper_runs)], plain)
        if scorer == "inline":
            # On a GPU plain vLLM stays beside it; a token takes twice the cache.
            inline_args = side_by_side(2 * CACHE_BYTES[device]) if device == "cuda" else {}
            engines = decoder_options["engines"]
            with Decoder(path, scorer="inline", engines=engines, engine_args=inline_args, **common) as beside:
                inline_runs, greedy_beside = take_turns(beside, plain, turns[runs + 1 :])
            for run in inline_runs:
                # The engine is stepped in its actor: what else that does cannot be told from it.
                del run["overhead_ms_per_guided_step"]
    agd, greedy = medians(agd_runs), medians(greedy_runs)
    result |= {
        "tokens_per_second": {"greedy": greedy["tokens_per_second"], "agd": agd["tokens_per_second"]},
        "agd_over_greedy": agd["tokens_per_second"] / greedy["tokens_per_second"],
        "guided_share": agd["guided_share"],
        "idle_share": agd["idle_share"],
        "overhead_ms_per_guided_step": agd.get("overhead_ms_per_guided_step"),
        "greedy_cores": cores and len(cores),
        "runs": {"greedy": greedy_runs, "agd": agd_runs, "paper": paper_runs},
    }
    if scorer == "inline":
        inline, there = medians(inline_runs), medians(greedy_beside)
        result["tokens_per_second"] |= {"inline": inline["tokens_per_second"]}
        result["inline_over_greedy"] = inline["tokens_per_second"] / there["tokens_per_second"]
        result["inline_guided_share"] = inline["guided_share"]
        result["runs"] |= {"inline": inline_runs, "greedy_beside_inline": greedy_beside}
    if paper_runs:
        paper = sum(run["tokens"] for run in paper_runs) / sum(run["seconds"] for run in paper_runs)
        there = agd_there["tokens_per_second"]
        result["tokens_per_second"] |= {"paper": paper, "agd_on_the_papers_rows": there}
        result["agd_over_paper"] = there / paper
        result["paper_rows"] = len(paper_runs)
    result |= {"dtype": dtype, "attribution_dtype": dtype, "model": shape or os.path.basename(model.rstrip("/"))}
    write_result(output, result)
    shown = (
        "tokens_per_second",
        "agd_over_greedy",
        "inline_over_greedy",
        "agd_over_paper",
        "guided_share",
        "idle_share",
        "overhead_ms_per_guided_step",
    )
    click.echo(json.dumps({key: result[key] for key in shown if key in result}, indent=2))


if __name__ == "__main__":
    main()
