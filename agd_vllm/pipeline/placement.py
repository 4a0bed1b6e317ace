"""Ray: connect or start a local cluster, make the actors, and see that the machine has room for them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the run was placed on; `started` if this process started Ray and has to stop it."""

    started: bool
    gpus: int
    cpus: int


def connect(actors: int, debug: bool) -> Cluster:
    """Joins the cluster that RAY_ADDRESS or a running Ray job names, else starts a local one.

    Raises RuntimeError where a cluster that was joined has too few CPUs for `actors`.
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
            options |= {"num_cpus": max(os.cpu_count() or 1, actors), "include_dashboard": False}
        ray.init(address=address, **options)
    resources = ray.cluster_resources()
    cluster = Cluster(started, int(resources.get("GPU", 0)), int(resources.get("CPU", 0)))
    if cluster.cpus < actors:
        raise RuntimeError(
            f"the Ray cluster has {cluster.cpus} CPUs, {actors} actors need one each; "
            "lower --engines or --attribution-workers, or add nodes"
        )
    return cluster


def disconnect(cluster: Cluster) -> None:
    if cluster.started:
        ray.shutdown()


def cores(cluster: Cluster, engines: int, workers: int) -> tuple[list[list[int] | None], list[list[int] | None]]:
    """Cores of each engine and worker; None where a GPU does the work, or where others share the cluster's machines."""
    if cluster.gpus or not cluster.started:
        return [None] * engines, [None] * workers
    return split_cores(engines, workers)


def make_replica(
    cluster: Cluster, model: ModelInfo, engine: EngineSettings, gate: GateSettings, traced: bool, debug: bool
) -> Any:
    """An engine actor, not started yet; a GPU of its own (tensor_parallel_size many) where the cluster has GPUs."""
    gpus = int(engine.engine_args.get("tensor_parallel_size", 1)) if cluster.gpus else 0
    actor = ray.remote(Replica).options(
        num_cpus=1, num_gpus=gpus, max_concurrency=REPLICA_CONCURRENCY, runtime_env=_runtime_env(debug)
    )
    return actor.remote(model, engine, gate, traced, debug)


def make_worker(cluster: Cluster, model: ModelInfo, settings: AttributionSettings, debug: bool) -> Any:
    """An attribution actor; it loads its model while it is made, `info` answers when it has."""
    actor = ray.remote(AttributionWorker).options(
        num_cpus=1, num_gpus=1 if cluster.gpus else 0, max_restarts=WORKER_RESTARTS, runtime_env=_runtime_env(debug)
    )
    return actor.remote(model.path, model.revision, model.trust_remote_code, settings)


def _runtime_env(debug: bool) -> dict[str, Any]:
    variables = {"TOKENIZERS_PARALLELISM": "false"}  # several actors share the cores
    if not debug:
        variables |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {"env_vars": variables}
