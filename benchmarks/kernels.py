"""How near the GPU kernels come to what bounds them.

    python -m benchmarks.kernels --json benchmarks/results/kernels-DEVICE.json

`ratio` is seconds over `bound_seconds`. Bounds: `gate`, one read of the logits at the card's copy bandwidth; `dual
attention prefill`, scaled_dot_product_attention forward on the values alone; `dual attention decode`, one read of K, V,
K', V' at that bandwidth; `rms norm` and `gated product` (a value with one tangent), one read and one write of
their streams at it. `... twin` is the twin in PyTorch. Without a GPU the kernels are interpreted on small shapes (run
it with TRITON_INTERPRET=1), which shows that they run and no more.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial

import click
import torch
import torch.nn.functional as F

from agd_vllm.attribution import rules
from agd_vllm.attribution.block_pool import BLOCK_TOKENS
from agd_vllm.attribution.rules import ACTIVATIONS, RULES
from agd_vllm.kernels import gate_triton, paged_attention_gpu, streams_triton, triton_support
from agd_vllm.kernels.gate import gate_twin
from agd_vllm.kernels.paged_attention import PagedLayer
from agd_vllm.kernels.paged_attention_gpu import GpuBatch
from benchmarks.machine import write_result

GATE_SHAPES = [(256, 128256), (64, 128256), (8, 128256), (256, 151936), (256, 49152)]
GATE_DTYPES = ("bfloat16", "float32")  # vLLM's sampler makes float32 of them
PREFILL_TOKENS = [1024, 4096]
DECODES = [(64, 4096), (16, 4096), (1, 4096), (64, 512)]
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TOKENS = [1, 64, 512]
HIDDEN, INTERMEDIATE = 4096, 14336
SMALL = {"gate": [(2, 5000)], "prefill": [40], "decode": [(2, 60)], "heads": (4, 2, 64), "tokens": [3]}
SMALL |= {"hidden": (256, 700)}
COPY_BYTES = 1 << 30
TOP_K = 5


def seconds_of(call: Callable[[], object]) -> float:
    """Median time of a call: on the GPU, its cache flushed before each; interpreted, of a single one."""
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    from triton.testing import do_bench

    return do_bench(call, warmup=100, rep=500, return_mode="median") / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written ones together."""
    source = torch.empty(COPY_BYTES if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source))


def gate_points(device: torch.device, shapes: list, bandwidth: float) -> Iterator[dict]:
    """With all gates closed, and with all of them open: a tau that no entropy is below, and all k candidates."""
    for (rows, vocab), dtype, is_open in itertools.product(shapes, GATE_DTYPES, (False, True)):
        logits = torch.randn(rows, vocab, device=device).to(getattr(torch, dtype))
        arguments = (
            torch.arange(rows, device=device),
            torch.full((rows,), -1.0 if is_open else 1e3, device=device),
            TOP_K,
            torch.zeros(rows, device=device),
            torch.full((rows,), vocab - 1, device=device),
        )
        # Twice: what PAUSE's logit becomes must not change the next call's decision.
        for _ in range(2):
            assert gate_triton.gate(logits, *arguments).open.tolist() == [is_open] * rows
        bound = logits.numel() * logits.element_size() / bandwidth
        shape = {"rows": rows, "vocab": vocab, "gates": "open" if is_open else "closed"}
        for name, run in (("gate", gate_triton.gate), ("gate twin", gate_twin)):
            yield _point(name, shape, dtype, seconds_of(partial(run, logits, *arguments)), bound)


def attention(
    device: torch.device, sequences: int, length: int, count: int, shape: tuple[int, int, int]
) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """One layer's attention of `count` new tokens in each sequence after `length` cached ones; and its cache."""
    heads, kv_heads, head_dim = shape
    pages, rows = -(-(length + count) // BLOCK_TOKENS), sequences * count
    size = (sequences * pages, kv_heads, 4, BLOCK_TOKENS, head_dim)
    cache = torch.randn(size, device=device, dtype=torch.bfloat16)
    rope = torch.randn(length + count, head_dim, device=device)
    layer = PagedLayer(heads, kv_heads, head_dim, head_dim**-0.5, rope, score_factor=1 / 4, value_factor=1 / 2)
    table = torch.arange(sequences * pages, dtype=torch.int32, device=device).view(sequences, pages)
    positions = torch.arange(length, length + count, device=device)
    slots = table.long()[:, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
    batch = GpuBatch(
        table,
        torch.arange(0, rows + 1, count, dtype=torch.int32, device=device),
        torch.full((sequences,), length + count, dtype=torch.int32, device=device),
        slots.flatten(),
        positions.repeat(sequences),
        torch.zeros(1, 1, heads, device=device),
        torch.full((rows,), -1, dtype=torch.int32, device=device),
        singles=sequences if count == 1 else 0,
    )
    qkv = torch.randn(2 * rows, (heads + 2 * kv_heads) * head_dim, device=device).bfloat16()
    return lambda: paged_attention_gpu.attend(layer, batch, 0, cache, qkv), cache


def prefill_points(device: torch.device, lengths: list[int], shape: tuple[int, int, int]) -> Iterator[dict]:
    heads, kv_heads, head_dim = shape
    for tokens in lengths:
        step, _ = attention(device, 1, 0, tokens, shape)
        query = torch.randn(1, heads, tokens, head_dim, device=device, dtype=torch.bfloat16)
        key, value = (torch.randn(1, kv_heads, tokens, head_dim, device=device, dtype=torch.bfloat16) for _ in range(2))
        plain = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
        bound = seconds_of(plain)
        described = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        yield _point("dual attention prefill", described, "bfloat16", seconds_of(step), bound)


def decode_points(device: torch.device, shapes: list, shape: tuple[int, int, int], bandwidth: float) -> Iterator[dict]:
    heads, kv_heads, head_dim = shape
    for sequences, context in shapes:
        step, cache = attention(device, sequences, context - 1, 1, shape)
        size = cache.numel() * cache.element_size()
        described = {"sequences": sequences, "context": context, "heads": heads, "kv_heads": kv_heads}
        described["head_dim"] = head_dim
        yield _point("dual attention decode", described, "bfloat16", seconds_of(step), size / bandwidth)


def stream_points(device: torch.device, tokens: list[int], hidden: tuple[int, int], bandwidth: float) -> Iterator[dict]:
    """What lies between the linear layers, as the tangent pass calls it for so many tokens."""
    dim, intermediate = hidden
    rule, activation = RULES["attnlrp"], ACTIVATIONS["silu"]
    for count in tokens:
        streams, gain = torch.randn(2, count, dim, device=device), torch.ones(dim, device=device)
        added = torch.randn_like(streams).bfloat16()
        gate, up = (torch.randn(2, count, intermediate, device=device).bfloat16() for _ in range(2))
        # Streams, kernel, twin, and the bytes read and written for each element.
        cases = {
            "rms norm": (
                streams,
                lambda s=streams, a=added, g=gain: streams_triton.rms_norm(s, a, g, 1e-5, False, torch.bfloat16),
                lambda s=streams, a=added, g=gain: rules.rms_norm(s.add_(a), g, 1e-5, rule).bfloat16(),
                4 + 4 + 2 + 2,
            ),
            "gated product": (
                gate,
                lambda g=gate, u=up: streams_triton.gated(g, u, "silu", "attnlrp"),
                lambda g=gate, u=up: rules.gated(g.float(), u.float(), activation, rule).bfloat16(),
                2 + 2 + 2,
            ),
        }
        for name, (elements, kernel, twin, element_bytes) in cases.items():
            bound = elements.numel() * element_bytes / bandwidth
            shape = {"streams": 2, "tokens": count, "elements": elements[0, 0].numel()}
            for called, run in ((name, kernel), (f"{name} twin", twin)):
                yield _point(called, shape, "bfloat16", seconds_of(run), bound)


def _point(kernel: str, shape: dict, dtype: str, seconds: float, bound: float) -> dict:
    point = {
        "kernel": kernel,
        "shape": shape,
        "dtype": dtype,
        "seconds": seconds,
        "bound_seconds": bound,
        "ratio": seconds / bound,
    }
    click.echo(json.dumps(point))
    return point


@click.command(help=__doc__)
@click.option("--json", "output", required=True)
def main(output):
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not triton_support.interpreted():
        raise click.ClickException("there is no NVIDIA GPU; TRITON_INTERPRET=1 runs the kernels on a CPU, to try them")
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    heads = (HEADS, KV_HEADS, HEAD_DIM) if on_gpu else SMALL["heads"]
    hidden = (HIDDEN, INTERMEDIATE) if on_gpu else SMALL["hidden"]
    points = [
        *gate_points(device, GATE_SHAPES if on_gpu else SMALL["gate"], bandwidth),
        *prefill_points(device, PREFILL_TOKENS if on_gpu else SMALL["prefill"], heads),
        *decode_points(device, DECODES if on_gpu else SMALL["decode"], heads, bandwidth),
        *stream_points(device, TOKENS if on_gpu else SMALL["tokens"], hidden, bandwidth),
    ]
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else "interpreter (CPU): no claim about time",
        "copy_bytes_per_second": bandwidth,
        "points": points,
    }
    write_result(output, result)


if __name__ == "__main__":
    main()
