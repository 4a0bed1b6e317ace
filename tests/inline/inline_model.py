"""vLLM's own model class with tangents, without an engine: sequences side by side, in chunks.

For a process of its own, since vLLM's state is its process's.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model

from agd_vllm.inline import engine_args
from agd_vllm.inline.attention import DualAttention, DualMetadata
from agd_vllm.inline.params import inline_params_of
from agd_vllm.inline.runner_v1 import InlineRow
from agd_vllm.records import Roi, Span

BLOCK = 16


class InlineModel:
    def __init__(self, path: str, rule: str, dtype: str = "float32"):
        torch.accelerator.empty_cache = lambda: None  # vLLM's loader calls it; its CPU worker does the same
        args = engine_args(path, rule, dtype)
        self._config = EngineArgs(
            **args, skip_tokenizer_init=True, block_size=BLOCK, kv_cache_memory_bytes=1 << 34
        ).create_engine_config()
        self._rule = rule
        self._v2 = self._config.use_v2_model_runner
        if self._v2:
            # Streams, events and pinned memory for where there are none.
            importlib.import_module("vllm.v1.worker.cpu.shm")
        with set_current_vllm_config(self._config):
            if not torch.distributed.is_initialized():
                store = Path(tempfile.mkdtemp()) / "store"
                init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
                initialize_model_parallel(1, 1)
            self._model = get_model(vllm_config=self._config)
        context = self._config.compilation_config.static_forward_context
        self._layers = {name: layer for name, layer in context.items() if isinstance(layer, DualAttention)}
        self._runner = self._model._runner

    def scores(
        self, sequences: Sequence[tuple[list[int], Roi]], candidates: Sequence[dict[int, Sequence[int]]], chunk: int
    ) -> list[dict[int, list[float]]]:
        """For each sequence, by the number of tokens before them, S(c) of its `candidates` there; all sequences grow
        side by side, `chunk` tokens a pass, or up to the next candidates."""
        found: list[dict[int, list[float]]] = [{} for _ in sequences]
        for reached, tangents, unembedding in self._passes(sequences, [sorted(at) for at in candidates], chunk):
            for (i, end), tangent in zip(reached, tangents, strict=True):
                if end in candidates[i]:
                    found[i][end] = (unembedding[list(candidates[i][end])].float() @ tangent.float()).tolist()
        return found

    def _passes(
        self, sequences: Sequence[tuple[list[int], Roi]], stops: list[list[int]], chunk: int
    ) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]]:
        """(sequence, its tokens in the cache by now) of each pass, their x' and the unembedding."""
        blocks = [-(-len(tokens) // BLOCK) for tokens, _ in sequences]
        table = torch.zeros(len(sequences), max(blocks), dtype=torch.int32)
        free = torch.randperm(sum(blocks), dtype=torch.int32) + 1
        for i, count in enumerate(blocks):
            table[i, :count], free = free[:count], free[count:]
        self._bind(1 + sum(blocks))
        if self._v2:
            self._enter(sequences)
        ends = [0] * len(sequences)
        while open_ := [i for i, (tokens, _) in enumerate(sequences) if ends[i] < len(tokens)]:
            pieces = []
            for i in open_:
                stop = next((at for at in stops[i] if at > ends[i]), len(sequences[i][0]))
                pieces.append(sequences[i][0][ends[i] : min(stop, ends[i] + chunk)])
            counts, lengths = torch.tensor([len(piece) for piece in pieces]), torch.tensor([ends[i] for i in open_])
            positions = torch.cat([torch.arange(n, n + c) for n, c in zip(lengths, counts, strict=True)])
            owner = torch.repeat_interleave(torch.tensor(open_), counts)
            slots = table[owner, positions // BLOCK].long() * BLOCK + positions % BLOCK
            starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).int()
            singles = len(open_) if chunk == 1 else 0
            metadata = DualMetadata(table[open_], starts, (lengths + counts).int(), slots, singles)
            if self._v2:
                self._runner.assign(starts, torch.tensor(open_), positions, len(positions))
            else:
                self._runner.rows = {row: self._row(*sequences[i]) for row, i in enumerate(open_)}
            with torch.no_grad(), set_forward_context(dict.fromkeys(self._layers, metadata), self._config):
                hidden = self._model(torch.tensor([token for piece in pieces for token in piece]), positions)
            self._model.compute_logits(hidden[counts.cumsum(0) - 1])
            for i, piece in zip(open_, pieces, strict=True):
                ends[i] += len(piece)
            yield [(i, ends[i]) for i in open_], self._runner.tangents, self._runner.unembedding

    def _bind(self, num_blocks: int) -> None:
        for layer in self._layers.values():
            spec = layer.get_kv_cache_spec(self._config)
            shape = (num_blocks, spec.num_kv_heads, BLOCK, spec.head_size + spec.head_size_v)
            # What was not written must never be read.
            layer.bind_kv_cache(torch.full(shape, float("nan"), dtype=spec.dtype))

    def _enter(self, sequences: Sequence[tuple[list[int], Roi]]) -> None:
        tokens = [len(tokens) for tokens, _ in sequences]
        self._runner.allocate(len(sequences), sum(tokens), max(tokens), torch.device("cpu"))
        former = Roi((Span(0, max(tokens), -3.0),), ((0, 0),))
        # Each row's slot was another's before, with weights up to the last position.
        for rois in ([former] * len(tokens), [roi for _, roi in sequences]):
            for row, (count, roi) in enumerate(zip(tokens, rois, strict=True)):
                params = inline_params_of(roi, 0, self._rule, 0.0, 5, 0.0) if roi else None
                self._runner.enter(row, params, max(tokens) if roi is former else count)
            self._runner.apply_staged_writes()

    def _row(self, tokens: list[int], roi: Roi) -> InlineRow:
        return InlineRow.of(inline_params_of(roi, 0, self._rule, 0.0, 5, 0.0), list(tokens), [])
