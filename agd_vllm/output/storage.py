"""The output directory as storage: files under a local path or any fsspec URL, each written whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from agd_vllm.input.named_once import parse_json

# What a store answers where it has no conditional requests; a client without them takes no such argument.
_NOT_IMPLEMENTED = (errno.ENOSYS, errno.EOPNOTSUPP)
# S3's codes for a condition that is not met. The last one: another process is creating the same object right now.
_CONDITION_NOT_MET = ("PreconditionFailed", "412", "ConditionalRequestConflict")


class NoConditionalCreation(Exception):
    """The storage cannot create a file on the condition that there is none of its name."""


class OutputFailed(Exception):
    """The output cannot be written or read back. One line; what was durable before is whole, and a resume continues."""


class OutputDirectory:
    """Files under a local path or any fsspec URL, each written whole or not at all.

    Raises:
        ValueError: for storage that ends with this process.
        OutputFailed: from every method, for whatever fault the storage has.
    """

    def __init__(self, directory: str):
        self.name = directory
        with self.faults(""):
            self._fs, self._root = fsspec.url_to_fs(directory)
        if _in_memory(self._fs):
            raise ValueError(f"output {directory}: what is in memory is gone with this process; give a folder or a URL")
        self.local = isinstance(self._fs, LocalFileSystem)
        # Processes that write a file of one name at once must not write into each other's temporary file.
        self._token = secrets.token_hex(4)

    def path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in a folder, hidden ones too; none where there is no such folder."""
        with self.faults(folder):
            self._fs.invalidate_cache()
            try:
                return sorted(os.path.basename(path) for path in self._fs.ls(self.path(folder), detail=False))
            except FileNotFoundError:
                return []

    def is_file(self) -> bool:
        with self.faults(""):
            return self._fs.isfile(self._root)

    def is_folder(self, name: str) -> bool:
        with self.faults(name):
            return self._fs.isdir(self.path(name))

    def make_folder(self, name: str) -> None:
        with self.faults(name):
            self._fs.makedirs(self.path(name), exist_ok=True)
            if self.local:
                self._sync("")

    def open(self, name: str) -> BinaryIO:
        with self.faults(name):
            return self._fs.open(self.path(name), "rb")

    def read_json(self, name: str) -> Any:
        with self.open(name) as file, self.faults(name):
            return parse_json(file.read())

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        with self.open(name) as file, self.faults(name):
            return pq.read_table(file, columns=columns)

    def remove(self, name: str) -> None:
        """Removes a file; nothing is done where there is none."""
        with self.faults(name), suppress(FileNotFoundError):
            self._fs.rm_file(self.path(name))

    def rename(self, name: str, new: str) -> None:
        with self.faults(name):
            self._fs.mv(self.path(name), self.path(new))

    def write(self, name: str, data: bytes) -> None:
        """Puts a file into place at once and, on a local disk, durably."""
        with self.create(name) as file, self.faults(name):
            file.write(data)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def write_table(self, name: str, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.write(name, buffer.getvalue())

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A file to write to, put into place at once where the block ends well. A temporary name beside it is hidden.

        What the block raises is passed on as it is: its writes want `faults` of their own.
        """
        folder, _, base = name.rpartition("/")
        temporary = self.path(f"{folder}/.{base}.{self._token}.tmp" if folder else f".{base}.{self._token}.tmp")
        with self.faults(name):
            self._fs.makedirs(self.path(folder), exist_ok=True)  # object stores drop empty folders
        file = None
        try:
            with self.faults(name):
                file = self._fs.open(temporary, "wb")
            yield file
            with self.faults(name):
                if self.local:
                    file.flush()
                    os.fsync(file.fileno())
                file.close()
                if self.local:
                    os.replace(temporary, self.path(name))
                    self._sync(folder)
                else:
                    self._fs.mv(temporary, self.path(name))
        except BaseException:
            with suppress(Exception):  # the first fault is the one to report
                if file is not None:
                    file.close()
            with suppress(Exception):
                self._fs.rm_file(temporary)
            raise

    def create_new(self, name: str, data: bytes) -> None:
        """Creates a small file in one step, so that of processes that try it at once only one succeeds.

        Raises:
            FileExistsError: where there is a file of this name.
            NoConditionalCreation: where the storage has no such operation.
        """
        path = self.path(name)
        with self.faults(name, FileExistsError, NoConditionalCreation):
            self._fs.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                if self.local:
                    with open(path, "xb", buffering=0) as file:
                        file.write(data)
                elif _creates_in_one_step(self._fs):
                    self._fs.pipe_file(path, data, mode="create")
                else:
                    raise NoConditionalCreation
            except Exception as error:
                if meaning := _why_not_created(error):
                    raise meaning from error
                raise

    def content(self, name: str) -> bytes | None:
        """A small file's content; None where there is no such file."""
        with self.faults(name), suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            return self._fs.cat_file(self.path(name))
        return None

    def written_at(self, name: str) -> datetime | None:
        """When a file was written, by the storage's clock; None where there is no such file."""
        with self.faults(name), suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            return self._fs.modified(self.path(name))
        return None

    def remove_temporaries(self, folder: str = "") -> None:
        """Removes what processes that died left half written. For the one process that may write there."""
        for name in self.names(folder):
            if is_temporary(name):
                self.remove(f"{folder}/{name}" if folder else name)

    def append(self, name: str, offset: int, data: bytes) -> None:
        """Replaces all of a local file from `offset` on, durably; what is before it is kept whatever happens."""
        # Unbuffered: closing a file must not try again to write what has just failed.
        with self.faults(name), open(self.path(name), "ab", buffering=0) as file:
            file.truncate(offset)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):  # the next try begins with it, too
                    file.truncate(offset)
                raise
            if not offset:
                self._sync("")

    def _sync(self, folder: str) -> None:
        """Makes a rename or a new file durable, which is a change of its folder."""
        descriptor = os.open(self.path(folder), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def faults(self, name: str, *passed: type[Exception]) -> Iterator[None]:
        """One line for any fault but those `passed` on: every file system raises kinds of its own, hence Exception."""
        try:
            yield
        except Exception as error:
            if isinstance(error, (OutputFailed, *passed)):
                raise
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            where = f"{self.name.rstrip('/')}/{name}" if name else self.name
            raise OutputFailed(f"output {where}: {reason}; fix that and run the same command again") from error


def place_of_file(path: str) -> tuple[OutputDirectory, str]:
    """The folder of a file to write, given as a path or URL, and its name there. Raises ValueError for a folder."""
    name = path.rpartition("/")[2]
    # With its last slash: without it the root would be no folder, nor that of file:///.
    place = OutputDirectory(path[: len(path) - len(name)] or ".")
    if name in ("", ".", "..") or place.is_folder(name):
        raise ValueError(f"--output {path}: that is a folder; name a file")
    return place, name


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that is not finished."""
    return name.startswith(".") and name.endswith(".tmp")


def _why_not_created(error: Exception) -> Exception | None:
    """What a fault in creating a new file means, where it is none of the storage's own."""
    # Other stores than Amazon's do not name the condition in their answer, by which s3fs recognises it.
    answer = getattr(error.__cause__, "response", None) or {}
    if answer.get("Error", {}).get("Code") in _CONDITION_NOT_MET:
        return FileExistsError(str(error))
    if isinstance(error, NotImplementedError | TypeError) or getattr(error, "errno", None) in _NOT_IMPLEMENTED:
        return NoConditionalCreation()
    return None


def _creates_in_one_step(fs: AbstractFileSystem) -> bool:
    """fsspec's own method, for file systems that have none, looks first and writes then."""
    inner = getattr(fs, "fs", None)
    if isinstance(inner, AbstractFileSystem):
        return _creates_in_one_step(inner)
    return getattr(fs.pipe_file, "__func__", None) is not AbstractFileSystem.pipe_file


def _in_memory(fs: AbstractFileSystem) -> bool:
    """Also behind a cache, or as a folder of another file system."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}
    inner = getattr(fs, "fs", None)
    return "memory" in protocols or (isinstance(inner, AbstractFileSystem) and _in_memory(inner))
