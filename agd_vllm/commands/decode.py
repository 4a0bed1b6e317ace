"""`agd-vllm decode`: a dataset in, a run directory out."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import click

from agd_vllm.commands import options as shared
from agd_vllm.commands.groups import GroupedCommand
from agd_vllm.commands.process import ROWS_FAILED, quiet_unless
from agd_vllm.strategies.registry import STRATEGIES


def _strategies() -> str:
    """How each strategy chooses a token, as a paragraph of --help that keeps its lines."""
    lines = ["\b", "How a token is chosen (--strategy):"]
    for name, strategy in STRATEGIES.items():
        first, *rest = textwrap.wrap(strategy.summary, 90, break_on_hyphens=False)
        lines += [f"  {name:17} {first}", *(f"  {'':17} {line}" for line in rest)]
    return "\n".join(lines)


@click.command(cls=GroupedCommand)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--output", help="Output directory, local or any fsspec URL (not needed with --dry-run).")
@shared.model_option
@shared.strategy_option
@shared.strategy_flags
@shared.roi_option
@shared.engines_option
@shared.workers_option
@shared.length_options
@shared.dtype_option
@shared.vllm_options
@shared.limit_option
@click.option("--resume/--no-resume", default=True, show_default=True, help="Resume an earlier run.")
@shared.seed_option
@click.option(
    "--part-rows",
    type=int,
    default=500,
    show_default=True,
    callback=shared.at_least_one,
    help="Results become durable after N rows ...",
)
@click.option("--part-seconds", type=float, default=60, show_default=True, help="... or after this many seconds.")
@click.option(
    "--dry-run", is_flag=True, help="Load no model: count the rows and show the first regions token by token."
)
@click.option("--log-json", metavar="FILE", help="One JSON line for every fault and restart.")
@click.option("--trace", metavar="FILE", help="A timeline of the run for chrome://tracing or ui.perfetto.dev.")
@shared.process_options
@click.pass_context
def decode(
    ctx: click.Context,
    inputs: tuple[str, ...],
    output: str | None,
    limit: int | None,
    resume: bool,
    part_rows: int,
    part_seconds: float,
    dry_run: bool,
    **options: Any,
) -> None:
    """Decode a dataset: JSON lines, a JSON array or Parquet, also packed with gz, bz2, xz or zst; local paths or
    fsspec URLs.

    Results land in DIR/results, guided steps in DIR/steps, failed rows in DIR/errors.jsonl.
    """
    quiet_unless(options["debug"])
    from agd_vllm.pipeline.options import DecoderOptions
    from agd_vllm.pipeline.run import RunSettings, preview, run_dataset

    decoder_options = DecoderOptions.of(**shared.given_options(options))
    if dry_run:
        failed = preview(inputs, decoder_options, limit, output)
    else:
        if output is None:
            raise click.UsageError("--output DIR is missing; say where the results go (or try --dry-run)")
        failed = run_dataset(RunSettings(inputs, output, limit, resume, part_rows, part_seconds), decoder_options)
    ctx.exit(ROWS_FAILED if failed else 0)


decode.help = f"{inspect.cleandoc(decode.help)}\n\n{_strategies()}"
