"""Strategies to compare: NAME[:KEY=VALUE...], each a set of decoder options of its own; a value may hold colons."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from agd_vllm.pipeline.options import INLINE, DecoderOptions
from agd_vllm.pipeline.strategies import Agd, Greedy

# What is the whole evaluation's, not a strategy's: quality is measured under one model, and the rest is its output.
NOT_A_KEY = ("model", "strategy", "engine_args", "chat_template_kwargs", "log_json", "trace", "debug")

_KEY = re.compile("[A-Za-z][A-Za-z_-]*")


@dataclass(frozen=True, slots=True)
class Strategy:
    """One strategy: as it was named, the folder of its run, its options.

    `names_region`: it names a region itself (roi, roi-heads), which takes the place of the rows'.
    """

    name: str
    folder: str
    options: DecoderOptions
    names_region: bool


def parse_strategies(text: str, options: DecoderOptions) -> list[Strategy]:
    """The comma-separated strategies, with `options` for what they do not set. Raises ValueError, in one line."""
    found: dict[str, Strategy] = {}
    for item in text.split(","):
        strategy = _parse(item.strip(), options)
        if strategy.folder in found:
            raise ValueError(
                f"--strategies: {found[strategy.folder].name} and {strategy.name} would share the folder "
                f"{strategy.folder}; name each once"
            )
        found[strategy.folder] = strategy
    if options.attribution_workers is not None and all(strategy.options.inline for strategy in found.values()):
        raise ValueError("--attribution-workers: every strategy attributes inline, without workers; leave it out")
    return list(found.values())


def reference(strategies: Sequence[Strategy]) -> str:
    """The name of the strategy that the others are compared with: plain `greedy`, whatever else decodes greedily, or
    the first one."""
    names = [strategy.name for strategy in strategies]
    return Greedy.name if Greedy.name in names else names[0]


def _parse(item: str, options: DecoderOptions) -> Strategy:
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
        if name == Agd.name and typed.get("scorer", options.scorer) == INLINE:
            # Those of the other strategies.
            typed = {"attribution_workers": None, "attribution_dtype": None} | typed
        changed = dataclasses.replace(options, strategy=name, **typed)
    except ValueError as error:
        raise ValueError(f"--strategies {item}: {error}") from error
    folder = re.sub("[^A-Za-z0-9]", "-", item)
    return Strategy(item, folder, changed, bool(values.keys() & {"roi", "roi_heads"}))


def typed_options(values: Mapping[str, Any], refused: Collection[str] = NOT_A_KEY) -> dict[str, Any]:
    """Fields of DecoderOptions but the `refused`, each value (a string, or of its type already) as that field's type.

    Raises ValueError for an unknown field or a value of another type, in one line.
    """
    typed = {}
    types = {name: kind for name, kind in get_type_hints(DecoderOptions).items() if name not in refused}
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
