"""What writers of an output directory share: a buffer that becomes durable in time, failed rows, one process only."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from typing import Any, Self

from agd_vllm.output.claim import claim
from agd_vllm.output.error_log import ErrorLog
from agd_vllm.output.storage import OutputDirectory, OutputFailed


class BufferedWriter(ABC):
    """Makes what it takes durable once there is enough of it or it is `seconds` old; `errors` are lines of JSON.

    Opening it claims `folder` and repairs what a dead process left there. Not thread-safe; a flush blocks for as long
    as the disk takes. Raises OutputFailed, from every method, where the storage fails or another process has the claim.
    """

    def __init__(self, directory: str, folder: str, errors: str, seconds: float):
        self._output = OutputDirectory(directory)
        self._writer = secrets.token_hex(4)
        self._errors: list[bytes] = []
        self._error_bytes = 0
        self._seconds = seconds
        self._since: float | None = None
        self._claim = claim(self._output, folder)
        self._error_log = ErrorLog(self._output, errors, self._writer, self._claim.exclusive)
        try:
            self._recover()
        except BaseException:
            self._claim.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failed write the same rows would only fail again, and hide the first fault.
        if kind and issubclass(kind, OutputFailed):
            self._claim.release()
        else:
            self.close()

    @abstractmethod
    def _recover(self) -> None:
        """Takes note of what earlier processes wrote, and repairs what they left."""

    @abstractmethod
    def _full(self) -> bool:
        """Whether there is enough to flush."""

    @abstractmethod
    def _flush_rows(self) -> None:
        """Writes all that is buffered but the errors, and empties the buffer."""

    def flush_if_due(self) -> None:
        """Writes what is buffered if there is enough of it or it is old enough; for the caller's loop, now and then."""
        self._claim.check()
        if self._full() or (self._since is not None and time.monotonic() - self._since >= self._seconds):
            self.flush()

    def flush(self) -> None:
        """Makes everything taken so far durable. Whatever fails stays buffered."""
        self._claim.confirm()
        self._flush_rows()
        if self._errors:
            self._error_log.write(b"".join(self._errors))
            self._errors, self._error_bytes = [], 0
        self._since = None

    def close(self) -> None:
        """Flushes, and releases the directory to other processes."""
        try:
            self.flush()
            self._error_log.merge()
        finally:
            self._claim.release()

    def _buffered(self) -> None:
        """To be called once something is in the buffer."""
        if self._since is None:
            self._since = time.monotonic()
        self.flush_if_due()

    def _buffer_error(self, record: dict[str, Any]) -> None:
        # Messages may quote names that are no Unicode; as JSON escapes they can be written.
        self._errors.append(json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._error_bytes += len(self._errors[-1])
        self._buffered()
