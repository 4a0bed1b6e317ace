"""The only module that imports lxt, the authors' own AttnLRP implementation and our oracle.

Importing `lxt.efficient` imports all its model maps, and two of them break: its BERT module is a copy of an old
Transformers file that asks for names which Transformers 5 no longer has, and its ViT module needs torchvision. Neither
is used here, so empty modules stand in for them before the import.

lxt changes the classes of a Transformers modelling module for the whole process. Attention is the exception: a wrapped
attention function is registered under a name of its own (`transformers.AttentionInterface`), because Transformers 5
looks attention up there and lxt's `patch_attention` would replace a table that is no longer read.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Callable

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface


def _stub_broken_modules() -> None:
    for name, target in (("bert", "modeling_bert"), ("vit_torch", "vision_transformer")):
        stub = types.ModuleType(f"lxt.efficient.models.{name}")
        setattr(stub, target, types.ModuleType(target))
        stub.attnLRP = stub.cp_LRP = {}
        sys.modules.setdefault(stub.__name__, stub)


_stub_broken_modules()
with warnings.catch_warnings():
    # lxt warns that zennit, which only its vision models need, is missing.
    warnings.simplefilter("ignore")
    from lxt.efficient.models.gemma3 import gemma3_norm
    from lxt.efficient.patches import (
        cp_gated_mlp_forward,
        cp_wrap_attention_forward,
        gated_mlp_forward,
        patch_method,
        rms_norm_forward,
        wrap_attention_forward,
    )

LXT_RULES = ("attnlrp", "cplrp")

_MLP = {"attnlrp": gated_mlp_forward, "cplrp": cp_gated_mlp_forward}
_ATTENTION: dict[str, Callable] = {"attnlrp": wrap_attention_forward, "cplrp": cp_wrap_attention_forward}

# Architecture: modelling module, its class prefix, the method of the norm that is replaced and its replacement.
_CLASSES = {
    "LlamaForCausalLM": ("llama", "Llama", "forward", rms_norm_forward),
    "MistralForCausalLM": ("mistral", "Mistral", "forward", rms_norm_forward),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2", "forward", rms_norm_forward),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3", "forward", rms_norm_forward),
    "Gemma3ForCausalLM": ("gemma3", "Gemma3", "_norm", gemma3_norm),
    "Gemma3ForConditionalGeneration": ("gemma3", "Gemma3", "_norm", gemma3_norm),
}

_process_rule: str | None = None
_patched: set[str] = set()


def patch(architecture: str, rule: str) -> str:
    """Give the architecture's Transformers classes the modified gradients of `rule`, for the whole process.

    `rule` is attnlrp (arXiv 2402.05602), cplrp (Ali et al., ICML 2022) or ixg (plain gradients, nothing is patched).
    Returns the `attn_implementation` that the model must be loaded with. Raises ValueError for an unknown rule, and
    RuntimeError if this process already runs another rule: its classes cannot serve two.
    """
    global _process_rule
    if rule not in (*LXT_RULES, "ixg"):
        raise ValueError(f"unknown attribution rule {rule!r}; known: {', '.join((*LXT_RULES, 'ixg'))}")
    if _process_rule not in (None, rule):
        raise RuntimeError(
            f"this process already attributes with rule {_process_rule!r}; lxt patches classes for a whole process, "
            f"so rule {rule!r} needs a process of its own"
        )
    _process_rule = rule
    if rule == "ixg":
        return "sdpa"
    module_name, prefix, norm_method, norm = _CLASSES[architecture]
    if module_name not in _patched:
        module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
        patch_method(_MLP[rule], getattr(module, f"{prefix}MLP"))
        patch_method(norm, getattr(module, f"{prefix}RMSNorm"), method_name=norm_method)
        _patched.add(module_name)
    implementation = f"agd_{rule}"
    AttentionInterface.register(implementation, _ATTENTION[rule](sdpa_attention_forward))
    AttentionMaskInterface.register(implementation, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return implementation
