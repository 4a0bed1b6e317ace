"""The command line: its commands, and how one ends: every failure is one line and an exit status."""

from __future__ import annotations

import io
import sys
import traceback

import click

from agd_vllm.commands.attribute import attribute
from agd_vllm.commands.calibrate import calibrate
from agd_vllm.commands.decode import decode
from agd_vllm.commands.evaluate import evaluate
from agd_vllm.commands.heads import heads
from agd_vllm.commands.lm_eval import lm_eval
from agd_vllm.commands.model import model
from agd_vllm.commands.process import OTHER, UNUSABLE
from agd_vllm.commands.report import report
from agd_vllm.commands.vectors import vectors
from agd_vllm.pipeline.signals import as_interrupt
from agd_vllm.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="agd-vllm")
def cli() -> None:
    """Attribution-guided decoding (AGD) of whole datasets on vLLM and Ray."""


for command in (decode, evaluate, report, attribute, calibrate, heads, vectors, lm_eval, model):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits with the contract's status; one readable line on stderr for what went wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _escape_what_streams_cannot_hold()
    try:
        with as_interrupt():
            status = cli.main(arguments, prog_name="agd-vllm", standalone_mode=False)
    except click.ClickException as error:
        status = _fail(error.format_message(), UNUSABLE)
    except click.Abort:
        status = _fail("interrupted; the same command resumes the run", OTHER)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        status = _fail_with(error)
    sys.stdout.flush()
    sys.exit(status if isinstance(status, int) else 0)


def _escape_what_streams_cannot_hold() -> None:
    """Whatever a terminal's encoding is, a character that it has not must not end a run: it is shown as \\u...."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not one that is closed, or that a caller has put in its place
            stream.reconfigure(errors="backslashreplace")


def _fail_with(error: Exception) -> int:
    from ray.exceptions import RayError

    from agd_vllm.input.files import InputUnusable
    from agd_vllm.output.storage import OutputFailed
    from agd_vllm.output.summary import OutputUnusable

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
