"""How much a worker is sent at once, by what its passes cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agd_vllm.records import Roi, ScoreRequest

if TYPE_CHECKING:
    from agd_vllm.attribution.forward import ForwardScorer

SIZES = (1, 16, 32, 64, 128, 256, 512)
"""Tokens of the calls that are timed."""

CALL_S = 0.002
"""What a call costs beside its scoring: Ray, and the pool's own turn."""

NEAR_THE_BEST = 0.9
"""Of the tokens per second that the best size reaches: where a call is long enough."""


@dataclass(frozen=True, slots=True)
class BatchBounds:
    """Of one call: requests, tokens that the worker has to compute (or one sequence's, if it has more), and those of
    prompts ahead of need. The defaults are a CPU's: enough to fill its matrix products, few enough that steps do not
    wait long for the prompts of others."""

    requests: int = 64
    tokens: int = 256
    ahead: int = 128


def bounds_by_cost(costs: Sequence[tuple[int, float]]) -> BatchBounds:
    """From (tokens, seconds) of calls: the smallest size that is about as good as the best, tokens per second.

    More in a call would only have it take longer, and those that come meanwhile wait. A step is one token at least, and
    prompts ahead of need, which are sent where no step waits, may take as long as a call of steps.
    """
    speeds = {tokens: tokens / (seconds + CALL_S) for tokens, seconds in costs}
    enough = NEAR_THE_BEST * max(speeds.values())
    tokens = min(tokens for tokens, speed in speeds.items() if speed >= enough)
    return BatchBounds(requests=tokens, tokens=tokens, ahead=tokens)


def time_calls(scorer: ForwardScorer) -> list[tuple[int, float]]:
    """(Tokens, seconds) of a prompt, or of as many first tokens as that, whichever takes longer.

    Each is run once before: what is compiled at a first call is compiled now. Nothing is held afterwards.
    """
    return [(size, max(_seconds(scorer, [size]), _seconds(scorer, [1] * size))) for size in SIZES]


def _seconds(scorer: ForwardScorer, lengths: Sequence[int]) -> float:
    names = [f"timed {row}" for row in range(len(lengths))]
    for _ in range(2):
        # No two begin alike, so that none waits for another.
        requests = [
            ScoreRequest(name, 0, [row] * length, Roi(), (0,))
            for row, (name, length) in enumerate(zip(names, lengths, strict=True))
        ]
        begun = time.perf_counter()
        scorer.score(requests)
        seconds = time.perf_counter() - begun
        for name in names:
            scorer.discard(name)
    return seconds
