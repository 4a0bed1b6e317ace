"""`agd-vllm evaluate`: a benchmark under several strategies, one table."""

from __future__ import annotations

from typing import Any

import click

from agd_vllm.commands import options as shared
from agd_vllm.commands.groups import GroupedCommand
from agd_vllm.commands.process import ROWS_FAILED, quiet_unless
from agd_vllm.evaluation.suites import SUITES
from agd_vllm.strategies.registry import OPTIONS


@click.command(cls=GroupedCommand)
@click.option("--suite", type=click.Choice(list(SUITES)), required=True)
@click.option(
    "--data",
    metavar="PATH",
    help="The benchmark's file as it is published (JSON or JSONL, packed or not); ifbench's is in its package.",
)
@click.option("--output", required=True, help="Directory of the runs and of table.md and table.json.")
@shared.model_option
@click.option(
    "--strategies",
    required=True,
    metavar="NAME[:KEY=VALUE...],...",
    help="For example greedy,agd,agd:tau=0:rule=ixg,dola:dola-layers=2+4,steer:steering=v.safetensors. Keys are "
    "options of decode; roi and roi-heads take the place of the rows' own region.",
)
@shared.limit_option
@click.option(
    "--distractors",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="nq: passages of other rows beside a row's own, drawn with --seed.",
)
@shared.own_options("tau", "top_k", "min_prob", "attribution_dtype")
@shared.roi_option
@shared.engines_option
@shared.workers_option
@shared.length_options
@shared.dtype_option
@shared.vllm_options
@shared.seed_option
@shared.process_options
@click.pass_context
def evaluate(
    ctx: click.Context,
    suite: str,
    data: str | None,
    output: str,
    strategies: str,
    limit: int | None,
    distractors: int,
    **options: Any,
) -> None:
    """Decode a benchmark with several strategies and score them.

    The region is what the benchmark wants followed: the system prompt (iheval), the user message, which holds task and
    rules (ifbench, ifeval), the document or documents (nq), the row's own or --roi (jsonl: rows in the input format
    whose metadata is {"answers": [...]} or {"instruction_id_list": [...], "kwargs": [...]}). Each strategy's run is a
    directory under DIR as decode writes it; the same command resumes it.
    """
    quiet_unless(options["debug"])
    from agd_vllm.evaluation.evaluate import EvaluationSettings
    from agd_vllm.evaluation.evaluate import evaluate as run_evaluation
    from agd_vllm.evaluation.strategies import parse_strategies
    from agd_vllm.pipeline.options import DecoderOptions

    parsed = parse_strategies(strategies, shared.given_options(options))
    common = DecoderOptions.of(strategy="greedy", **{k: v for k, v in options.items() if k not in OPTIONS})
    settings = EvaluationSettings(suite, data, output, limit, distractors)
    failed = run_evaluation(settings, common, parsed, click.echo)
    ctx.exit(ROWS_FAILED if failed else 0)
