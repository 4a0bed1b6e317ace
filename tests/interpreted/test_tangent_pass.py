"""The whole tangent pass by Triton's kernels in the place of a CPU's: prefill in chunks, then cached steps; and what a
pass launches, which on a GPU is captured once for all passes of its size."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from agd_vllm.attribution import forward, tangent_pass
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.attribution.operations import FusedOperations
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
    """One by Triton's kernels, one by a CPU's: passes of at most 16 tokens."""
    monkeypatch.setattr(forward, "PASS_TOKENS", 16)

    def load(name: str, rule: str) -> tuple[ForwardScorer, ForwardScorer]:
        model = str(tiny.save(name, tmp_path))
        expected = ForwardScorer(model, rule=rule, cache_bytes=1 << 20)
        monkeypatch.setattr(tangent_pass, "operations", lambda _hf, *model: FusedOperations(*model, streams_triton))
        monkeypatch.setattr(tangent_pass, "attention_kernel", lambda *_: paged_attention_gpu)
        return ForwardScorer(model, rule=rule, cache_bytes=1 << 20), expected

    return load


def assert_same_scores(ours, theirs) -> None:
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_scores_are_those_of_the_other_kernels(scorers):
    scorer, expected = scorers("gemma3", "attnlrp")
    assert scorer.tangents.static.sizes == [1, 2, 4, 8, 16]
    torch.manual_seed(0)
    rows = torch.randint(3, tiny.VOCABULARY, (2, 22)).tolist()
    for start, end in ((0, 20), (20, 22)):
        requests = [
            ScoreRequest(f"{row}", start, ids[start : end - row * (start > 0)], Roi(SPANS), (5, 6, 7))
            for row, ids in enumerate(rows)
        ]
        assert_same_scores(scorer.score(requests), expected.score(requests))


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
    scorer, expected = scorers("llama-3", "attnlrp")
    tangents = scorer.tangents
    torch.manual_seed(1)
    ids = torch.randint(3, tiny.VOCABULARY, (4, 40)).tolist()
    regions = Roi(SPANS, ((0, 1), (2, 3))), Roi(SPANS), Roi(heads=((1, 0),)), Roi((Span(0, 2),))

    def requests(*parts: tuple[int, int, int]) -> list[ScoreRequest]:
        return [ScoreRequest(f"{i}", start, ids[i][start:end], regions[i], (5, 6, 7)) for i, start, end in parts]

    # The first sequence has the first blocks of the cache and one of the last rows that are scored.
    for batch in (requests((0, 0, 15)), requests((1, 0, 16), (2, 0, 3))):
        assert_same_scores(scorer.score(batch), expected.score(batch))
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
        seen.append((len(tables.ids), watch.seen))
        return out

    monkeypatch.setattr(tangents.static, "run", watched)
    for batch in (
        requests((0, 15, 16), (1, 16, 20)),  # five rows, then seven: both are padded to eight
        requests((2, 3, 4), (0, 16, 17), (3, 0, 5)),
        requests((1, 20, 26)),
    ):
        assert_same_scores(scorer.score(batch), expected.score(batch))
    assert [size for size, _ in seen] == [8, 8, 8]
    assert seen[0][1] == seen[1][1] == seen[2][1]
    operators = {entry[0] for entry in seen[0][1]}
    assert {name for _, name in LAUNCHED} <= operators and "aten.embedding.default" in operators
    # What makes a number of a tensor waits for the device, and so does what is as long as it happens to be.
    assert not {name for name in operators if "local_scalar" in name or "nonzero" in name or "_to_copy" in name}
