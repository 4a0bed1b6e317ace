"""Compiles the Triton kernels for NVIDIA GPUs, none at hand: a line of JSON for each, as the assembler sees it.

A process of its own: where a compiler fails in earnest it takes the process along.
"""

import json
import re
import subprocess
import tempfile

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from agd_vllm.kernels import (
    gate_triton,
    paged_attention_triton,
    paged_heads_triton,
    streams_triton,
    tilings,
)

# Compute capability and the shared memory that a block may have: A100, H100.
GPUS = {80: 163 << 10, 90: 227 << 10}
ALIGNED = [["tt.divisibility", 16]]
NUMBERS = ("ratio", "value_factor", "largest", "eps", "scale")
MULTIPLES_OF_16 = ("stride", "vocab", "dim", "num_heads", "of_block", "of_head", "of_plane", "of_token")
TABLES = {"sequences": "i64", "tiles": "i64", "tokens": "i64", "rows": "i64", "pause": "i64", "opens": "i1"}
TABLES |= {"slots": "i64", "positions": "i64"}
COUNTS = {name: "i32" for name in ("candidate_ids", "candidate_counts", "table", "starts", "ends", "set_of")}


def build(
    function, gpu: int, pointers: tuple[str, ...], constants: dict, half: tuple[str, ...] = (), name="", **options
) -> None:
    """`pointers`: the arguments that are tensors, of them bfloat16 `half`; the others are numbers, as in a call."""
    signature, aligned = {}, {}
    for index, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in pointers:
            signature[argument] = "*" + ("bf16" if argument in half else (TABLES | COUNTS).get(argument, "fp32"))
            aligned[(index,)] = ALIGNED
        else:
            signature[argument] = "fp32" if argument in NUMBERS else "i32"
            if argument in MULTIPLES_OF_16:
                aligned[(index,)] = ALIGNED
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)
    assembly = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(assembly)
        file.flush()
        arch = re.search(r"\.target (\w+)", assembly)[1]
        command = [get_ptxas(gpu).path, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    result = {
        "kernel": name or function.__name__,
        "gpu": gpu,
        "registers": int(re.search(r"Used (\d+) registers", told)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", told)[1]),
        "shared_bytes": kernel.metadata.shared,
        "shared_limit": GPUS[gpu],
        "widest_load": max(
            (int(lanes or 1) * int(bits) for lanes, bits in re.findall(r"ld\.global(?:\.v(\d))?\.b(\d+)", assembly)),
            default=0,
        ),
    }
    print(json.dumps(result), flush=True)


def gate(gpu: int, half: tuple[str, ...]) -> None:
    tensors = ("logits", "rows", "pause", "maxima", "partials")
    build(
        gate_triton._measure,
        gpu,
        tensors,
        {"TILE": gate_triton.TILE, "TILES": gate_triton.TILES},
        half,
        num_warps=gate_triton.MEASURE_WARPS,
    )
    outputs = ("entropies", "log_sum_exps", "opens", "candidate_ids", "candidate_probs", "candidate_counts")
    build(
        gate_triton._decide,
        gpu,
        (*tensors, "tau", "min_prob", *outputs),
        {"TILE": gate_triton.TILE, "ALL_TILES": 256, "CHUNKS": 16, "TOP_K": 64},
        half,
        num_warps=gate_triton.DECIDE_WARPS,
    )


def paged_attention(gpu: int, head_dim: int) -> None:
    group, paged = 4, {"STREAMS": 2, "GROUP": 4, "SIZE": 16, **kind(head_dim)}
    halves = ("qkv", "queries", "cache", "out")
    build(
        paged_heads_triton.prepare,
        gpu,
        ("qkv", "slots", "positions", "rope", "query_gain", "key_gain", "queries", "cache"),
        {"NORMED": False, "THROUGH_NORM": False, "MEMBERS": 8, **paged},
        halves,
        num_warps=2,
    )
    for kinds, single in ((tilings.DECODE, True), (tilings.PREFILL, False)):
        tiling = tilings.choose_tiling(kinds, paged["BLOCK_D"], group, GPUS[gpu])
        build(
            paged_attention_triton.attend,
            gpu,
            ("queries", "out", "sums", "numbers", "cache", "table", "starts", "ends", "sets", "set_of"),
            {
                "SINGLE": single,
                "MIXED": True,
                "WINDOW": False,
                "SPLIT": single,
                "ROWS": tiling.rows,
                "KEYS": tiling.keys,
                "INTERPRETED": False,
                **paged,
            },
            halves,
            name="decode" if single else "attend",
            num_warps=tiling.warps,
            num_stages=2 * tiling.stages - 1 if single else tiling.stages,
        )
    build(
        paged_attention_triton.combine,
        gpu,
        ("sums", "numbers", "out", "starts", "sets", "set_of"),
        {"D": head_dim, "BLOCK_D": paged["BLOCK_D"]},
        halves,
        num_warps=1,
    )


def between_linear_layers(gpu: int, dim: int) -> None:
    build(
        streams_triton._rms_norm,
        gpu,
        ("streams", "added", "gain", "out"),
        {"ADDED": True, "THROUGH_NORM": False, "BLOCK": dim},
        ("added", "out"),
        num_warps=streams_triton._warps(dim),
    )
    tensors = ("gates", "ups", "out")
    build(
        streams_triton._gated,
        gpu,
        tensors,
        {"SILU": True, "RULE": 0, "BLOCK": streams_triton.GATED_BLOCK},
        tensors,
        num_warps=streams_triton.GATED_WARPS,
    )


def kind(head_dim: int) -> dict:
    return {"TYPE": tl.bfloat16, "D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for half in ((), ("logits",)):
        gate(90, half)
    between_linear_layers(90, 4096)
    for gpu in GPUS:
        paged_attention(gpu, 128)
