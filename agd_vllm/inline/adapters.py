"""Where the weights of vLLM's models lie: one short adapter per family, no weight is copied.

To add an architecture: its adapter and class in `models`, a tiny model in `tests/attribution/tiny.py`; the tests then
hold it to the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from agd_vllm.attribution.rules import Norm, Rule
from agd_vllm.inline.attention import DualAttention
from agd_vllm.kernels.paged_attention import PagedLayer


@dataclass(frozen=True, slots=True)
class InlineLayer:
    """One decoder layer; a norm that the architecture lacks is None."""

    attention_norm: Norm
    qkv: nn.Module
    attend: DualAttention
    o: nn.Module
    attention_output_norm: Norm | None
    mlp_norm: Norm
    gate_up: nn.Module
    down: nn.Module
    mlp_output_norm: Norm | None


def replace_attention(vllm_config: VllmConfig, layers: nn.ModuleList, rule: Rule) -> None:
    """Puts dual attention in the place of each layer's plain one, and keeps biases out of the linear layers: they are
    added to the values only."""
    for layer in layers:
        attention = layer.self_attn
        name = attention.attn.layer_name
        attention.window = attention.attn.sliding_window
        attention.attn = DualAttention(
            vllm_config, name, attention.num_heads, attention.num_kv_heads, attention.head_dim, rule
        )
        for linear in (attention.qkv_proj, attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            linear.skip_bias_add = True


def adapt(layers: nn.ModuleList, rule: Rule) -> list[InlineLayer]:
    """To be called once the weights are loaded and `replace_attention` has been."""
    tables: dict[nn.Module, torch.Tensor] = {}
    return [_adapt(index, layer, rule, tables) for index, layer in enumerate(layers)]


def norm(module: nn.Module) -> Norm:
    """The gain as it multiplies: 1 + w in Gemma."""
    gain = module.weight.float()
    return Norm((1 + gain if isinstance(module, GemmaRMSNorm) else gain).contiguous(), module.variance_epsilon)


def _adapt(index: int, layer: nn.Module, rule: Rule, tables: dict[nn.Module, torch.Tensor]) -> InlineLayer:
    attention, mlp = layer.self_attn, layer.mlp
    attention.attn.prepare(index, _paged_layer(attention, rule, tables))
    four_norms = hasattr(layer, "pre_feedforward_layernorm")
    after_attention = norm(layer.post_attention_layernorm)
    return InlineLayer(
        attention_norm=norm(layer.input_layernorm),
        qkv=attention.qkv_proj,
        attend=attention.attn,
        o=attention.o_proj,
        # The same name is the norm before the MLP in Llama's kind, and the one behind the attention in Gemma 3.
        attention_output_norm=after_attention if four_norms else None,
        mlp_norm=norm(layer.pre_feedforward_layernorm) if four_norms else after_attention,
        gate_up=mlp.gate_up_proj,
        down=mlp.down_proj,
        mlp_output_norm=norm(layer.post_feedforward_layernorm) if four_norms else None,
    )


def _paged_layer(attention: nn.Module, rule: Rule, tables: dict[nn.Module, torch.Tensor]) -> PagedLayer:
    rotary = attention.rotary_emb
    if rotary not in tables:
        # vLLM keeps its table in the model's dtype, which is coarse for bfloat16: made anew in float32.
        with rotary.cos_sin_cache.device:
            tables[rotary] = rotary._compute_cos_sin_cache().float().contiguous()
    norms = [norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    query_norm, key_norm = norms or (None, None)
    return PagedLayer(
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        rope=tables[rotary],
        score_factor=rule.scores,
        value_factor=rule.values,
        window=attention.window,
        query_gain=query_norm and query_norm.gain,
        key_gain=key_norm and key_norm.gain,
        eps=query_norm.eps if query_norm else 0.0,
        through_norm=rule.through_norm,
    )
