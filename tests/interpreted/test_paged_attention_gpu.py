"""Attention of paged sequences by Triton's kernels against its twin in PyTorch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import BF16, F32, gpu_batch, make_case, make_layer, make_offset_case, relative_error

from agd_vllm.attribution import paged_twin
from agd_vllm.attribution.rules import RULES
from agd_vllm.kernels import paged_attention_gpu, tilings
from agd_vllm.kernels.paged_attention_gpu import GpuBatch
from agd_vllm.kernels.tilings import Tiling

PREFILL, DECODE = tilings.PREFILL, tilings.DECODE


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a few dozen tokens are several tiles of queries and of keys."""
    monkeypatch.setattr(tilings, "PREFILL", (Tiling(32, 16, 4, 1),))
    monkeypatch.setattr(tilings, "DECODE", (Tiling(16, 16, 4, 1),))


def assert_as_twin(case, tolerance=1e-5, cache_tolerance=1e-5, mixed=False) -> None:
    theirs, twin = case.attend(paged_twin.attend)
    ours, cache = replace(case, batch=gpu_batch(case, mixed)).attend(paged_attention_gpu.attend)
    for one, other, bound in ((ours, theirs, tolerance), (cache, twin, cache_tolerance)):
        largest = bound * float(other.float().nan_to_num().abs().max())
        torch.testing.assert_close(one.float(), other.float(), rtol=bound, atol=largest, equal_nan=True)


@settings(max_examples=12, deadline=None)
@given(
    rule=st.sampled_from(list(RULES)),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([16, 64, 96]),
    ones=st.lists(st.integers(0, 90), max_size=3),
    others=st.lists(st.tuples(st.integers(0, 60), st.integers(2, 40)), max_size=2),
    window=st.none() | st.integers(1, 50),
    norms=st.booleans(),
    block_size=st.sampled_from([16, 32, 48]),
    strides=st.sampled_from(["contiguous", "one of several", "tokens first"]),
    heads=st.booleans(),
    splits=st.sampled_from([1, 1, 2, 5]),
    seed=st.integers(0, 2**16),
)
def test_it_attends_and_fills_the_cache_as_its_twin(
    rule, kv_heads, group, head_dim, ones, others, window, norms, block_size, strides, heads, splits, seed
):
    torch.manual_seed(seed)
    sequences = [(length, 1) for length in ones] + others or [(20, 1)]
    layer = make_layer(rule, kv_heads, group, head_dim, window, norms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tilings, "num_splits", lambda *_: splits)
        assert_as_twin(make_case(layer, sequences, block_size, strides, heads=heads))


@pytest.mark.parametrize(("head_dim", "window"), [(64, 40), (128, None), (256, 40)])
def test_the_tiles_of_a_gpu(monkeypatch, head_dim, window):
    """With a window a tile of keys may begin in pages that are another's by now."""
    monkeypatch.setattr(tilings, "PREFILL", PREFILL)
    monkeypatch.setattr(tilings, "DECODE", DECODE)
    torch.manual_seed(head_dim)
    assert_as_twin(make_case(make_layer(group=4, head_dim=head_dim, window=window), [(130, 1), (40, 50)]))


@pytest.mark.parametrize(("rule", "window"), [("attnlrp", None), ("cplrp", 20), ("ixg", 20)])
def test_bfloat16(rule, window):
    """Weights are rounded to bfloat16 for the products, and so are queries (the interpreter cuts them off)."""
    torch.manual_seed(0)
    case = make_case(make_layer(rule, 2, 3, 64, window), [(70, 1), (77, 3), (0, 40)], dtype=BF16)
    assert_as_twin(case, tolerance=2**-5, cache_tolerance=2**-7)


@pytest.mark.parametrize("deviations", [0, 3, 10, 30])
@pytest.mark.parametrize(("window", "splits"), [(None, 1), (None, 3), (40, 2)])
def test_an_offset_of_all_scores_tangents_costs_no_precision(monkeypatch, window, splits, deviations):
    """It cancels in the result, so it must not be in the weights that are rounded to bfloat16."""
    monkeypatch.setattr(tilings, "num_splits", lambda *_: splits)
    torch.manual_seed(0)
    case = make_offset_case(deviations, window)
    theirs, _ = case.attend(paged_twin.attend)
    ours, _ = replace(case, batch=gpu_batch(case)).attend(paged_attention_gpu.attend)
    assert relative_error(ours, theirs) < 5e-3


def test_more_heads_in_a_group_than_rows_in_a_tile():
    torch.manual_seed(0)
    assert_as_twin(make_case(make_layer(group=20, head_dim=16), [(40, 1), (3, 4)], heads=True))


@pytest.mark.parametrize(("rule", "splits"), [("attnlrp", 1), ("cplrp", 3), ("ixg", 2)])
def test_batches_of_which_only_the_device_knows_who_has_one_token(monkeypatch, rule, splits):
    """In any order, with rows of padding: each launch passes over what is the other's."""
    monkeypatch.setattr(tilings, "num_splits", lambda *_: splits)
    torch.manual_seed(splits)
    layer = make_layer(rule, kv_heads=2, group=2, head_dim=16, window=[None, None, 20][splits - 1])
    sequences = [(3, 20), (40, 1), (0, 1), (17, 2), (33, 1)]
    assert_as_twin(make_case(layer, sequences, padding=4, heads=True), mixed=True)
    assert_as_twin(make_case(layer, [(25, 1)], heads=True), mixed=True)


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_of_padding_are_0_and_write_nowhere(monkeypatch, splits):
    """A CUDA graph is of one size of batch: what is missing are sequences without a token, at the end."""
    monkeypatch.setattr(tilings, "num_splits", lambda *_: splits)
    torch.manual_seed(0)
    case = make_case(make_layer(group=2, head_dim=16), [(90, 1), (20, 1)], padding=2, heads=True)
    theirs, twin = case.attend(paged_twin.attend)
    batch = gpu_batch(case)
    padded = replace(
        batch,
        # What stands there is another batch's.
        block_table=torch.cat((batch.block_table, batch.block_table)),
        starts=torch.cat((batch.starts, batch.starts[-1:].repeat(2))),
        ends=torch.cat((batch.ends, batch.ends)),
        singles=4,
    )
    ours, cache = replace(case, batch=padded).attend(paged_attention_gpu.attend)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache, twin, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 3])
def test_what_is_launched_does_not_depend_on_lengths(monkeypatch, splits):
    """Two batches of one size in the same buffers: the same grids, numbers and addresses, and right both times."""
    monkeypatch.setattr(tilings, "num_splits", lambda *_: splits)
    launched = []
    for module, name in ((paged_attention_gpu.kernels, "attend"), (paged_attention_gpu.kernels, "combine")):
        spy_on(monkeypatch, module, name, launched)
    spy_on(monkeypatch, paged_attention_gpu.paged_heads_triton, "prepare", launched)
    layer = make_layer(kv_heads=2, group=2, head_dim=16)
    held, seen = None, []
    for lengths in ((5, 40, 130), (90, 0, 17)):
        torch.manual_seed(sum(lengths))
        case = make_case(layer, [(length, 1) for length in lengths], heads=True)
        theirs, _ = case.attend(paged_twin.attend)
        batch = gpu_batch(case)
        batch = replace(batch, block_table=torch.nn.functional.pad(batch.block_table, (0, 9))[:, :10].contiguous())
        cache = torch.nn.functional.pad(case.cache, (0, 0) * 4 + (0, 30 - len(case.cache)))
        if held is None:
            held = batch, cache, case.qkv
        else:
            for to, tensor in zip(tensors_of(held[0]), tensors_of(batch), strict=True):
                to.copy_(tensor)
            held[1].copy_(cache)
            held[2].copy_(case.qkv)
        launched.clear()
        ours = paged_attention_gpu.attend(layer, held[0], 1, held[1], held[2])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        # What is made for a call alone (queries, sums, what comes out) lies where there is room: a graph has its own.
        kept = {tensor.data_ptr() for tensor in (held[1], held[2], *tensors_of(held[0]))}
        seen.append([(name, grid, [a for a in args if a in kept or a < 1 << 32]) for name, grid, args in launched])
    assert seen[0] == seen[1]
    assert [name for name, *_ in seen[0]] == ["prepare", "attend", "combine"][: 2 + (splits > 1)]


def tensors_of(batch: GpuBatch) -> list[torch.Tensor]:
    return [getattr(batch, name) for name in GpuBatch.__dataclass_fields__ if name != "singles"]


def spy_on(monkeypatch, module, name: str, launched: list) -> None:
    kernel = getattr(module, name)

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                numbers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
                launched.append((name, grid, numbers))
                kernel[grid](*arguments, **constants)

            return launch

    monkeypatch.setattr(module, name, Spy())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_visible(bad):
    torch.manual_seed(0)
    case = make_case(make_layer(), [(20, 1), (20, 1)], dtype=F32)
    case.cache[int(case.batch.block_table[0, 0]), 0, 0, 3] = bad
    out = replace(case, batch=gpu_batch(case)).attend(paged_attention_gpu.attend)[0].view(2, 2, -1)
    assert out[:, 0].isnan().any() and out[:, 1].isfinite().all()
