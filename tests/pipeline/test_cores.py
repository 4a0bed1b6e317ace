"""How engines and workers share the cores of one machine."""

import os

import pytest

from agd_vllm.pipeline.placement import split_cores


@pytest.mark.parametrize(
    ("count", "engines", "workers"), [(2, 1, 1), (8, 2, 1), (7, 2, 2), (1, 1, 1), (2, 3, 2), (4, 1, 0)]
)
def test_every_actor_has_cores_and_none_is_shared_without_need(monkeypatch, count, engines, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10, 10 + count)))
    first, second = split_cores(engines, workers)
    assert (len(first), len(second)) == (engines, workers)
    shares = first + second
    assert all(shares)
    used = [core for share in shares for core in share]
    assert set(used) == set(range(10, 10 + count))
    if count >= engines + workers:
        assert len(used) == count
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
