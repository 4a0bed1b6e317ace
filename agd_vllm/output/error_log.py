"""Failed rows as lines of JSON: on a disk a file that grows, on object stores parts that the run's end merges."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from agd_vllm.input.reader import DUPLICATE_ID
from agd_vllm.output.parts import next_number, part_name, parts
from agd_vllm.output.storage import OutputDirectory

_CHUNK_BYTES = 1 << 20


class ErrorLog:
    """The lines of one file, `NAME.jsonl`, which this process writes.

    Object stores cannot append: there each write is a part, `NAME/part-*.jsonl`. `merge` adds parts to the file. Where
    another run may be writing (not `exclusive`) there are parts on disks, too, and they are never merged.
    Raises OutputFailed, from every method, where the storage fails.
    """

    def __init__(self, output: OutputDirectory, name: str, writer: str, exclusive: bool):
        self._output = output
        self._name = name
        self._writer = writer
        self._exclusive = exclusive
        self._end = self._next_part = 0

    def recover(self, take: Callable[[dict[str, Any]], object]) -> None:
        """Has `take` note the errors of earlier processes, and merges what these have left in parts.

        A torn last line, of a process that died, is not noted, and overwritten.
        """
        for line in _whole_lines(self._output, self._name):
            self._end += len(line)
            with self._output.faults(self._name):
                record = json.loads(line)
            take(record)
        for record in unmerged(self._output, self._name):
            take(record)
        self._next_part = next_number(parts(self._output, _folder(self._name), "jsonl"))
        if self._exclusive and self._output.local:
            self._output.append(self._name, self._end, b"")
        self.merge()

    def write(self, data: bytes) -> None:
        """Makes whole lines durable."""
        if self._exclusive and self._output.local:
            self._output.append(self._name, self._end, data)
            self._end += len(data)
        else:
            self._output.write(f"{_folder(self._name)}/{part_name(self._next_part, self._writer, 'jsonl')}", data)
            self._next_part += 1

    def merge(self) -> None:
        """Adds all parts to the file, which exists from then on."""
        if not self._exclusive:
            return
        names = _part_paths(self._output, self._name)
        there = self._name in self._output.names()
        if not there or (names and not _are_merged(self._output, self._name, names)):
            with self._output.create(self._name) as merged, self._output.faults(self._name):
                if there:
                    _copy(self._output, self._name, merged, self._end)
                for name in names:
                    self._end += _copy(self._output, name, merged)
        # In order, so that those left where this process dies are what the file ends with.
        for name in names:
            self._output.remove(name)


def unmerged(output: OutputDirectory, name: str) -> Iterator[dict[str, Any]]:
    """The errors that are in parts only, because their run still writes or was killed.

    An error that two runs at once recorded is given once.
    """
    names = _part_paths(output, name)
    if not names or _are_merged(output, name, names):
        return
    writers: dict[bytes, str] = {}
    for part in names:
        writer = part.rpartition("-")[2]
        for line in _whole_lines(output, part):
            with output.faults(part):
                record = json.loads(line)
            if writers.setdefault(_key(record), writer) == writer:
                yield record


def count_errors(output: OutputDirectory, name: str, decoded: Callable[[str], bool]) -> int:
    """How many rows failed. One that is `decoded`, by another run at the same time, did not."""
    count = 0
    if name in output.names():
        with output.open(name) as file, output.faults(name):
            while chunk := file.read(_CHUNK_BYTES):
                count += chunk.count(b"\n")
    return count + sum(not (has_own_id(record) and decoded(record["id"])) for record in unmerged(output, name))


def has_own_id(record: dict[str, Any]) -> bool:
    """Whether an error is known by its row's id: it has one, and repeats no other row's."""
    return record["id"] is not None and record["error"]["type"] != DUPLICATE_ID


def _key(record: dict[str, Any]) -> bytes:
    place = record["id"] if has_own_id(record) else [record.get(part) for part in ("file", "line", "input")]
    return hashlib.blake2b(json.dumps(place).encode(), digest_size=16).digest()


def _folder(name: str) -> str:
    return name.removesuffix(".jsonl")


def _part_paths(output: OutputDirectory, name: str) -> list[str]:
    return [f"{_folder(name)}/{part}" for part in parts(output, _folder(name), "jsonl")]


def _whole_lines(output: OutputDirectory, name: str) -> Iterator[bytes]:
    folder, _, base = name.rpartition("/")
    if base in output.names(folder):
        with output.open(name) as file, output.faults(name):
            for line in file:
                if line.endswith(b"\n"):
                    yield line


def _are_merged(output: OutputDirectory, name: str, names: list[str]) -> bool:
    """Whether the file ends with what these parts hold: a process died after it had merged, before they were gone."""
    if name not in output.names():
        return False
    with output.open(name) as file, output.faults(name):
        size = 0
        for part in names:
            with output.open(part) as whole:
                size += whole.seek(0, 2)
        if file.seek(0, 2) < size:
            return False
        file.seek(-size, 2)
        for part in names:
            with output.open(part) as whole:
                while chunk := whole.read(_CHUNK_BYTES):
                    if file.read(len(chunk)) != chunk:
                        return False
    return True


def _copy(output: OutputDirectory, name: str, to: BinaryIO, end: int | None = None) -> int:
    copied = 0
    with output.open(name) as file, output.faults(name):
        while chunk := file.read(_CHUNK_BYTES if end is None else min(_CHUNK_BYTES, end - copied)):
            to.write(chunk)
            copied += len(chunk)
    return copied
