"""The compiled attention of paged sequences against its twin in PyTorch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import BF16, F32, Case, make_case, make_layer, make_offset_case, relative_error

from agd_vllm.attribution import paged_twin
from agd_vllm.attribution.rules import RULES
from agd_vllm.kernels.paged_attention import HEAD_DIMS, PagedBatch


def assert_as_twin(case: Case) -> None:
    (ours, cache), (theirs, twin) = case.attend(), case.attend(paged_twin.attend)
    exact = case.cache.dtype == case.qkv.dtype == F32
    assert ours.dtype == case.qkv.dtype
    # Of bfloat16, a key may be rounded to either side.
    for one, other, tolerance in ((ours, theirs, 1e-5 if exact else 1e-2), (cache, twin, 1e-5 if exact else 2**-7)):
        bound = tolerance * float(other.float().nan_to_num().abs().max())
        torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=bound, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(list(RULES)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from(HEAD_DIMS),
    sequences=st.lists(st.tuples(st.integers(0, 150), st.just(1) | st.integers(1, 90)), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 70),
    norms=st.booleans(),
    block_size=st.sampled_from([16, 32, 48, 128]),
    strides=st.sampled_from(["contiguous", "one of several", "tokens first"]),
    dtypes=st.sampled_from([(F32, F32), (F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32)]),
    padding=st.integers(0, 3),
    heads=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_attends_and_fills_the_cache_as_its_twin(
    rule, kv_heads, group, head_dim, sequences, window, norms, block_size, strides, dtypes, padding, heads, seed
):
    torch.manual_seed(seed)
    layer = make_layer(rule, kv_heads, group, head_dim, window, norms)
    dtype, cache_dtype = dtypes
    case = make_case(layer, sequences, block_size, strides, dtype, cache_dtype, padding, heads)
    assert_as_twin(case)
    rows = len(case.batch.slots)
    assert not case.attend()[0].view(2, rows, -1)[:, rows - padding :].any()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rule", list(RULES))
def test_long_sequences_of_many_heads(rule, dtype):
    """More keys than any tile holds, more heads of a group than a task's vectors."""
    torch.manual_seed(0)
    for group in (3, 8, 71):
        assert_as_twin(make_case(make_layer(rule, 1, group, 64), [(400, 1), (250, 70), (0, 130)], 32, dtype=dtype))


def test_a_sequence_gets_the_same_bits_whatever_is_beside_it():
    torch.manual_seed(0)
    layer = make_layer(kv_heads=3, group=3)
    case = make_case(layer, [(200, 1), (17, 1), (64, 50), (0, 7)], heads=True)
    together = case.attend()[0]
    batch, rows = case.batch, len(case.batch.slots)
    for i, start in enumerate((batch.counts.cumsum(0) - batch.counts).tolist()):
        here = slice(start, start + int(batch.counts[i]))
        own = PagedBatch(
            batch.block_table[i : i + 1],
            batch.lengths[i : i + 1],
            batch.counts[i : i + 1],
            batch.slots[here],
            batch.positions[here],
            batch.heads[:, here].contiguous(),
        )
        qkv = case.qkv.view(2, rows, -1)[:, here].flatten(0, 1).contiguous()
        alone = replace(case, batch=own, qkv=qkv).attend()[0]
        assert torch.equal(alone.view(2, -1, layer.num_heads * 64), together.view(2, rows, -1)[:, here])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_number_of_threads_changes_no_bit(dtype):
    torch.manual_seed(0)
    case = make_case(make_layer(kv_heads=3, group=3), [(200, 1), (30, 1), (64, 90)], dtype=dtype)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(case.attend())
    torch.set_num_threads(threads)
    for out, cache in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(cache.nan_to_num(9), results[0][1].nan_to_num(9))


@pytest.mark.parametrize("window", [None, 40])
def test_chunks_of_a_prompt_change_no_bit(window):
    torch.manual_seed(0)
    layer = make_layer(kv_heads=2, group=3, window=window)
    case = make_case(layer, [(0, 150)])
    whole = case.attend()[0].view(2, 150, -1)
    batch, cache = case.batch, case.cache
    for start, end in ((0, 37), (37, 64), (64, 150)):
        length, count = torch.tensor([start]), torch.tensor([end - start])
        slots, positions = batch.slots[start:end], batch.positions[start:end]
        part = PagedBatch(batch.block_table, length, count, slots, positions)
        qkv = case.qkv.view(2, 150, -1)[:, start:end].flatten(0, 1).contiguous()
        out, cache = replace(case, batch=part, qkv=qkv, cache=cache).attend()
        assert torch.equal(out.view(2, end - start, -1), whole[:, start:end])


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_visible(bad, count):
    torch.manual_seed(0)
    case = make_case(make_layer(), [(20, count), (20, count)])
    slot = int(case.batch.block_table[0, 0])
    case.cache[slot, 0, 0, 3] = bad
    out = case.attend()[0].view(2, 2, count, -1)
    assert out[:, 0].isnan().any() and out[:, 1].isfinite().all()


def test_scores_of_any_size_are_safe():
    torch.manual_seed(0)
    case = make_case(make_layer(kv_heads=1, group=2), [(150, 1), (150, 20)])
    case.qkv[:, : 2 * 64] *= 1e3
    (ours, _), (theirs, _) = case.attend(), case.attend(paged_twin.attend)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("deviations", [0, 3, 10, 30])
def test_an_offset_of_all_scores_tangents_costs_no_precision(deviations, window):
    torch.manual_seed(0)
    case = make_offset_case(deviations, window)
    (ours, _), (theirs, _) = case.attend(), case.attend(paged_twin.attend)
    assert relative_error(ours, theirs) < 1e-5


def test_what_does_not_fit_is_refused():
    case = make_case(make_layer(), [(20, 1)])
    for changes, words in (
        ({"qkv": case.qkv.double()}, "bfloat16 or float32"),
        ({"qkv": case.qkv[:, 1:]}, "of 1 tokens"),
        ({"cache": case.cache[:, :, :3]}, "no cache of this layer"),
        ({"cache": case.cache[..., :8, :]}, "no multiple of 16"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(case, **changes).attend()
    with pytest.raises(ValueError, match="no kernel for heads of 48"):
        make_case(make_layer(head_dim=48), [(20, 1)]).attend()
    with pytest.raises(ValueError, match="cannot share"):
        replace(case.layer, num_kv_heads=2)
