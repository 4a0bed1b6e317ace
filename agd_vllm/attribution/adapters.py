"""Where the weights of a Hugging Face model lie: one short adapter per architecture.

The weights of linear layers are taken over: the modules keep none.

To add an architecture: name it in `agd_vllm.models.architectures`, write its adapter here, give `lxt_compat` its
classes and `tests/attribution/tiny.py` a tiny model; the tests then hold it to the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from agd_vllm.attribution.hf_model import HFModel
from agd_vllm.attribution.rules import ACTIVATIONS, Activation, Norm

DEFAULT_ROPE = "default"


class Linear:
    """Linear layers of one input, whose outputs lie side by side: weight [out, in], bias [out] or None."""

    def __init__(self, *modules: nn.Linear):
        self.weight = torch.cat([module.weight for module in modules]) if len(modules) > 1 else modules[0].weight
        biases = [module.bias for module in modules if module.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        for module in modules:
            module.weight = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. A norm that the architecture lacks is None; `window` is in tokens, None for full attention.

    `scaling` multiplies q k, `rope` names the layer's rotary table.
    """

    attention_norm: Norm
    qkv: Linear
    o: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    attention_output_norm: Norm | None
    mlp_norm: Norm
    gate_up: Linear
    down: Linear
    mlp_output_norm: Norm | None
    scaling: float
    window: int | None
    rope: str = DEFAULT_ROPE


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder stack; `rotary(rope, positions)` gives cos and sin, float32 [N, D], for int64 positions [N]."""

    layers: list[Layer]
    final_norm: Norm
    activation: Activation
    rotary: Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def adapt(hf: HFModel) -> Decoder:
    """Read the layers of a model that `check_supported` has let pass."""
    name = getattr(hf.config, "hidden_activation", None) or hf.config.hidden_act
    layers, final_norm = _ADAPTERS[hf.architecture](hf.stack)
    per_type = hf.architecture.startswith("Gemma3")
    return Decoder(layers, final_norm, ACTIVATIONS[name], _rotary(hf.stack.rotary_emb, per_type=per_type))


def _llama(stack: nn.Module) -> tuple[list[Layer], Norm]:
    """Llama and all that are built like it; Qwen3 adds norms on the heads' queries and keys."""
    return [_llama_layer(layer, window=None) for layer in stack.layers], _norm(stack.norm)


def _mistral(stack: nn.Module) -> tuple[list[Layer], Norm]:
    """Llama with one sliding window for all layers."""
    window = stack.config.sliding_window
    return [_llama_layer(layer, window=window) for layer in stack.layers], _norm(stack.norm)


def _qwen(stack: nn.Module) -> tuple[list[Layer], Norm]:
    """Qwen2 (biases) and Qwen3: Llama with a window in some layers."""
    return [_llama_layer(layer, window=layer.self_attn.sliding_window) for layer in stack.layers], _norm(stack.norm)


def _gemma3(stack: nn.Module) -> tuple[list[Layer], Norm]:
    """Four norms a layer, each with gain 1 + weight; local layers have a window and a rotary table of their own."""
    layers = []
    for layer in stack.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            Layer(
                attention_norm=_gemma_norm(layer.input_layernorm),
                qkv=Linear(attention.q_proj, attention.k_proj, attention.v_proj),
                o=Linear(attention.o_proj),
                q_norm=_gemma_norm(attention.q_norm),
                k_norm=_gemma_norm(attention.k_norm),
                attention_output_norm=_gemma_norm(layer.post_attention_layernorm),
                mlp_norm=_gemma_norm(layer.pre_feedforward_layernorm),
                gate_up=Linear(mlp.gate_proj, mlp.up_proj),
                down=Linear(mlp.down_proj),
                mlp_output_norm=_gemma_norm(layer.post_feedforward_layernorm),
                scaling=attention.scaling,
                window=attention.sliding_window,
                rope=attention.layer_type,
            )
        )
    return layers, _gemma_norm(stack.norm)


_ADAPTERS = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen,
    "Qwen3ForCausalLM": _qwen,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3,
}


def _llama_layer(layer: nn.Module, *, window: int | None) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=Linear(attention.q_proj, attention.k_proj, attention.v_proj),
        o=Linear(attention.o_proj),
        q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        attention_output_norm=None,
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=Linear(mlp.gate_proj, mlp.up_proj),
        down=Linear(mlp.down_proj),
        mlp_output_norm=None,
        scaling=attention.scaling,
        window=window,
    )


def _norm(module: nn.Module) -> Norm:
    return Norm(module.weight.float(), module.variance_epsilon)


def _gemma_norm(module: nn.Module) -> Norm:
    return Norm(1 + module.weight.float(), module.eps)


def _rotary(module: nn.Module, *, per_type: bool) -> Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin by the model's own rotary module, so that every RoPE scaling is its own."""

    def tables(rope: str, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.empty((), dtype=torch.float32, device=positions.device)
        cos, sin = module(like, positions[None], rope) if per_type else module(like, positions[None])
        return cos[0], sin[0]

    return tables
