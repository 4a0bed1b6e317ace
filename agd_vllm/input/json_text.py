"""JSON text cut into rows before it is parsed: one to a line, or the elements of one array that is the file."""

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
_INSIDE_STRING = re.compile(rb'["\\]')


class ArrayNotClosed(Exception):
    """The text ends within its array."""


@dataclass(frozen=True, slots=True)
class RowText:
    """The text of a row, in bytes, and its first physical line, counted from 1. Of an `oversized` one only the head.

    `form`: a `line`, an `element` of an array, or the `rest` of the line on which an array ends.
    """

    line: int
    text: bytes
    oversized: bool
    form: Literal["line", "element", "rest"] = "line"


def row_texts(chunks: Iterator[bytes]) -> Iterator[RowText]:
    """Every row of a text: its lines, or where it begins with an array of objects that array's elements, up to its end.

    Memory is bounded by the longest row that is not oversized. Raises ArrayNotClosed.
    """
    line, head = _beginning(chunks, b"", 1)
    if not head.startswith(b"["):
        yield from _lines(itertools.chain([head], chunks), line)
        return
    second, inside = _beginning(chunks, head[1:], line)
    if inside[:1] not in (b"{", b"]"):
        yield from _lines(itertools.chain([b"[" + b"\n" * (second - line) + inside], chunks), line)
        return
    array = _Array(inside, chunks, second)
    told = False  # of the line or lines of the array
    for element in array.elements():
        told = True
        yield element
    form = "rest"
    for row in _lines(itertools.chain([array.rest()], chunks), array.line):
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


class _Array:
    """A text from behind the opening bracket of an array on: finds where each element ends without parsing it."""

    def __init__(self, head: bytes, chunks: Iterator[bytes], line: int):
        self._buffer = bytearray(head)
        self._chunks = chunks
        self._at = 0  # what lies before it has been passed
        self.line = line  # at that point

    def elements(self) -> Iterator[RowText]:
        while True:
            self._pass(_BETWEEN.match(self._buffer, self._at).end())
            if self._at == len(self._buffer):
                self._read_on()
            elif self._buffer[self._at] == ord("]"):
                self._pass(self._at + 1)
                return
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
            self._read_on()
        oversized = head is not None or end - self._at > MAX_ROW_BYTES
        text = head or self._copy(min(end, self._at + SHOWN_CHARACTERS) if oversized else end)
        self._pass(end)
        return RowText(line, text, oversized, "element")

    def _copy(self, end: int) -> bytes:
        with memoryview(self._buffer) as view:
            return bytes(view[self._at : end])

    def _pass(self, end: int) -> None:
        self.line += self._buffer.count(b"\n", self._at, end)
        self._at = end

    def _read_on(self) -> None:
        chunk = next(self._chunks, None)
        if chunk is None:
            raise ArrayNotClosed
        del self._buffer[: self._at]
        self._at = 0
        self._buffer += chunk


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
