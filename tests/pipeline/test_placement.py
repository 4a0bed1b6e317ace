"""The run's header."""

import pytest

from agd_vllm.pipeline import placement
from agd_vllm.pipeline.placement import layout
from agd_vllm.pipeline.teams import Demand, Shares


@pytest.mark.parametrize(
    ("shares", "engines", "workers", "line"),
    [
        (Shares(), [[0]], [[1]], "1 engine on cores 0; 1 attribution worker on cores 1"),
        (Shares(), [[0, 1], [2, 3]], [], "2 engines on cores 0,1 / 2,3"),
        (Shares(), [None], [None, None], "1 engine; 2 attribution workers"),
        (Shares(2, 0.5), [None], [None], "1 engine on 2 GPUs each; 1 attribution worker on 0.5 GPU each"),
    ],
)
def test_the_header_says_who_runs_where(shares, engines, workers, line):
    assert layout(shares, engines, workers) == line


@pytest.mark.parametrize(("engines", "workers", "cpus"), [(1, 1, 4), (4, 2, 6)])
def test_a_local_ray_is_told_of_the_cores_that_it_may_use(monkeypatch, engines, workers, cpus):
    """Of a machine with 128, say: Ray keeps an idle process for each that it knows of."""
    asked = {}
    monkeypatch.setattr(placement, "usable_cores", lambda: 4)
    monkeypatch.setattr(placement.ray, "init", lambda **options: asked.update(options))
    placement._init("local", Demand(engines, workers, 1), debug=False)
    assert asked["num_cpus"] == cpus
