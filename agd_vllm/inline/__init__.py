"""AGD inside vLLM's own forward pass: the tangent runs beside the values, the candidate is chosen where the logits are.

Imports `kernels`, `models`, `records`, of `attribution` the rules and regions, of `engine` the channel and the rows of
a batch. For scripts with their own `vllm.LLM`: `engine_args`, `request` and `Reports`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agd_vllm.inline.arguments import engine_args
    from agd_vllm.inline.conversation import request
    from agd_vllm.inline.reports import Reports

__all__ = ["Reports", "engine_args", "request"]

_MODULES = {
    "Reports": "agd_vllm.inline.reports",
    "engine_args": "agd_vllm.inline.arguments",
    "request": "agd_vllm.inline.conversation",
}


def __getattr__(name: str):
    # vLLM is imported with `request` and `Reports` only: who checks options does not wait for it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
