"""The contrast's logits processor in orders of scheduling that no engine can be made to take at will."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from agd_vllm.engine import row_processor
from agd_vllm.engine.channel import GateReceiver
from agd_vllm.engine.contrast import EXTRA_ARG, ContrastParams, ContrastProcessor

VOCAB, PAUSE, ALPHA = 12, 11, 0.5
SLOTS = 8
FORCED = torch.finfo(torch.float32).max


class Sequence:
    """A session of vLLM's, opened at output step `begun`."""

    def __init__(self, key: int, with_region: bool, slot: int = 0, begun: int = 0, penalty: float = 1.0):
        prompt = [0, 1, 2, 3, 4] if with_region else [0, 7, 8]
        self.with_region = with_region
        params = ContrastParams(key, slot, with_region, len(prompt), begun, PAUSE, ALPHA, penalty)
        self.params = SamplingParams(temperature=0, extra_args=params.as_extra_args())
        self.context, self.output = prompt + [0] * begun, []

    @property
    def token_ids(self) -> list[int]:
        return self.context + self.output

    def resume(self, token_id: int) -> None:
        self.context, self.output = self.context + self.output + [token_id], []


class BatchV1:
    """Batches of the given sequences, one after another, as vLLM would tell the processor of them."""

    def __init__(self):
        config = SimpleNamespace(use_v2_model_runner=False)
        self._processor, self._size = ContrastProcessor(config, torch.device("cpu"), False), 0

    def sample(self, *sequences: Sequence | None, logits: torch.Tensor | None = None):
        """Logits before and after the processor; None is a request that has nothing to do with contrasts."""
        added = [
            (index, each.params, each.context, each.output) if each else (index, SamplingParams(), [1], [])
            for index, each in enumerate(sequences)
        ]
        before = torch.randn(len(sequences), VOCAB) if logits is None else logits
        after = self._apply(added, before.clone())
        for each, row in zip(sequences, after, strict=True):
            if each and row.argmax() != PAUSE:
                each.output.append(int(row.argmax()))
        return before, after

    def _apply(self, added: list[tuple], logits: torch.Tensor) -> torch.Tensor:
        removed = range(len(added), self._size)
        self._processor.update_state(BatchUpdate(len(added), list(removed), added, []))
        self._size = len(added)
        return self._processor.apply(logits)

    @property
    def kept(self) -> dict:
        return self._processor._work._kept


class BatchV2(BatchV1):
    """As vLLM's Model Runner V2 tells of them: by slots, which requests leave and enter again."""

    def __init__(self):
        self._prefill_lens = np.zeros(SLOTS, dtype=np.int32)
        self._token_ids = torch.zeros(SLOTS, 64, dtype=torch.int32)
        self._requests = LogitsProcRequestState(
            torch.device("cpu"),
            SLOTS,
            VOCAB,
            SimpleNamespace(gpu=self._token_ids),
            None,
            SimpleNamespace(np=self._prefill_lens),
            None,
        )
        self._processor = ContrastProcessor(SimpleNamespace(use_v2_model_runner=True), self._requests)

    def _apply(self, added: list[tuple], logits: torch.Tensor) -> torch.Tensor:
        slots = np.arange(len(added))[::-1].copy()
        seen = np.zeros(len(added), dtype=np.int32)
        for slot, (index, params, context, output) in zip(slots.tolist(), added, strict=True):
            self._processor.add_request(slot, params)
            self._token_ids[slot, : len(context) + len(output)] = torch.tensor(context + output)
            self._prefill_lens[slot], seen[index] = len(context), len(context) + len(output)
        context = LogitsContext(*[None] * 2, slots, *[None] * 3, seen)
        return self._processor.apply(logits, context)


@pytest.fixture
def receiver():
    receiver = GateReceiver(lambda step: None)
    yield receiver
    receiver.close()


@pytest.fixture(params=[BatchV1, BatchV2])
def batch(request, receiver, monkeypatch):
    monkeypatch.setattr(row_processor, "get_tensor_model_parallel_rank", lambda: 0)
    torch.manual_seed(0)
    return request.param()


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


def test_a_penalty_is_the_contrasts_by_the_prompt_with_the_region(batch, receiver):
    """At the pause of a first step and in step after it; the sequence without the region has other tokens."""
    one, other = Sequence(1, True, penalty=1.5), Sequence(1, False, penalty=1.5)
    penalize = RepetitionPenaltyLogitsProcessor(1.5)

    def penalized(tokens, before):
        plain = formula(*before)
        contrast = penalize(torch.tensor([tokens]), plain[None])[0]
        assert contrast[tokens].ne(plain[tokens]).all()
        return contrast

    logits = torch.randn(2, VOCAB)
    # The contrast's best is a token of the prompt, and another one's once that is penalised.
    logits[:, 3], logits[:, 9] = 6.0, 5.0
    before, after = batch.sample(one, other, logits=logits)
    assert paused(*after)
    assert formula(*before).argmax() == 3
    token_id = receiver.take_choice(1, 0)
    assert token_id == penalized(one.token_ids, before).argmax() == 9
    for each in (one, other):
        each.resume(token_id)
    for _ in range(3):
        tokens = one.token_ids
        before, after = batch.sample(one, other)
        torch.testing.assert_close(after[0], penalized(tokens, before))
        assert torch.equal(after[0], after[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", -1.0), ("alpha", float("nan")), ("slot", "first"), ("repetition_penalty", 0.0)],
)
def test_parameters_are_checked_before_they_reach_the_engine(name, value):
    params = ContrastParams(1, 0, True, 5, 0, PAUSE, ALPHA).as_extra_args()[EXTRA_ARG] | {name: value}
    with pytest.raises(ValueError, match=name):
        ContrastProcessor.validate_params(SamplingParams(temperature=0, extra_args={EXTRA_ARG: params}))
