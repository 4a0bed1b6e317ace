"""`agd-vllm calibrate`: a dataset in, the gate's threshold out."""

from __future__ import annotations

from typing import Any

import click

from agd_vllm.commands import options as shared
from agd_vllm.commands.process import ROWS_FAILED, quiet_unless


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--output", required=True, metavar="DIR", help="Output directory, local or any fsspec URL.")
@shared.model_option
@click.option(
    "--percentile",
    type=float,
    default=80,
    show_default=True,
    help="Of the entropies, 0 to 100: at 80 the gate opens at about one step in five.",
)
@shared.engines_option
@shared.length_options
@shared.dtype_option
@shared.vllm_options
@shared.limit_option
@shared.process_options
@click.pass_context
def calibrate(
    ctx: click.Context,
    inputs: tuple[str, ...],
    output: str,
    percentile: float,
    limit: int | None,
    **options: Any,
) -> None:
    """Find a model's gate threshold (--tau of decode) on a dataset of yours, as in arXiv 2509.26307.

    Decodes the dataset greedily and takes a percentile of the entropies of its tokens. Writes DIR/tau.json,
    DIR/entropy.parquet (id, step, entropy in nats) and DIR/entropy.png (a histogram).
    """
    quiet_unless(options["debug"])
    from agd_vllm.pipeline import calibration
    from agd_vllm.pipeline.options import DecoderOptions

    decoder_options = DecoderOptions.of(**options, strategy="greedy", entropies=True)
    try:
        failed = calibration.calibrate(
            calibration.CalibrationSettings(inputs, output, percentile, limit), decoder_options
        )
    except KeyboardInterrupt:
        raise RuntimeError("interrupted before the end; no file was written") from None
    ctx.exit(ROWS_FAILED if failed else 0)
