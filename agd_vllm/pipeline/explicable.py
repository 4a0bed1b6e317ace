"""Whether attribution, which explains the logits of a copy of the model, explains the answers of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agd_vllm.engine.model_copies import check_for_copies
from agd_vllm.strategies.registry import STRATEGIES


def check_explicable(parameters: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line, for a run of these `parameters` whose tokens other logits chose."""
    name = parameters.get("strategy")
    if name in STRATEGIES and not STRATEGIES[name].by_own_logits:
        raise ValueError(
            f"strategy {name} does not choose tokens by the logits of the model itself, which are all that attribution "
            "explains; give a run of another strategy"
        )
    try:
        check_for_copies(parameters.get("engine_args", {}), parameters.get("dtype", "auto"))
    except ValueError as error:
        raise ValueError(f"{error} and decode anew") from error


def is_explicable(parameters: Mapping[str, Any]) -> bool:
    """Whether `check_explicable` accepts the run."""
    try:
        check_explicable(parameters)
    except ValueError:
        return False
    return True
