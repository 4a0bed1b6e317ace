"""What only an NVIDIA GPU shows: the kernels as compiled code, and V2's reports from its streams."""

import random
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import stream_checks as checks
import torch
import torch.nn.functional as F
from paged_cases import gpu_batch, make_case, make_layer, make_offset_case, relative_error

from agd_vllm.attribution import paged_twin
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.attribution.rules import ACTIVATIONS, RULES
from agd_vllm.engine.gate_reports import CopyFromGPU
from agd_vllm.kernels import paged_attention_gpu, streams_triton, tilings, triton_support
from agd_vllm.kernels.gate import gate, gate_twin
from agd_vllm.records import Roi, ScoreRequest, Span

sys.path.append(str(Path(__file__).parent / "attribution"))
import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CUDA = torch.device("cuda")


@contextmanager
def no_waiting():
    """What waits for the GPU in this block is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 49152), (64, 128256), (7, 151936), (3, 300001)])
def test_the_gate_equals_its_twin(rows, vocab, dtype):
    assert triton_support.available()
    torch.manual_seed(vocab)
    logits = (torch.randn(rows, vocab, device=CUDA) * 3).to(dtype)
    logits[0, ::3] = -torch.inf
    arguments = (
        torch.arange(rows, device=CUDA),
        torch.full((rows,), 1.0, device=CUDA),
        20,
        torch.full((rows,), 1e-4, device=CUDA),
        torch.randint(vocab, (rows,), device=CUDA),
    )
    theirs = logits.clone()
    with no_waiting():
        decision = gate(logits, *arguments)
    expected = gate_twin(theirs, *arguments)
    for name in ("entropy", "log_sum_exp", "candidate_probs"):
        torch.testing.assert_close(getattr(decision, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    for name in ("open", "candidate_ids", "candidate_count"):
        assert torch.equal(getattr(decision, name), getattr(expected, name)), name
    assert torch.equal(logits, theirs)


def on_gpu(value):
    """A batch or a layer with its tensors on the GPU."""
    moved = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{name: t.to(CUDA) for name, t in moved.items() if isinstance(t, torch.Tensor)})


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("rule", list(RULES))
def test_attention_equals_its_twin(rule, window, head_dim):
    """Decode, chunks and a long prompt in one batch, with norms and heads of the region."""
    torch.manual_seed(head_dim)
    assert tilings.available(head_dim, torch.bfloat16)
    sequences = [(2000, 1), (5, 1), (900, 1), (900, 33), (0, 700)]
    layer = make_layer(rule, 2, 4, head_dim, window, norms=True)
    case = make_case(layer, sequences, dtype=torch.bfloat16, heads=True)
    theirs, twin = case.attend(paged_twin.attend)
    cache = case.cache.to(CUDA)
    with no_waiting():
        ours = paged_attention_gpu.attend(on_gpu(layer), on_gpu(gpu_batch(case)), 1, cache, case.qkv.to(CUDA))
    for one, other, bound in ((ours, theirs, 2**-5), (cache, twin, 2**-7)):
        largest = bound * float(other.float().nan_to_num().abs().max())
        torch.testing.assert_close(one.cpu().float(), other.float(), rtol=bound, atol=largest, equal_nan=True)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("deviations", [0, 3, 10, 30])
def test_an_offset_of_all_scores_tangents_costs_no_precision(deviations, window):
    torch.manual_seed(0)
    case = make_offset_case(deviations, window, [(2000, 1), (5, 1), (900, 33), (0, 700)])
    theirs, _ = case.attend(paged_twin.attend)
    batch, cache = on_gpu(gpu_batch(case)), case.cache.to(CUDA)
    ours = paged_attention_gpu.attend(on_gpu(case.layer), batch, 1, cache, case.qkv.to(CUDA))
    assert relative_error(ours.cpu(), theirs) < 5e-3


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_attention_of_decoding_is_the_same_captured(rows):
    """A graph of one batch, replayed over other lengths, blocks and rows of padding."""
    torch.manual_seed(rows)
    layer = make_layer(kv_heads=2, group=4, head_dim=128)
    on_card, table_width, held = on_gpu(layer), 64, None
    for turn in range(3):
        lengths = torch.randint(0, 900, (rows,)).tolist()
        case = make_case(layer, [(length, 1) for length in lengths], dtype=torch.bfloat16, heads=True)
        batch = gpu_batch(case)
        batch = replace(batch, block_table=F.pad(batch.block_table, (0, table_width))[:, :table_width].contiguous())
        blocks = rows * table_width
        cache = torch.cat((case.cache, case.cache.new_zeros(blocks - len(case.cache), *case.cache.shape[1:])))
        if held is None:
            held = on_gpu(batch), cache.to(CUDA), case.qkv.to(CUDA)
            call = partial(paged_attention_gpu.attend, on_card, held[0], 1, held[1], held[2])
            call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = call()
        for field in fields(batch):
            if isinstance(tensor := getattr(batch, field.name), torch.Tensor):
                getattr(held[0], field.name).copy_(tensor)
        held[1].copy_(cache)
        held[2].copy_(case.qkv)
        graph.replay()
        captured = out.clone()
        held[1].copy_(cache)
        assert torch.equal(captured, call()), turn


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim"), [(1, 4096), (130, 576), (7, 14336)])
def test_what_lies_between_linear_layers_equals_its_twins(rows, dim, dtype, rule):
    size = {"num_streams": 3, "rows": rows, "dtype": dtype, "seed": dim, "device": CUDA}
    checks.check_rms_norm(streams_triton, **size, dim=dim, rule=rule, adds=True)
    for activation in ACTIVATIONS:
        checks.check_gated(streams_triton, **size, dim=dim, rule=rule, activation=activation)


def test_a_guided_step_is_a_cpus_and_its_pass_waits_for_nothing(tmp_path):
    model = str(tiny.save("llama-3", tmp_path))
    scorer, expected = ForwardScorer(model, dtype="bfloat16"), ForwardScorer(model, device="cpu")
    in_float = ForwardScorer(model)  # where no kernel serves, its twin does
    tokens, roi = list(range(3, 43)), Roi((Span(2, 9), Span(12, 15, -0.5)))
    for ids in (tokens, [*tokens, 50]):
        request = ScoreRequest("a", 0, ids, roi, (5, 6, 7))
        ours, theirs = (torch.tensor(each.score([request])) for each in (scorer, expected))
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1 * float(theirs.abs().max()))
        exact = torch.tensor(in_float.score([request]))
        torch.testing.assert_close(exact, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    sequence = scorer.cache.get("a")
    sequence.tokens.append(51)
    with torch.inference_mode(), no_waiting():
        scorer.tangents.extend([(sequence, 1)], scorer.cache.pool, [(5, 6, 7)])


def check_captured(load, turns: int = 100) -> None:
    """Captured passes against the same ones run as they are: prompts and steps of every size, then any calls."""
    captured, plain = load(), load()
    plain.tangents.static.forget()
    rng = random.Random(0)
    regions = Roi((Span(0, 1),)), Roi(), Roi((Span(0, 1, 0.5),), ((0, 1), (2, 3))), Roi(heads=((1, 0),))

    def check(requests: list[ScoreRequest]) -> None:
        ours, theirs = (torch.tensor(scorer.score(requests)) for scorer in (captured, plain))
        assert torch.equal(ours, theirs), [(request.start, len(request.token_ids)) for request in requests]

    def request(name: str, start: int, count: int) -> ScoreRequest:
        tokens = [rng.randrange(3, tiny.VOCABULARY) for _ in range(count)]
        return ScoreRequest(name, start, tokens, regions[len(name) % 4], (5, 6, 7))

    for size in captured.tangents.static.sizes:
        check([request(f"prompt {size}", 0, min(size, 400))])
        check([request(f"step {size} {row}", 0, 1) for row in range(size)])
    held = {f"row {row}": 0 for row in range(12)}
    for _ in range(turns):
        batch = []
        for name in rng.sample(sorted(held), rng.randint(1, len(held))):
            if held[name] > 350:
                held[name] = 0
            count = rng.choice([1, 1, 2, 60])
            batch.append(request(name, held[name], count))
            held[name] += count
        check(batch)


@pytest.mark.parametrize(("name", "rule"), [("llama-3", "attnlrp"), ("gemma3", "ixg"), ("qwen3", "cplrp")])
def test_captured_passes_equal_those_that_are_run(tmp_path, name, rule):
    model = str(tiny.save(name, tmp_path))
    check_captured(partial(ForwardScorer, model, rule=rule, dtype="bfloat16", cache_bytes=1 << 28))


def test_a_decision_is_copied_behind_the_models_back():
    copy_from_gpu = CopyFromGPU(CUDA)
    logits = torch.randn(4, 1000, device=CUDA)
    zeros = torch.zeros(4, device=CUDA)
    decision = gate(logits, torch.arange(4, device=CUDA), zeros, 5, zeros, torch.full((4,), 3, device=CUDA))
    with no_waiting():
        copy, wait = copy_from_gpu(decision)
    wait()
    for ours, theirs in zip(copy, decision, strict=True):
        assert ours.device.type == "cpu" and torch.equal(ours, theirs.cpu())
