"""What vLLM is started with for inline attribution."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from agd_vllm.attribution.rules import RULES
from agd_vllm.inline.supported import DTYPES, SCHEDULER
from agd_vllm.models.architectures import INLINE, check_supported
from agd_vllm.models.class_overrides import class_names

CONFIG = "agd_inline"
PROCESSOR = "agd_vllm.inline.processor:InlineProcessor"


def engine_args(
    model: str,
    rule: str = "attnlrp",
    dtype: str = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` (or AsyncEngineArgs) that decode with inline attribution by `rule`; add yours.

    They are the same on every machine, which is not looked at: vLLM's worker checks its own (`supported.check_config`).
    Raises ValueError, in one line, for a model or a rule that it has no code for.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule}: there are {', '.join(RULES)}")
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    name = check_supported(config)
    classes = class_names(INLINE)
    if name not in classes:
        raise ValueError(f"{name} has no inline class; take --scorer forward, or one of {', '.join(classes)}")
    own = f"{config.get_text_config().dtype}".removeprefix("torch.")
    if dtype == "auto" and own not in (*DTYPES, "None"):
        raise ValueError(f"dtype: the model's is {own}, inline attribution has {' and '.join(DTYPES)}; name one")
    return {
        "model": model,
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "model_class_overrides": {name: classes[name]},
        "logits_processors": [PROCESSOR],
        "scheduler_cls": SCHEDULER,
        # Part of the key of vLLM's compile cache.
        "additional_config": {CONFIG: {"rule": rule}},
        # What lies between the linear layers are kernels of ours, so that nothing is compiled; a GPU captures decode.
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        # Windows are the kernel's: all layers share one kind of block.
        "disable_hybrid_kv_cache_manager": True,
    }


def rule_name(vllm_config: Any) -> str:
    """The rule that an engine was started with. Raises ValueError where none was named."""
    try:
        return vllm_config.additional_config[CONFIG]["rule"]
    except (KeyError, TypeError) as error:
        raise ValueError("additional_config: take that of agd_vllm.inline.engine_args") from error


def cache_planes(rule: str) -> int:
    """Vectors of each head that the KV cache has for a token: k, k', v, v'; k, v, v' where scores have no tangent."""
    return 4 if RULES[rule].scores else 3
