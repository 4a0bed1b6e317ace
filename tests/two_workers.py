"""How the tests are shared out to workers of pytest-xdist: which files go to one, in which order, on which cores."""

from __future__ import annotations

import os

import pytest
import torch

# Files that share what takes long to make (real runs, engines, scores of reverse mode) go to one worker. Workers take
# these and the other long ones first, in this order: both then end at about the same time.
GROUPS = {
    "runs": (
        "commands/test_ray_job.py",
        "commands/test_attribute.py",
        "commands/test_cli.py",
        "pipeline/test_agd_equals_paper.py",
        "pipeline/test_chaos.py",
    ),
    "engine": ("engine/test_engine.py", "inline/test_inline.py"),
    "inline": ("inline/test_command_line.py",),
    "on a GPU": ("benchmarks/test_on_gpu_benchmark.py",),
    "steering": ("steering/test_steering.py",),
    "tight engine": ("pipeline/test_strategies.py", "pipeline/test_pressure.py", "pipeline/test_calibrate.py"),
    "evaluate": ("evaluation/test_evaluate.py",),
    "oracle": ("attribution/test_forward.py", "inline/test_models.py"),
    "dola": ("dola/test_dola.py", "pipeline/test_first_steps.py"),
    "decoder": ("pipeline/test_decoder.py",),
    "smollm2": ("attribution/test_smollm2.py",),
    "store": (
        "pipeline/test_two_runs.py",
        "output/test_shared_storage.py",
        "output/test_unclaimed_storage.py",
        "output/test_error_log.py",
        "output/test_lease.py",
    ),
    "lm-eval": ("evaluation/test_lm_eval.py",),
    "refusals": ("inline/test_refusals.py",),
    "raw parameters": ("inline/test_raw_parameters.py",),
    "pause": ("benchmarks/test_pause_benchmark.py",),
    "triton": ("kernels/test_triton_kernels.py",),
    "writer": ("output/test_writer.py",),
}
GROUP = {f"tests/{file}": group for group, files in GROUPS.items() for file in files}


def group(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return GROUP.get(file, file)


def pytest_configure(config: pytest.Config) -> None:
    """A worker has cores of its own, and so has all that it starts: vLLM would bind the engines of both to the same."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        index, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        own = cores[index % count :: count] or cores
        os.sched_setaffinity(0, own)
        # Torch, which is loaded by now, has a thread for each core that there was: on fewer they wait for each other.
        torch.set_num_threads(len(own))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(GROUPS)}
    items.sort(key=lambda item: places.get(group(item.nodeid), len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """By file, as with `--dist loadfile`, but for the groups. (`--dist loadgroup` does nothing under pytest 9.2.)"""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None
