"""The run's header."""

import pytest

from agd_vllm.pipeline.placement import layout
from agd_vllm.pipeline.teams import Shares


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
