"""Input files as a stream of rows: JSON lines, a JSON array or Parquet, plain or packed, from any fsspec URL.

Memory is bounded by one chunk, one row or one Parquet batch, and 16 bytes of digest for each id. A fault of a row
becomes a `RowError` and reading goes on; a fault of a file raises `InputUnusable`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from agd_vllm.input.files import InputUnusable, OpenInput, open_input
from agd_vllm.input.id_set import IdSet
from agd_vllm.input.json_text import MAX_ROW_BYTES, ArrayNotClosed, RowText, row_texts
from agd_vllm.input.named_once import NamedTwice, named_once
from agd_vllm.input.parquet import has_rows, parquet_rows
from agd_vllm.input.schema import parse_row, row_id
from agd_vllm.input.wording import place_text
from agd_vllm.records import InputRow, RowError, RowRefused

MAX_DEPTH = 100  # far from Python's recursion limit, which json and pickle run into later on, deeper in the stack
MAX_INTEGER_BITS = 4096  # Python refuses to print integers of more than 4,300 digits
DUPLICATE_ID = "duplicate_id"

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_rows(inputs: Sequence[str]) -> Iterator[InputRow | RowError]:
    """Every row of the inputs, in order: valid ones as `InputRow`, all others as `RowError`; blank lines are no rows.

    The inputs form one run: an id that an earlier row of any of them has used, valid or not, is a row error.
    Raises:
        InputUnusable: where a file cannot be opened, or breaks off; the rows before that have been yielded.
    """
    seen = IdSet()
    for source in inputs:
        with open_input(source) as opened:
            for row in _parquet_rows(opened.parquet, source) if opened.parquet else _json_rows(opened, source):
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
        with open_input(source) as opened:
            if opened.parquet:
                empty = not has_rows(opened.parquet, source)
            else:
                empty = next(_texts(opened, source), None) is None
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


def _parquet_rows(parquet: BinaryIO, source: str) -> Iterator[_Read]:
    for number, (row, fault) in enumerate(parquet_rows(parquet, source), start=1):
        yield _Read(number, row, fault=fault)


# JSON

_NAMES = {"element": "element of the array", "value": "object, and put what follows it on a line of its own"}


def _texts(opened: OpenInput, source: str) -> Iterator[RowText]:
    """The texts of rows; blank lines are none."""
    try:
        yield from (row for row in row_texts(opened.text) if row.text.strip() or row.oversized)
    except ArrayNotClosed:
        raise InputUnusable(
            f"input {source} breaks off: the JSON array that it begins with is not closed; complete it, or put one "
            "JSON object on each line"
        ) from None


def _json_rows(opened: OpenInput, source: str) -> Iterator[_Read]:
    for row in _texts(opened, source):
        text = row.text.decode(errors="backslashreplace")
        try:
            yield _Read(row.line, _parse_json(row), text)
        except RowRefused as refused:
            yield _Read(row.line, None if row.oversized else _salvaged(row.text), text, refused)


def _parse_json(row: RowText) -> Any:
    what = "line" if row.form == "line" else "row"
    if row.oversized:
        message = f"the {what} is longer than {MAX_ROW_BYTES >> 20} MiB; split the row or shorten it"
        raise RowRefused("line_too_long", message)
    if row.form == "rest":
        raise RowRefused("invalid_json", "the line continues after the end of the array of rows; put this row into it")
    try:
        return json.loads(row.text.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        message = f"byte {error.start + 1} of the {what} is not UTF-8; save it as UTF-8"
        raise RowRefused("invalid_utf8", message) from None
    except json.JSONDecodeError as error:
        place = f"{error.msg} at character {error.pos + 1}"
        hint = "put one JSON object on each line" if what == "line" else f"repair this {_NAMES[row.form]}"
        raise RowRefused("invalid_json", f"the {what} is not JSON: {place}; {hint}") from None
    except RecursionError:
        raise RowRefused("too_deep", f"the row nests deeper than {MAX_DEPTH} levels; flatten it") from None
    except ValueError:  # of int(), which refuses more than 4,300 digits
        raise RowRefused("not_json", "the row has an integer of too many digits; write it as a string") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return named_once(pairs)
    except NamedTwice as twice:
        message = f"an object of the row names the key {twice.name} twice; keep one of the two"
        raise RowRefused("invalid_json", message) from None


def _salvaged(text: bytes) -> Any:
    """What a text says that is no valid row, for its id: bytes that are not UTF-8 as lone surrogates, a key that is
    named twice not at all, no integers."""
    try:
        lenient = text.decode(errors="surrogateescape")
        return json.loads(lenient, object_pairs_hook=_unambiguous, parse_int=lambda digits: None)
    except (ValueError, RecursionError):
        return None


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    return {key: value for key, value in pairs if counts[key] == 1}
