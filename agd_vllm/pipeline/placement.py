"""Ray: connect or start a local cluster, make the actors, and see that the machine has room for them."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil
import ray

from agd_vllm.attribution.worker import AttributionSettings, AttributionWorker
from agd_vllm.engine.settings import EngineSettings
from agd_vllm.models.host import usable_cores
from agd_vllm.models.inspect import ModelInfo
from agd_vllm.pipeline.ray_token import provide_token
from agd_vllm.pipeline.replica import Replica
from agd_vllm.pipeline.signals import not_for_children
from agd_vllm.pipeline.teams import Demand, Reservation, Shares, gpu_shares
from agd_vllm.strategies.strategy import Strategy

# The CPU cores of each actor; None: any.
Cores = list[list[int] | None]
# Ray restarts a worker that died; it holds nothing that cannot be sent again.
WORKER_RESTARTS = -1
# Rows of one engine, many of them waiting for admission: their coroutines are light.
REPLICA_CONCURRENCY = 64
# Of its share of a GPU's memory, what an engine takes unless told otherwise; the rest is for what vLLM does not count.
SHARED_GPU_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the run was placed on, with room for all of its actors taken.

    `started`: this process started Ray and has to stop it.
    """

    started: bool
    shares: Shares
    room: Reservation


def connect(demand: Demand, debug: bool) -> Cluster:
    """Joins the cluster that RAY_ADDRESS or a running Ray job names, else starts a local one.

    Raises RuntimeError where the cluster has too few CPUs or GPUs, or others do not let go of them.
    """
    # Set by `ray job submit` and by users of a running cluster; one that merely runs here is not ours to use.
    address = os.environ.get("RAY_ADDRESS", "local")
    started = not ray.is_initialized() and address == "local"
    try:
        if not ray.is_initialized():
            _init(address, demand, debug)
        return _claim(started, demand)
    except BaseException:
        if started:
            _stop_ray()
        raise


def _init(address: str, demand: Demand, debug: bool) -> None:
    options: dict[str, Any] = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    if address == "local":
        # Ray keeps a process for each. One more than there are cores only lets more actors share them; threads are
        # split elsewhere.
        options |= {"num_cpus": max(usable_cores(), demand.actors), "include_dashboard": False}
        provide_token()
    with not_for_children(), _signal_handlers_kept():
        ray.init(address=address, **options)


def _claim(started: bool, demand: Demand) -> Cluster:
    resources = ray.cluster_resources()
    cpus = int(resources.get("CPU", 0))
    if cpus < demand.actors:
        raise RuntimeError(
            f"the Ray cluster has {cpus} CPUs, {demand.actors} actors need one each; "
            "lower --engines or --attribution-workers, or add nodes"
        )
    shares = gpu_shares(int(resources.get("GPU", 0)), demand)
    return Cluster(started, shares, Reservation(demand, shares))


@contextmanager
def _signal_handlers_kept():
    """Ray puts a handler of its own in the place of ours for SIGTERM."""
    mine = signal.getsignal(signal.SIGTERM)
    yield
    if mine != signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, mine)


def disconnect(cluster: Cluster) -> None:
    """Gives back what was taken, and stops Ray if this process started it."""
    if ray.is_initialized():
        cluster.room.give_back()
    if cluster.started:
        _stop_ray()


def _stop_ray() -> None:
    """Ends the Ray that this process started. Its daemons do not hear the signal that asks them to end, so that Ray
    kills them, one by one and a second after it asked: their agents and actors, and what these began, are ended here,
    and daemons that nothing depends on before."""
    daemons = _daemons()
    begun = [process for daemon in daemons for process in _family(daemon)]
    _kill(daemon for daemon in daemons if daemon.name().startswith("python"))
    ray.shutdown()
    _kill(begun)


def _daemons() -> list[psutil.Process]:
    folder = os.path.dirname(ray.__file__)
    return [child for child in psutil.Process().children() if any(folder in part for part in _command(child))]


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def _family(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def cores(cluster: Cluster, engines: int, workers: int) -> tuple[Cores, Cores]:
    """Cores of each engine and worker; None where a GPU does the work, or where others share the cluster's machines."""
    if cluster.shares.engine or not cluster.started:
        return [None] * engines, [None] * workers
    of_engines, of_workers = split_cores(engines, workers)
    return [*of_engines], [*of_workers]


def layout(shares: Shares, engine_cores: Cores, worker_cores: Cores) -> str:
    """Who runs where, in one line for the run's header."""
    parts = []
    for name, gpus, actors in (
        ("engine", shares.engine, engine_cores),
        ("attribution worker", shares.worker, worker_cores),
    ):
        if not actors:
            continue
        part = f"{len(actors)} {name}{'s' if len(actors) > 1 else ''}"
        if gpus:
            part += f" on {gpus:g} GPU{'s' if gpus > 1 else ''} each"
        elif actors[0] is not None:
            part += " on cores " + " / ".join(",".join(map(str, cores or ())) for cores in actors)
        parts.append(part)
    return "; ".join(parts)


def make_replica(
    cluster: Cluster,
    index: int,
    model: ModelInfo,
    engine: EngineSettings,
    strategy: Strategy,
    traced: bool,
    debug: bool,
    after: list[Any],
) -> Any:
    """The engine actor of that index, not started yet, on its share of the GPUs, of which it takes memory once Ray has
    answered what `after` holds."""
    gpus = cluster.shares.engine
    if cluster.shares.shared:
        engine = replace(engine, engine_args={"gpu_memory_utilization": SHARED_GPU_MEMORY * gpus} | engine.engine_args)
    actor = ray.remote(Replica).options(
        num_cpus=1,
        num_gpus=gpus,
        scheduling_strategy=cluster.room.engine(index),
        max_concurrency=REPLICA_CONCURRENCY,
        runtime_env=_runtime_env(debug),
    )
    return actor.remote(model, engine, strategy, traced, debug, after)


def make_worker(cluster: Cluster, index: int, model: ModelInfo, settings: AttributionSettings, debug: bool) -> Any:
    """The attribution actor of that index; it loads its model while it is made, `info` answers when it has."""
    settings = replace(settings, gpu_share=cluster.shares.worker)
    actor = ray.remote(AttributionWorker).options(
        num_cpus=1,
        num_gpus=cluster.shares.worker,
        scheduling_strategy=cluster.room.worker(index),
        max_restarts=WORKER_RESTARTS,
        runtime_env=_runtime_env(debug),
    )
    return actor.remote(model.path, model.revision, model.trust_remote_code, settings)


def _runtime_env(debug: bool) -> dict[str, Any]:
    variables = {"TOKENIZERS_PARALLELISM": "false"}  # several actors share the cores
    if not debug:
        variables |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {"env_vars": variables}


def split_cores(engines: int, workers: int) -> tuple[list[list[int]], list[list[int]]]:
    """CPU cores of each engine and of each worker: equal, disjoint shares of this process's cores.

    Two actors on one core slow each other at every step. With fewer cores than actors they share: engines and workers
    then go round the cores in turn.
    """
    cores = sorted(os.sched_getaffinity(0))
    actors = engines + workers
    if len(cores) < actors:
        shares = [[cores[index % len(cores)]] for index in range(actors)]
    else:
        bounds = [len(cores) * index // actors for index in range(actors + 1)]
        shares = [cores[start:end] for start, end in itertools.pairwise(bounds)]
    return shares[:engines], shares[engines:]
