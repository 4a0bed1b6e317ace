"""Which process may write into a folder of an output directory: by a lock on a disk, by a lease elsewhere."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import psutil

from agd_vllm.output.lease import LEASE, Lease
from agd_vllm.output.storage import NoConditionalCreation, OutputDirectory, OutputFailed, is_temporary

log = logging.getLogger("agd_vllm")

LOCK = ".lock"
# Mounted so, a network file system keeps locks from other processes of this machine only.
LOCKS_OF_ONE_MACHINE = {"nolock", "local_lock=all", "local_lock=posix", "localflock", "localflocks"}


class Lock:
    """A lock, held by a file. It ends when it is released or with this process, however that dies.

    Raises OutputFailed where another process holds it, and OSError where the file system has no locks.
    """

    exclusive = True

    def __init__(self, output: OutputDirectory, name: str):
        path = output.path(name)
        with output.faults(""):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._file = open(path, "ab")  # noqa: SIM115 (held until it is closed)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if not isinstance(error, BlockingIOError | PermissionError):
                raise
            message = f"output {output.name}: another run is writing there; wait for it or stop it"
            raise OutputFailed(message) from None

    def check(self) -> None:
        """A lock cannot be taken."""

    confirm = check

    def release(self) -> None:
        self._file.close()


class Unclaimed:
    """Storage that can keep no second run away: nothing of what is there may be taken for a dead run's."""

    exclusive = False

    def check(self) -> None:
        """Nothing can be asked: other processes are not known."""

    confirm = release = check


Claim = Lock | Lease | Unclaimed


def claim(output: OutputDirectory, folder: str = "") -> Claim:
    """The right to write into a folder until it is released. Raises OutputFailed where another process has it."""
    if output.local and not _locks_of_one_machine(output.path(folder)):
        try:
            return Lock(output, f"{folder}/{LOCK}" if folder else LOCK)
        except OSError:
            pass  # some network file systems have no locks
    try:
        return Lease(output, folder)
    except NoConditionalCreation:
        _warn(output.name)
        return Unclaimed()


@contextmanager
def claimed(output: OutputDirectory) -> Iterator[Claim]:
    """A claim for the length of a block."""
    held = claim(output)
    try:
        yield held
    finally:
        held.release()


@cache  # once in a process
def _warn(name: str) -> None:
    log.warning(
        "output %s: this storage cannot keep a second run away; start one at a time (two at once overwrite nothing, "
        "and rows that both decode count once)",
        name,
    )


def is_of_a_claim(name: str) -> bool:
    """Whether a file is one that claims leave behind where a process dies."""
    return name == LOCK or name.startswith(LEASE) or is_temporary(name)


def _locks_of_one_machine(path: str) -> bool:
    path = os.path.realpath(path)
    mounts = [mount for mount in psutil.disk_partitions(all=True) if _is_under(path, mount.mountpoint)]
    innermost = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return innermost is not None and not LOCKS_OF_ONE_MACHINE.isdisjoint(innermost.opts.split(","))


def _is_under(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
