"""What every scorer offers, and the factory that loads the one asked for and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from agd_vllm.records import ScoreRequest

SCORERS = ("forward", "lxt")
RULES = ("attnlrp", "cplrp", "ixg")
INTEGRATED = "ig"


class Scorer(Protocol):
    """Scores candidates of guided steps.

    `stateful`: requests may carry only the tokens since the last step. `cache_tokens`: how many tokens it then holds
    between calls, over all sequences (None where it is not stateful).
    """

    stateful: bool
    cache_tokens: int | None

    def score(self, requests: Sequence[ScoreRequest]) -> Sequence[list[float] | None]:
        """One list of S(c, R) per request, in the order of its candidates.

        None: a stateful scorer no longer holds the tokens before the request's `start` (or holds them under another
        region); send the sequence again with `start` 0. Raises ValueError for a region outside the tokens or the model.
        """

    def release(self, sequence: str) -> None:
        """The sequence is finished: what is held for it may go."""


def load_scorer(
    name: str,
    model_path: str,
    *,
    rule: str = "attnlrp",
    cache_bytes: int | None = None,
    max_model_len: int | None = None,
    **loading: Any,
) -> Scorer:
    """Load a scorer by its name on the command line. Only that scorer's module is imported.

    `forward`: forward-mode tangents with a cache of at most `cache_bytes` (default: an eighth of the device's memory),
    for sequences of at most `max_model_len` tokens (default: what the model is made for).
    `lxt`: the reference, reverse mode; it keeps no cache, and with rule `ig` gives relevance, not scores. `loading`: as
    for `hf_model.load_model`. Raises ValueError for an unknown name or rule and for a model that attribution cannot
    read.
    """
    if name not in SCORERS:
        raise ValueError(f"unknown scorer {name!r}; known: {', '.join(SCORERS)}")
    if name == "lxt" and rule == INTEGRATED:
        from agd_vllm.attribution.integrated_gradients import IntegratedGradients

        return IntegratedGradients(model_path, **loading)
    if rule not in RULES:
        raise ValueError(f"unknown attribution rule {rule!r}; known: {', '.join(RULES)}")
    if name == "lxt":
        from agd_vllm.attribution.reference import ReferenceScorer

        return ReferenceScorer(model_path, rule=rule, **loading)
    from agd_vllm.attribution.forward import ForwardScorer

    return ForwardScorer(model_path, rule=rule, cache_bytes=cache_bytes, max_model_len=max_model_len, **loading)
