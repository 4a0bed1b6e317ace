"""What two engines that took turns made: medians, their ratio, and every turn."""

from __future__ import annotations

import json
import statistics
from typing import Any

import click

from benchmarks.machine import write_result


def write_comparison(output: str, ratio: str, speeds: dict[str, list[float]], **settings: Any) -> None:
    """Writes and prints the comparison. `speeds`: tokens/s by engine, turn by turn; `ratio` names the first engine's
    median over the second's."""
    medians = {name: statistics.median(of_engine) for name, of_engine in speeds.items()}
    first, second = medians.values()
    shown = {"tokens_per_second": medians, ratio: first / second}
    write_result(output, {**shown, "runs": speeds, **settings})
    click.echo(json.dumps(shown, indent=2))
