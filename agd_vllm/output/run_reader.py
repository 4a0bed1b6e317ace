"""A run's output directory read back: its parameters, its decoded rows with their guided steps, its relevance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from agd_vllm.output.parts import Firsts, parts, steps_of
from agd_vllm.output.relevance_writer import RELEVANCE
from agd_vllm.output.storage import OutputDirectory
from agd_vllm.output.summary import RUN, SUMMARY
from agd_vllm.records import DecodedRow, GuidedStep, Span

# Steps lie in files of their own, and entropies (of calibration) in no run.
_ROW_COLUMNS = [field.name for field in fields(DecodedRow) if field.name not in ("steps", "entropies")]
_STEP_COLUMNS = ["id", *(field.name for field in fields(GuidedStep))]


class RunReader:
    """Reads what `agd-vllm decode` has made durable, also while it runs.

    Raises ValueError, with one line, for a directory that holds no run, and OutputFailed, from every method, where a
    file cannot be read.
    """

    def __init__(self, directory: str):
        self.directory = directory.rstrip("/") or directory
        self.output = OutputDirectory(directory)
        if not {RUN, SUMMARY}.intersection(self.output.names()):
            raise ValueError(f"run {directory}: no run is there; give the output directory of agd-vllm decode")
        self._parts = parts(self.output, "results")
        self._with_steps = {*parts(self.output, "steps")}

    def parameters(self) -> dict[str, Any]:
        """What ran, and, once the run has ended or was broken off, its counts and times: `summary.json`."""
        return self.json(RUN) | self.json(SUMMARY)

    def json(self, name: str) -> dict[str, Any]:
        """One of the run's JSON files; empty where it is not there."""
        return self.output.read_json(name) if name in self.output.names() else {}

    def ids(self) -> list[str]:
        """The ids of all decoded rows, in completion order."""
        return [id for _, table in self._results(["id"]) for id in table["id"].to_pylist()]

    def rows(self, ids: Collection[str] | None = None) -> Iterator[DecodedRow]:
        """Decoded rows with their guided steps, in completion order; of these ids only, where some are given."""
        wanted = None if ids is None else pa.array(list(ids), pa.string())
        for part, table in self._results(_ROW_COLUMNS, wanted):
            if not table.num_rows:
                continue
            steps = self._steps(part, table)
            for row in table.to_pylist():
                spans = tuple(Span(**span) for span in row.pop("roi_spans"))
                yield DecodedRow(**row, roi_spans=spans, steps=steps[row["id"]])

    def step_columns(self, columns: list[str]) -> Iterator[pa.Table]:
        """Some columns of all guided steps of decoded rows, part by part."""
        firsts = Firsts()
        for part in self._parts:
            ids = self.output.read_table(f"results/{part}", ["id"])
            kept = firsts.of(ids)
            if part in self._with_steps:
                yield steps_of(self.output, part, columns, None if kept is ids else kept)

    def relevance(self, ids: Collection[str]) -> Iterator[dict[str, Any]]:
        """What `agd-vllm attribute` wrote for these rows; nothing where it wrote nothing."""
        wanted = pa.array(list(ids), pa.string())
        seen: set[tuple[str, int, int]] = set()
        for part in parts(self.output, RELEVANCE):
            for batch in _only(self.output.read_table(f"{RELEVANCE}/{part}"), wanted).to_batches(max_chunksize=256):
                for found in batch.to_pylist():
                    key = (found["id"], found["step"], found["token_id"])
                    if key not in seen:
                        seen.add(key)
                        yield found

    def _results(self, columns: list[str], wanted: pa.Array | None = None) -> Iterator[tuple[str, pa.Table]]:
        firsts = Firsts()
        for part in self._parts:
            yield part, firsts.of(_only(self.output.read_table(f"results/{part}", columns), wanted))

    def _steps(self, part: str, rows: pa.Table) -> dict[str, list[GuidedStep]]:
        steps: defaultdict[str, list[GuidedStep]] = defaultdict(list)
        if part in self._with_steps:
            for step in steps_of(self.output, part, _STEP_COLUMNS, rows).to_pylist():
                steps[step.pop("id")].append(GuidedStep(**step))
        return steps


def _only(table: pa.Table, ids: pa.Array | None) -> pa.Table:
    return table if ids is None else table.filter(pc.is_in(table["id"], ids))
