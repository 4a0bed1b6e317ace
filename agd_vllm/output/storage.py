"""The output directory as storage: files under a local path or any fsspec URL, each written whole or not at all."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from agd_vllm.input.named_once import parse_json


class OutputFailed(Exception):
    """The output cannot be written or read back. One line; what was durable before is whole, and a resume goes on."""


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

    def parts(self, folder: str) -> dict[int, str]:
        """Part numbers of `results` or `steps`, ascending, with their names relative to the directory."""
        found = ((re.fullmatch(r"part-(\d+)\.parquet", name), name) for name in self.names(folder))
        return dict(sorted((int(match[1]), f"{folder}/{name}") for match, name in found if match))

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
        with self.faults(name):
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
        temporary = self.path(f"{folder}/.{base}.tmp" if folder else f".{base}.tmp")
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
            with suppress(Exception):  # the first fault is the one to tell of
                if file is not None:
                    file.close()
            with suppress(Exception):
                self._fs.rm_file(temporary)
            raise

    def write_from(self, name: str, offset: int, data: bytes) -> None:
        """Replaces all of a file from `offset` on, durably; what stood before it is kept whatever happens."""
        if not self.local:  # object stores cannot append
            kept = self._read(name)[:offset] if offset else b""
            return self.write(name, kept + data)
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

    def _read(self, name: str) -> bytes:
        with self.open(name) as file, self.faults(name):
            return file.read()

    def _sync(self, folder: str) -> None:
        """Makes a rename or a new file durable, which is a change of its folder."""
        descriptor = os.open(self.path(folder), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lock(self, name: str) -> BinaryIO | None:
        """Two runs at once would use the same part numbers. The lock, held by a file of this name, ends with this
        process, however it dies, or when what is returned is closed; None where the storage has no locks."""
        if not self.local:
            return None
        path = self.path(name)
        with self.faults(""):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            lock = open(path, "ab")  # noqa: SIM115 (held until it is closed)
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                lock.close()
                message = f"output {self.name}: another run is writing there; wait for it or stop it"
                raise OutputFailed(message) from None
            except OSError:
                pass  # some network file systems have no locks
            return lock

    @contextmanager
    def faults(self, name: str) -> Iterator[None]:
        """One line for any fault: every file system raises kinds of its own, hence Exception."""
        try:
            yield
        except OutputFailed:
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            where = f"{self.name.rstrip('/')}/{name}" if name else self.name
            raise OutputFailed(f"output {where}: {reason}; mend that and run the same command again") from error


def place_of_file(path: str) -> tuple[OutputDirectory, str]:
    """The folder of a file to write, given as a path or URL, and its name there. Raises ValueError for a folder."""
    name = path.rpartition("/")[2]
    # With its last slash: without it the root would be no folder, nor that of file:///.
    place = OutputDirectory(path[: len(path) - len(name)] or ".")
    if name in ("", ".", "..") or place.is_folder(name):
        raise ValueError(f"--output {path}: that is a folder; name a file")
    return place, name


def _in_memory(fs: AbstractFileSystem) -> bool:
    """Also behind a cache, or as a folder of another file system."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}
    inner = getattr(fs, "fs", None)
    return "memory" in protocols or (isinstance(inner, AbstractFileSystem) and _in_memory(inner))
