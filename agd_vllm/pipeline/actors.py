"""Actors that load a model: their answers, and their end."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from agd_vllm.faults import last_line

# An actor that takes longer to load hangs.
START_S = 1800.0

log = logging.getLogger("agd_vllm")


def loaded(calls: list[Any], what: str) -> list[Any]:
    """The answers of actors that load a model. Raises RuntimeError with one line where one fails or hangs."""
    try:
        return ray.get(calls, timeout=START_S)
    except GetTimeoutError as error:
        raise RuntimeError(f"{what} did not start within {START_S:g} s (--debug shows its log)") from error
    except Exception as error:
        raise RuntimeError(f"{what} could not start: {last_line(error)} (--debug shows its log)") from error


def kill(actor: Any) -> None:
    """Ends an actor that may be dead already."""
    try:
        ray.kill(actor)
    except Exception as error:
        log.debug("could not kill an actor: %s", error)
