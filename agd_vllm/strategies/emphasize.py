"""AGD's baseline without attribution: a prompt that repeats its region."""

from __future__ import annotations

from dataclasses import dataclass

from agd_vllm.strategies.greedy import Greedily


@dataclass(frozen=True, kw_only=True)
class Emphasize(Greedily):
    """Greedy, after a prompt that repeats the region at the end of the last user message."""

    name = "emphasize"
    summary = "the most probable token, with the region repeated at the end of the last user message"
    emphasized = True
