"""Paired bootstrap over rows: how sure a difference between two strategies on the same rows is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
_CHUNK = 500  # resamples at a time, so that memory stays small for many rows


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference with the percentile interval of its resamples."""

    difference: float
    low: float
    high: float


def paired_difference(ours: Sequence[int], theirs: Sequence[int], totals: Sequence[int]) -> Interval | None:
    """Difference of two accuracies over the same rows, `ours` minus `theirs`, with a 95 % percentile interval.

    For row i `ours[i]` and `theirs[i]` of `totals[i]` rules are kept, and an accuracy is the sum of kept rules over
    the sum of rules: with all totals 1 the prompt-level one, else the instruction-level one. Whole rows are drawn
    with replacement, the same ones for both, so that rules of a row stay together, and the draws are the same
    every time. None where there is no row.
    """
    counts, total = np.array([ours, theirs], float), np.array(totals, float)
    if not total.size:
        return None
    rng = np.random.default_rng(SEED)
    change, rows = counts[0] - counts[1], total.size
    resampled = []
    for _ in range(0, RESAMPLES, _CHUNK):
        drawn = rng.multinomial(rows, np.full(rows, 1 / rows), size=_CHUNK)  # [_CHUNK, rows]: how often each is drawn
        resampled.append(drawn @ change / (drawn @ total))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(resampled), [tail, 100 - tail])
    return Interval(float(change.sum() / total.sum()), float(low), float(high))
