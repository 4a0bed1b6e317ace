"""Options that several commands share; their names are those of `DecoderOptions` and `RunSettings`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import Field
from typing import Any

import click

from agd_vllm.commands.groups import GroupedOption
from agd_vllm.input.named_once import NamedTwice, named_once, parse_json
from agd_vllm.strategies.agd import Agd
from agd_vllm.strategies.registry import OPTIONS, STRATEGIES, owners

Decorator = Callable[[Callable], Callable]


def _together(*decorators: Decorator) -> Decorator:
    """One decorator out of several; `--help` lists their options in this order."""

    def decorate(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _key_values(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE, repeated; a value is read as JSON where it is JSON, as a word where it is not."""
    parsed: list[tuple[str, Any]] = []
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{item!r} is not KEY=VALUE")
        try:
            parsed.append((key, parse_json(value)))
        except NamedTwice as twice:
            raise click.BadParameter(f"{key}: {twice}") from twice
        except json.JSONDecodeError:
            parsed.append((key, value))
    try:
        return named_once(parsed)
    except NamedTwice as twice:
        raise click.BadParameter(f"{twice}") from twice


def _json_object(_ctx: click.Context, _param: click.Parameter, given: str) -> dict[str, Any]:
    try:
        parsed = parse_json(given)
    except NamedTwice as twice:
        raise click.BadParameter(f"{twice}") from twice
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise click.BadParameter('not a JSON object, e.g. {"enable_thinking": false}')
    return parsed


def at_least_one(ctx: click.Context, _param: click.Parameter, given: int | None) -> int | None:
    """For click: a whole number from 1, or none."""
    if given is not None and given < 1:
        raise click.BadParameter(f"{given}: at least 1")
    return given


model_option = click.option("--model", required=True, help="Local model folder or Hugging Face id.")

limit_option = click.option("--limit", type=int, callback=at_least_one, help="Only the first N rows.")


def own_options(*names: str) -> Decorator:
    """The flags of strategies' options, as their dataclasses name them; None where the command line gives none."""
    return _together(*(_own_option(OPTIONS[name]) for name in names))


def _own_option(option: Field) -> Decorator:
    """Without a default, so that an option of another strategy is refused only where the command line gives it."""
    flag, told, default = option.name.replace("_", "-"), option.metadata, option.default
    shown = told["help"] if default is None else f"{told['help']} [default: {default}]"
    common = {"cls": GroupedOption, "group": f"Options of {', '.join(owners(option.name))}", "help": shown}
    if isinstance(default, bool):
        return click.option(f"--{flag}/--no-{flag}", option.name, default=None, **common)
    kind = click.Choice(told["choices"]) if told["choices"] else {"float": float, "int": int}.get(f"{option.type}", str)
    return click.option(f"--{flag}", option.name, type=kind, metavar=told["metavar"], **common)


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """`options` without those of strategies that the command line does not give."""
    return {name: value for name, value in options.items() if name not in OPTIONS or value is not None}


strategy_flags = own_options(*(name for name, option in OPTIONS.items() if option.metadata["flag"]))

strategy_option = click.option(
    "--strategy",
    type=click.Choice(list(STRATEGIES)),
    default=Agd.name,
    show_default=True,
    help="How the next token is chosen: see above.",
)

roi_option = click.option(
    "--roi",
    metavar="SELECTOR",
    help="Region for rows that name none: role=ROLE, message=N, text=WORDS, or none (such rows are decoded unguided) "
    "[default: role=system, or none with --roi-heads].",
)

engines_option = click.option(
    "--engines", type=int, default=1, show_default=True, help="vLLM engines, one Ray actor each."
)

workers_option = click.option(
    "--attribution-workers", type=int, help="Copies of the model for scoring [default: 1]; none with --scorer inline."
)

length_options = _together(
    click.option("--max-tokens", type=int, default=256, show_default=True, help="For rows that name none."),
    click.option(
        "--max-model-len", type=int, help="Longest prompt and output together, in tokens [default: the model's]."
    ),
)

dtype_option = click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True
)

vllm_options = _together(
    click.option(
        "--engine-arg",
        "engine_args",
        multiple=True,
        callback=_key_values,
        metavar="KEY=VALUE",
        help="Passed to vLLM's engine arguments; repeatable (gpu_memory_utilization=0.5, tensor_parallel_size=2, ...).",
    ),
    click.option("--chat-template-kwargs", default="{}", callback=_json_object, metavar="JSON"),
)

seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Of vLLM, and of random-candidate's draws."
)

process_options = _together(
    click.option("--trust-remote-code", is_flag=True, help="Run code that the model's folder brings along."),
    click.option("--debug", is_flag=True, help="Tracebacks, and the logs of vLLM and Ray."),
)
