"""Parquet rows as JSON has them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, BinaryIO
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from agd_vllm.input.files import CHUNK_BYTES, InputUnusable, reason, unusable
from agd_vllm.input.named_once import NamedTwice, named_once
from agd_vllm.records import RowRefused

BATCH_ROWS = 256


def has_rows(file: BinaryIO, source: str) -> bool:
    """Raises InputUnusable for a file without a Parquet footer, or with two columns of one name."""
    return _opened(file, source).metadata.num_rows > 0


def parquet_rows(file: BinaryIO, source: str) -> Iterator[tuple[dict[str, Any], RowRefused | None]]:
    """Each row without its nulls, and without the first values that cannot be read, which are its fault.

    Raises InputUnusable where the file is damaged, or has two columns of one name; the rows before that have been
    yielded.
    """
    opened = _opened(file, source)
    with unusable(source):
        batches = opened.iter_batches(BATCH_ROWS)
    while (batch := _next_batch(batches, source)) is not None:
        columns = dict(zip(batch.schema.names, map(_readable, batch.columns), strict=True))
        for index in range(batch.num_rows):
            yield _row(columns, index)


def _opened(file: BinaryIO, source: str) -> pq.ParquetFile:
    with unusable(source):
        # Read in pieces, where the default is to hold all of a row group, which may be all of the file.
        opened = pq.ParquetFile(file, buffer_size=CHUNK_BYTES, pre_buffer=False)
        columns = opened.schema_arrow.names
    try:
        named_once([(name, None) for name in columns])
    except NamedTwice as twice:
        message = f"input {source} has two columns that are named {twice.name}; rename or drop one of them"
        raise InputUnusable(message) from None
    return opened


def _readable(column: pa.Array) -> pa.Array:
    """Nanoseconds as text: Python's own times hold none, and what pyarrow gives then depends on pandas being there."""
    fine = pa.types.is_timestamp(column.type) and column.type.unit == "ns"
    return column.cast(pa.string()) if fine else column


def _row(columns: dict[str, pa.Array], index: int) -> tuple[dict[str, Any], RowRefused | None]:
    row: dict[str, Any] = {}
    fault = None
    for name, column in columns.items():
        try:
            value = _plain(column[index].as_py(), column.type)
        except (ValueError, OverflowError) as error:  # a string that is not UTF-8, a time that Python cannot hold
            message = f"column {name} has a value that cannot be read: {reason(error)}; fix or remove it"
            fault = fault or RowRefused("unreadable_value", message)
            continue
        if value is not None:
            row[name] = value
    return row, fault


def _next_batch(batches: Iterator[pa.RecordBatch], source: str) -> pa.RecordBatch | None:
    with unusable(source):
        return next(batches, None)


def _plain(value: Any, kind: pa.DataType) -> Any:
    """A Parquet value as JSON has it: a map is an object. A struct's null fields are absent: every struct of a column
    has the same."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if value is None:
        return None
    if pa.types.is_map(kind):
        return _map([(_key(key), _plain(part, kind.item_type)) for key, part in value])
    if isinstance(value, dict):
        return {name: _plain(part, kind.field(name).type) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_plain(part, kind.value_type) for part in value]
    if isinstance(value, (date, datetime, time, timedelta, Decimal, UUID)):
        return str(value)
    return value


def _key(key: Any) -> Any:
    """A map's key as JSON's objects have it, where there is one way to write it."""
    plain = isinstance(key, (int, date, datetime, time, Decimal, UUID)) and not isinstance(key, bool)
    return str(key) if plain else key


def _map(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("the map has a key twice")
    return made
