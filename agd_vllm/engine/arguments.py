"""Checks `--engine-arg` before any model is loaded."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

# Set by options of their own, or by what sessions need.
OWN = {
    "model": "--model",
    "tokenizer": "--model",
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
    "seed": "--seed",
    "trust_remote_code": "--trust-remote-code",
    # Engines side by side are this run's own.
    "data_parallel_size": "--engines",
}
FIXED = (
    "logits_processors",
    "disable_hybrid_kv_cache_manager",
    "scheduler_cls",
    "scheduling_policy",
    "speculative_config",
)


def gpus_per_engine(given: dict[str, Any]) -> int:
    """How many GPUs one engine spreads over."""
    return int(given.get("tensor_parallel_size", 1)) * int(given.get("pipeline_parallel_size", 1))


def check_engine_args(given: dict[str, Any]) -> None:
    """Raises ValueError for a name that vLLM does not know, or that agd-vllm sets itself."""
    if not given:
        return
    # vLLM's import takes seconds and is paid only by those who pass arguments to it.
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in given:
        if name in OWN:
            raise ValueError(f"--engine-arg {name}: use {OWN[name]}")
        if name in FIXED:
            raise ValueError(f"--engine-arg {name}: agd-vllm sets it, and its rows depend on it; leave it out")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise ValueError(f"--engine-arg {name}: vLLM has no such engine argument{hint}")
