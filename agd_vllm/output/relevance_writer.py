"""`relevance/`: the relevance of every token before a step for a token that might follow there, in Parquet parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from agd_vllm.input.id_set import IdSet
from agd_vllm.output.buffered import BufferedWriter
from agd_vllm.output.parts import next_number, part_name, parts

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


class RelevanceWriter(BufferedWriter):
    """Takes the relevance of whole rows and makes it durable after PART_BYTES bytes or PART_SECONDS seconds.

    A part appears whole, by a rename, and is never touched again; failed rows go to RELEVANCE_ERRORS.
    """

    def __init__(self, directory: str):
        self._buffer: list[tuple[str, TokenRelevance]] = []
        self._bytes = 0
        self._steps: Counter[str] = Counter()
        self._failed: set[str] = set()
        self.relevances = 0
        super().__init__(directory, RELEVANCE, RELEVANCE_ERRORS, PART_SECONDS)

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
        self._buffer_error({"id": id, "error": {"type": type, "message": message}})

    def _full(self) -> bool:
        return self._bytes >= PART_BYTES

    def _flush_rows(self) -> None:
        if self._buffer:
            part = part_name(self._next_part, self._writer)
            self._output.write_table(f"{RELEVANCE}/{part}", _table(self._buffer))
            self._next_part += 1
            self._buffer, self._bytes = [], 0

    def _recover(self) -> None:
        self._output.make_folder(RELEVANCE)
        if self._claim.exclusive:
            self._output.remove_temporaries(RELEVANCE)
        self._error_log.recover(lambda record: self._failed.add(record["id"]))
        names = parts(self._output, RELEVANCE)
        counted = IdSet()
        for part in names:
            table = self._output.read_table(f"{RELEVANCE}/{part}", ["id", "step"])
            for found in table.group_by(["id", "step"]).aggregate([([], "count_all")]).to_pylist():
                # Two runs at once, where storage could keep neither away, attribute a step twice.
                if counted.add(f"{found['step']} {found['id']}"):
                    self._steps[found["id"]] += 1
                    self.relevances += found["count_all"]
        self._next_part = next_number(names)


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
