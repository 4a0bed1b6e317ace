"""What a strategy computes: forward passes a token, prompts apart."""

from __future__ import annotations

from collections.abc import Mapping

from agd_vllm.evaluation.outcomes import Outcome
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.pipeline.strategies import Agd, Cad


def forward_passes(options: DecoderOptions, outcomes: Mapping[str, Outcome]) -> float | None:
    """How often an output token goes through the model's layers, on average over the `outcomes`.

    A tangent costs as much as a value. Attribution workers push both through their copy, up to each row's last guided
    step. None where nothing was decoded, and for the scorer lxt, which goes through the prompt again at every step.
    """
    if options.strategy == Cad.name:
        return 2.0
    if options.strategy != Agd.name:
        return 1.0
    if options.inline:
        return 2.0
    tokens = sum(len(outcome.token_ids) for outcome in outcomes.values())
    if options.scorer != "forward" or tokens == 0:
        return None
    # The token of a step is chosen before it is computed.
    scored = sum(outcome.steps[-1].step for outcome in outcomes.values() if outcome.steps)
    return 1 + 2 * scored / tokens
