"""Thousands of random calls to a scorer with a small cache, against a twin that keeps no pages at all.

In the place of the layers each new token's place in the cache is filled with what its values and tangents depend on:
all tokens, region weights and heads up to it: a block that two write to, or that the wrong one reads, is seen at once.
"""

import random

import pytest
import tiny
import torch

from agd_vllm.attribution import forward
from agd_vllm.attribution.block_pool import BLOCK_TOKENS
from agd_vllm.attribution.forward import ForwardScorer
from agd_vllm.records import Roi, ScoreRequest, Span

CALLS, BLOCKS = 3000, 24
REGIONS = (Roi((Span(0, 3),)), Roi((Span(0, 3), Span(20, 23, -0.5))), Roi((Span(0, 3),), ((0, 1),)), Roi())


def marks(tokens: list[int], roi: Roi) -> list[float]:
    """For each token a number, exact in float32, of all tokens, region weights and heads up to it."""
    so_far, found = hash(roi.heads), []
    for position, token in enumerate(tokens):
        weight = sum(span.weight for span in roi.spans if span.start <= position < span.end)
        so_far = hash((so_far, token, weight))
        found.append(float(so_far % (1 << 24)))
    return found


def places(blocks, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and offset of the tokens [first, last)."""
    positions = torch.arange(first, last)
    return torch.from_numpy(blocks)[positions // BLOCK_TOKENS].long(), positions % BLOCK_TOKENS


def extend(segments, pool, candidates):
    scores = []
    for (sequence, count), ids in zip(segments, candidates, strict=True):
        start, end = sequence.length, sequence.length + count
        expected = torch.tensor(marks(sequence.tokens[:end], sequence.roi))
        block, offset = places(sequence.blocks, 0, start)
        for layer in pool.layers:
            assert torch.equal(layer[block, 0, 0, offset, 0], expected[:start]), "what was held is another's"
        block, offset = places(sequence.blocks, start, end)
        pool.layers[:, block, :, :, offset] = expected[start:, None, None, None, None]
        sequence.length = end
        scores += [expected[-1] + 0.0 * candidate for candidate in ids]
    return torch.tensor(scores)


def check_blocks(cache) -> None:
    """No block leaks, and each is counted once for every sequence that has it."""
    held = [*cache._active.values(), *cache._finished.values()]
    owners = torch.zeros(cache.pool.num_blocks, dtype=torch.int32)
    for sequence in held:
        assert len(sequence.blocks) == -(-len(sequence.tokens) // BLOCK_TOKENS)
        owners[torch.from_numpy(sequence.blocks).long()] += 1
    assert torch.equal(owners, torch.from_numpy(cache.pool._holders))
    assert cache.pool.num_free == int((owners == 0).sum())


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> ForwardScorer:
    model = str(tiny.save("llama", tmp_path_factory.mktemp("tiny")))
    empty = ForwardScorer(model, cache_bytes=0)
    return ForwardScorer(model, cache_bytes=BLOCKS * empty.cache.shape.block_bytes, max_model_len=1024)


def next_request(rng: random.Random, name: str, row: tuple[list[int], Roi] | None, prompts) -> ScoreRequest:
    """A row that begins as others do, is sent anew under any region, is cut back, or grows, maybe beyond the cache."""
    kind = rng.random()
    if row is None or kind < 0.1:
        tokens = [*rng.choice(prompts)[: rng.randint(24, 90)], rng.randrange(3, 9)]
        return ScoreRequest(name, 0, tokens, rng.choice(REGIONS), (1,))
    tokens, roi = row
    start, count = len(tokens), rng.randint(1, 20)
    if kind < 0.35:  # where its prompt may be shared; regions end at 23
        start, count = rng.randrange(23, start + 1), rng.randint(1, 30)
    elif kind < 0.4:
        start, count = 0, BLOCKS * BLOCK_TOKENS + 1
    new = tokens[start:] if start == 0 else []
    return ScoreRequest(name, start, new + [rng.randrange(3, 9) for _ in range(count)], roi, (1,))


def test_random_calls_find_in_the_cache_what_belongs_there(scorer, monkeypatch):
    rng = random.Random(5)
    monkeypatch.setattr(scorer.tangents, "extend", extend)
    monkeypatch.setattr(forward, "PASS_TOKENS", 100)
    prompts = [[rng.randrange(3, 9) for _ in range(90)] for _ in range(3)]
    rows: dict[str, tuple[list[int], Roi]] = {}
    seen = dict.fromkeys(("resumed", "asked for", "too large", "shared", "copied"), 0)
    copy = scorer.cache.pool.copy

    def counted(source: int, target: int) -> None:
        seen["copied"] += 1
        copy(source, target)

    monkeypatch.setattr(scorer.cache.pool, "copy", counted)
    for _ in range(CALLS):
        batch, expected = [], []
        for _ in range(rng.choice((1, 1, 2, 4))):
            name = f"{rng.randrange(8)}"
            request = next_request(rng, name, rows.get(name), prompts)
            tokens = [*(rows[name][0][: request.start] if request.start else ()), *request.token_ids]
            rows[name] = tokens, request.roi
            batch.append(request)
            expected.append(marks(tokens, request.roi)[-1:])
        answers = scorer.score(batch)
        check_blocks(scorer.cache)
        ended = {name for name, (tokens, _) in rows.items() if len(tokens) > 150}
        for request, answer, right in zip(batch, answers, expected, strict=True):
            assert answer == right or (answer is None and request.start > 0)
            seen["resumed"] += answer is not None and request.start > 0
            seen["asked for"] += answer is None
            seen["too large"] += answer is not None and len(request.token_ids) > BLOCKS * BLOCK_TOKENS
            if answer is None:
                ended.add(request.sequence)
        for name in ended:
            scorer.release(name)
            del rows[name]
        seen["shared"] += bool((scorer.cache.pool._holders > 1).any())
        check_blocks(scorer.cache)
    assert min(seen.values()) > 50, seen
    for name in rows:
        scorer.release(name)
    scorer.cache.evict(BLOCKS)
    assert scorer.cache.num_bytes == 0
