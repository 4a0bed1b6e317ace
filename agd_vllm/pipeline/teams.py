"""Which engines and attribution workers belong together, and what a run reserves of a Ray cluster for them."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

# A cluster that others use: it is told of after the one, and given up after the other.
TELL_AFTER_S, RESERVE_S = 10.0, 1800.0

log = logging.getLogger("agd_vllm")


@dataclass(frozen=True, slots=True)
class Demand:
    """Actors of a run."""

    engines: int
    workers: int
    gpus_per_engine: int

    @property
    def actors(self) -> int:
        return self.engines + self.workers


@dataclass(frozen=True, slots=True)
class Team:
    """Engines, by their index, and the workers that score for them and for no others."""

    engines: tuple[int, ...]
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shares:
    """GPUs of each engine and each worker, a fraction where they share, 0 where there are none.

    `teams_share`: a team has one GPU, or a part of one, for all of its actors.
    """

    engine: float = 0
    worker: float = 0
    teams_share: bool = False

    @property
    def shared(self) -> bool:
        """Whether several actors have one GPU. vLLM measures what it takes on all of the GPU while it starts, so that
        nobody else may load a model there meanwhile."""
        return 0 < self.engine < 1


def teams(engines: int, workers: int) -> list[Team]:
    """Each engine with workers of its own, or, where these are fewer, each worker with engines of its own.

    All workers for every engine would make batches that many times smaller, and a batch costs what its weights cost.
    The team of engine i is the one at i modulo their number.
    """
    count = min(engines, workers) or max(engines, workers)
    return [Team(tuple(range(team, engines, count)), tuple(range(team, workers, count))) for team in range(count)]


def gpu_shares(gpus: int, demand: Demand) -> Shares:
    """GPUs of each engine and each worker: whole ones while they last, else equal shares of one for each team.

    With fewer actors to a GPU than a team has, the shares are those of all actors alike. Raises RuntimeError where
    engines that spread over several GPUs leave none for the workers.
    """
    if not gpus:
        return Shares()
    whole = demand.engines * demand.gpus_per_engine + demand.workers
    if whole <= gpus:
        return Shares(demand.gpus_per_engine, 1)
    if demand.gpus_per_engine > 1:
        raise RuntimeError(
            f"the Ray cluster has {gpus} GPUs, {demand.engines} engines of {demand.gpus_per_engine} GPUs and "
            f"{demand.workers} attribution workers need {whole}; lower tensor_parallel_size, --engines or "
            "--attribution-workers, or add GPUs"
        )
    made = teams(demand.engines, demand.workers)
    if len(made) >= gpus:
        largest = max(len(team.engines) + len(team.workers) for team in made)
        share = _part(math.ceil(len(made) / gpus) * largest)
        return Shares(share, share, teams_share=True)
    share = _part(math.ceil(demand.actors / gpus))
    return Shares(share, share)


def _part(count: int) -> float:
    """1 / count, rounded down to what Ray counts in: the parts of a GPU never add up to more than it."""
    return math.floor(10_000 / count) / 10_000


class Reservation:
    """Room for all actors of a run, taken at once or not at all: two runs never hold half of what each needs.

    Blocks until the cluster has it. Raises RuntimeError where others do not let go within RESERVE_S seconds.
    """

    def __init__(self, demand: Demand, shares: Shares):
        self._engine_bundles: dict[int, int] = {}
        self._worker_bundles: dict[int, int] = {}
        bundles: list[dict[str, float]] = []
        for team in teams(demand.engines, demand.workers):
            actors = [(self._engine_bundles, engine, shares.engine) for engine in team.engines]
            actors += [(self._worker_bundles, worker, shares.worker) for worker in team.workers]
            for place, (bundle_of, index, gpus) in enumerate(actors):
                if place == 0 or not shares.teams_share:
                    bundles.append({"CPU": 0, "GPU": 0})
                bundles[-1]["CPU"] += 1
                bundles[-1]["GPU"] += gpus
                bundle_of[index] = len(bundles) - 1
        self._group = placement_group([{key: n for key, n in bundle.items() if n} for bundle in bundles])
        if not self._group.wait(TELL_AFTER_S):
            log.warning("waiting for room in the Ray cluster: %s", bundles)
            if not self._group.wait(RESERVE_S - TELL_AFTER_S):
                self.give_back()
                raise RuntimeError(
                    f"the Ray cluster had no room for {bundles} within {RESERVE_S:g} s, because others use it or no "
                    "node is as large; lower --engines or --attribution-workers, or tensor_parallel_size"
                )

    def engine(self, index: int) -> Any:
        """Ray's scheduling strategy for that engine."""
        return PlacementGroupSchedulingStrategy(self._group, self._engine_bundles[index])

    def worker(self, index: int) -> Any:
        """Ray's scheduling strategy for that worker."""
        return PlacementGroupSchedulingStrategy(self._group, self._worker_bundles[index])

    def give_back(self) -> None:
        remove_placement_group(self._group)
