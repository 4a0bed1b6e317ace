"""Do both scorers decode the same tokens? The same rows with `--scorer forward` and with `--scorer lxt`, in float32.

    python -m benchmarks.scorers --model M --input X.jsonl --json OUT.json

lxt runs k backward passes at every guided step: count on a second or two each.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import click

from agd_vllm import Decoder
from agd_vllm.input.reader import read_rows
from agd_vllm.records import DecodedRow
from benchmarks.machine import write_result

TIE = 1e-4


def decode(scorer: str, model: str, path: str, limit: int | None) -> dict[str, DecodedRow]:
    begun = time.monotonic()
    with Decoder(
        model, scorer=scorer, dtype="float32", max_model_len=2048, engine_args={"enforce_eager": True}
    ) as decoder:
        rows = itertools.islice(read_rows([path]), limit)
        decoded = {row.id: row for row in decoder.outcomes(rows) if isinstance(row, DecodedRow)}
    click.echo(f"{scorer}: {len(decoded)} rows, {time.monotonic() - begun:.0f} s", err=True)
    return decoded


def parts_at_a_tie(ours: DecodedRow, theirs: DecodedRow) -> bool:
    """Whether the first token that differs is one where lxt's two best scores lie within TIE of its largest."""
    pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
    parting = next(index for index, (a, b) in enumerate(pairs) if a != b)
    scores = next((sorted(step.scores) for step in theirs.steps if step.step == parting), None)
    return scores is not None and scores[-1] - scores[-2] <= TIE * max(map(abs, scores))


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--input", "path", required=True)
@click.option("--limit", type=int)
@click.option("--json", "output", required=True)
def main(model, path, limit, output):
    forward, lxt = (decode(scorer, model, path, limit) for scorer in ("forward", "lxt"))
    different = [name for name, row in forward.items() if row.token_ids != lxt[name].token_ids]
    result = {
        "model": Path(model).name,
        "rows": len(forward),
        "tokens": sum(len(row.token_ids) for row in forward.values()),
        "guided_steps": sum(len(row.steps) for row in forward.values()),
        "rows_different": len(different),
        "parted_at_a_tie": sum(parts_at_a_tie(forward[name], lxt[name]) for name in different),
    }
    write_result(output, result)
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
