"""vLLM's models with a tangent beside the values: what all families have in common."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn
from vllm.config import VllmConfig

from agd_vllm.attribution.operations import Operations
from agd_vllm.attribution.rules import ACTIVATIONS, RULES, Norm
from agd_vllm.engine.last_words import report_failures
from agd_vllm.inline import adapters
from agd_vllm.inline.adapters import InlineLayer
from agd_vllm.inline.arguments import rule_name
from agd_vllm.inline.attention import DualAttention
from agd_vllm.inline.runner import Runner
from agd_vllm.inline.runner_v1 import RunnerV1
from agd_vllm.inline.supported import check_config


class TangentModel:
    """Comes before a causal language model of vLLM's, whose layers, weight loading and unembedding it uses.

    Residual streams, norms, softmax and gates are float32, linear layers and caches have the model's dtype. `forward`
    gives x and x' after the final norm side by side, [N, 2 d]: whatever rows vLLM takes of it, `compute_logits` has
    both. The score of any token c is S(c) = u_c x'.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        report_failures()
        check_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config.get_text_config()
        self._rule = RULES[rule_name(vllm_config)]
        self._dtype = vllm_config.model_config.dtype
        activation = ACTIVATIONS[getattr(config, "hidden_activation", None) or config.hidden_act]
        self._ops = Operations(self._rule, activation, self._dtype, vllm_config.device_config.device)
        adapters.replace_attention(vllm_config, self.model.layers, self._rule)
        _check_room(vllm_config, [layer.self_attn.attn for layer in self.model.layers])
        self._runner = _runner(vllm_config)
        self._runner.serve(self.model.layers[0].self_attn.attn, len(self.model.layers))

    # Read from the weights, which are loaded by the first pass.
    @cached_property
    def _layers(self) -> list[InlineLayer]:
        return adapters.adapt(self.model.layers, self._rule)

    @cached_property
    def _final_norm(self) -> Norm:
        return adapters.norm(self.model.norm)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors=None,
        inputs_embeds: torch.Tensor | None = None,
        **_,
    ) -> torch.Tensor:
        embeddings = self.model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        step = self._runner.step(positions)
        streams = embeddings.new_empty(2, *embeddings.shape, dtype=torch.float32)
        streams[0] = embeddings
        torch.mul(streams[0], step.weights[:, None], out=streams[1])
        ops, added = self._ops, None
        for layer in self._layers:
            attended = layer.attend(step.batch, _linear(layer.qkv, ops.norm(streams, layer.attention_norm, added)))
            added = self._output(_linear(layer.o, attended), layer.attention_output_norm)
            gate_up = _linear(layer.gate_up, ops.norm(streams, layer.mlp_norm, added))
            hidden = ops.gated(gate_up.unflatten(0, (2, -1)))
            added = self._output(_linear(layer.down, hidden), layer.mlp_output_norm)
        return torch.cat(tuple(ops.exact_norm(streams, self._final_norm, added)), dim=-1)

    def _output(self, rows: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """What a block adds to the residual streams, [2, N, d]."""
        streams = rows.unflatten(0, (2, -1))
        return streams if norm is None else self._ops.exact_norm(streams.float(), norm)

    @staticmethod
    def get_model_state_cls() -> type:
        """Model Runner V2 asks for it."""
        from agd_vllm.inline.runner_v2 import InlineState

        return InlineState

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        value, tangent = hidden_states.chunk(2, dim=-1)
        self._runner.keep(tangent, self.lm_head.weight)
        return super().compute_logits(value.to(self._dtype).contiguous())


def _runner(vllm_config: VllmConfig) -> Runner:
    if vllm_config.use_v2_model_runner:
        # Of it nothing can be imported without Triton.
        from agd_vllm.inline.runner_v2 import RunnerV2

        return RunnerV2.of(vllm_config)
    return RunnerV1.of(vllm_config)


def _check_room(vllm_config: VllmConfig, layers: list[DualAttention]) -> None:
    """Raises ValueError, before weights are loaded, where the KV cache cannot hold one row of the greatest length."""
    there = vllm_config.cache_config.kv_cache_memory_bytes
    needed = sum(layer.get_kv_cache_spec(vllm_config).max_memory_usage_bytes(vllm_config) for layer in layers)
    if there is not None and needed > there:
        raise ValueError(
            f"a row of --max-model-len {vllm_config.model_config.max_model_len} takes {needed / 2**30:.2f} GiB of KV "
            f"cache, which holds tangents, too, and there are {there / 2**30:.2f} GiB; lower it, or raise --engine-arg "
            "kv_cache_memory_bytes=..."
        )


def _linear(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """[2, N, in] or [2 N, in] to [2 N, out]: y = W x + b, y' = W x'."""
    out, bias = module(rows.flatten(0, -2))
    if bias is not None:
        out[: len(out) // 2] += bias
    return out
