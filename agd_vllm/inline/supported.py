"""What inline attribution has no code for, refused in one line: of engine arguments before anything is loaded, of a
configuration of vLLM's, whoever made it, before weights are."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from agd_vllm.kernels import triton_support

SCHEDULER = "agd_vllm.inline.scheduler.InlineScheduler"
DTYPES = ("float32", "bfloat16")
INSTEAD_OF_IT = "take --scorer forward"
INSTEAD = f"leave it out, or {INSTEAD_OF_IT}"


class Without(NamedTuple):
    """An engine argument that there is no code for, but with the value `nothing`, and where a configuration of vLLM's
    has it (None: it cannot be seen there)."""

    argument: str
    nothing: Any
    of: Callable[[Any], Any] | None = None


WITHOUT = (
    Without("tensor_parallel_size", 1, lambda config: config.parallel_config.tensor_parallel_size),
    Without("pipeline_parallel_size", 1, lambda config: config.parallel_config.pipeline_parallel_size),
    Without("decode_context_parallel_size", 1, lambda config: config.parallel_config.decode_context_parallel_size),
    Without(
        "enable_batch_sharded_sampling",
        False,
        lambda config: bool(config.parallel_config.enable_batch_sharded_sampling),
    ),
    Without("enable_lora", False, lambda config: config.lora_config is not None),
    Without("quantization", None, lambda config: config.model_config.quantization),
    Without("kv_cache_dtype", "auto", lambda config: config.cache_config.cache_dtype),
    Without("speculative_config", None, lambda config: config.speculative_config),
    # `engine_args` sets these.
    Without("model_class_overrides", {}),
    Without("additional_config", {}),
    Without("compilation_config", {}),
)


def check_arguments(dtype: str, given: dict[str, Any]) -> None:
    """Raises ValueError, in one line, for engine arguments that inline attribution has no code for."""
    for each in WITHOUT:
        if each.argument in given:
            _check(each, f"--engine-arg {each.argument}", given[each.argument], dtype)


def check_config(config: Any) -> None:
    """Raises ValueError, in one line, for a VllmConfig that inline attribution has no code for. To be called by vLLM's
    worker, which knows its device, before weights are loaded."""
    dtype = f"{config.model_config.dtype}".removeprefix("torch.")
    for each in WITHOUT:
        if each.of is not None:
            value = each.of(config)
            _check(each, f"{each.argument}={value}", value, dtype)
    if config.scheduler_config.scheduler_cls != SCHEDULER:
        raise ValueError(
            "scheduler_cls: inline attribution has a scheduler of its own, which keeps regions apart in the prefix "
            "cache; take that of agd_vllm.inline.engine_args"
        )
    if config.compilation_config.mode:
        raise ValueError("compilation_config: inline attribution compiles nothing; take that of engine_args")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: inline attribution has {' and '.join(DTYPES)}; name one")
    if config.device_config.device.type == "cuda":
        _check_gpu(config, dtype)


def _check(each: Without, name: str, value: Any, dtype: str) -> None:
    same = (each.nothing, dtype) if each.argument == "kv_cache_dtype" else (each.nothing,)
    if value not in same:
        raise ValueError(f"{name}: inline attribution does not work with it; {INSTEAD}")


def _check_gpu(config: Any, dtype: str) -> None:
    if dtype != "bfloat16":
        raise ValueError(f"dtype {dtype}: on a GPU inline attribution has bfloat16 only; name it, or {INSTEAD_OF_IT}")
    if not triton_support.available():
        raise ValueError(f"inline attribution needs Triton on a GPU; install it, or {INSTEAD_OF_IT}")
    from agd_vllm.kernels import tilings

    head_dim = config.model_config.get_head_size()
    if not tilings.available(head_dim, torch.bfloat16):
        raise ValueError(
            f"inline attribution has no kernel for heads of {head_dim} on this GPU (at most {tilings.MAX_HEAD_DIM}, "
            f"compute capability {'.'.join(map(str, tilings.MIN_CAPABILITY))} or later); {INSTEAD_OF_IT}"
        )
    if not config.use_v2_model_runner:
        reason = "leave VLLM_USE_V2_MODEL_RUNNER out" if "VLLM_USE_V2_MODEL_RUNNER" in os.environ else INSTEAD_OF_IT
        raise ValueError(f"on a GPU inline attribution needs vLLM's Model Runner V2; {reason}")
