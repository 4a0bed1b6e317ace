"""`agd-vllm report`: a run to look at."""

from __future__ import annotations

import click

from agd_vllm.commands import options as shared
from agd_vllm.commands.process import quiet_unless


@click.command()
@click.argument("run_directory", metavar="RUN_DIR")
@click.option("--compare", metavar="OTHER_RUN", help="Show another run of the same rows beside it.")
@click.option("--output", metavar="FILE", help="[default: RUN_DIR/report.html]")
@click.option(
    "--max-rows",
    type=int,
    default=500,
    show_default=True,
    callback=shared.at_least_one,
    help="Rows that the page holds, in the order of their ids.",
)
@click.option("--model", help="Where the tokenizer is [default: where the run found its model].")
@shared.process_options
def report(
    run_directory: str,
    compare: str | None,
    output: str | None,
    max_rows: int,
    model: str | None,
    trust_remote_code: bool,
    debug: bool,
) -> None:
    """Write a run as one HTML page: its figures, and its answers with what guided them.

    The page needs no network. A heat map of the prompt is shown where `agd-vllm attribute --run RUN_DIR` was run.
    """
    quiet_unless(debug)
    from agd_vllm.reporting.report import ReportSettings, write_report

    settings = ReportSettings(run_directory, compare, output, max_rows, model, trust_remote_code)
    path, shown, left_out = write_report(settings)
    rest = f"; {left_out:,} more are left out (--max-rows)" if left_out else ""
    click.echo(f"{shown:,} row{'' if shown == 1 else 's'}{rest}")
    click.echo(f"report: {path}")
