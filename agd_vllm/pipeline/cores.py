"""Which CPU cores the actors of a machine without GPUs run on: two on one core slow each other at every step."""

from __future__ import annotations

import itertools
import os


def split_cores(engines: int, workers: int) -> tuple[list[list[int]], list[list[int]]]:
    """Cores of each engine and of each worker: equal, disjoint shares of this process's cores.

    With fewer cores than actors they share: engines and workers then go round the cores in turn.
    """
    cores = sorted(os.sched_getaffinity(0))
    actors = engines + workers
    if len(cores) < actors:
        shares = [[cores[index % len(cores)]] for index in range(actors)]
    else:
        bounds = [len(cores) * index // actors for index in range(actors + 1)]
        shares = [cores[start:end] for start, end in itertools.pairwise(bounds)]
    return shares[:engines], shares[engines:]
