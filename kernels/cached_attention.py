"""Attention of cached sequences and of their tangents on a CPU, all sequences of a batch in one call.

`cached_attention.c`, compiled by the machine's C compiler when it is first used and kept in the user's cache folder.
Its twin in PyTorch is `agd_vllm.attribution.rules.attention`, one sequence a call.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cached_attention.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
HEAD_DIMS = (64, 96, 128, 256)

log = logging.getLogger("agd_vllm")


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "streams", "key_streams", "heads", "kv_heads", "window")]
    _fields_ += [("score_factor", ctypes.c_float), ("value_factor", ctypes.c_float)]


class CachedAttention:
    """Ragged sequences of one batch: caches [layers, K, streams, capacity, D] float32, `length` tokens in them each.

    `sequences`: (keys, values, length, count) of each, whose `count` new tokens are the next rows of the batch.
    `score_factor` and `value_factor` are the rule's f and h. Raises OSError without a compiler: see `available`.
    """

    def __init__(
        self,
        sequences: Sequence[tuple[torch.Tensor, torch.Tensor, int, int]],
        score_factor: float,
        value_factor: float,
    ):
        table, rows = [], 0
        for keys, values, length, count in sequences:
            table.append((keys.data_ptr(), values.data_ptr(), keys.shape[3], length, count, rows))
            rows += count
        self._sequences = torch.tensor(table, dtype=torch.int64)
        keys, values = sequences[0][:2]
        self._shape = _Shape(
            rows=rows,
            streams=values.shape[2],
            key_streams=keys.shape[2],
            kv_heads=keys.shape[1],
            score_factor=score_factor,
            value_factor=value_factor,
        )
        self._attend = _library().agd_cached_attention

    def __call__(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """One layer: adds the new keys and values to the caches and attends.

        queries [key streams, rows, H, D] (scaled by 1 / sqrt(d)), keys [key streams, rows, K, D], values
        [S, rows, K, D]; `window`: a query sees that many positions, its own included. Returns [S, rows, H, D].
        """
        shape = self._shape
        shape.heads, shape.window = queries.shape[2], window or 0
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        out = queries.new_empty(shape.streams, *queries.shape[1:])
        status = self._attend(
            self._sequences.data_ptr(),
            len(self._sequences),
            ctypes.byref(shape),
            layer,
            queries.shape[3],
            *(tensor.data_ptr() for tensor in (queries, keys, values, out)),
        )
        if status:
            raise MemoryError(f"no memory for the attention scores of {shape.rows} tokens")
        return out


@functools.cache
def available(head_dim: int) -> bool:
    """Whether it can be used here for heads of that size. Warns once where there is no working C compiler."""
    if head_dim not in HEAD_DIMS:
        return False
    try:
        _library()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("scoring is slower without a C compiler (gcc with OpenMP): %s", _reason(error))
        return False
    return True


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.fspath(_compiled()))
    pointers = [ctypes.c_void_p] * 4
    library.agd_cached_attention.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.POINTER(_Shape),
        ctypes.c_int64,
        ctypes.c_int64,
        *pointers,
    ]
    return library


def _compiled() -> Path:
    """The shared library for this machine's instructions, compiled if it is not there yet."""
    compiler = os.environ.get("CC", "cc")
    # Home folders are shared by machines of different kinds.
    machine = hashlib.sha256(repr((compiler, FLAGS, platform.machine(), _cpu_flags())).encode() + SOURCE.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agd-vllm"
    path = folder / f"cached_attention-{machine.hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: others may be compiling it as well.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / path.name
        command = [compiler, *FLAGS, os.fspath(SOURCE), "-o", os.fspath(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        made.rename(path)
    return path


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _reason(error: Exception) -> str:
    printed = (getattr(error, "stderr", None) or "").strip().splitlines()
    return printed[0] if printed else f"{error}"
