"""What a dataset's run does when it is broken off: the loop around the decoder, with a stand-in for the engines."""

import json
import random
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from conftest import CHECKOUT
from test_writer import decoded

from agd_vllm.pipeline import run as run_module
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.pipeline.run import RunSettings, run_dataset
from agd_vllm.records import InputRow
from agd_vllm.storage import OutputFailed

ROWS = 12


@dataclass
class Decoding:
    """Decodes rows out of thin air; raises `fault` after `before_fault` rows. Notes what it saw at its end."""

    options: DecoderOptions
    before_fault: int = ROWS
    fault: type[BaseException] | None = None
    metadata: str = "null"
    rows_on_disk_at_close: int | None = None
    offered: list[str] = field(default_factory=list)
    load_seconds: float = 1.5
    layout: str = "1 engine"
    faults: dict = field(default_factory=lambda: {"worker_restarts": 1})
    roi_heads: tuple = ()
    waiting_for_attribution: int = 0
    model = SimpleNamespace(path="model")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.rows_on_disk_at_close = rows_on_disk(self.output)

    def outcomes(self, rows):
        for number, row in enumerate(rows):
            if self.fault is not None and number == self.before_fault:
                raise self.fault
            assert isinstance(row, InputRow)
            self.offered.append(row.id)
            yield decoded(row.id, self.metadata)


def rows_on_disk(output) -> int:
    return sum(pq.read_metadata(path).num_rows for path in output.glob("results/part-*.parquet"))


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Runs the dataset with a Decoding of these settings, which it returns beside what run_dataset raised."""
    source, output = tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"id": f"{i}", "prompt": "Hi"}) + "\n" for i in range(ROWS)))

    def run(**settings):
        made = []

        def make(options):
            made.append(Decoding(options, **settings))
            made[0].output = output
            return made[0]

        monkeypatch.setattr(run_module, "Decoder", make)
        error = None
        try:
            run_dataset(RunSettings((str(source),), str(output), part_rows=100), DecoderOptions(model="model"))
        except BaseException as raised:
            error = raised
        return made[0], error

    run.output = output
    run.summary = lambda: json.loads((output / "summary.json").read_text())
    return run


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
    program = f"from agd_vllm.writer import RunWriter; w = RunWriter({output!r}); print('locked', flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT) as other:
        assert other.stdout.readline() == b"locked\n"
        _, error = dataset()
        assert isinstance(error, OutputFailed)
        assert dataset.summary() == before
        other.communicate(b"\n")
