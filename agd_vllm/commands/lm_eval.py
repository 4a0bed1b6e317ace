"""`agd-vllm lm-eval`: lm-evaluation-harness with this project's model known to it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator

import click

from agd_vllm.commands.process import quiet_unless
from agd_vllm.input.named_once import NamedTwice, named_once

# Its options that take KEY=VALUE,... or JSON, of which it takes the last where a key is named twice.
KEY_VALUES = ("--model_args", "-a"), ("--gen_kwargs",), ("--metadata",)

_STRING = re.compile(r""""[^"]*"|'[^']*'""")
_BRACKETED = re.compile(r"[\[({][^\[\](){}]*[\])}]")


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

    _refuse_names_given_twice(arguments)
    # lm-eval reads the process's own arguments.
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


def _refuse_names_given_twice(arguments: tuple[str, ...]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names in KEY_VALUES:
        parser.add_argument(*names, nargs="+", action="extend", default=[])
    try:
        given = vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError:
        return  # lm-eval says it
    for option, items in given.items():
        try:
            named_once([pair for item in items for pair in _pairs(item)])
        except NamedTwice as twice:
            raise click.UsageError(f"--{option}: {twice}") from twice


def _pairs(item: str) -> Iterator[tuple[str, None]]:
    """The keys of a JSON object or of KEY=VALUE,... where values may be lists, objects or strings with commas."""
    try:
        value = json.loads(item, object_pairs_hook=named_once)
    except json.JSONDecodeError:
        bare, brackets = _STRING.sub("", item), 1
        while brackets:
            bare, brackets = _BRACKETED.subn("", bare)
        yield from ((part.partition("=")[0], None) for part in bare.split(",") if part)
    else:
        if isinstance(value, dict):
            yield from ((key, None) for key in value)
