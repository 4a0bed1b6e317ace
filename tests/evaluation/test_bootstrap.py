"""The paired bootstrap on data whose interval is known."""

import math

import pytest

from agd_vllm.evaluation.bootstrap import paired_difference


def test_rows_that_agree_leave_no_doubt():
    interval = paired_difference([1, 0, 1], [1, 0, 1], [1, 1, 1])
    assert (interval.difference, interval.low, interval.high) == (0, 0, 0)
    assert paired_difference([1] * 5, [0] * 5, [1] * 5).low == 1


def test_the_interval_is_that_of_the_paired_differences():
    """400 rows, 60 won and 20 lost: a difference of 0.1 with a standard error of sqrt(0.2 - 0.1^2) / 20."""
    ours = [1] * 60 + [0] * 20 + [1] * 100 + [0] * 220
    theirs = [0] * 60 + [1] * 20 + [1] * 100 + [0] * 220
    interval = paired_difference(ours, theirs, [1] * 400)
    error = math.sqrt(0.2 - 0.1**2) / 20
    assert interval.difference == pytest.approx(0.1)
    assert interval.low == pytest.approx(0.1 - 1.96 * error, abs=0.003)
    assert interval.high == pytest.approx(0.1 + 1.96 * error, abs=0.003)
    assert paired_difference(ours, theirs, [1] * 400) == interval


def test_rules_of_a_row_are_drawn_together():
    """One row of 30 rules among 30 rows of one: the difference hangs on how often that row is drawn."""
    interval = paired_difference([30] + [0] * 30, [0] * 31, [30] + [1] * 30)
    assert interval.difference == 0.5
    assert interval.low == 0
    assert interval.high > 0.7


def test_no_rows():
    assert paired_difference([], [], []) is None
