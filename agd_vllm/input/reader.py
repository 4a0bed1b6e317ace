"""Input files as a stream of rows: JSONL or Parquet, plain or compressed, from any fsspec URL.

Memory is bounded by one chunk, one line or one Parquet batch, and 16 bytes of digest for each id. A fault of a row
becomes a `RowError` and reading goes on; a fault of a file raises `InputUnusable`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from agd_vllm.input.id_set import IdSet
from agd_vllm.input.schema import parse_row, row_id
from agd_vllm.records import InputRow, RowError, RowRefused

MAX_LINE_BYTES = 64 << 20
MAX_DEPTH = 100  # far from Python's recursion limit, which json and pickle run into later on, deeper in the stack
MAX_INTEGER_BITS = 4096  # Python refuses to print integers of more than 4,300 digits
DUPLICATE_ID = "duplicate_id"
CHUNK_BYTES = 1 << 20
BATCH_ROWS = 256
SHOWN_CHARACTERS = 2000

_SURROGATE = re.compile("[\ud800-\udfff]")
_BOM = b"\xef\xbb\xbf"


class InputUnusable(Exception):
    """An input that cannot be read, or not to its end. The message is one line: which, why, how to mend it."""


def read_rows(inputs: Sequence[str]) -> Iterator[InputRow | RowError]:
    """Every row of the inputs, in order: valid ones as `InputRow`, all others as `RowError`; blank lines are no rows.

    The inputs form one run: an id that an earlier row of any of them has used, valid or not, is a row error.
    Raises:
        InputUnusable: where a file cannot be opened, or breaks off; the rows before that have been yielded.
    """
    seen = IdSet()
    for source in inputs:
        for row in _parquet_rows(source) if _is_parquet(source) else _json_rows(source):
            checked = row if isinstance(row, RowError) else _checked(seen, *row)
            yield dataclasses.replace(checked, file=source)


def check_rows(rows: Iterable[Any]) -> Iterator[InputRow | RowError]:
    """`read_rows` for rows that are in memory, as dicts with the keys of the input file; a line is a row's position."""
    seen = IdSet()
    for line, value in enumerate(rows, start=1):
        yield _checked(seen, line, value)


def check_inputs(inputs: Sequence[str]) -> None:
    """Opens every input and looks for its first row, so that a hopeless run ends before a model is loaded.

    Raises:
        InputUnusable: for an input that is missing, a directory, of an unknown kind, damaged at its start, or empty.
    """
    for source in inputs:
        if _is_parquet(source):
            with _open(source) as file, _unusable(source):
                empty = pq.ParquetFile(file).metadata.num_rows == 0
        else:
            empty = not any(line.strip() for _, line, _ in _lines(source))
        if empty:
            raise InputUnusable(f"input {source} is empty; give a file with at least one row, or leave it out")


def _checked(seen: IdSet, line: int, value: Any, text: str | None = None) -> InputRow | RowError:
    """The record of a value. What JSON cannot hold is given in `errors.jsonl` as the text that it was read from."""
    try:
        _require_json(value)
    except RowRefused as refused:
        return RowError(_as_text(value) if text is None else text, line, None, refused.type, str(refused))
    id = row_id(value)
    try:
        if id is not None and not seen.add(id):
            raise RowRefused(DUPLICATE_ID, "an earlier row has this id; ids must be unique over all inputs of a run")
        return parse_row(value, line)
    except RowRefused as refused:
        return RowError(value, line, id, refused.type, str(refused))


def _require_json(value: Any) -> None:
    """Refuses what cannot be written as JSON in UTF-8 again, wherever in the row it hides."""
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise RowRefused("too_deep", f"the row nests deeper than {MAX_DEPTH} levels; flatten it")
        if isinstance(item, dict):
            pending += ((part, depth + 1) for pair in item.items() for part in pair)
            if not all(isinstance(key, str) for key in item):
                raise RowRefused("not_json", "the row has an object whose keys are not all strings")
        elif isinstance(item, list):
            pending += ((part, depth + 1) for part in item)
        elif isinstance(item, str):
            if _SURROGATE.search(item):
                raise RowRefused(
                    "lone_surrogate", "the row has a lone surrogate (\\ud800 to \\udfff), which no UTF-8 holds"
                )
        elif isinstance(item, float):
            if item != item or item in (float("inf"), float("-inf")):
                raise RowRefused("not_json", "the row has NaN or a number out of range, which JSON has not; use null")
        elif isinstance(item, int):
            if item.bit_length() > MAX_INTEGER_BITS:
                raise RowRefused("not_json", "the row has an integer of more than 1,200 digits; write it as a string")
        elif item is not None:
            raise RowRefused("not_json", f"the row has a value of type {type(item).__name__}, which JSON has not")


def _as_text(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):  # keys that are no strings, cycles, huge integers, depth
        return f"a {type(value).__name__} that JSON cannot hold"
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


# JSONL


def _json_rows(source: str) -> Iterator[tuple[int, Any, str] | RowError]:
    for number, line, oversized in _lines(source):
        text = line.decode(errors="backslashreplace")
        if oversized:
            message = f"the line is longer than {MAX_LINE_BYTES >> 20} MiB; split the row or shorten it"
            yield RowError(text, number, None, "line_too_long", message)
        elif line.strip():
            try:
                yield number, _parse_json(line), text
            except RowRefused as refused:
                yield RowError(text, number, None, refused.type, str(refused))


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise RowRefused("invalid_utf8", f"byte {error.start + 1} of the line is not UTF-8; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        what = f"{error.msg} at character {error.pos + 1}"
        raise RowRefused("invalid_json", f"the line is not JSON: {what}; put one JSON object on each line") from None
    except RecursionError:
        raise RowRefused("too_deep", f"the row nests deeper than {MAX_DEPTH} levels; flatten it") from None
    except ValueError:  # of int(), which refuses more than 4,300 digits
        raise RowRefused("not_json", "the row has an integer of too many digits; write it as a string") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RowRefused("invalid_json", "an object of the row names a key twice; keep one of the two")
    return fields


def _lines(source: str) -> Iterator[tuple[int, bytes, bool]]:
    """Physical lines (number, bytes without the newline, oversized). Of an oversized line only the head is kept."""
    number, oversized = 1, False
    head = bytearray()
    prefix = _BOM
    with _open(source) as file:
        while chunk := _read(file, source):
            chunk, prefix = chunk.removeprefix(prefix), b""
            *ends, rest = chunk.split(b"\n")
            for end in ends:
                line = b"" if oversized else bytes(head) + end
                if oversized or len(line) > MAX_LINE_BYTES:
                    line, oversized = bytes(head[:SHOWN_CHARACTERS]), True
                yield number, line, oversized
                number, oversized = number + 1, False
                head.clear()
            if not oversized:
                head += rest
            if len(head) > MAX_LINE_BYTES:
                oversized = True
                del head[SHOWN_CHARACTERS:]
        if head:
            yield number, bytes(head), oversized


# Parquet


def _is_parquet(source: str) -> bool:
    return _path(source).endswith(".parquet")


def _parquet_rows(source: str) -> Iterator[tuple[int, Any] | RowError]:
    number = 0
    with _open(source) as file:
        with _unusable(source):
            # Read in pieces, where the default is to hold all of a row group, which may be all of the file.
            batches = pq.ParquetFile(file, buffer_size=CHUNK_BYTES, pre_buffer=False).iter_batches(BATCH_ROWS)
        while (batch := _next_batch(batches, source)) is not None:
            columns = dict(zip(batch.schema.names, map(_readable, batch.columns), strict=True))
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield number, _parquet_row(columns, index)
                except RowRefused as refused:
                    yield RowError(None, number, None, refused.type, str(refused))


def _readable(column: pa.Array) -> pa.Array:
    """Nanoseconds as text: Python's own times hold none, and what pyarrow gives then depends on pandas being there."""
    fine = pa.types.is_timestamp(column.type) and column.type.unit == "ns"
    return column.cast(pa.string()) if fine else column


def _parquet_row(columns: dict[str, pa.Array], index: int) -> dict[str, Any]:
    row = {}
    for name, column in columns.items():
        try:
            value = column[index].as_py()
        except (ValueError, OverflowError) as error:  # a string that is not UTF-8, a time that Python cannot hold
            raise RowRefused("unreadable_value", f"column {name} has a value that cannot be read: {error}") from None
        if value is not None:
            row[name] = _plain(value)
    return row


def _next_batch(batches: Iterator[pa.RecordBatch], source: str) -> pa.RecordBatch | None:
    with _unusable(source):
        return next(batches, None)


def _plain(value: Any) -> Any:
    """A Parquet value as JSON has it. A struct's null fields are absent: every struct of a column has the same."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, (date, datetime, time, timedelta, Decimal)):
        return str(value)
    return value


# Files


def _path(source: str) -> str:
    """The part of a path or URL that has the suffixes: presigned URLs go on after a question mark."""
    return source.split("?")[0] if "://" in source else source


def _open(source: str) -> BinaryIO | pa.CompressedInputStream:
    codec = {"gz": "gzip", "zst": "zstd"}.get(_path(source).rpartition(".")[2])
    with _unusable(source):
        fs, path = fsspec.url_to_fs(source)
        file = fs.open(path, "rb")
        # Arrow's reader notices a truncated stream and reads several frames as one; zstandard's own does neither.
        return pa.CompressedInputStream(file, codec) if codec else file


def _read(file: BinaryIO | pa.CompressedInputStream, source: str) -> bytes:
    with _unusable(source):
        return file.read(CHUNK_BYTES)


@contextmanager
def _unusable(source: str) -> Iterator[None]:
    """Turns any fault of a file into one line. Every file system and codec raises kinds of its own, hence Exception."""
    try:
        yield
    except FileNotFoundError:
        raise InputUnusable(f"input {source} does not exist; check the path") from None
    except IsADirectoryError:
        raise InputUnusable(f"input {source} is a directory; name the files in it") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputUnusable(f"input {source} cannot be read: {reason}; repair or replace it") from error
