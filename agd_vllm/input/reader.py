"""Input files as a stream of rows: JSONL or Parquet, plain or compressed, from any fsspec URL.

Memory is bounded by one chunk, one line or one Parquet batch, and 16 bytes of digest for each id. A fault of a row
becomes a `RowError` and reading goes on; a fault of a file raises `InputUnusable`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, BinaryIO
from uuid import UUID

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from agd_vllm.input.id_set import IdSet
from agd_vllm.input.schema import parse_row, place_text, row_id
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
            yield dataclasses.replace(_checked(seen, row), file=source)


def check_rows(rows: Iterable[Any]) -> Iterator[InputRow | RowError]:
    """`read_rows` for rows that are in memory, as dicts with the keys of the input file; a line is a row's position."""
    seen = IdSet()
    for line, value in enumerate(rows, start=1):
        yield _checked(seen, _Read(line, value))


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


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read of a row: its value, as far as it could be read where there is a `fault`.

    `text` is what it was read from, for `errors.jsonl`, if JSON cannot hold the value.
    """

    line: int
    value: Any
    text: str | None = None
    fault: RowRefused | None = None


def _checked(seen: IdSet, read: _Read) -> InputRow | RowError:
    """The record of a row. A faulty one holds its id, too, wherever that can be read."""
    given = read.value
    try:
        _require_json(read.value)
        fault = read.fault
    except RowRefused as refused:
        fault = read.fault or refused
        given = _as_text(read.value)
    if fault is not None and read.text is not None:
        given = read.text
    id = row_id(read.value)
    if id is not None and _SURROGATE.search(id):
        id = None
    try:
        if id is not None and not seen.add(id):
            raise RowRefused(DUPLICATE_ID, "an earlier row has this id; ids must be unique over all inputs of a run")
        if fault is not None:
            raise fault
        return parse_row(read.value, read.line)
    except RowRefused as refused:
        return RowError(given, read.line, id, refused.type, str(refused))


def _require_json(value: Any) -> None:
    """Refuses what cannot be written as JSON in UTF-8 again, wherever in the row it hides, and says where."""
    pending: list[tuple[Any, int, Any]] = [(value, 1, None)]  # trails: (trail of the parent, key or index)
    while pending:
        item, depth, trail = pending.pop()
        if depth > MAX_DEPTH:
            raise RowRefused("too_deep", f"the row nests deeper than {MAX_DEPTH} levels; flatten it")
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    raise RowRefused("not_json", f"{_where(trail)} has a key that is no string; write it as a string")
                if _SURROGATE.search(key):
                    raise _lone_surrogate(f"a key of {_where(trail)}")
            pending += ((part, depth + 1, (trail, key)) for key, part in item.items())
        elif isinstance(item, list):
            pending += ((part, depth + 1, (trail, index)) for index, part in enumerate(item))
        elif isinstance(item, str):
            if _SURROGATE.search(item):
                raise _lone_surrogate(_where(trail))
        elif isinstance(item, float):
            if item != item or item in (float("inf"), float("-inf")):
                raise RowRefused(
                    "not_json", f"{_where(trail)} is NaN or a number out of range, which JSON has not; use null"
                )
        elif isinstance(item, int):
            if item.bit_length() > MAX_INTEGER_BITS:
                raise RowRefused(
                    "not_json", f"{_where(trail)} is an integer of more than 1,200 digits; write it as a string"
                )
        elif item is not None:
            raise RowRefused(
                "not_json",
                f"{_where(trail)} is of type {type(item).__name__}, which JSON has not; "
                "write it as a string, a list or an object",
            )


def _lone_surrogate(where: str) -> RowRefused:
    return RowRefused("lone_surrogate", f"{where} has a lone surrogate (\\ud800 to \\udfff), which no UTF-8 holds")


def _where(trail: tuple | None) -> str:
    """A trail as the place that it leads to: metadata.scores[2]."""
    parts: list[str | int] = []
    while trail is not None:
        trail, part = trail
        parts.append(part)
    return place_text(reversed(parts)) or "the row"


def _as_text(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):  # keys that are no strings, cycles, huge integers, depth
        return f"a {type(value).__name__} that JSON cannot hold"
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


# JSONL


def _json_rows(source: str) -> Iterator[_Read]:
    for number, line, oversized in _lines(source):
        text = line.decode(errors="backslashreplace")
        if oversized:
            message = f"the line is longer than {MAX_LINE_BYTES >> 20} MiB; split the row or shorten it"
            yield _Read(number, None, text, RowRefused("line_too_long", message))
        elif line.strip():
            try:
                yield _Read(number, _parse_json(line), text)
            except RowRefused as refused:
                yield _Read(number, _salvaged(line), text, refused)


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
        counts = Counter(key for key, _ in pairs)
        twice = place_text([next(key for key in counts if counts[key] > 1)])
        raise RowRefused("invalid_json", f"an object of the row names the key {twice} twice; keep one of the two")
    return fields


def _salvaged(line: bytes) -> Any:
    """What a line says that is no valid row, for its id: bytes that are not UTF-8 as lone surrogates, a key that is
    named twice not at all, no integers."""
    try:
        text = line.decode(errors="surrogateescape")
        return json.loads(text, object_pairs_hook=_unambiguous, parse_int=lambda digits: None)
    except (ValueError, RecursionError):
        return None


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    return {key: value for key, value in pairs if counts[key] == 1}


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


def _parquet_rows(source: str) -> Iterator[_Read]:
    number = 0
    with _open(source) as file:
        with _unusable(source):
            # Read in pieces, where the default is to hold all of a row group, which may be all of the file.
            batches = pq.ParquetFile(file, buffer_size=CHUNK_BYTES, pre_buffer=False).iter_batches(BATCH_ROWS)
        while (batch := _next_batch(batches, source)) is not None:
            columns = dict(zip(batch.schema.names, map(_readable, batch.columns), strict=True))
            for index in range(batch.num_rows):
                number += 1
                yield _parquet_row(columns, index, number)


def _readable(column: pa.Array) -> pa.Array:
    """Nanoseconds as text: Python's own times hold none, and what pyarrow gives then depends on pandas being there."""
    fine = pa.types.is_timestamp(column.type) and column.type.unit == "ns"
    return column.cast(pa.string()) if fine else column


def _parquet_row(columns: dict[str, pa.Array], index: int, number: int) -> _Read:
    row: dict[str, Any] = {}
    fault = None
    for name, column in columns.items():
        try:
            value = _plain(column[index].as_py(), column.type)
        except (ValueError, OverflowError) as error:  # a string that is not UTF-8, a time that Python cannot hold
            message = f"column {name} has a value that cannot be read: {_reason(error)}; mend or remove it"
            fault = fault or RowRefused("unreadable_value", message)
            continue
        if value is not None:
            row[name] = value
    return _Read(number, row, fault=fault)


def _next_batch(batches: Iterator[pa.RecordBatch], source: str) -> pa.RecordBatch | None:
    with _unusable(source):
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
        raise InputUnusable(f"input {source} cannot be read: {_reason(error)}; repair or replace it") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
