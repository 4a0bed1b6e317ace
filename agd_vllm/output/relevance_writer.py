"""`relevance/`: the relevance of every token before a step for a token that might follow there, in Parquet parts."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from agd_vllm.output.storage import OutputDirectory, OutputFailed
from agd_vllm.output.writer import LOCK

# The folder holds Parquet only, so that it can be read as one table.
RELEVANCE = "relevance"
RELEVANCE_ERRORS = "relevance-errors.jsonl"
PART_BYTES, PART_SECONDS = 64 << 20, 60.0

RELEVANCE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("step", pa.int32()),
        ("token_id", pa.int32()),
        ("logit", pa.float32()),
        ("relevance", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, slots=True)
class TokenRelevance:
    """One row of `relevance/`: what speaks for `token_id` as the output token of index `step`.

    `relevance` is float32 [prompt tokens + step], over the prompt and the output tokens before the step; `logit` is
    what it explains.
    """

    step: int
    token_id: int
    logit: float
    relevance: np.ndarray


class RelevanceWriter:
    """Takes the relevance of whole rows and makes it durable after PART_BYTES bytes or PART_SECONDS seconds.

    A part appears whole, by a rename, and is never touched again; failed rows go to RELEVANCE_ERRORS. Opening it
    mends what a dead process left. Not thread-safe.
    Raises OutputFailed, from every method, where the storage fails, or at once where another process writes here.
    """

    def __init__(self, directory: str):
        self._output = OutputDirectory(directory)
        self._output.make_folder(RELEVANCE)
        self._lock = self._output.lock(f"{RELEVANCE}/{LOCK}")
        self._buffer: list[tuple[str, TokenRelevance]] = []
        self._bytes = 0
        self._errors: list[bytes] = []
        self._since: float | None = None
        self._steps: Counter[str] = Counter()
        self._failed: set[str] = set()
        self.relevances = 0
        try:
            self._next_part = self._recover_parts()
            self._errors_end = self._recover_errors()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> RelevanceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # After a failed write the same rows would only fail again, and hide the first fault.
            if not (kind and issubclass(kind, OutputFailed)):
                self.flush()
        finally:
            self._release()

    @property
    def rows(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> int:
        return self._steps.total()

    @property
    def failed(self) -> int:
        return len(self._failed)

    def steps_of(self, id: str) -> int:
        """How many steps of a row were taken, by earlier processes too."""
        return self._steps.get(id, 0)

    def has_failed(self, id: str) -> bool:
        return id in self._failed

    def add(self, id: str, relevances: list[TokenRelevance]) -> None:
        """Takes steps of a row, with all tokens of each."""
        self._buffer += [(id, relevance) for relevance in relevances]
        self._bytes += sum(relevance.relevance.nbytes for relevance in relevances)
        self._steps[id] += len({relevance.step for relevance in relevances})
        self.relevances += len(relevances)
        self._buffered()

    def fail(self, id: str, type: str, message: str) -> None:
        """Takes a row that cannot be attributed."""
        self._failed.add(id)
        fault = {"id": id, "error": {"type": type, "message": message}}
        self._errors.append(json.dumps(fault, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._buffered()

    def flush_if_due(self) -> None:
        old = self._since is not None and time.monotonic() - self._since >= PART_SECONDS
        if old or self._bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Makes everything taken so far durable."""
        if self._buffer:
            self._output.write_table(f"{RELEVANCE}/part-{self._next_part:05d}.parquet", _table(self._buffer))
            self._next_part += 1
            self._buffer, self._bytes = [], 0
        if self._errors:
            data = b"".join(self._errors)
            self._output.write_from(RELEVANCE_ERRORS, self._errors_end, data)
            self._errors_end += len(data)
            self._errors = []
        self._since = None

    def _buffered(self) -> None:
        if self._since is None:
            self._since = time.monotonic()
        self.flush_if_due()

    def _release(self) -> None:
        if self._lock:
            self._lock.close()

    def _recover_parts(self) -> int:
        for name in self._output.names(RELEVANCE):
            if name.startswith(".part-") and name.endswith(".tmp"):
                self._output.remove(f"{RELEVANCE}/{name}")
        parts = self._output.parts(RELEVANCE)
        for name in parts.values():
            table = self._output.read_table(name, ["id", "step"])
            self.relevances += table.num_rows
            for row in table.group_by("id").aggregate([("step", "count_distinct")]).to_pylist():
                self._steps[row["id"]] += row["step_count_distinct"]
        return max(parts, default=-1) + 1

    def _recover_errors(self) -> int:
        """Takes note of the rows that failed; the size of the whole lines, which a torn one may follow."""
        end = 0
        if RELEVANCE_ERRORS in self._output.names():
            with self._output.open(RELEVANCE_ERRORS) as file, self._output.faults(RELEVANCE_ERRORS):
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    end += len(line)
                    self._failed.add(json.loads(line)["id"])
        return end


def _table(rows: list[tuple[str, TokenRelevance]]) -> pa.Table:
    values = [relevance.relevance for _, relevance in rows]
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.table(
        {
            "id": [id for id, _ in rows],
            "step": [relevance.step for _, relevance in rows],
            "token_id": [relevance.token_id for _, relevance in rows],
            "logit": [relevance.logit for _, relevance in rows],
            "relevance": pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values), pa.float32())),
        },
        schema=RELEVANCE_SCHEMA,
    )
