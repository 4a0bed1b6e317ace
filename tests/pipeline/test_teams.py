"""Who works with whom, GPUs of each: whole ones while they last, shares where they do not; and real reservations."""

import pytest
import ray

from agd_vllm.pipeline import teams as teams_module
from agd_vllm.pipeline.teams import Demand, Reservation, Shares, gpu_shares, teams


@pytest.mark.parametrize(
    ("gpus", "demand", "shares"),
    [
        (0, Demand(1, 1, 1), Shares()),
        (2, Demand(1, 1, 1), Shares(1, 1)),
        (8, Demand(2, 4, 2), Shares(2, 1)),
        (1, Demand(1, 0, 1), Shares(1, 1)),
        (1, Demand(1, 1, 1), Shares(1 / 2, 1 / 2, teams_share=True)),
        (1, Demand(1, 3, 1), Shares(1 / 4, 1 / 4, teams_share=True)),
        (4, Demand(4, 4, 1), Shares(1 / 2, 1 / 2, teams_share=True)),
        (4, Demand(5, 5, 1), Shares(1 / 4, 1 / 4, teams_share=True)),
        (1, Demand(3, 1, 1), Shares(1 / 4, 1 / 4, teams_share=True)),
        # One team with more actors than GPUs: it cannot have a GPU for itself.
        (2, Demand(2, 1, 1), Shares(1 / 2, 1 / 2)),
        (2, Demand(1, 2, 1), Shares(1 / 2, 1 / 2)),
        (1, Demand(1, 2, 1), Shares(0.3333, 0.3333, teams_share=True)),
    ],
)
def test_shares(gpus, demand, shares):
    assert gpu_shares(gpus, demand) == shares
    assert demand.engines * shares.engine + demand.workers * shares.worker <= gpus


def test_an_engine_over_several_gpus_needs_them_all():
    with pytest.raises(RuntimeError, match=r"2 GPUs.*need 3.*tensor_parallel_size"):
        gpu_shares(2, Demand(1, 1, 2))


@pytest.mark.parametrize(
    ("engines", "workers"), [(1, 0), (3, 0), (0, 2), (1, 1), (1, 3), (2, 2), (2, 5), (3, 2), (4, 1), (8, 16)]
)
def test_every_actor_is_in_one_team_and_teams_are_alike(engines, workers):
    made = teams(engines, workers)
    assert sorted(engine for team in made for engine in team.engines) == list(range(engines))
    assert sorted(worker for team in made for worker in team.workers) == list(range(workers))
    for index in range(engines):
        assert index in made[index % len(made)].engines
    for sizes in ([len(team.engines) for team in made], [len(team.workers) for team in made]):
        assert max(sizes) - min(sizes) <= 1


@ray.remote
class Actor:
    def gpus(self):
        return ray.get_gpu_ids()


@pytest.fixture(scope="module")
def cluster():
    """Ray with four GPUs, as far as it knows."""
    ray.init(address="local", num_cpus=8, num_gpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def place(demand: Demand, shares: Shares, room: Reservation):
    def actors(count, gpus, strategy):
        made = [
            Actor.options(num_cpus=1, num_gpus=gpus, scheduling_strategy=strategy(i)).remote() for i in range(count)
        ]
        return ray.get([actor.gpus.remote() for actor in made], timeout=60), made

    return actors(demand.engines, shares.engine, room.engine), actors(demand.workers, shares.worker, room.worker)


def test_an_engine_and_its_worker_share_a_gpu_with_nobody_else(cluster):
    demand = Demand(2, 2, 1)
    shares = gpu_shares(2, demand)
    room = Reservation(demand, shares)
    (engines, kept), (workers, kept_too) = place(demand, shares, room)
    assert engines == workers
    assert len({gpu for (gpu,) in engines}) == demand.engines
    del kept, kept_too
    room.give_back()


def test_engines_over_two_gpus_have_both_and_a_worker_another(cluster):
    demand = Demand(1, 2, 2)
    shares = gpu_shares(4, demand)
    room = Reservation(demand, shares)
    (engines, kept), (workers, kept_too) = place(demand, shares, room)
    assert len(engines[0]) == 2
    assert sorted([*engines[0], *workers[0], *workers[1]]) == [0, 1, 2, 3]
    del kept, kept_too
    room.give_back()


def test_a_full_cluster_is_told_of_and_given_up_with_nothing_taken(cluster, monkeypatch, caplog):
    monkeypatch.setattr(teams_module, "TELL_AFTER_S", 0.5)
    monkeypatch.setattr(teams_module, "RESERVE_S", 4.0)
    first = Reservation(Demand(1, 1, 1), Shares(2, 1))
    with pytest.raises(RuntimeError, match=r"no room.*lower --engines"):
        Reservation(Demand(2, 2, 1), Shares(1, 1))
    assert "waiting for room" in caplog.text
    first.give_back()
    Reservation(Demand(2, 2, 1), Shares(1, 1)).give_back()
