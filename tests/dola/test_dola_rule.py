"""The rule against what a published implementation picked, and against what the paper leaves to it."""

import pytest
import torch
from dola_recorded import NEAR, RECORDED, logits

from agd_vllm.dola.contrast import REMOVED, dola_scores


def near(gap: float | None) -> bool:
    return gap is not None and gap < NEAR


def test_layers_tokens_and_scores_are_the_recorded_ones():
    compared = 0
    for case in RECORDED["picks"]:
        final, early = logits(case)
        scores = dola_scores(final[None], early[:, None], case["relative_top"])[0]
        kept = scores > -REMOVED / 2
        if not near(case["kept_gap"]):
            assert kept.sum() == case["kept"], case["seed"]
        if near(case["layer_gap"]):
            continue
        # The score of a kept token tells which layer it was contrasted with.
        layer = early[case["layer"]].log_softmax(-1)
        assert torch.allclose(scores[kept], (final.log_softmax(-1) - layer)[kept], atol=1e-4), case["seed"]
        if not near(case["token_gap"]):
            compared += 1
            assert scores.argmax() == case["token"], case["seed"]
            assert scores.max().item() == pytest.approx(case["score"], abs=1e-4)
    assert compared > 580


def test_a_row_alone_is_the_row_among_others():
    drawn = torch.Generator().manual_seed(0)
    final, early = torch.randn(5, 300, generator=drawn) * 3, torch.randn(4, 5, 300, generator=drawn) * 3
    together = dola_scores(final, early, 0.1)
    alone = [dola_scores(final[row : row + 1], early[:, row : row + 1], 0.1) for row in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_with_the_greatest_relative_top_it_is_greedy_and_with_none_every_token_is_kept():
    drawn = torch.Generator().manual_seed(1)
    final, early = torch.randn(8, 300, generator=drawn), torch.randn(3, 8, 300, generator=drawn)
    assert torch.equal(dola_scores(final, early, 1.0).argmax(-1), final.argmax(-1))
    assert (dola_scores(final, early, 0.0) > -REMOVED / 2).all()


def test_removed_tokens_keep_their_order_below_the_others():
    final = torch.tensor([[9.0, 3.0, 2.0, 1.0]])
    scores = dola_scores(final, [torch.tensor([[0.0, 9.0, 0.0, 9.0]])], 0.5)
    assert scores.argsort(descending=True).tolist() == [[0, 1, 2, 3]]
