"""Which models attribution can read. Cheap to import: the command line asks before anything is loaded."""

from __future__ import annotations

from typing import Any

TEXT_MODEL = {
    "Gemma3ForCausalLM": "model",
    "Gemma3ForConditionalGeneration": "model.language_model",
    "LlamaForCausalLM": "model",
    "MistralForCausalLM": "model",
    "Qwen2ForCausalLM": "model",
    "Qwen3ForCausalLM": "model",
}
"""Architecture, as `config.architectures` names it, to the path of the stack of decoder layers in the HF model."""

SUPPORTED = tuple(TEXT_MODEL)


def check_supported(config: Any) -> str:
    """The architecture of a Hugging Face config, if attribution can read such a model.

    Raises ValueError, in one line: an unsupported architecture (the message lists the supported ones), quantized
    weights (the rules need them as matrices), soft-capped logits or bidirectional attention (no rule covers these).
    """
    names = getattr(config, "architectures", None) or []
    name = next((name for name in names if name in TEXT_MODEL), None)
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
    return name
