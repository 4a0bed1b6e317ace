"""A run's output directory read back: its parameters, its decoded rows with their guided steps, its relevance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from agd_vllm.output.relevance_writer import RELEVANCE
from agd_vllm.output.storage import OutputDirectory
from agd_vllm.output.summary import RUN, SUMMARY
from agd_vllm.records import DecodedRow, GuidedStep, Span

# Steps lie in files of their own, and entropies (of calibration) in no run.
_ROW_COLUMNS = [field.name for field in fields(DecodedRow) if field.name not in ("steps", "entropies")]
_STEP_COLUMNS = ["id", *(field.name for field in fields(GuidedStep))]


class RunReader:
    """Reads what `agd-vllm decode` has made durable, while it goes on, too.

    Raises ValueError, with one line, for a directory that holds no run, and OutputFailed, from every method, where a
    file cannot be read.
    """

    def __init__(self, directory: str):
        self.directory = directory.rstrip("/") or directory
        self.output = OutputDirectory(directory)
        if not {RUN, SUMMARY}.intersection(self.output.names()):
            raise ValueError(f"run {directory}: no run is there; give the output directory of agd-vllm decode")
        self.results = self.output.parts("results")
        self._steps = self.output.parts("steps")

    def parameters(self) -> dict[str, Any]:
        """What ran, and, once the run has ended or was broken off, its counts and times: `summary.json`."""
        return self.json(RUN) | self.json(SUMMARY)

    def json(self, name: str) -> dict[str, Any]:
        """One of the run's JSON files; empty where it is not there."""
        return self.output.read_json(name) if name in self.output.names() else {}

    def ids(self) -> list[str]:
        """The ids of all decoded rows, in completion order."""
        return [id for name in self.results.values() for id in self.output.read_table(name, ["id"])["id"].to_pylist()]

    def rows(self, ids: Collection[str] | None = None) -> Iterator[DecodedRow]:
        """Decoded rows with their guided steps, in completion order; of these ids only, where some are given."""
        wanted = None if ids is None else pa.array(list(ids), pa.string())
        for number, name in self.results.items():
            results = _only(self.output.read_table(name, _ROW_COLUMNS), wanted)
            if not results.num_rows:
                continue
            steps = self._steps_of(number, results["id"])
            for row in results.to_pylist():
                spans = tuple(Span(**span) for span in row.pop("roi_spans"))
                yield DecodedRow(**row, roi_spans=spans, steps=steps[row["id"]])

    def step_columns(self, columns: list[str]) -> Iterator[pa.Table]:
        """Some columns of all guided steps of decoded rows, part by part."""
        for number in self._steps.keys() & self.results.keys():
            yield self.output.read_table(self._steps[number], columns)

    def relevance(self, ids: Collection[str]) -> Iterator[dict[str, Any]]:
        """What `agd-vllm attribute` wrote for these rows; nothing where it wrote nothing."""
        wanted = pa.array(list(ids), pa.string())
        for name in self.output.parts(RELEVANCE).values():
            for batch in _only(self.output.read_table(name), wanted).to_batches(max_chunksize=256):
                yield from batch.to_pylist()

    def _steps_of(self, number: int, ids: pa.ChunkedArray) -> dict[str, list[GuidedStep]]:
        steps: defaultdict[str, list[GuidedStep]] = defaultdict(list)
        if number in self._steps:
            table = self.output.read_table(self._steps[number], _STEP_COLUMNS)
            for step in _only(table, ids.combine_chunks()).to_pylist():
                steps[step.pop("id")].append(GuidedStep(**step))
        return steps


def _only(table: pa.Table, ids: pa.Array | None) -> pa.Table:
    return table if ids is None else table.filter(pc.is_in(table["id"], ids))
