"""A tangent pass of one of a few sizes: on a GPU captured once (CUDA graphs) and replayed, elsewhere run as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from agd_vllm.attribution.pass_tables import PassBuffers, PassTables

SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Rows of a pass where it is padded. Up to about 90 the weights, which are read once, are what it costs; beyond that
every row costs, and sizes lie closer."""


class StaticPass:
    """Runs `function(tables, cache)`, which gives a tensor of N rows, on tables of `buffers`.

    `sizes`: N is the least of them that suffices, the last one the most there can be; None: N is exact.
    """

    def __init__(
        self,
        function: Callable[[PassTables, torch.Tensor], torch.Tensor],
        buffers: PassBuffers,
        sizes: Sequence[int] | None,
    ):
        self._function, self._buffers, self.sizes = function, buffers, sizes
        self._cache: torch.Tensor | None = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def size_for(self, tokens: int) -> int:
        return tokens if self.sizes is None else next(size for size in self.sizes if size >= tokens)

    def forget(self) -> None:
        """Nothing is captured any longer, and no cache is held for it."""
        self._cache = None
        self._graphs.clear()

    @torch.inference_mode()
    def capture(self, cache: torch.Tensor) -> None:
        """Captures passes over `cache`, as in `BlockPool.layers`, instead of those captured before.

        Each size is run once before, which compiles its kernels. The largest comes first: its memory serves the others,
        since no two run at a time.
        """
        self.forget()
        self._cache = cache
        memory = torch.cuda.graph_pool_handle()
        for size in sorted(self.sizes, reverse=True):
            tables = self._buffers.pad(size)
            self._function(tables, cache)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                out = self._function(tables, cache)
            self._graphs[size] = graph, out

    def run(self, tables: PassTables, cache: torch.Tensor) -> torch.Tensor:
        """What the function gives, valid until the next call. A cache of which nothing was captured is served, too."""
        captured = self._graphs.get(len(tables.ids)) if cache is self._cache else None
        if captured is None:
            return self._function(tables, cache)
        graph, out = captured
        graph.replay()
        return out
