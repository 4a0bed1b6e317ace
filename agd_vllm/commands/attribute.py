"""`agd-vllm attribute`: the relevance of every token of prompt and answer, as data."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from agd_vllm.commands import options as shared
from agd_vllm.commands.process import ROWS_FAILED, quiet_unless
from agd_vllm.strategies.strategy import DTYPES

INTEGRATED = "ig"
# What decodes answers where rows give none: with --run the answers are there.
DECODING = ("engines", "max_tokens", "max_model_len", "dtype", "engine_args", "chat_template_kwargs", "seed")


@click.command()
@click.argument("inputs", nargs=-1, metavar="[INPUT...]")
@click.option("--output", help="Output directory for answers and relevance, local or any fsspec URL.")
@click.option("--run", "run_directory", metavar="RUN_DIR", help="Attribute the answers of a run, into RUN_DIR.")
@click.option("--model", help="Local model folder or Hugging Face id [default with --run: the run's].")
@click.option(
    "--max-steps",
    type=int,
    callback=shared.at_least_one,
    help="Steps of each answer: guided ones that changed the token first, then other guided ones, then the rest, in "
    "order [default: all].",
)
@click.option(
    "--rule",
    type=click.Choice(["attnlrp", "cplrp", "ixg", INTEGRATED]),
    help="ig: integrated gradients, twenty times the work of the others [default: attnlrp, with --run the run's]",
)
@shared.engines_option
@shared.workers_option
@shared.length_options
@shared.dtype_option
@click.option("--attribution-dtype", type=click.Choice(DTYPES), help="[default: as --dtype]")
@shared.vllm_options
@shared.limit_option
@shared.seed_option
@shared.process_options
@click.pass_context
def attribute(
    ctx: click.Context,
    inputs: tuple[str, ...],
    output: str | None,
    run_directory: str | None,
    model: str | None,
    max_steps: int | None,
    rule: str | None,
    attribution_workers: int | None,
    attribution_dtype: str | None,
    limit: int | None,
    trust_remote_code: bool,
    debug: bool,
    **decoding: Any,
) -> None:
    """Write the relevance of every prompt token, and every earlier output token, for each token of the answers.

    Either of the answers of a run (--run), or of those to INPUT: a last message of role assistant is the row's answer;
    other rows are answered greedily first. Relevance lands in DIR/relevance, answers to INPUT in DIR/results.
    """
    quiet_unless(debug)
    if run_directory is None:
        _check_input(inputs, output, model)
    else:
        _check_run(ctx, inputs, output)
    from agd_vllm.engine.model_copies import check_for_copies
    from agd_vllm.output.summary import count_outputs
    from agd_vllm.pipeline.options import DecoderOptions
    from agd_vllm.pipeline.relevance import RelevanceSettings, attribute_run
    from agd_vllm.pipeline.run import RunSettings, run_dataset

    failed = 0
    if run_directory is None:
        # Before anything is decoded.
        check_for_copies(decoding["engine_args"], decoding["dtype"])
        common = {"trust_remote_code": trust_remote_code, "debug": debug}
        options = DecoderOptions.of(model, "greedy", **common, **decoding)
        assert output is not None  # _check_input
        failed = run_dataset(RunSettings(inputs, output, limit, given_answers=True), options)
        if failed and not count_outputs(output)["decoded"]:
            ctx.exit(ROWS_FAILED)
        run_directory = output
    failed += attribute_run(
        RelevanceSettings(
            run=run_directory,
            model=model,
            rule=rule,
            dtype=attribution_dtype,
            max_steps=max_steps,
            limit=limit,
            workers=attribution_workers or 1,
            trust_remote_code=trust_remote_code,
            debug=debug,
        )
    )
    ctx.exit(ROWS_FAILED if failed else 0)


def _check_input(inputs: tuple[str, ...], output: str | None, model: str | None) -> None:
    if not inputs:
        raise click.UsageError("INPUT is missing; name files with rows, or a run with --run RUN_DIR")
    for option, given in (("--output DIR", output), ("--model", model)):
        if given is None:
            raise click.UsageError(f"{option} is missing; it is needed beside INPUT")


def _check_run(ctx: click.Context, inputs: tuple[str, ...], output: str | None) -> None:
    if inputs or output:
        raise click.UsageError(
            "--run attributes the answers of a run, into its directory; leave INPUT and --output out"
        )
    for parameter in ctx.command.params:
        if parameter.name in DECODING and ctx.get_parameter_source(parameter.name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} is for decoding; with --run the answers are there")
