"""Parts of an output: `part-NUMBER-WRITER`, which one process writes once, and rows that two of them hold."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from agd_vllm.input.id_set import IdSet
from agd_vllm.output.storage import OutputDirectory


def part_name(number: int, writer: str, ending: str = "parquet") -> str:
    """`writer` is random, of one process: two that write at once use the same numbers, and never the same names."""
    return f"part-{number:05d}-{writer}.{ending}"


def parts(output: OutputDirectory, folder: str, ending: str = "parquet") -> list[str]:
    """The names of a folder's parts, by number: any `part-*`, those without a writer, of 0.1.0, too."""
    names = (name for name in output.names(folder) if re.fullmatch(rf"part-.*\.{ending}", name))
    return sorted(names, key=lambda name: (_number(name), name))


def next_number(names: Iterable[str]) -> int:
    """The number after the greatest one among the names of parts, from 0."""
    return max(map(_number, names), default=-1) + 1


def _number(name: str) -> int:
    match = re.match(r"part-(\d+)", name)
    return int(match[1]) if match else -1


class Firsts:
    """Rows of ids that no earlier part holds.

    Two runs at once decode rows twice where storage could keep neither away; the answer that comes first counts.
    """

    def __init__(self) -> None:
        self.ids = IdSet()

    def of(self, table: pa.Table) -> pa.Table:
        """A part's rows without those whose `id` an earlier part holds: the same table where there are none.

        To be called part by part.
        """
        new = [self.ids.add(id) for id in table["id"].to_pylist()]
        return table if all(new) else table.filter(pa.array(new, pa.bool_()))


def steps_of(output: OutputDirectory, part: str, columns: list[str], ids: pa.Table | None) -> pa.Table:
    """Columns of the guided steps of a part; of these `ids` only, where some are given."""
    name = f"steps/{part}"
    if ids is None:
        return output.read_table(name, columns)
    table = output.read_table(name, list(dict.fromkeys(["id", *columns])))
    return table.filter(pc.is_in(table["id"], ids["id"].combine_chunks())).select(columns)
