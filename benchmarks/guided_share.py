"""Tokens/s against the share of guided steps: `benchmarks.throughput` at several thresholds tau, and a plot of them.

    python -m benchmarks.guided_share --model M --input X --taus 0,1,1.734,2.5,inf --json OUT.json --plot OUT.png

Other options go to `benchmarks.throughput` as they are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.machine import write_result

SERIES = {
    "greedy": "plain vLLM, greedy",
    "agd": "agd-vllm",
    "paper": "the paper's loop",
}


def measure(tau: str, options: list[str], folder: Path) -> dict:
    output = folder / f"{tau}.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.throughput", "--tau", tau, "--json", str(output), *options], check=True
    )
    return json.loads(output.read_text())


def plot(points: list[dict], path: Path) -> None:
    points = sorted(points, key=lambda point: point["guided_share"])
    figure, axes = plt.subplots(figsize=(6.4, 4), dpi=150, layout="constrained")
    for marker, (key, label) in zip("so^", SERIES.items(), strict=True):
        known = [point for point in points if key in point["tokens_per_second"]]
        shares = [100 * point["guided_share"] for point in known]
        axes.plot(shares, [point["tokens_per_second"][key] for point in known], marker=marker, label=label)
    for point in points:
        tau = "inf" if point["tau"] is None else f"{point['tau']:g}"
        place = (100 * point["guided_share"], point["tokens_per_second"]["agd"])
        axes.annotate(f"tau {tau}", place, textcoords="offset points", xytext=(4, 7), fontsize=8)
    axes.margins(x=0.1)  # room for the words at the last point
    axes.set(yscale="log", xlabel="guided steps, % of all tokens", ylabel="tokens/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path)


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--taus", default="0,1,1.734,2.5,inf", show_default=True)
@click.option("--json", "output", required=True, type=click.Path(path_type=Path))
@click.option("--plot", "picture", required=True, type=click.Path(path_type=Path))
@click.pass_context
def main(ctx, taus, output, picture):
    with tempfile.TemporaryDirectory() as folder:
        points = [measure(tau, ctx.args, Path(folder)) for tau in taus.split(",")]
    write_result(output, {"points": points})
    plot(points, picture)


if __name__ == "__main__":
    main()
