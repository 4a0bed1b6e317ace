"""All strategies, and which of them has which option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from agd_vllm.strategies.agd import Agd
from agd_vllm.strategies.cad import Cad
from agd_vllm.strategies.dola import Dola
from agd_vllm.strategies.emphasize import Emphasize
from agd_vllm.strategies.greedy import Greedy
from agd_vllm.strategies.random_candidate import RandomCandidate
from agd_vllm.strategies.steer import Steer
from agd_vllm.strategies.strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    each.name: each for each in (Agd, Greedy, Cad, Dola, Steer, Emphasize, RandomCandidate)
}
# Every option of a strategy, by name.
OPTIONS: dict[str, Field] = {option.name: option for strategy in STRATEGIES.values() for option in fields(strategy)}


def owners(option: str) -> list[str]:
    """The names of the strategies that have this option."""
    return [name for name, strategy in STRATEGIES.items() if any(own.name == option for own in fields(strategy))]


def make_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """The strategy of that name with these `options`, defaults for the rest.

    Raises ValueError, in one line, for an unknown name, an option of another strategy, and a value it cannot use.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy {name!r}: choose one of {', '.join(STRATEGIES)}")
    for option in options:
        if name not in owners(option):
            raise ValueError(
                f"{option}: strategy {name} has no such option; leave it out, or choose strategy "
                f"{' or '.join(owners(option))}"
            )
    return STRATEGIES[name](**options)
