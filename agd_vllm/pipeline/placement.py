"""Ray: connect or start a local cluster, make the actors, and see that the machine has room for them."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from agd_vllm.attribution.worker import AttributionSettings, AttributionWorker
from agd_vllm.engine.engine import EngineSettings, GateSettings
from agd_vllm.model import ModelInfo
from agd_vllm.pipeline.cores import split_cores
from agd_vllm.pipeline.replica import Replica

# Ray restarts a worker that died; it holds nothing that cannot be sent again.
WORKER_RESTARTS = -1
# Rows of one engine, many of them waiting for admission: their coroutines are light.
REPLICA_CONCURRENCY = 64
# Of its share of a GPU's memory, what an engine takes unless told otherwise (vLLM's own default on a whole one).
SHARED_GPU_MEMORY = 0.9


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
class Cluster:
    """What the run was placed on; `started` if this process started Ray and has to stop it.

    `engine_gpus` and `worker_gpus`: GPUs of each actor, a fraction where they share, 0 where there are none.
    """

    started: bool
    engine_gpus: float
    worker_gpus: float


def connect(demand: Demand, debug: bool) -> Cluster:
    """Joins the cluster that RAY_ADDRESS or a running Ray job names, else starts a local one.

    Raises RuntimeError where the cluster has too few CPUs or GPUs.
    """
    if ray.is_initialized():
        started = False
    else:
        # Set by `ray job submit` and by users of a running cluster; one that merely runs here is not ours to use.
        address = os.environ.get("RAY_ADDRESS", "local")
        options: dict[str, Any] = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
        started = address == "local"
        if started:
            # A CPU more than there are cores only lets more actors share them; threads are split elsewhere.
            options |= {"num_cpus": max(os.cpu_count() or 1, demand.actors), "include_dashboard": False}
        with _signal_handlers_kept():
            ray.init(address=address, **options)
    resources = ray.cluster_resources()
    cpus = int(resources.get("CPU", 0))
    if cpus < demand.actors:
        raise RuntimeError(
            f"the Ray cluster has {cpus} CPUs, {demand.actors} actors need one each; "
            "lower --engines or --attribution-workers, or add nodes"
        )
    return Cluster(started, *gpu_shares(int(resources.get("GPU", 0)), demand))


@contextmanager
def _signal_handlers_kept():
    """Ray puts a handler of its own in the place of ours for SIGTERM."""
    mine = signal.getsignal(signal.SIGTERM)
    yield
    if mine != signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, mine)


def gpu_shares(gpus: int, demand: Demand) -> tuple[float, float]:
    """GPUs of each engine and each worker: whole ones while they last, else equal shares.

    Raises RuntimeError where engines that spread over several GPUs leave none for the workers.
    """
    if not gpus:
        return 0, 0
    whole = demand.engines * demand.gpus_per_engine + demand.workers
    if whole <= gpus:
        return demand.gpus_per_engine, 1
    if demand.gpus_per_engine > 1:
        raise RuntimeError(
            f"the Ray cluster has {gpus} GPUs, {demand.engines} engines of {demand.gpus_per_engine} GPUs and "
            f"{demand.workers} attribution workers need {whole}; lower tensor_parallel_size, --engines or "
            "--attribution-workers, or add GPUs"
        )
    share = 1 / -(-demand.actors // gpus)
    return share, share


def workers_of(engine: int, engines: int, workers: int) -> list[int]:
    """Which workers score for an engine: its own ones, or one that it shares with other engines.

    All workers for every engine would make batches that many times smaller, and a batch costs what its weights cost.
    """
    if workers < engines:
        return [engine % workers]
    return list(range(engine, workers, engines))


def disconnect(cluster: Cluster) -> None:
    if cluster.started:
        ray.shutdown()


def cores(cluster: Cluster, engines: int, workers: int) -> tuple[list[list[int] | None], list[list[int] | None]]:
    """Cores of each engine and worker; None where a GPU does the work, or where others share the cluster's machines."""
    if cluster.engine_gpus or not cluster.started:
        return [None] * engines, [None] * workers
    return split_cores(engines, workers)


def layout(cluster: Cluster, engine_cores: list[list[int] | None], worker_cores: list[list[int] | None]) -> str:
    """Who runs where, in one line for the run's header."""
    parts = []
    for name, gpus, shares in (
        ("engine", cluster.engine_gpus, engine_cores),
        ("attribution worker", cluster.worker_gpus, worker_cores),
    ):
        if not shares:
            continue
        part = f"{len(shares)} {name}{'s' if len(shares) > 1 else ''}"
        if gpus:
            part += f" on {gpus:g} GPU{'s' if gpus > 1 else ''} each"
        elif shares[0] is not None:
            part += " on cores " + " / ".join(",".join(map(str, share)) for share in shares)
        parts.append(part)
    return "; ".join(parts)


def make_replica(
    cluster: Cluster, model: ModelInfo, engine: EngineSettings, gate: GateSettings, traced: bool, debug: bool
) -> Any:
    """An engine actor, not started yet, on its share of the GPUs."""
    if 0 < cluster.engine_gpus < 1:
        memory = {"gpu_memory_utilization": SHARED_GPU_MEMORY * cluster.engine_gpus}
        engine = replace(engine, engine_args=memory | engine.engine_args)
    actor = ray.remote(Replica).options(
        num_cpus=1, num_gpus=cluster.engine_gpus, max_concurrency=REPLICA_CONCURRENCY, runtime_env=_runtime_env(debug)
    )
    return actor.remote(model, engine, gate, traced, debug)


def make_worker(cluster: Cluster, model: ModelInfo, settings: AttributionSettings, debug: bool) -> Any:
    """An attribution actor; it loads its model while it is made, `info` answers when it has."""
    settings = replace(settings, gpu_share=cluster.worker_gpus)
    actor = ray.remote(AttributionWorker).options(
        num_cpus=1, num_gpus=cluster.worker_gpus, max_restarts=WORKER_RESTARTS, runtime_env=_runtime_env(debug)
    )
    return actor.remote(model.path, model.revision, model.trust_remote_code, settings)


def _runtime_env(debug: bool) -> dict[str, Any]:
    variables = {"TOKENIZERS_PARALLELISM": "false"}  # several actors share the cores
    if not debug:
        variables |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {"env_vars": variables}
