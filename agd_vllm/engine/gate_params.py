"""What a gated request tells vLLM's worker process."""

from __future__ import annotations

from typing import Any

import msgspec
from vllm import SamplingParams

from agd_vllm.engine.batch_rows import checked_params

EXTRA_ARG = "agd"


class GateParams(msgspec.Struct, frozen=True):
    """What a request carries in `SamplingParams.extra_args["agd"]`; requests without it are left untouched.

    `key` names the row in reports, anew after each pause; `prompt_len` is the length of its original prompt, so that
    step = tokens so far - prompt_len; `pause_id` is masked at open steps and forced at gated ones.
    """

    key: int
    prompt_len: int
    pause_id: int
    tau: float
    top_k: int
    min_prob: float

    def as_extra_args(self) -> dict[str, dict[str, Any]]:
        return {EXTRA_ARG: msgspec.to_builtins(self)}


def gate_params(sampling_params: SamplingParams) -> GateParams | None:
    """None for a request that is not gated. Raises ValueError: vLLM then refuses the request, where an error in its
    worker would kill the engine."""
    params = checked_params(sampling_params, EXTRA_ARG, GateParams)
    if params is not None and (not params.tau >= 0 or params.top_k < 2 or not 0 <= params.min_prob <= 1):
        raise ValueError("a gate needs tau >= 0, top_k >= 2 and 0 <= min_prob <= 1")
    return params
