"""What a dataset's run does when it is broken off: the loop around the decoder, with a stand-in for the engines."""

import json
import random
import resource
import signal
import subprocess
import sys

import pytest
from conftest import CHECKOUT
from made_decoding import ROWS, rows_on_disk

from agd_vllm.output.storage import OutputFailed


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_what_is_decoded_is_on_disk_before_engines_are_stopped_and_not_decoded_again(dataset, fault):
    broken, error = dataset(before_fault=5, fault=fault)
    assert isinstance(error, fault)
    assert broken.rows_on_disk_at_close == 5
    assert dataset.summary()["decoded"] == 5
    resumed, error = dataset()
    assert error is None
    assert resumed.offered == [f"{i}" for i in range(5, ROWS)]
    summary = dataset.summary()
    assert (summary["decoded"], summary["load_seconds"]) == (ROWS, 3.0)
    assert summary["faults"] == {"worker_restarts": 2}


def test_a_full_disk_stops_the_run_with_its_reason_and_a_resume_finishes_it(dataset):
    """The size of a file is limited instead of the disk's: writing fails in the same place."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        _, error = dataset(metadata=json.dumps(random.randbytes(9000).hex()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(error, OutputFailed)
    assert "\n" not in str(error)
    assert rows_on_disk(dataset.output) == 0
    _, error = dataset()
    assert error is None
    assert rows_on_disk(dataset.output) == ROWS


def test_a_run_that_another_one_locks_out_leaves_its_files_alone(dataset):
    dataset(before_fault=5, fault=KeyboardInterrupt)
    before = dataset.summary()
    output = str(dataset.output)
    program = (
        f"from agd_vllm.output.writer import RunWriter; w = RunWriter({output!r}); print('locked', flush=True); input()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT) as other:
        assert other.stdout.readline() == b"locked\n"
        _, error = dataset()
        assert isinstance(error, OutputFailed)
        assert dataset.summary() == before
        other.communicate(b"\n")
