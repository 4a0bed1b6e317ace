"""A published benchmark file as JSONL rows, for the benchmarks that take an --input.

python -m benchmarks.rows iheval PATH OUT.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from agd_vllm.evaluation.suites import SUITES, read_suite


@click.command(help=__doc__)
@click.argument("suite", type=click.Choice(list(SUITES)))
@click.argument("path")
@click.argument("output", type=click.Path(path_type=Path))
def main(suite, path, output):
    lines = [json.dumps(row) + "\n" for row in read_suite(suite, path)]
    output.write_text("".join(lines))
    click.echo(f"{len(lines)} rows")


if __name__ == "__main__":
    main()
