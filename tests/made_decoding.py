"""A dataset's run around a stand-in for the engines."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from made_runs import decoded

from agd_vllm.pipeline import run as run_module
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.pipeline.run import RunSettings, run_dataset
from agd_vllm.records import InputRow

ROWS = 12


@dataclass
class Decoding:
    """Decodes rows out of thin air; raises `fault` after `before_fault` rows. Notes what it saw at its end."""

    options: DecoderOptions
    before_fault: int = ROWS
    fault: type[BaseException] | None = None
    metadata: str = "null"
    at_row: Callable[[int], None] = lambda number: None
    rows_on_disk_at_close: int | None = None
    offered: list[str] = field(default_factory=list)
    load_seconds: float = 1.5
    layout: str = "1 engine"
    faults: dict = field(default_factory=lambda: {"worker_restarts": 1})
    roi_heads: tuple = ()
    waiting_for_attribution: int = 0
    model = SimpleNamespace(path="model", digest=None)
    tokenizer = SimpleNamespace(chat_template=None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.rows_on_disk_at_close = rows_on_disk(self.output)

    def outcomes(self, rows):
        for number, row in enumerate(rows):
            if self.fault is not None and number == self.before_fault:
                raise self.fault
            assert isinstance(row, InputRow)
            self.at_row(number)
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
            run_dataset(RunSettings((str(source),), str(output), part_rows=100), DecoderOptions.of(model="model"))
        except BaseException as raised:
            error = raised
        return made[0], error

    run.output = output
    run.summary = lambda: json.loads((output / "summary.json").read_text())
    return run
