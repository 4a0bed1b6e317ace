"""How much a worker is sent at once: by made-up costs, and by those of a tiny model."""

import pytest
import tiny

from agd_vllm.attribution import batch_bounds
from agd_vllm.attribution.batch_bounds import SIZES, BatchBounds, bounds_by_cost, time_calls
from agd_vllm.attribution.forward import ForwardScorer


def costs(floor_s: float, token_s: float) -> list[tuple[int, float]]:
    """A GPU's: the weights are read, then tokens cost in proportion."""
    return [(size, max(floor_s, token_s * size)) for size in SIZES]


@pytest.mark.parametrize(
    ("floor_s", "token_s", "tokens"),
    [
        (0.0037, 0.00004, 256),  # an H200: what a call costs beside counts for as much as fifty tokens
        (0.040, 0.0001, 512),  # all but free up to 400
        (0.0, 0.005, 16),  # in proportion from the first on
        (0.1, 0.002, 64),  # free up to 50
    ],
)
def test_a_call_has_the_fewest_tokens_that_are_about_as_fast_as_the_best(floor_s, token_s, tokens):
    assert bounds_by_cost(costs(floor_s, token_s)) == BatchBounds(tokens, tokens, tokens)


def test_many_prompts_go_in_one_call_where_that_costs_little():
    assert bounds_by_cost(costs(0.04, 0.0001)).ahead // 60 == 8


def test_every_size_is_timed_after_it_has_run_once_and_nothing_stays(tmp_path, monkeypatch):
    scorer = ForwardScorer(str(tiny.save("llama", tmp_path)))
    monkeypatch.setattr(batch_bounds, "SIZES", (1, 8, 40))
    sent, score = [], scorer.score
    monkeypatch.setattr(
        scorer, "score", lambda requests: (sent.append([len(r.token_ids) for r in requests]), score(requests))
    )
    timed = time_calls(scorer)
    assert [size for size, _ in timed] == [1, 8, 40] and all(seconds > 0 for _, seconds in timed)
    assert sent == [[1], [1], [1], [1], [8], [8], [1] * 8, [1] * 8, [40], [40], [1] * 40, [1] * 40]
    assert scorer.cache.num_bytes == 0 and len(scorer.cache) == 0
