"""The whole tangent pass by Triton's kernels in the place of a CPU's: prefill in chunks, then cached steps; and what a
pass launches, which on a GPU is captured once for all passes of its size."""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from agd_vllm.attribution import forward, linears, operations, tangent_pass
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.kernels import paged_attention_gpu, streams_triton, tilings
from agd_vllm.records import Roi, ScoreRequest, Span

sys.path.append(str(Path(__file__).parent.parent / "attribution"))
import tiny

LAUNCHED = [
    (paged_attention_gpu.kernels, "attend"),
    (paged_attention_gpu.kernels, "combine"),
    (paged_attention_gpu.paged_heads_triton, "prepare"),
    (streams_triton, "_rms_norm"),
    (streams_triton, "_gated"),
]
SPANS = (Span(2, 9), Span(12, 15, -0.5))


@pytest.fixture
def scorers(tmp_path, monkeypatch):
    """One by Triton's kernels, and what loads one by a CPU's: passes of at most 16 tokens."""
    monkeypatch.setattr(forward, "PASS_TOKENS", 16)

    def load(name: str, rule: str) -> tuple[ForwardScorer, Callable[[], ForwardScorer]]:
        expected = partial(ForwardScorer, str(tiny.save(name, tmp_path)), rule=rule, cache_bytes=1 << 20)
        with monkeypatch.context() as patch:
            patch.setattr(linears, "_can_pack", lambda weight: False)
            patch.setattr(operations, "stream_kernels", lambda *_: streams_triton)
            patch.setattr(tangent_pass, "attention_kernel", lambda *_: paged_attention_gpu)
            return expected(), expected

    return load


def assert_same_scores(ours, theirs) -> None:
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_scores_are_those_of_the_other_kernels(scorers):
    scorer, load_expected = scorers("gemma3", "attnlrp")
    expected = load_expected()
    assert scorer.tangents.static.sizes == [1, 2, 4, 8, 16]
    torch.manual_seed(0)
    rows = torch.randint(3, tiny.VOCABULARY, (2, 22)).tolist()
    for start, end in ((0, 20), (20, 22)):
        requests = [
            ScoreRequest(f"{row}", start, ids[start : end - row * (start > 0)], Roi(SPANS), (5, 6, 7))
            for row, ids in enumerate(rows)
        ]
        assert_same_scores(scorer.score(requests), expected.score(requests))


def addresses(tables) -> list[int]:
    batch = [getattr(tables.batch, field.name) for field in dataclasses.fields(tables.batch)]
    tensors = [tables.ids, tables.weights, *(each for each in batch if isinstance(each, torch.Tensor))]
    return [tensor.data_ptr() for tensor in tensors]


class Watch(TorchDispatchMode):
    """Operators and kernels in their order, with shapes and numbers, and addresses in the storages of `kept`; what is
    made on the way lies where there is room, which a graph has of its own."""

    def __init__(self, kept: list[torch.Tensor]):
        super().__init__()
        self.seen: list[tuple] = []
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in kept}

    def described(self, value):
        if isinstance(value, list | tuple):
            return [self.described(each) for each in value]
        if isinstance(value, dict):
            return {name: self.described(each) for name, each in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        is_kept = value.untyped_storage().data_ptr() in self._storages
        return tuple(value.shape), value.stride(), value.dtype, value.data_ptr() if is_kept else None

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen.append((str(function), self.described(arguments), self.described(keywords or {})))
        return function(*arguments, **(keywords or {}))

    def spy_on(self, monkeypatch, module, name: str) -> None:
        kernel, watch = getattr(module, name), self

        class Spy:
            def __getitem__(self, grid):
                def launch(*arguments, **constants):
                    watch.seen.append((name, grid, watch.described(arguments), constants))
                    with _disable_current_modes():
                        kernel[grid](*arguments, **constants)

                return launch

        monkeypatch.setattr(module, name, Spy())


def test_two_passes_of_one_size_launch_the_same_on_the_same_buffers(scorers, monkeypatch):
    """Other rows, lengths, heads and regions, and each right after the other."""
    monkeypatch.setattr(tilings, "num_splits", lambda *_: 2)
    scorer, load_expected = scorers("llama-3", "attnlrp")
    tangents = scorer.tangents
    torch.manual_seed(1)
    ids = torch.randint(3, tiny.VOCABULARY, (4, 40)).tolist()
    regions = Roi(SPANS, ((0, 1), (2, 3))), Roi(SPANS), Roi(heads=((1, 0),)), Roi((Span(0, 2),))

    def requests(*parts: tuple[int, int, int]) -> list[ScoreRequest]:
        return [ScoreRequest(f"{i}", start, ids[i][start:end], regions[i], (5, 6, 7)) for i, start, end in parts]

    def check(*parts: tuple[int, int, int]) -> None:
        """Against scorers that have seen nothing else, so that nothing of another call can be in them."""
        whole = [load_expected().score(requests((i, 0, end)))[0] for i, _, end in parts]
        assert_same_scores(scorer.score(requests(*parts)), whole)

    # The first sequence has the first blocks of the cache and one of the last rows that are scored.
    check((0, 0, 15))
    check((1, 0, 16), (2, 0, 3))
    buffers = tangents._buffers
    parameters = [tensor for _, tensor in scorer.hf.model.named_parameters() if tensor is not None]
    kept = [buffers._by_row, buffers._table, buffers._sets, scorer.cache.pool.layers, *parameters]
    seen, run = [], tangents.static.run

    def watched(tables, cache):
        watch = Watch(kept)
        with monkeypatch.context() as patch, watch:
            for module, name in LAUNCHED:
                watch.spy_on(patch, module, name)
            out = run(tables, cache)
        seen.append((tables, watch.seen))
        return out

    monkeypatch.setattr(tangents.static, "run", watched)
    check((0, 15, 16), (1, 16, 20))  # five rows, then seven, then six: all are padded to eight
    check((2, 3, 4), (0, 16, 17), (3, 0, 5))
    check((1, 20, 26))
    assert [len(tables.ids) for tables, _ in seen] == [8, 8, 8]
    assert addresses(seen[0][0]) == addresses(seen[1][0]) == addresses(seen[2][0])
    assert seen[0][1] == seen[1][1] == seen[2][1]
    operators = {entry[0] for entry in seen[0][1]}
    assert {name for _, name in LAUNCHED} <= operators and "aten.embedding.default" in operators
    # What makes a number of a tensor waits for the device, and so does what is as long as it happens to be.
    assert not {name for name in operators if "local_scalar" in name or "nonzero" in name or "_to_copy" in name}
