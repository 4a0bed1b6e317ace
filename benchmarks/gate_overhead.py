"""What the gate costs: plain vLLM greedy against the gated path with tau = infinity, same rows, one run.

    python -m benchmarks.gate_overhead --model M --input X --json OUT.json

Both engines are loaded side by side and take turns, so that a change in the machine's speed meets both.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import click

from agd_vllm import Decoder
from agd_vllm.reader import read_rows
from agd_vllm.records import DecodedRow
from benchmarks.machine import describe


def serve_plain(connection: Connection, model: str, engine_args: dict) -> None:
    """Plain `vllm.LLM` in a process of its own: receives (prompts, max_tokens), answers (tokens, seconds)."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(model, disable_log_stats=True, **engine_args)
    connection.send("ready")
    while (job := connection.recv()) is not None:
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in job]
        params = [SamplingParams(temperature=0.0, max_tokens=limit, detokenize=True) for _, limit in job]
        begun = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        connection.send((sum(len(output.outputs[0].token_ids) for output in outputs), seconds))


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
    shared = {"enforce_eager": eager, "kv_cache_memory_bytes": 1 << 30}
    rows = list(read_rows([input_path]))[:limit]
    context = multiprocessing.get_context("spawn")
    ours_end, plain_end = context.Pipe()
    plain_args = {"dtype": dtype, "max_model_len": 2048, **shared}
    process = context.Process(target=serve_plain, args=(plain_end, model, plain_args))
    process.start()
    assert ours_end.recv() == "ready"
    rates: dict[str, list[float]] = {"plain": [], "gated": []}
    with Decoder(
        model, tau=float("inf"), dtype=dtype, max_tokens=max_tokens, max_model_len=2048, engine_args=shared
    ) as decoder:
        for turn in range(rounds + 1):
            begun = time.perf_counter()
            decoded = [row for row in decoder.outcomes(rows) if isinstance(row, DecodedRow)]
            seconds = time.perf_counter() - begun
            ours_end.send([(row.prompt_token_ids, len(row.token_ids)) for row in decoded])
            plain_tokens, plain_seconds = ours_end.recv()
            if turn:  # the first turn warms both up
                rates["gated"].append(sum(len(row.token_ids) for row in decoded) / seconds)
                rates["plain"].append(plain_tokens / plain_seconds)
    ours_end.send(None)
    process.join()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "tokens_per_second": medians,
        "gated_over_plain": medians["gated"] / medians["plain"],
        "runs": rates,
        "rows": len(rows),
        "max_tokens": max_tokens,
        "dtype": dtype,
        "eager": eager,
        **describe(),
    }
    with open(output, "w") as file:
        json.dump(result, file, indent=2)
    click.echo(json.dumps({key: result[key] for key in ("tokens_per_second", "gated_over_plain")}, indent=2))


if __name__ == "__main__":
    main()
