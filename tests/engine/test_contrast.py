"""The contrast's logits processor in orders of scheduling that no engine can be made to take at will."""

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from agd_vllm.engine import contrast as contrast_module
from agd_vllm.engine.channel import GateReceiver
from agd_vllm.engine.contrast import EXTRA_ARG, ContrastParams, ContrastProcessor

VOCAB, PAUSE, ALPHA = 12, 11, 0.5
FORCED = torch.finfo(torch.float32).max


class Sequence:
    """A session of vLLM's, opened at output step `begun`."""

    def __init__(self, key: int, with_region: bool, slot: int = 0, begun: int = 0):
        prompt = 5 if with_region else 3
        self.with_region = with_region
        params = ContrastParams(key, slot, with_region, prompt, begun, PAUSE, ALPHA)
        self.params = SamplingParams(temperature=0, extra_args=params.as_extra_args())
        self.context, self.output = [0] * (prompt + begun), []

    def resume(self, token_id: int) -> None:
        self.context, self.output = self.context + self.output + [token_id], []


class Batch:
    """Batches of the given sequences, one after another, as vLLM would tell the processor of them."""

    def __init__(self, processor: ContrastProcessor):
        self._processor, self._size = processor, 0

    def sample(self, *sequences: Sequence | None, logits: torch.Tensor | None = None):
        """Logits before and after the processor; None is a request that has nothing to do with contrasts."""
        added = [
            (index, each.params, each.context, each.output) if each else (index, SamplingParams(), [1], [])
            for index, each in enumerate(sequences)
        ]
        removed = range(len(sequences), self._size)
        self._processor.update_state(BatchUpdate(len(sequences), list(removed), added, []))
        self._size = len(sequences)
        before = torch.randn(len(sequences), VOCAB) if logits is None else logits
        after = self._processor.apply(before.clone())
        for each, row in zip(sequences, after, strict=True):
            if each and row.argmax() != PAUSE:
                each.output.append(int(row.argmax()))
        return before, after


@pytest.fixture
def receiver():
    receiver = GateReceiver(lambda step: None)
    yield receiver
    receiver.close()


@pytest.fixture
def batch(receiver, monkeypatch):
    monkeypatch.setattr(contrast_module, "get_tensor_model_parallel_rank", lambda: 0)
    torch.manual_seed(0)
    processor = ContrastProcessor(None, torch.device("cpu"), False)
    batch = Batch(processor)
    batch.kept = processor._kept
    return batch


def formula(with_region: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    contrast = (1 + ALPHA) * with_region - ALPHA * without
    contrast[PAUSE] = float("-inf")
    return contrast


def paused(*rows: torch.Tensor) -> bool:
    return all(row[PAUSE] == FORCED for row in rows)


def test_both_pause_at_their_first_step_and_then_go_on_in_step(batch, receiver):
    one, other = Sequence(1, True), Sequence(1, False)
    before, after = batch.sample(None, other, one)
    assert torch.equal(after[0], before[0])
    assert paused(after[1], after[2])
    token_id = receiver.take_choice(1, 0)
    assert token_id == formula(before[2], before[1]).argmax()
    for each in (one, other):
        each.resume(token_id)
    for _ in range(3):
        before, after = batch.sample(one, other, None)
        assert torch.equal(after[2], before[2])
        torch.testing.assert_close(after[0], formula(before[0], before[1]))
        assert torch.equal(after[0], after[1])
    assert one.output == other.output
    assert len(one.output) == 3
    assert not batch.kept
    with pytest.raises(LookupError):
        receiver.take_choice(1, 3)


@pytest.mark.parametrize("first", [True, False])
def test_one_that_is_scheduled_alone_waits_for_the_other(batch, receiver, first):
    one, other = Sequence(1, True), Sequence(1, False)
    batch.sample(one, other)
    for each in (one, other):
        each.resume(receiver.take_choice(1, 0) if each is one else 0)
    early, late = (one, other) if first else (other, one)
    before, after = batch.sample(early)
    assert paused(after[0])
    with pytest.raises(LookupError):
        receiver.take_choice(1, 1)
    then, after = batch.sample(late)
    assert paused(after[0])
    pair = (before[0], then[0]) if first else (then[0], before[0])
    assert receiver.take_choice(1, 1) == formula(*pair).argmax()


@pytest.mark.parametrize("chunked", [True, False])
def test_what_an_unfinished_prefill_writes_is_overwritten(batch, receiver, chunked):
    """Sample after sample of the sequence in chunks is discarded; the other one paused at the first."""
    one, other = Sequence(1, chunked, begun=4), Sequence(1, not chunked, begun=4)
    before, after = batch.sample(one, other)
    real = before[1]
    for _ in range(2):
        before, after = batch.sample(one)
        assert paused(after[0])
    pair = (before[0], real) if chunked else (real, before[0])
    assert receiver.take_choice(1, 4) == formula(*pair).argmax()


def test_nothing_of_an_earlier_pair_in_the_slot_is_taken(batch, receiver):
    batch.sample(Sequence(1, True), Sequence(1, False))
    one, other = Sequence(2, True), Sequence(2, False)
    before, _ = batch.sample(one)
    with pytest.raises(LookupError):
        receiver.take_choice(2, 0)
    then, _ = batch.sample(other)
    assert receiver.take_choice(2, 0) == formula(before[0], then[0]).argmax()
    assert len(batch.kept) == 2


def test_pairs_side_by_side_do_not_mix(batch, receiver):
    pairs = [[Sequence(key, side, slot=key) for side in (True, False)] for key in range(3)]
    before, _ = batch.sample(*(each for pair in pairs for each in pair))
    for key, pair in enumerate(pairs):
        token_id = receiver.take_choice(key, 0)
        assert token_id == formula(before[2 * key], before[2 * key + 1]).argmax()
        for each in pair:
            each.resume(token_id)
    mixed = [pairs[2][1], pairs[0][0], pairs[1][1], pairs[2][0], pairs[1][0]]  # the other one of pair 0 is missing
    before, after = batch.sample(*mixed)
    torch.testing.assert_close(after[3], formula(before[3], before[0]))
    torch.testing.assert_close(after[4], formula(before[4], before[2]))
    assert torch.equal(after[0], after[3]) and torch.equal(after[2], after[4])
    assert paused(after[1])


def test_a_masked_token_stays_impossible(batch, receiver):
    """Stop tokens below min_tokens are -inf in both: their difference must not become NaN."""
    one, other = Sequence(1, True), Sequence(1, False)
    logits = torch.randn(2, VOCAB)
    logits[:, 3] = float("-inf")
    batch.sample(one, other, logits=logits)
    token_id = receiver.take_choice(1, 0)
    assert token_id == formula(logits[0], logits[1]).nan_to_num(float("-inf")).argmax()
    for each in (one, other):
        each.resume(token_id)
    _, after = batch.sample(one, other, logits=logits)
    assert not after.isnan().any()
    assert (after[:, 3] == float("-inf")).all()


@pytest.mark.parametrize(("name", "value"), [("alpha", -1.0), ("alpha", float("nan")), ("slot", "first")])
def test_parameters_are_checked_before_they_reach_the_engine(name, value):
    params = ContrastParams(1, 0, True, 5, 0, PAUSE, ALPHA).as_extra_args()[EXTRA_ARG] | {name: value}
    with pytest.raises(ValueError, match=name):
        ContrastProcessor.validate_params(SamplingParams(temperature=0, extra_args={EXTRA_ARG: params}))
