"""A lease on an output directory: one run at a time on storage without locks, also if the run dies without a word.

A lease is a small file that names its holder. Storage can create such a file only where there is none of its name, so
leases are numbered: the holder renews its lease by creating the next number and removes the number before. Another
run may create that next number only once the last lease is older, by the storage's clock, than the seconds it states.
Holder and other run want the same name then, and one of them gets it. No lease is ever overwritten.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from agd_vllm.output.storage import NoConditionalCreation, OutputDirectory, OutputFailed

LEASE = ".lease-"
EXPIRES_AFTER, RENEWED_EVERY = 120.0, 20.0  # seconds
# Of a start that finds other runs starting, renewing and ending at the same moments.
ATTEMPTS = 10


class Lease:
    """Holds the lease of a folder of an output directory, renewed by a thread, until it is released.

    Raises:
        OutputFailed: at once where another run holds it, later from `check` and `confirm` where another has taken it.
        NoConditionalCreation: where the storage cannot create a file on the condition that there is none.
    """

    exclusive = True

    def __init__(self, output: OutputDirectory, folder: str = ""):
        self._output = output
        self._folder = folder
        self._token = secrets.token_hex(8)
        self._taken: str | None = None
        self._renewing = threading.Lock()
        self._released = threading.Event()
        self._renewed = time.monotonic()
        self._number = self._take()
        threading.Thread(target=self._keep, daemon=True).start()

    def check(self) -> None:
        """Raises OutputFailed where a renewal has found the lease taken. Asks nothing of the storage."""
        if self._taken:
            raise OutputFailed(self._taken)

    def confirm(self) -> None:
        """To be called before anything is written. Renews the lease where the thread was late to."""
        self.check()
        if time.monotonic() - self._renewed > EXPIRES_AFTER / 2:
            self.renew()

    def renew(self) -> None:
        """Raises OutputFailed where another run has taken the lease, or the storage fails."""
        with self._renewing:
            self.check()
            begun = time.monotonic()
            # Who takes a lease removes it. Where that run has ended by now, the next number is free again.
            own, following = self._name(self._number), self._name(self._number + 1)
            held = self._is_own(own) and self._create(following)
            if held and not self._is_own(own):
                self._output.remove(following)
                held = False
            if not held:
                self._taken = (
                    f"output {self._output.name}: another run has taken it over from this one, whose lease had "
                    "expired, so this one stops; what it wrote is kept, and the same command resumes it"
                )
                self.check()
            self._number += 1
            self._renewed = begun
            self._output.remove(own)

    def release(self) -> None:
        """Removes the lease: another run may begin at once. A lease that cannot be removed expires."""
        self._released.set()
        with self._renewing, suppress(OutputFailed):
            for number in self._numbers():
                if self._is_own(self._name(number)):
                    self._output.remove(self._name(number))

    def _keep(self) -> None:
        while not self._released.wait(RENEWED_EVERY):
            # A fault of the storage may pass; if it stays, the next flush ends the run with it.
            with suppress(OutputFailed):
                self.renew()
            if self._taken:
                return

    def _take(self) -> int:
        for _ in range(ATTEMPTS):
            number = max(self._expired(), default=-1) + 1
            name = self._name(number)
            if not self._create(name):
                continue
            try:
                if self._create_again(name):
                    raise NoConditionalCreation
                # A run that took the expired lease since, and renewed its own, has left this number free.
                for other in self._expired(but=number):
                    self._output.remove(self._name(other))
            except BaseException:
                with suppress(OutputFailed):
                    self._output.remove(name)
                raise
            return number
        raise OutputFailed(f"output {self._output.name}: other runs begin there, too; start one of them")

    def _create(self, name: str) -> bool:
        """False where the lease of this name is another run's."""
        holder = {"host": socket.gethostname(), "process": os.getpid(), "expires_after": EXPIRES_AFTER}
        try:
            self._output.create_new(name, json.dumps(holder | {"token": self._token}).encode())
        except FileExistsError:
            # It is this run's where a client repeated a request that had been carried out.
            return self._is_own(name)
        return True

    def _is_own(self, name: str) -> bool:
        return _read(self._output.content(name) or b"").get("token") == self._token

    def _create_again(self, name: str) -> bool:
        """Whether the storage ignores the condition, as some stores do."""
        try:
            self._output.create_new(name, b"{}")
        except FileExistsError:
            return False
        return True

    def _expired(self, but: int | None = None) -> list[int]:
        """The numbers of all leases but this run's own. Raises OutputFailed where one of them has not expired."""
        for _ in range(ATTEMPTS):
            numbers = [number for number in self._numbers() if number != but]
            names = [self._name(number) for number in numbers]
            found = [(self._output.content(name), self._output.written_at(name)) for name in names]
            leases = [(content, written) for content, written in found if written is not None]
            # One that is gone was renewed or released since its name was read.
            if len(leases) == len(found):
                break
        else:
            raise OutputFailed(f"output {self._output.name}: another run is writing there; wait for it or stop it")
        if not leases:
            return []
        now = self._now()
        for content, written in leases:
            holder = _read(content or b"")
            seconds = holder.get("expires_after", EXPIRES_AFTER)
            left = (written - now).total_seconds() + seconds
            if left > 0:
                raise OutputFailed(
                    f"output {self._output.name}: another run is writing there (process {holder.get('process')} on "
                    f"{holder.get('host')}); wait for it or stop it. If it has died, its lease expires in "
                    f"{left:.0f} s, at {written + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S %Z}"
                )
        return numbers

    def _now(self) -> datetime:
        """The time on the storage's clock: this machine's may be wrong."""
        name = self._path(f".clock-{self._token}.tmp")
        self._output.create_new(name, b"")
        now = self._output.written_at(name)
        self._output.remove(name)
        if now is None:
            raise OutputFailed(f"output {self._output.name}: {name} is gone at once; run the same command again")
        return now

    def _numbers(self) -> list[int]:
        found = (re.fullmatch(re.escape(LEASE) + r"(\d+)", name) for name in self._output.names(self._folder))
        return sorted(int(match[1]) for match in found if match)

    def _name(self, number: int) -> str:
        # As long as each other: a listing in the order of names then meets a lease or the one that renewed it.
        return self._path(f"{LEASE}{number:010d}")

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name


def _read(content: bytes) -> dict[str, Any]:
    """What a lease states of its holder; nothing where it was read before that was written."""
    try:
        return dict(json.loads(content))
    except ValueError:
        return {}
