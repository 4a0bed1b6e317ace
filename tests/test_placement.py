"""GPUs of engines and workers: whole ones while they last, shares of equal size where they do not."""

import pytest

from agd_vllm.pipeline.placement import Cluster, Demand, gpu_shares, layout, workers_of


@pytest.mark.parametrize(
    ("gpus", "demand", "shares"),
    [
        (0, Demand(1, 1, 1), (0, 0)),
        (2, Demand(1, 1, 1), (1, 1)),
        (8, Demand(2, 4, 2), (2, 1)),
        (1, Demand(1, 0, 1), (1, 1)),
        (1, Demand(1, 1, 1), (1 / 2, 1 / 2)),
        (1, Demand(1, 3, 1), (1 / 4, 1 / 4)),
        (2, Demand(2, 1, 1), (1 / 2, 1 / 2)),
        (4, Demand(4, 4, 1), (1 / 2, 1 / 2)),
    ],
)
def test_shares(gpus, demand, shares):
    assert gpu_shares(gpus, demand) == shares
    assert demand.engines * shares[0] + demand.workers * shares[1] <= gpus


def test_an_engine_over_several_gpus_needs_them_all():
    with pytest.raises(RuntimeError, match=r"2 GPUs.*need 3.*tensor_parallel_size"):
        gpu_shares(2, Demand(1, 1, 2))


@pytest.mark.parametrize(
    ("cluster", "engines", "workers", "line"),
    [
        (Cluster(True, 0, 0), [[0]], [[1]], "1 engine on cores 0; 1 attribution worker on cores 1"),
        (Cluster(True, 0, 0), [[0, 1], [2, 3]], [], "2 engines on cores 0,1 / 2,3"),
        (Cluster(False, 0, 0), [None], [None, None], "1 engine; 2 attribution workers"),
        (Cluster(True, 2, 0.5), [None], [None], "1 engine on 2 GPUs each; 1 attribution worker on 0.5 GPU each"),
    ],
)
def test_the_header_says_who_runs_where(cluster, engines, workers, line):
    assert layout(cluster, engines, workers) == line


@pytest.mark.parametrize(("engines", "workers"), [(1, 1), (1, 3), (2, 2), (2, 5), (3, 2), (4, 1), (8, 16)])
def test_every_worker_has_an_engine_and_no_engine_has_more_than_it_needs(engines, workers):
    shares = [workers_of(engine, engines, workers) for engine in range(engines)]
    used = [worker for share in shares for worker in share]
    assert set(used) == set(range(workers))
    assert len(used) == max(engines, workers)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(map(used.count, used)) - min(map(used.count, used)) <= 1
