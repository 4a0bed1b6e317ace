"""Options that several commands share; their names are those of `DecoderOptions` and `RunSettings`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from agd_vllm.input.named_once import NamedTwice, named_once, parse_json

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
    if given is not None and given < 1:
        raise click.BadParameter(f"{given}: at least 1")
    return given


model_option = click.option("--model", required=True, help="Local model folder or Hugging Face id.")

limit_option = click.option("--limit", type=int, callback=at_least_one, help="Only the first N rows.")

strategy_options = _together(
    click.option(
        "--strategy",
        type=click.Choice(["agd", "greedy", "cad", "dola", "steer", "emphasize", "random-candidate"]),
        default="agd",
        show_default=True,
        help="How the next token is chosen: see above.",
    ),
    click.option(
        "--cad-alpha",
        type=float,
        default=0.5,
        show_default=True,
        help="For cad: (1 + alpha) * logits with the region - alpha * logits without; 0 is greedy.",
    ),
    click.option(
        "--dola-layers",
        default="low",
        show_default=True,
        metavar="low|high|I,J,...",
        help="For dola: the layers to contrast with, every other one of the lower or upper half, or by number (0: the "
        "embeddings).",
    ),
    click.option(
        "--dola-relative-top",
        type=float,
        default=0.1,
        show_default=True,
        help="For dola: of tokens with this share of the greatest probability; 1 is greedy.",
    ),
    click.option(
        "--steering",
        metavar="FILE",
        help="For steer: vectors by layer, which `agd-vllm vectors` makes; local or any fsspec URL.",
    ),
    click.option(
        "--steering-strength",
        type=float,
        default=1.0,
        show_default=True,
        help="For steer: how often the vector is added; 0 is greedy, below 0 away from what it stands for.",
    ),
    click.option(
        "--steering-norm/--no-steering-norm",
        default=True,
        show_default=True,
        help="For steer: whether each token's stream keeps its length.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        show_default=True,
        help="Logits of tokens that prompt or answer hold are divided by it, negative ones multiplied, before anything "
        "is chosen (the published DoLa scripts take 1.2); not with attribution workers, nor for random-candidate.",
    ),
)

gate_options = _together(
    click.option(
        "--tau", type=float, default=1.734, show_default=True, help="Gate threshold in nats; 0 guides every step."
    ),
    click.option("--top-k", type=int, default=5, show_default=True, help="Size of the candidate set."),
    click.option("--min-prob", type=float, default=0.05, show_default=True, help="Candidate floor pi_min."),
)

roi_option = click.option(
    "--roi",
    metavar="SELECTOR",
    help="Region for rows that name none: role=ROLE, message=N, text=WORDS, or none (such rows are decoded unguided) "
    "[default: role=system, or none with --roi-heads].",
)

scorer_options = _together(
    click.option(
        "--roi-heads",
        metavar="FILE",
        help='Attention heads as region of every row: JSON {"heads": [[layer, head], ...]}; alone or with token spans.',
    ),
    click.option(
        "--scorer",
        type=click.Choice(["forward", "inline", "lxt"]),
        default="forward",
        show_default=True,
        help="forward: forward-mode AttnLRP on attribution workers; inline: the same inside vLLM's own forward pass, "
        "without workers and pauses; lxt: the reference, in reverse mode.",
    ),
    click.option(
        "--rule",
        type=click.Choice(["attnlrp", "cplrp", "ixg"]),
        default="attnlrp",
        show_default=True,
        help="Attribution rule.",
    ),
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

attribution_dtype_option = click.option(
    "--attribution-dtype", type=click.Choice(["auto", "float32", "bfloat16"]), help="[default: as --dtype]"
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
