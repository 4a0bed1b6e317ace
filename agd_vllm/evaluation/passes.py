"""What a strategy computes: forward passes a token, prompts apart."""

from __future__ import annotations

from collections.abc import Mapping

from agd_vllm.evaluation.outcomes import Outcome
from agd_vllm.strategies.strategy import Strategy


def forward_passes(strategy: Strategy, outcomes: Mapping[str, Outcome]) -> float | None:
    """How often an output token goes through the model's layers, on average over the `outcomes`.

    A tangent costs as much as a value. Attribution workers push both through their copy, up to each row's last guided
    step. None where nothing was decoded, and for the scorer lxt, which goes through the prompt again at every step.
    """
    tokens = sum(len(outcome.token_ids) for outcome in outcomes.values())
    # The token of a step is chosen before it is computed.
    scored = sum(outcome.steps[-1].step for outcome in outcomes.values() if outcome.steps)
    return strategy.passes(tokens, scored)
