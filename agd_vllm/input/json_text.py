"""JSON text cut into rows before it is parsed: one to a line, the elements of arrays, or objects over several lines."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

MAX_ROW_BYTES = 64 << 20
SHOWN_CHARACTERS = 2000

_BETWEEN = re.compile(rb"[ \t\r\n,]*")
_AFTER_SCALAR = re.compile(rb"[ \t\r\n,\]]")
_OUTSIDE_STRING = re.compile(rb'["{}\[\]]')
# An object that begins on a line and goes on on the next one: with its first key, or with its end.
_OVER_LINES = re.compile(rb'\{[ \t]*\r?\n[ \t\r\n]*["}]')
_INSIDE_STRING = re.compile(rb'["\\]')


class ArrayNotClosed(Exception):
    """The text ends within its array."""


Form = Literal["line", "element", "value", "rest"]


@dataclass(frozen=True, slots=True)
class RowText:
    """The text of a row, in bytes, and its first physical line, counted from 1. Of an `oversized` one only the head.

    `form`: a `line`, an `element` of an array, a `value` among others, or the `rest` of the line on which an array
    ends.
    """

    line: int
    text: bytes
    oversized: bool
    form: Form = "line"


def row_texts(chunks: Iterator[bytes], line: int = 1) -> Iterator[RowText]:
    """Every row of a text that begins on this line: its lines; or the elements of the arrays of objects with which it
    begins, up to their end; or, where its first object goes on on the next line, its values, as jq writes them.

    Memory is bounded by the longest row that is not oversized. Raises ArrayNotClosed.
    """
    line, head = _beginning(chunks, b"", line)
    if not head.startswith(b"["):
        cut = _Values(head, chunks, line, "value").elements() if _OVER_LINES.match(head) else None
        yield from cut or _lines(itertools.chain([head], chunks), line)
        return
    second, inside = _beginning(chunks, head[1:], line)
    if inside[:1] not in (b"{", b"]"):
        yield from _lines(itertools.chain([b"[" + b"\n" * (second - line) + inside], chunks), line)
        return
    array = _Values(inside, chunks, second, "element")
    told = False  # of the line or lines of the array
    for element in array.elements():
        told = True
        yield element
    after, rest = _beginning(chunks, array.rest(), array.line)
    if rest.startswith(b"["):
        yield from row_texts(itertools.chain([rest], chunks), after)
        return
    form: Form = "rest" if after == array.line else "line"
    for row in _lines(itertools.chain([rest], chunks), after):
        if row.text.strip():
            if not told and form == "line":
                yield RowText(line, b"[]", False)  # no array of rows, but a line among others
            told = True
        yield RowText(row.line, row.text, row.oversized, form)
        form = "line"


def _beginning(chunks: Iterator[bytes], head: bytes, line: int) -> tuple[int, bytes]:
    """The first of `head` and the chunks that is not blank from where it is not, and the line that this is on."""
    for chunk in itertools.chain([head], chunks):
        begun = chunk.lstrip(b" \t\r\n")
        line += chunk.count(b"\n", 0, len(chunk) - len(begun))
        if begun:
            return line, begun
    return line, b""


def _lines(chunks: Iterator[bytes], number: int) -> Iterator[RowText]:
    """Physical lines, without the newline."""
    oversized = False
    head = bytearray()
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            line = b"" if oversized else bytes(head) + end
            if oversized or len(line) > MAX_ROW_BYTES:
                line, oversized = bytes(head[:SHOWN_CHARACTERS]), True
            yield RowText(number, line, oversized)
            number, oversized = number + 1, False
            head.clear()
        if not oversized:
            head += rest
        if len(head) > MAX_ROW_BYTES:
            oversized = True
            del head[SHOWN_CHARACTERS:]
    if head:
        yield RowText(number, bytes(head), oversized)


class _Values:
    """A text of values, each an `element` from behind the opening bracket of an array on, or a `value` among others:
    finds where each ends without parsing it."""

    def __init__(self, head: bytes, chunks: Iterator[bytes], line: int, form: Literal["element", "value"]):
        self._form = form
        self._buffer = bytearray(head)
        self._chunks = chunks
        self._at = 0  # what lies before it has been passed
        self.line = line  # at that point

    def elements(self) -> Iterator[RowText]:
        while True:
            between = _BETWEEN.match(self._buffer, self._at)
            assert between is not None  # it matches nothing, too
            self._pass(between.end())
            if self._at == len(self._buffer):
                if not self._read_on():
                    return
            elif self._buffer[self._at] == ord("]"):
                self._pass(self._at + 1)
                if self._form == "element":
                    return
                yield RowText(self.line, b"]", False, self._form)
            else:
                yield self._element()

    def rest(self) -> bytes:
        """What has been read beyond the array."""
        return bytes(self._buffer[self._at :])

    def _element(self) -> RowText:
        line, head = self.line, None
        ends = _Ends(self._buffer[self._at])
        where = self._at
        while (end := ends.find(self._buffer, where)) is None:
            if len(self._buffer) - self._at > MAX_ROW_BYTES:
                head = head or self._copy(self._at + SHOWN_CHARACTERS)
                self._pass(len(self._buffer))
            where = ends.reached - self._at  # from here on the buffer begins with what has not been passed
            if not self._read_on():
                end = len(self._buffer)
                break
        oversized = head is not None or end - self._at > MAX_ROW_BYTES
        text = head or self._copy(min(end, self._at + SHOWN_CHARACTERS) if oversized else end)
        self._pass(end)
        return RowText(line, text, oversized, self._form)

    def _copy(self, end: int) -> bytes:
        with memoryview(self._buffer) as view:
            return bytes(view[self._at : end])

    def _pass(self, end: int) -> None:
        self.line += self._buffer.count(b"\n", self._at, end)
        self._at = end

    def _read_on(self) -> bool:
        """False where the text ends. Raises ArrayNotClosed where it may not."""
        chunk = next(self._chunks, None)
        if chunk is None:
            if self._form == "element":
                raise ArrayNotClosed
            return False
        del self._buffer[: self._at]
        self._at = 0
        self._buffer += chunk
        return True


class _Ends:
    """Where an element ends that begins with the byte `first`, searched for piece by piece."""

    def __init__(self, first: int):
        self._scalar = first not in b'{["'
        self._depth = 0
        self._in_string = False
        self.reached = 0

    def find(self, buffer: bytearray, at: int) -> int | None:
        """The end of the element, searched for from `at` on; None if it lies beyond the buffer, up to `reached`."""
        if self._scalar:
            found = _AFTER_SCALAR.search(buffer, at)
            self.reached = len(buffer)
            return found and found.start()
        while found := (_INSIDE_STRING if self._in_string else _OUTSIDE_STRING).search(buffer, at):
            at, mark = found.end(), found[0]
            if mark == b"\\":
                at += 1  # whatever it is, it ends no string
            elif mark == b'"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if mark in b"{[" else -1
            if self._depth <= 0 and not self._in_string:
                return at
        self.reached = max(at, len(buffer))
        return None
