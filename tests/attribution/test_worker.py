"""The attribution worker's own process."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from agd_vllm.attribution.worker import AttributionWorker

class Scorer:
    def score(self, requests):
        raise {error}

worker = AttributionWorker.__new__(AttributionWorker)
worker._scorer = Scorer()
try:
    worker.score([], [])
except Exception as error:
    print("raised", type(error).__name__)
"""


def run(error: str) -> subprocess.CompletedProcess:
    program = PROGRAM.replace("{error}", error)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "error",
    [
        'torch.AcceleratorError("device-side assert triggered")',
        'RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")',
    ],
)
def test_a_gpu_that_failed_ends_the_process_which_every_later_call_would_find_broken(error):
    assert run(error).returncode == 1


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError('no room')", "RuntimeError('a mistake')"])
def test_other_errors_are_those_of_their_batch_alone(error):
    done = run(error)
    name = error.partition("(")[0].removeprefix("torch.")
    assert (done.returncode, done.stdout.strip()) == (0, f"raised {name}"), done.stderr
