"""The output directory: Parquet parts and `errors.jsonl`, durable in steps and whole after any death.

What a reader may look at appears by a rename of a finished file. A part's steps have the name of its results, and are
renamed into place before these: a row in `results` has its steps, and steps of a part without results are those of a
run that died between the two, whose rows are decoded again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agd_vllm.input.id_set import IdSet
from agd_vllm.input.reader import DUPLICATE_ID
from agd_vllm.output.buffered import BufferedWriter
from agd_vllm.output.error_log import has_own_id
from agd_vllm.output.parts import next_number, part_name, parts
from agd_vllm.records import DecodedRow, GuidedStep, RowError

ERRORS = "errors.jsonl"
ERROR_BUFFER_BYTES = 16 << 20  # an error carries its row, which may be large: part_rows alone would not bound memory

_SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("weight", pa.float32())])
RESULTS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("roi_spans", pa.list_(_SPAN)),
        ("finish_reason", pa.string()),
        ("num_guided", pa.int32()),
        ("metadata", pa.string()),
    ]
)
STEPS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("step", pa.int32()),
        ("entropy", pa.float32()),
        ("candidate_ids", pa.list_(pa.int32())),
        ("candidate_probs", pa.list_(pa.float32())),
        ("scores", pa.list_(pa.float32())),
        ("chosen_id", pa.int32()),
        ("greedy_id", pa.int32()),
    ]
)


class RunWriter(BufferedWriter):
    """Takes decoded and failed rows, and makes them durable after `part_rows` rows or `part_seconds` seconds.

    Opening it repairs what a dead run left: temporary files and steps without results go, a torn last line of
    `errors.jsonl` is cut off, a results part without a Parquet footer (a copy broken off, on storage that cannot
    rename) is set aside under a hidden name. Where another run may be writing, nothing is removed. A part that is in
    place is never touched again. Rows that are buffered when the process dies are decoded again by a resume.
    """

    def __init__(self, directory: str, part_rows: int = 500, part_seconds: float = 60):
        self._part_rows = part_rows
        self._rows: list[DecodedRow] = []
        self._completed = IdSet()
        self._unowned: Counter[bytes] = Counter()
        super().__init__(directory, "", ERRORS, part_seconds)

    def completed_ids(self) -> IdSet:
        """The ids of all rows added or failed, by earlier runs too: a resume does not decode them again."""
        return self._completed

    def add(self, row: DecodedRow) -> bool:
        """Takes a decoded row. False, and nothing done, where its id is completed: it was decoded twice."""
        if not self._completed.add(row.id):
            return False
        self._rows.append(row)
        self._buffered()
        return True

    def fail(self, error: RowError) -> bool:
        """Takes a failed row. False, and nothing done, where it is completed, or an earlier run has recorded it.

        A resume reads all rows again, hence the second case. An error without an id, or of a row that repeats another
        row's id, completes no id: it is known by its line and input, as often as they occur (in several files).
        """
        if error.id is None or error.type == DUPLICATE_ID:
            key = _unowned_key(error.line, error.input)
            if self._unowned[key]:
                self._unowned[key] -= 1
                return False
        elif not self._completed.add(error.id):
            return False
        fault = {"type": error.type, "message": error.message}
        place = {"input": error.input, "file": error.file, "line": error.line, "id": error.id}
        self._buffer_error(place | {"error": fault})
        return True

    def _full(self) -> bool:
        rows = len(self._rows) + len(self._errors)
        return rows >= self._part_rows or self._error_bytes >= ERROR_BUFFER_BYTES

    def _flush_rows(self) -> None:
        if self._rows:
            part = part_name(self._next_part, self._writer)
            steps = [(row.id, step) for row in self._rows for step in row.steps]
            self._output.write_table(f"steps/{part}", _steps_table(steps))
            # Who has taken over since takes steps without results for a dead run's.
            self._claim.confirm()
            self._output.write_table(f"results/{part}", _results_table(self._rows))
            self._next_part += 1
            self._rows = []

    def _recover(self) -> None:
        for folder in ("results", "steps"):
            self._output.make_folder(folder)
        if self._claim.exclusive:
            for folder in ("", "results", "steps"):
                self._output.remove_temporaries(folder)
        self._recover_parts()
        self._error_log.recover(self._recover_error)

    def _recover_error(self, record: dict[str, Any]) -> None:
        if has_own_id(record):
            self._completed.add(record["id"])
        else:
            self._unowned[_unowned_key(record["line"], record["input"])] += 1

    def _recover_parts(self) -> None:
        """Takes note of the ids in `results`, and of the next part's number."""
        whole = []
        for part in parts(self._output, "results"):
            name = f"results/{part}"
            with self._output.open(name) as file, self._output.faults(name):
                try:
                    ids = pq.read_table(file, columns=["id"])["id"].to_pylist()
                except pa.ArrowInvalid:
                    ids = None
            if ids is None:
                self._output.rename(name, f"results/.{part}.torn")
                continue
            whole.append(part)
            for id in ids:
                self._completed.add(id)
        if self._claim.exclusive:
            for part in set(parts(self._output, "steps")).difference(whole):
                self._output.remove(f"steps/{part}")
        self._next_part = next_number(whole)


def _unowned_key(line: int, input: Any) -> bytes:
    return hashlib.blake2b(json.dumps([line, input]).encode(), digest_size=16).digest()


def _results_table(rows: list[DecodedRow]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in RESULTS_SCHEMA.names}
    columns["roi_spans"] = [[asdict(span) for span in row.roi_spans] for row in rows]
    return pa.table(columns, schema=RESULTS_SCHEMA)


def _steps_table(steps: list[tuple[str, GuidedStep]]) -> pa.Table:
    columns = {name: [getattr(step, name) for _, step in steps] for name in STEPS_SCHEMA.names if name != "id"}
    return pa.table({"id": [id for id, _ in steps], **columns}, schema=STEPS_SCHEMA)
