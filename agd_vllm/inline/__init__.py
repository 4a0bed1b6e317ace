"""AGD inside vLLM's own forward pass: the tangent runs beside the values, the candidate is chosen where the logits are.

Imports `kernels`, `models`, `records`, of `attribution` the rules and regions, of `engine` the channel and the rows of
a batch. For scripts with their own `vllm.LLM`: `engine_args` and `request`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agd_vllm.inline.arguments import engine_args
    from agd_vllm.inline.conversation import request

__all__ = ["engine_args", "request"]


def __getattr__(name: str):
    # vLLM is imported with `request` only: who checks options does not wait for it.
    if name == "engine_args":
        from agd_vllm.inline.arguments import engine_args

        return engine_args
    if name == "request":
        from agd_vllm.inline.conversation import request

        return request
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
