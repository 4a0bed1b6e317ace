"""`agd-vllm lm-eval`: lm-evaluation-harness with this project's model known to it."""

from __future__ import annotations

import sys

import click

from agd_vllm.commands.process import quiet_unless


@click.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
    short_help="Run lm-eval's tasks under AGD.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """lm-evaluation-harness (`pip install '.[eval]'`) with the model `agd-vllm` beside its own; its own arguments.

    agd-vllm lm-eval run --model agd-vllm --model_args pretrained=M,tau=1.734 --tasks ifeval --apply_chat_template
    """
    quiet_unless(False)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise click.UsageError(f"lm-eval is not installed ({error}): pip install 'agd-vllm[eval]'") from error
    import agd_vllm.evaluation.lm_eval  # noqa: F401 (makes the model known)

    # lm-eval reads the process's own arguments.
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
