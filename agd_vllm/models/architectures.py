"""Which models attribution can read. Cheap to import: the command line asks before anything is loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

INLINE, DOLA, STEER = "inline", "dola", "steer"


class Family(NamedTuple):
    """A family of models: `stack` is the path of the decoder layers in the Hugging Face model, `vllm` the module of
    vLLM's class (below vllm.model_executor.models), `works` what a class of ours adds to that."""

    stack: str
    vllm: str | None = None
    works: tuple[str, ...] = ()


FAMILIES = {
    "Gemma3ForCausalLM": Family("model", "gemma3", (INLINE, STEER)),
    "Gemma3ForConditionalGeneration": Family("model.language_model"),
    "LlamaForCausalLM": Family("model", "llama", (INLINE, DOLA, STEER)),
    "MistralForCausalLM": Family("model", "mistral", (INLINE, DOLA, STEER)),
    "Qwen2ForCausalLM": Family("model", "qwen2", (INLINE, DOLA, STEER)),
    "Qwen3ForCausalLM": Family("model", "qwen3", (INLINE, DOLA, STEER)),
}
"""Every family that attribution supports, by its architecture as `config.architectures` names it."""

SUPPORTED = tuple(FAMILIES)

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
"""Activations of the gated MLP that have a tangent rule."""

CHANGING_ROPE = ("dynamic", "longrope")
"""RoPE types whose frequencies depend on the length of the sequence: what is cached would change as it grows."""


def check_supported(config: Any) -> str:
    """The architecture of a Hugging Face config, if attribution can read such a model.

    Raises ValueError, in one line: an unsupported architecture (the message lists the supported ones), quantized
    weights (the rules need them as matrices), soft-capped logits, bidirectional attention or another activation (no
    rule covers these), RoPE parameters that lack something, a RoPE type that cannot be cached.
    """
    names = getattr(config, "architectures", None) or []
    name = next((name for name in names if name in FAMILIES), None)
    if name is None:
        given = ", ".join(names) or "none named in its config"
        raise ValueError(f"unsupported architecture: {given}; attribution supports {', '.join(SUPPORTED)}")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise ValueError(
            f"the weights are quantized ({method}) and cannot be read as matrices; "
            "attribution needs the unquantized model (float32, bfloat16 or float16)"
        )
    text_config = getattr(config, "text_config", config)
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(text_config, key, None):
            raise ValueError(f"{name} with {key} is not supported: no attribution rule covers it")
    activation = getattr(text_config, "hidden_activation", None) or text_config.hidden_act
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} has no attribution rule; known: {', '.join(ACTIVATIONS)}")
    _check_complete(text_config)
    for rope_type in _rope_types(text_config) & set(CHANGING_ROPE):
        raise ValueError(f"RoPE type {rope_type!r} cannot be cached: its frequencies change with the sequence's length")
    return name


def longest_sequence(text_config: Any) -> int:
    """Tokens of the longest sequence, by vLLM's rule: positions that are stretched linearly count as they are then, but
    Gemma 3's config names its longest sequence itself, and so does one with YaRN."""
    longest = text_config.max_position_embeddings
    if text_config.model_type.startswith("gemma3"):
        return longest
    linear = [each for each in _rope_parameters(text_config) if each.get("rope_type") == "linear"]
    return int(longest * max((each.get("factor", 1) for each in linear), default=1))


def _rope_parameters(text_config: Any) -> list[dict[str, Any]]:
    """Transformers' `rope_parameters`, which may be one set for each type of layer."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    return [each for each in parameters.values() if isinstance(each, dict)] or [parameters]


def _check_complete(text_config: Any) -> None:
    # Those of a file are completed while it is read; vLLM puts `hf_overrides` in their place afterwards.
    sets = _rope_parameters(text_config)
    missing = [name for name in ("rope_type", "rope_theta") if any(name not in each for each in sets)]
    by_layer = any(isinstance(each, dict) for each in (text_config.rope_parameters or {}).values())
    if missing or by_layer != text_config.model_type.startswith("gemma3"):
        what = f"{' and '.join(missing)} missing" if missing else "not of the form that config.json has"
        raise ValueError(f"rope_parameters: {what}; hf_overrides take the place of all of them, so name them all")


def _rope_types(text_config: Any) -> set[str]:
    return {each.get("rope_type", "default") for each in _rope_parameters(text_config)}
