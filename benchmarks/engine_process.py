"""Would an engine that is stepped in its caller's process be faster than one in a process of its own?

    python -m benchmarks.engine_process --model M --input X --json OUT.json

Plain vLLM, greedy, eager, both on the same one core, taking turns on the same rows; medians of `--runs` turns after a
warm-up. The difference is what the way between processes costs vLLM, and so what is to be gained at most.
"""

from __future__ import annotations

import os

import click

from agd_vllm import Decoder
from agd_vllm.input.reader import read_rows
from agd_vllm.records import InputRow
from benchmarks.comparison import write_comparison
from benchmarks.plain import PlainVLLM, side_by_side

MAX_MODEL_LEN = 2048
CACHE_BYTES = 1 << 30


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--input", "input_path", required=True)
@click.option("--limit", type=int, default=32, show_default=True)
@click.option("--max-tokens", type=int, default=128, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--runs", type=int, default=3, show_default=True)
@click.option("--json", "output", required=True)
def main(model, input_path, limit, max_tokens, dtype, runs, output):
    preparer = Decoder(model, max_model_len=MAX_MODEL_LEN).preparer()
    rows = [row for row in read_rows([input_path]) if isinstance(row, InputRow)][:limit]
    job = [(preparer.prepare(row).prompt_token_ids, {"max_tokens": max_tokens}) for row in rows]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    args = {
        "dtype": dtype,
        "max_model_len": MAX_MODEL_LEN,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        **side_by_side(CACHE_BYTES),
    }
    speeds: dict[str, list[float]] = {"in_process": [], "own_process": []}
    with (
        PlainVLLM(model, own_process=False, **args) as within,
        PlainVLLM(model, own_process=True, **args) as own,
    ):
        for turn in range(runs + 1):
            for engine, known in zip((within, own), speeds.values(), strict=True):
                tokens, seconds, _ = engine.generate(job)
                if turn:
                    known.append(tokens / seconds)
    write_comparison(output, "in_process_over_own", speeds, rows=len(job), max_tokens=max_tokens, dtype=dtype)


if __name__ == "__main__":
    main()
