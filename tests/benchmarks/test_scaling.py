"""The simulation of many engines: the real scheduler, in virtual time."""

import asyncio
import time

import pytest

from benchmarks.scaling import Measured, VirtualLoop, simulate


def measured(guided_share: float) -> Measured:
    """A step takes a second whatever its rows, a batch two and another for each token."""
    return Measured([0.0] + [1.0] * 64, (2.0, 0.0, 1.0), 1.0, [(8, 10)], guided_share)


def run(measured: Measured, engines: int, workers: int, sessions: int = 4, rows: int = 8):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(simulate(measured, engines, workers, sessions, rows))


def test_time_passes_without_being_waited_for():
    begun = time.monotonic()
    point = run(measured(0.0), engines=2, workers=0)
    assert time.monotonic() - begun < 5
    # Each engine: two rounds of four rows, ten steps of a second each, four tokens a step.
    assert point["tokens_per_second"] == pytest.approx(8)
    assert point["engine_busy"] == pytest.approx(1)


def test_a_row_that_is_guided_all_the_way_waits_for_each_of_its_batches():
    point = run(measured(1.0), engines=1, workers=1, sessions=1, rows=1)
    # The prompt ahead of its step takes eight seconds, that step a batch of no new token, each other a batch of one.
    assert 10 / point["tokens_per_second"] == pytest.approx(8 + 2 + 9 * (1 + 3))


def test_more_engines_with_workers_of_their_own_decode_as_many_times_more():
    one, four = run(measured(0.4), 1, 1), run(measured(0.4), 4, 4)
    assert four["tokens_per_second"] / one["tokens_per_second"] == pytest.approx(4, rel=0.25)
    assert run(measured(0.4), 4, 1)["tokens_per_second"] < four["tokens_per_second"]
