"""What writers of an output directory share: a buffer that becomes durable in time, failed rows, one process only."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

from agd_vllm.output.storage import OutputDirectory, OutputFailed


class BufferedWriter(ABC):
    """Makes what it takes durable once there is enough of it or it is `seconds` old; `errors` are lines of JSON.

    Opening it mends what a dead process left. Not thread-safe; a flush blocks for as long as the disk takes.
    Raises OutputFailed, from every method, where the storage fails, or at once where another process holds `lock`.
    """

    def __init__(self, directory: str, lock: str, errors: str, seconds: float):
        self._output = OutputDirectory(directory)
        self._errors_name = errors
        self._errors: list[bytes] = []
        self._error_bytes = self._errors_end = 0
        self._seconds = seconds
        self._since: float | None = None
        self._lock = self._output.lock(lock)
        try:
            self._recover()
        except BaseException:
            self._release_lock()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failed write the same rows would only fail again, and hide the first fault.
        if kind and issubclass(kind, OutputFailed):
            self._release_lock()
        else:
            self.close()

    @abstractmethod
    def _recover(self) -> None:
        """Takes note of what earlier processes wrote, and mends what they left."""

    @abstractmethod
    def _full(self) -> bool:
        """Whether there is enough to flush."""

    @abstractmethod
    def _flush_rows(self) -> None:
        """Writes all that is buffered but the errors, and empties the buffer."""

    def flush_if_due(self) -> None:
        """Writes what is buffered if there is enough of it or it is old enough; for the caller's loop, now and then."""
        if self._full() or (self._since is not None and time.monotonic() - self._since >= self._seconds):
            self.flush()

    def flush(self) -> None:
        """Makes everything taken so far durable. Whatever fails stays buffered."""
        self._flush_rows()
        if self._errors:
            data = b"".join(self._errors)
            self._output.write_from(self._errors_name, self._errors_end, data)
            self._errors_end += len(data)
            self._errors, self._error_bytes = [], 0
        self._since = None

    def close(self) -> None:
        """Flushes, and lets another process write into the directory."""
        try:
            self.flush()
        finally:
            self._release_lock()

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

    def _recover_errors(self, take: Callable[[dict[str, Any]], object]) -> None:
        """Has `take` note the errors of earlier processes; a torn last line is overwritten by the next flush."""
        if self._errors_name in self._output.names():
            with self._output.open(self._errors_name) as file, self._output.faults(self._errors_name):
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._errors_end += len(line)
                    take(json.loads(line))

    def _remove_temporaries(self, *folders: str) -> None:
        for folder in folders:
            for name in self._output.names(folder.rstrip("/")):
                if name.startswith(".") and name.endswith(".tmp"):
                    self._output.remove(folder + name)

    def _release_lock(self) -> None:
        if self._lock:
            self._lock.close()
