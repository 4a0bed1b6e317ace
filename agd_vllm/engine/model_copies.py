"""Whether a Hugging Face copy of the model can follow an engine's arguments, and what it is to be made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agd_vllm.engine.argument_table import HARMLESS, PASSED_ON, REFUSED
from agd_vllm.engine.arguments import FIXED, OWN
from agd_vllm.models.config_overrides import check_overrides, followed

COPIES = "the copies of the model that attribution and perplexity are computed with"


def check_for_copies(given: Mapping[str, Any], dtype: str) -> None:
    """Raises ValueError, in one line, for engine arguments that a copy of the model does not follow.

    `dtype`: the engine's.
    """
    for name, value in given.items():
        if name == "hf_overrides":
            try:
                check_overrides(value)
            except ValueError as error:
                raise ValueError(f"--engine-arg {error}") from error
        elif name in REFUSED:
            same = (None, *REFUSED[name], *((dtype,) if name == "kv_cache_dtype" else ()))
            if value not in same:
                raise ValueError(f"--engine-arg {name}={value}: {COPIES} do not follow the engine there; leave it out")
        elif name not in PASSED_ON and name not in HARMLESS and name not in OWN and name not in FIXED:
            raise ValueError(f"--engine-arg {name}: {COPIES} may not follow the engine there; leave it out")


def overrides_for_copies(given: Mapping[str, Any]) -> dict[str, Any]:
    """The changes of the configuration that a copy is made with."""
    return followed(given.get("hf_overrides"))
