"""What vLLM is started with for inline attribution, and what it cannot be combined with."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig

from agd_vllm.attribution.rules import RULES
from agd_vllm.kernels import triton_support
from agd_vllm.models.architectures import check_supported

CONFIG = "agd_inline"
CLASSES = {
    name: f"agd_vllm.inline.models:Inline{name}"
    for name in (
        "Gemma3ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    )
}
PROCESSOR = "agd_vllm.inline.processor:InlineProcessor"
# A batch of prompts whose temporaries stay in a CPU's cache.
CPU_BATCH_TOKENS = 512
DTYPES = ("float32", "bfloat16")
# Engine arguments that it has no code for, and the values that ask for nothing.
WITHOUT = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "enable_lora": False,
    "enable_batch_sharded_sampling": False,
    "quantization": None,
    "kv_cache_dtype": "auto",
    "model_class_overrides": {},
    "additional_config": {},
    "compilation_config": {},
}
INSTEAD_OF_IT = "take --scorer forward"
INSTEAD = f"leave it out, or {INSTEAD_OF_IT}"


def engine_args(
    model: str,
    rule: str = "attnlrp",
    dtype: str = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` (or AsyncEngineArgs) that decode with inline attribution by `rule`; add yours.

    Raises ValueError, in one line, for a model or a machine that it has no code for.
    """
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    name = check_supported(config)
    if name not in CLASSES:
        raise ValueError(f"{name} has no inline class; take --scorer forward, or one of {', '.join(CLASSES)}")
    own = f"{config.get_text_config().dtype}".removeprefix("torch.")
    if dtype == "auto" and own not in (*DTYPES, "None"):
        raise ValueError(f"dtype: the model's is {own}, inline attribution has {' and '.join(DTYPES)}; name one")
    if torch.cuda.is_available():
        _check_gpu(dtype, own, config.get_text_config())
    args: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "model_class_overrides": {name: CLASSES[name]},
        "logits_processors": [PROCESSOR],
        # Part of the key of vLLM's compile cache.
        "additional_config": {CONFIG: {"rule": rule}},
        # What lies between the linear layers are kernels of ours, so that nothing is compiled; a GPU captures decode.
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        # Windows are the kernel's: all layers share one kind of block.
        "disable_hybrid_kv_cache_manager": True,
    }
    return args if torch.cuda.is_available() else args | {"max_num_batched_tokens": CPU_BATCH_TOKENS}


def _check_gpu(dtype: str, own: str, config: Any) -> None:
    """Raises ValueError, in one line, for what it has no code for on a GPU."""
    if (own if dtype == "auto" else dtype) != "bfloat16":
        raise ValueError(f"--dtype {dtype}: on a GPU inline attribution has bfloat16 only; name it, or {INSTEAD_OF_IT}")
    if not triton_support.available():
        raise ValueError(f"inline attribution needs Triton on a GPU; install it, or {INSTEAD_OF_IT}")
    from agd_vllm.kernels import tilings

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not tilings.available(head_dim, torch.bfloat16):
        raise ValueError(
            f"inline attribution has no kernel for heads of {head_dim} on this GPU (at most {tilings.MAX_HEAD_DIM}, "
            f"compute capability {'.'.join(map(str, tilings.MIN_CAPABILITY))} or later); {INSTEAD_OF_IT}"
        )
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        raise ValueError("VLLM_USE_V2_MODEL_RUNNER=0: on a GPU inline attribution needs Model Runner V2; leave it out")


def rule_name(vllm_config: Any) -> str:
    """The rule that an engine was started with."""
    return vllm_config.additional_config[CONFIG]["rule"]


def cache_planes(rule: str) -> int:
    """Vectors of each head that the KV cache has for a token: k, k', v, v'; k, v, v' where scores have no tangent."""
    return 4 if RULES[rule].scores else 3


def check_arguments(dtype: str, given: dict[str, Any]) -> None:
    """Raises ValueError, in one line, for engine arguments that inline attribution has no code for."""
    for key, nothing in WITHOUT.items():
        if key in given and given[key] not in (nothing, dtype if key == "kv_cache_dtype" else nothing):
            raise ValueError(f"--engine-arg {key}: inline attribution does not work with it; {INSTEAD}")
