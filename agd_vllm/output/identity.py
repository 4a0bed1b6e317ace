"""Whether a run may be resumed: what decides its tokens must be what it was when it began."""

from __future__ import annotations

import json
from typing import Any

# Engine arguments that decide where and how fast tokens are computed, not which.
MEMORY_AND_PLACE = (
    "block_size",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_seqs",
    "tensor_parallel_size",
)
# What a run without the key was: the default that each option had when it was added. A line here is never changed.
BEFORE_IT_WAS_ADDED = {
    "cad_alpha": 0.5,
    "chat_template_kwargs": {},
    "dola_layers": "low",
    "dola_relative_top": 0.1,
    "engine_args": {},
    "entropies": False,
    "given_answers": False,
    "repetition_penalty": 1.0,
    "roi_heads": [],
    "rule": "attnlrp",
    "scorer": "forward",
    "steering_norm": True,
    "steering_strength": 1.0,
    "trust_remote_code": False,
}
# What the digest of a model of the hub begins with.
COMMIT = "commit "
MODEL, DIGEST, ENGINE_ARGS = "model", "model_digest", "engine_args"


def run_differences(held: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How the run that is `held` differs from the `new` one, as `tau is 1.734 there and 0 here`; empty for the same.

    What the new one does not name is of no strategy of its own, or no longer an option. A model is known by its digest
    where both have one, else by its name.
    """
    return [line for key in new for line in _difference(key, held, new)]


def _difference(key: str, held: dict[str, Any], new: dict[str, Any]) -> list[str]:
    same = same_model(held.get(DIGEST), new.get(DIGEST))
    if key == DIGEST:
        named = f"{held.get(MODEL)} there are not those of {new.get(MODEL)} here"
        return [f"the weights or the config.json of {named}"] if same is False else []
    if key == MODEL and same is not None:
        return []
    there, here = held.get(key, BEFORE_IT_WAS_ADDED.get(key)), new[key]
    if key == ENGINE_ARGS:
        there, here = decisive(there), decisive(here)
    return differences(there, here, key)


def same_model(digest: str | None, other: str | None) -> bool | None:
    """Whether two models are one, by their digests; None where these do not say, because one is missing or one is of a
    folder and the other of the hub."""
    if digest is None or other is None or digest.startswith(COMMIT) != other.startswith(COMMIT):
        return None
    return digest == other


def decisive(engine_args: dict[str, Any]) -> dict[str, Any]:
    """The engine arguments that decide which tokens a run has: all but those of memory and place."""
    return {name: value for name, value in engine_args.items() if name not in MEMORY_AND_PLACE}


def differences(held: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, as `parameters.tau is 1.734 there and 0 here`."""
    if isinstance(held, dict) and isinstance(new, dict):
        keys = [*held, *(key for key in new if key not in held)]
        return [
            line
            for key in keys
            for line in differences(held.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        ]
    return [] if held == new else [f"{where} is {_shown(held)} there and {_shown(new)} here"]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
