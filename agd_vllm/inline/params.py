"""What a request with inline attribution tells vLLM's worker: its gate and its region."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import msgspec
from vllm import SamplingParams

from agd_vllm.engine.batch_rows import checked_params
from agd_vllm.engine.channel import MAX_TOP_K
from agd_vllm.records import Roi, Span

EXTRA_ARG = "agd_inline"
MAX_KEY = 2**63 - 1
# Of float32, in which weights are.
MAX_WEIGHT = 3.4e38


class InlineParams(msgspec.Struct, frozen=True):
    """What a request carries in `SamplingParams.extra_args["agd_inline"]`; requests without it are left untouched.

    `key` names the row in reports. `rule` is the engine's. `salt` becomes the prompt's `cache_salt`, whatever that was
    (`scheduler`): cached blocks hold the tangents of one region. `spans` are (start, end, weight), `heads` (layer,
    head). `repetition_penalty` is applied before the gate: by vLLM's sampler on Model Runner V2, which is told of it,
    too, by our processor on V1.
    """

    key: int
    rule: str
    salt: str
    tau: float
    top_k: int
    min_prob: float
    spans: list[tuple[int, int, float]] = []
    heads: list[tuple[int, int]] = []
    repetition_penalty: float = 1.0

    @property
    def roi(self) -> Roi:
        return Roi(tuple(Span(*span) for span in self.spans), tuple(self.heads))

    def as_extra_args(self) -> dict[str, dict[str, Any]]:
        return {EXTRA_ARG: msgspec.to_builtins(self)}


def region_salt(roi: Roi, rule: str) -> str:
    """The `cache_salt` of prompts with this region: prefixes are shared by rows whose region is the same, whatever
    follows it."""
    spans = sorted((span.start, span.end, float(span.weight)) for span in roi.spans)
    heads = sorted(set(map(tuple, roi.heads)))
    return hashlib.sha256(repr((rule, spans, heads)).encode()).hexdigest()[:32]


def inline_params_of(
    roi: Roi, key: int, rule: str, tau: float, top_k: int, min_prob: float, repetition_penalty: float = 1.0
) -> InlineParams:
    """Parameters of a request with this region, by Roi; the rest as InlineParams has it."""
    spans = [(span.start, span.end, span.weight) for span in roi.spans]
    salt = region_salt(roi, rule)
    return InlineParams(key, rule, salt, tau, top_k, min_prob, spans, list(roi.heads), repetition_penalty)


def inline_params(sampling_params: SamplingParams) -> InlineParams | None:
    """None for a request without. Raises ValueError: vLLM then refuses the request, where an error in its worker would
    kill the engine."""
    params = checked_params(sampling_params, EXTRA_ARG, InlineParams)
    if params is None:
        return None
    if not params.tau >= 0 or not 2 <= params.top_k <= MAX_TOP_K or not 0 <= params.min_prob <= 1:
        raise ValueError(f"a gate needs tau >= 0, a top_k of 2 to {MAX_TOP_K} and 0 <= min_prob <= 1")
    if not 0 <= params.key <= MAX_KEY:
        raise ValueError(f"a key is a number from 0 to {MAX_KEY}")
    if not (params.repetition_penalty > 0 and math.isfinite(params.repetition_penalty)):
        raise ValueError("a repetition_penalty is a finite number above 0")
    if any(not 0 <= start < end or not abs(weight) <= MAX_WEIGHT for start, end, weight in params.spans):
        raise ValueError("a span of the region is (start, end, weight) with 0 <= start < end and a finite weight")
    if not params.spans and not params.heads:
        raise ValueError("the request has no region: leave extra_args out for a greedy one")
    if params.salt != region_salt(params.roi, params.rule):
        raise ValueError("the salt is not that of the region; take prompt and parameters from agd_vllm.inline.request")
    return params
