"""What the gate costs: plain vLLM greedy against the gated path with tau = infinity, same rows, one run.

    python -m benchmarks.gate_overhead --model M --input X --json OUT.json

Both engines are loaded side by side, with the same settings, and take turns on all cores, so that a change in the
machine's speed meets both.
"""

from __future__ import annotations

import time

import click

from agd_vllm import Decoder
from agd_vllm.input.reader import read_rows
from agd_vllm.records import DecodedRow
from benchmarks.comparison import write_comparison
from benchmarks.plain import PlainVLLM, side_by_side

CACHE_BYTES = 1 << 30


@click.command()
@click.option("--model", required=True)
@click.option("--input", "input_path", required=True)
@click.option("--limit", type=int, default=32, show_default=True)
@click.option("--max-tokens", type=int, default=128, show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--eager", is_flag=True, help="Without compilation, for both.")
@click.option("--json", "output", required=True)
def main(model, input_path, limit, max_tokens, rounds, dtype, eager, output):
    """Median tokens/s of both paths over `rounds` turns after a warm-up, and their ratio."""
    shared = {"enforce_eager": eager, **side_by_side(CACHE_BYTES)}
    rows = list(read_rows([input_path]))[:limit]
    rates: dict[str, list[float]] = {"gated": [], "plain": []}
    options = {"dtype": dtype, "max_model_len": 2048}
    with (
        PlainVLLM(model, **options, **shared) as plain,
        Decoder(model, tau=float("inf"), max_tokens=max_tokens, engine_args=shared, **options) as decoder,
    ):
        for turn in range(rounds + 1):
            begun = time.perf_counter()
            decoded = [row for row in decoder.outcomes(rows) if isinstance(row, DecodedRow)]
            seconds = time.perf_counter() - begun
            tokens, plain_seconds, _ = plain.generate(
                [(row.prompt_token_ids, {"max_tokens": len(row.token_ids)}) for row in decoded]
            )
            if turn:  # the first turn warms both up
                rates["gated"].append(sum(len(row.token_ids) for row in decoded) / seconds)
                rates["plain"].append(tokens / plain_seconds)
    write_comparison(output, "gated_over_plain", rates, rows=len(rows), max_tokens=max_tokens, dtype=dtype, eager=eager)


if __name__ == "__main__":
    main()
