"""The attribution worker's own process."""

import subprocess
import sys

PROGRAM = """
import torch
from agd_vllm.attribution.worker import AttributionWorker

class Scorer:
    def score(self, requests):
        raise torch.{error}("device-side assert triggered")

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


def test_a_gpu_that_failed_ends_the_process_which_every_later_call_would_find_broken():
    assert run("AcceleratorError").returncode == 1


def test_too_little_memory_is_an_error_of_its_batch_alone():
    done = run("OutOfMemoryError")
    assert (done.returncode, done.stdout.strip()) == (0, "raised OutOfMemoryError"), done.stderr
