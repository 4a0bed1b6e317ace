"""Strategies to compare: NAME[:KEY=VALUE...], each a set of decoder options of its own; a value may hold colons."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.strategies.agd import INLINE, Agd
from agd_vllm.strategies.greedy import Greedy
from agd_vllm.strategies.registry import OPTIONS, STRATEGIES, owners

# What is the whole evaluation's, not a strategy's: quality is measured under one model, and the rest is its output.
NOT_A_KEY = ("model", "strategy", "engine_args", "chat_template_kwargs", "log_json", "trace", "debug")

_KEY = re.compile("[A-Za-z][A-Za-z_-]*")


@dataclass(frozen=True, slots=True)
class EvaluatedStrategy:
    """One strategy: as it was named, the folder of its run, its options.

    `names_region`: it names a region itself (roi, roi-heads), which takes the place of the rows'.
    """

    name: str
    folder: str
    options: DecoderOptions
    names_region: bool


def parse_strategies(text: str, given: Mapping[str, Any]) -> list[EvaluatedStrategy]:
    """The comma-separated strategies, with the `given` options, by their flat names, for what they do not set.

    Raises ValueError, in one line, also for an option of `given` that none of them has.
    """
    found: dict[str, EvaluatedStrategy] = {}
    for item in text.split(","):
        strategy = _parse(item.strip(), given)
        if strategy.folder in found:
            raise ValueError(
                f"--strategies: {found[strategy.folder].name} and {strategy.name} would share the folder "
                f"{strategy.folder}; name each once"
            )
        found[strategy.folder] = strategy
    chosen = [strategy.options.strategy for strategy in found.values()]
    for option in given.keys() & OPTIONS.keys():
        if not any(strategy.name in owners(option) for strategy in chosen):
            raise ValueError(
                f"{option}: no strategy here has this option; leave it out, or add {' or '.join(owners(option))}"
            )
    if given.get("attribution_workers") is not None and all(strategy.inline for strategy in chosen):
        raise ValueError("--attribution-workers: every strategy attributes inline, without workers; leave it out")
    return list(found.values())


def reference(strategies: Sequence[EvaluatedStrategy]) -> str:
    """The name of the strategy that the others are compared with: plain `greedy`, whatever else decodes greedily, or
    the first one."""
    names = [strategy.name for strategy in strategies]
    return Greedy.name if Greedy.name in names else names[0]


def _parse(item: str, given: Mapping[str, Any]) -> EvaluatedStrategy:
    name, *settings = item.split(":")
    values: dict[str, str] = {}
    last = ""
    for setting in settings:
        key, equals, value = setting.partition("=")
        if equals and _KEY.fullmatch(key):
            last = key.replace("-", "_")
            if last in values:
                raise ValueError(f"--strategies {item}: {key} is named twice; keep one of the two")
            values[last] = value
        elif last:
            # A value may hold colons, as URLs do.
            values[last] += f":{setting}"
        else:
            raise ValueError(f"--strategies {item}: {setting!r} is not KEY=VALUE")
    try:
        typed = typed_options(values)
        common = {key: value for key, value in given.items() if key not in OPTIONS or name in owners(key)}
        if name == Agd.name and typed.get("scorer") == INLINE:
            # Those of the other strategies.
            common = {
                key: value for key, value in common.items() if key not in ("attribution_workers", "attribution_dtype")
            }
        options = DecoderOptions.of(strategy=name, **common | typed)
    except ValueError as error:
        raise ValueError(f"--strategies {item}: {error}") from error
    folder = re.sub("[^A-Za-z0-9]", "-", item)
    return EvaluatedStrategy(item, folder, options, bool(values.keys() & {"roi", "roi_heads"}))


def typed_options(values: Mapping[str, Any], refused: Collection[str] = NOT_A_KEY) -> dict[str, Any]:
    """Flat options but the `refused`, each value (a string, or of its type already) as that option's type.

    Raises ValueError for an unknown field or a value of another type, in one line.
    """
    typed = {}
    types = {name: kind for name, kind in flat_types().items() if name not in refused}
    for key, value in values.items():
        if key not in types:
            known = ", ".join(name.replace("_", "-") for name in types)
            raise ValueError(f"unknown key {key.replace('_', '-')!r}; known: {known}")
        try:
            typed[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"{key.replace('_', '-')} {value!r}: {reason}") from error
    return typed


def flat_types() -> dict[str, Any]:
    """The type of every option by its flat name, of all strategies, too."""
    types = get_type_hints(DecoderOptions) | {"strategy": str}
    for strategy in STRATEGIES.values():
        hints = get_type_hints(strategy)
        types |= {option.name: hints[option.name] for option in fields(strategy)}
    return types
