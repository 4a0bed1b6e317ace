"""Input files as bytes: from any fsspec URL, unpacked. What a file is, its first bytes say, whatever its name says."""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa

CHUNK_BYTES = 1 << 20
HEAD_BYTES = 4096

PARQUET = "Parquet"
_MAGIC = (
    (re.compile(rb"PAR1"), PARQUET),
    (re.compile(rb"\x1f\x8b"), "gzip"),
    (re.compile(rb"BZh[1-9]"), "bz2"),
    (re.compile(rb"\xfd7zXZ\x00"), "xz"),
    # Properties, a dictionary's size, and the length of what is packed, if it is known: xz's forerunner has no magic.
    (re.compile(rb"\x5d\x00\x00..(\xff{8}|.{5}\x00{3})", re.DOTALL), "lzma"),
    # A frame, or a skippable one, with which parallel compressors begin.
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL), "zstd"),
)
_BOM = b"\xef\xbb\xbf"
_UTF16 = re.compile(rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff|[^\x00]\x00[^\x00]?\x00|\x00[^\x00]\x00[^\x00]", re.DOTALL)
# The first line of a table: names, one of them the row's id.
_TABLE = re.compile(rb"""(?:["\w. -]+[,;\t])*"?(?:custom_)?id"?(?:[,;\t]["\w. -]+)+\r?\n|"?(?:custom_)?id"?[,;\t]""")
_TABLE_NAME = re.compile(r"\.(csv|tsv)$", re.IGNORECASE)
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1f]")
# Names by which a file says that it is more than text.
_PACKED_NAME = re.compile(r"\.(gz|gzip|bz2|xz|lzma|zst|zstd|parquet)$", re.IGNORECASE)


class InputUnusable(Exception):
    """An input that cannot be read, or not to its end. The message is one line: which, why, how to mend it."""


@dataclass(frozen=True, slots=True)
class OpenInput:
    """An input that is either a Parquet file, to seek in, or text, unpacked, as chunks without a byte order mark."""

    parquet: BinaryIO | None
    text: Iterator[bytes]


@contextmanager
def open_input(source: str) -> Iterator[OpenInput]:
    """Opens a path or URL.

    Raises:
        InputUnusable: at once for an input that is missing, a directory, or binary of another kind than Parquet and
            the packings of _MAGIC; while it is read, where it breaks off.
    """
    with unusable(source):
        fs, path = fsspec.url_to_fs(source)
        file = fs.open(path, "rb")
    try:
        kind = _kind(_head(file, source))
        with unusable(source):
            try:
                file.seek(0)
            except Exception:  # a stream that cannot go back
                file.close()
                file = fs.open(path, "rb")
        if kind == PARQUET:
            yield OpenInput(file, iter(()))
            return
        with unusable(source):
            unpacked = _UNPACKED[kind](file) if kind else file
        head = _head(unpacked, source)
        _check_text(source, head, kind)
        yield OpenInput(None, _chunks(head.removeprefix(_BOM), unpacked, source))
    finally:
        file.close()


def _kind(head: bytes) -> str | None:
    return next((kind for magic, kind in _MAGIC if magic.match(head)), None)


def _head(file: BinaryIO, source: str) -> bytes:
    head = b""
    while len(head) < HEAD_BYTES and (chunk := _read(file, source, HEAD_BYTES - len(head))):
        head += chunk
    return head


def _chunks(head: bytes, file: BinaryIO, source: str) -> Iterator[bytes]:
    if head:
        yield head
    while chunk := _read(file, source, CHUNK_BYTES):
        yield chunk


def _read(file: BinaryIO, source: str, size: int) -> bytes:
    with unusable(source):
        return file.read(size)


def _check_text(source: str, head: bytes, kind: str | None) -> None:
    """Raises InputUnusable for what is no text in UTF-8 at its very beginning, or not what its name promises."""
    if not head:
        return
    within = f" within {kind}" if kind else ""
    if _UTF16.match(head):
        raise InputUnusable(f"input {source} is UTF-16 or UTF-32{within}; save it as UTF-8")
    start = head.removeprefix(_BOM).lstrip()
    if start[:1] in (b"{", b"[", b""):
        return
    if _TABLE.match(start) or _TABLE_NAME.search(_path(source)):
        raise InputUnusable(
            f'input {source} is a table (CSV); convert it to Parquet: python -c "import pyarrow.csv as c, '
            f"pyarrow.parquet as p; p.write_table(c.read_csv('{source}'), 'rows.parquet')\""
        )
    promised = kind is None and _PACKED_NAME.search(_path(source))
    if promised or _kind(head) or b"\0" in head or (_CONTROL.search(head) and not _is_utf8(head)):
        raise InputUnusable(
            f"input {source} is neither JSON nor Parquet, nor JSON packed with gz, bz2, xz, lzma or zst: it begins "
            f"with {head[:4].hex(' ')}{within}; convert or unpack it"
        )


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return len(head) == HEAD_BYTES and error.start > HEAD_BYTES - 4  # a character that is cut off
    return True


class _Xz:
    """The streams of an xz or lzma file one after another. Python's own reader passes over what follows a damaged
    header."""

    def __init__(self, file: BinaryIO, form: int = lzma.FORMAT_XZ):
        self._file = file
        self._form = form
        self._decompressor: lzma.LZMADecompressor | None = None
        self._rest = b""

    def read(self, size: int) -> bytes:
        data = b""
        while not data:
            decompressor = self._decompressor or self._begin()
            if decompressor is None:
                return b""
            if not self._rest and decompressor.needs_input:
                self._rest = self._file.read(CHUNK_BYTES)
                if not self._rest:
                    raise EOFError("truncated xz stream")
            data = decompressor.decompress(self._rest, size)
            self._rest = b""
            if decompressor.eof:
                self._rest, self._decompressor = decompressor.unused_data, None
        return data

    def _begin(self) -> lzma.LZMADecompressor | None:
        """The next stream, after the padding that may stand between two; None where there is none."""
        while not (rest := self._rest.lstrip(b"\0")):
            self._rest = self._file.read(CHUNK_BYTES)
            if not self._rest:
                return None
        self._rest, self._decompressor = rest, lzma.LZMADecompressor(self._form)
        return self._decompressor


# Arrow's readers notice a truncated stream and read several frames as one.
_UNPACKED: dict[str, Callable[[BinaryIO], Any]] = {
    codec: partial(pa.CompressedInputStream, compression=codec) for codec in ("gzip", "bz2", "zstd")
}
_UNPACKED |= {"xz": _Xz, "lzma": partial(_Xz, form=lzma.FORMAT_ALONE)}


# Faults


@contextmanager
def unusable(source: str) -> Iterator[None]:
    """Turns any fault of a file into one line. Every file system and codec raises kinds of its own, hence Exception."""
    try:
        yield
    except InputUnusable:
        raise
    except FileNotFoundError as error:
        # fsspec says so of every fault of a server, and keeps the true one as its cause.
        cause = error.__cause__
        if cause is not None and getattr(cause, "status", None) not in (404, 410):
            message = f"input {source} cannot be reached: {reason(cause)}; check the address, and that it can be read"
            raise InputUnusable(message) from error
        raise InputUnusable(f"input {source} does not exist; check the path") from None
    except IsADirectoryError:
        raise InputUnusable(f"input {source} is a directory; name the files in it") from None
    except Exception as error:
        raise InputUnusable(f"input {source} cannot be read: {reason(error)}; repair or replace it") from error


def reason(error: BaseException) -> str:
    """The words of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _path(source: str) -> str:
    """The part of a path or URL that has the suffixes: presigned URLs go on after a question mark."""
    return source.split("?")[0] if "://" in source else source
