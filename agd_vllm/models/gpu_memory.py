"""Whether a model fits the share of a GPU that it was given: told in one line before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

GIB = 1 << 30
# What the CUDA context, libraries and compiled kernels of a process take.
PROCESS_BYTES = GIB // 2
# A captured layer: some 16 launches with their arguments.
GRAPH_LAYER_BYTES = 128 << 10
# Rows times splits of their keys, on the largest GPUs there are (tilings.num_splits).
SPLIT_ROWS = 2048
# Streams of a guided step: values and one tangent.
STREAMS = 2
# Vectors of a head that a KV cache has for each token.
KEYS_AND_VALUES = 2
# A worker's tangent cache is what its share leaves, less what comes and goes beside it; at least so much.
CACHE_PART, LEAST_CACHE_BYTES = 0.9, GIB


def weight_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Of the model's parameters, tied ones once; no weight is read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def worker_needs(
    config: PretrainedConfig, dtype: torch.dtype, sizes: Sequence[int], max_model_len: int, block_tokens: int
) -> dict[str, int]:
    """Bytes of an attribution worker beside its tangent cache: passes of these sizes (tokens), captured, and of the
    largest one more that is not; tables for sequences of at most `max_model_len` tokens in blocks of `block_tokens`."""
    text, pass_tokens = config.get_text_config(), max(sizes)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # The residual stream, norms, queries, keys, values and the gated product of one layer, float32.
    per_token = STREAMS * 4 * (8 * text.hidden_size + 4 * text.intermediate_size)
    # Where sequences are few, each has its keys split: rows times splits are about as many whatever the size.
    sums = SPLIT_ROWS * text.num_attention_heads * (STREAMS * head_dim + 3) * 4
    # What each captured pass gives, float32, both streams, stays where it is.
    captured = STREAMS * 4 * text.hidden_size * sum(sizes) + GRAPH_LAYER_BYTES * text.num_hidden_layers * len(sizes)
    # Block table, rotary tables (some models have two), head sets.
    blocks = pass_tokens * -(-max_model_len // block_tokens)
    tables = 4 * (
        blocks + 2 * max_model_len * head_dim + pass_tokens * text.num_hidden_layers * text.num_attention_heads
    )
    return {
        "weights": weight_bytes(config, dtype),
        "activations": pass_tokens * per_token + sums + PROCESS_BYTES,
        "CUDA graphs": pass_tokens * per_token + sums + captured,
        "tables": tables,
    }


def engine_needs(
    config: PretrainedConfig, dtype: torch.dtype, max_model_len: int, gpus: int, planes: int = KEYS_AND_VALUES
) -> dict[str, int]:
    """Bytes of an engine on each of its `gpus`: the KV cache of one row of `max_model_len` tokens, at least; `planes`
    vectors of each of a token's heads are in it."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = planes * text.num_hidden_layers * text.num_key_value_heads * head_dim * dtype.itemsize
    return {
        "weights": weight_bytes(config, dtype) // gpus,
        f"KV cache of one row of {max_model_len} tokens": max_model_len * per_token // gpus,
        "the rest": PROCESS_BYTES,
    }


def check_room(who: str, needs: dict[str, int], room: int, total: int, remedies: str) -> None:
    """Raises RuntimeError with one line where `who` needs more than `room` bytes of a GPU with `total`."""
    needed = sum(needs.values())
    if needed <= room:
        return
    parts = ", ".join(f"{what} {_gib(size)}" for what, size in needs.items())
    raise RuntimeError(
        f"{who} needs {_gib(needed)} GiB of GPU memory ({parts}) and has {_gib(room)} of the GPU's {_gib(total)} GiB: "
        f"{_gib(needed - room)} GiB are missing; {remedies}"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
