"""How gated steps reach the engine actor from vLLM's worker process: one Unix datagram per engine step.

On a CPU a datagram is sent while sampling and arrives before its token does, which travels through two more processes.
On a GPU a thread sends it as soon as the decision has been copied: it may come a moment after the token.
Tokens that a contrast has chosen and recorded entropies take the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from agd_vllm.records import Gate, GuidedStep

# vLLM's processes inherit the actor's environment; a field of vLLM's config would change its compile-cache key.
SOCKET_VARIABLE = "AGD_VLLM_GATE_SOCKET"
MAX_DATAGRAM = 1 << 16
# Bytes at most: 23 for a candidate (id, probability and score), 32 for the rest of a report.
CANDIDATE_BYTES, REPORT_BYTES = 23, 32
MAX_TOP_K = 2000
# A report that is not here so long after its token will not come.
REPORT_S = 10.0

# Choices or entropies in a datagram: at most 24 bytes each.
NOTES_PER_DATAGRAM = 1000

# Set where a run is traced: the processor then reports every engine step, too.
TRACE_VARIABLE = "AGD_VLLM_TRACE"

T = TypeVar("T")
Report = tuple[int, int, float, list[int], list[float]]  # key, step, entropy, candidate ids, candidate probabilities
Guided = tuple[float, list[int], list[float], list[float]]  # entropy, candidate ids, their probabilities and scores
Sample = tuple[int, int, Guided | None]  # key, step, and how it was guided
Choice = tuple[int, int, int]  # key, step, token id
Entropy = tuple[int, int, float]  # key, step, entropy in nats


class EngineStep(msgspec.Struct, frozen=True):
    """One forward pass of vLLM's with the gate at its end: seconds since the epoch, durations, rows.

    On a GPU the durations are those until all is queued, and vLLM leaves out steps in which no row is gated.
    """

    begun: float
    seconds: float
    gate_seconds: float
    rows: int


class Datagram(msgspec.Struct):
    """What the engine's process sends at once, after a step."""

    reports: list[Report] = []
    step: EngineStep | None = None
    choices: list[Choice] = []
    entropies: list[Entropy] = []
    samples: list[Sample] = []
    failure: str | None = None


class GateSender:
    """The worker's end. Sending never raises: an exception in a logits processor kills the engine."""

    def __init__(self, path: str):
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def send(self, reports: list[Report], step: EngineStep | None = None) -> None:
        for fitting in _datagrams(reports, lambda report: len(report[3])):
            self._send(Datagram(fitting))
        if step is not None:
            self._send(Datagram(step=step))

    def send_samples(self, samples: list[Sample]) -> None:
        """Every sample of the rows that are followed, guided or not: nobody waits for them, and a lost one shows in the
        row's steps."""
        for fitting in _datagrams(samples, lambda sample: len(sample[2][1]) if sample[2] else 0):
            self._send(Datagram(samples=fitting))

    def send_choices(self, choices: list[Choice]) -> None:
        for start in range(0, len(choices), NOTES_PER_DATAGRAM):
            self._send(Datagram(choices=choices[start : start + NOTES_PER_DATAGRAM]))

    def send_entropies(self, entropies: list[Entropy]) -> None:
        for start in range(0, len(entropies), NOTES_PER_DATAGRAM):
            self._send(Datagram(entropies=entropies[start : start + NOTES_PER_DATAGRAM]))

    def send_failure(self, reason: str) -> None:
        self._send(Datagram(failure=reason))

    def _send(self, datagram: Datagram) -> None:
        # The receiver is gone only when its actor is; the engine then ends with it.
        with contextlib.suppress(OSError):
            self._socket.sendto(msgspec.msgpack.encode(datagram), self._path)


def _datagrams(reports: list[Any], candidates: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Reports, with so many `candidates` each, in as many as fit into a datagram."""
    fitting, size = [], 0
    for report in reports:
        more = REPORT_BYTES + CANDIDATE_BYTES * candidates(report)
        if fitting and size + more > MAX_DATAGRAM // 2:
            yield fitting
            fitting, size = [], 0
        fitting.append(report)
        size += more
    if fitting:
        yield fitting


class ReportsLost(Exception):
    """Not every sample of a row was reported: its guided steps are not all known."""


@dataclass(slots=True)
class _Followed:
    """A row's guided steps up to the `reported` one; `broken`: one before was never told of."""

    steps: list[GuidedStep] = field(default_factory=list)
    reported: int = 0
    broken: bool = False

    def take(self, step: int, guided: Guided | None) -> None:
        if step < self.reported:
            return  # computed again, or of a sample that vLLM threw away: what was reported first stands
        self.broken |= step > self.reported
        self.reported = step + 1
        if guided is not None:
            entropy, ids, probs, scores = guided
            self.steps.append(GuidedStep.of(Gate(step, entropy, tuple(ids), tuple(probs)), scores))


class GateReceiver:
    """The actor's end. Keeps the latest report of each expected key, the latest choice of each row's, and all entropies
    of some.

    The processor also reports rows of unfinished chunked prefills, whose sample vLLM discards: a report counts only
    when its row's PAUSE arrives, and is looked up by (key, step).
    """

    def __init__(self, on_step: Callable[[EngineStep], None]):
        self._on_step = on_step
        # What vLLM's process has last failed with.
        self.failure: str | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="agd-vllm-")
        self.path = str(Path(self._folder.name) / "gate")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)
        self._latest: dict[int, Gate | None] = {}
        self._choices: dict[int, tuple[int, int]] = {}
        self._entropies: dict[int, dict[int, float]] = {}
        self._followed: dict[int, _Followed] = {}
        self._awaited: dict[int, asyncio.Event] = {}
        self._decoder = msgspec.msgpack.Decoder(Datagram)
        os.environ[SOCKET_VARIABLE] = self.path

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> None:
        """Reads all that has arrived. Called by the event loop too, or a full queue would block vLLM's worker."""
        with contextlib.suppress(BlockingIOError):
            while True:
                datagram: Datagram = self._decoder.decode(self._socket.recv(MAX_DATAGRAM))
                for key, step, entropy, ids, probs in datagram.reports:
                    if key in self._latest:
                        self._latest[key] = Gate(step, entropy, tuple(ids), tuple(probs))
                    if key in self._awaited:
                        self._awaited[key].set()
                for key, step, token_id in datagram.choices:
                    self._choices[key] = (step, token_id)
                for key, step, entropy in datagram.entropies:
                    if key in self._entropies:
                        self._entropies[key][step] = entropy
                for key, step, guided in datagram.samples:
                    if key in self._followed:
                        self._followed[key].take(step, guided)
                    if key in self._awaited:
                        self._awaited[key].set()
                if datagram.step is not None:
                    self._on_step(datagram.step)
                if datagram.failure is not None:
                    self.failure = datagram.failure

    def expect(self, key: int) -> None:
        """Keeps reports of `key` until `forget`."""
        self._latest[key] = None

    async def take(self, key: int, step: int) -> Gate:
        """The report of `key` at output step `step`; waits if it is still on its way.

        Raises LookupError when there is none.
        """
        try:
            return await self._until(key, lambda: self._report(key, step))
        except TimeoutError as error:
            raise LookupError(f"no gate report for step {step} came within {REPORT_S:g} s") from error

    async def _until(self, key: int, ready: Callable[[], T | None]) -> T:
        """What `ready` gives as soon as it is not None; asked again whenever something of `key` has arrived.

        Raises TimeoutError after REPORT_S.
        """
        if (found := ready()) is not None:
            return found
        self.drain()
        arrived = self._awaited[key] = asyncio.Event()
        try:
            async with asyncio.timeout(REPORT_S):
                while (found := ready()) is None:
                    arrived.clear()
                    await arrived.wait()
        finally:
            del self._awaited[key]
        return found

    def _report(self, key: int, step: int) -> Gate | None:
        gate = self._latest.get(key)
        return gate if gate is not None and gate.step == step else None

    def take_choice(self, key: int, step: int) -> int:
        """The token that a contrast chose for row `key` at output step `step`. Raises LookupError without one."""
        self.drain()
        chosen = self._choices.pop(key, None)
        if chosen is None or chosen[0] != step:
            raise LookupError(f"no choice for step {step} (latest: {chosen[0] if chosen else None})")
        return chosen[1]

    def record_entropies(self, key: int) -> None:
        """Keeps every entropy of row `key` until `forget`."""
        self._entropies[key] = {}

    def entropies(self, key: int, steps: range) -> list[float]:
        """The entropies of row `key` at `steps`, nats. Raises LookupError where one is missing."""
        self.drain()
        return [self._entropies[key][step] for step in steps]

    def follow(self, key: int) -> None:
        """Keeps every guided step of row `key` until `forget`."""
        self._followed[key] = _Followed()

    def guided_steps(self, key: int, token_ids: list[int]) -> list[GuidedStep] | None:
        """The guided steps of row `key`, whose output is `token_ids`, in their order; None while reports are on their
        way. Raises ReportsLost."""
        followed = self._followed[key]
        if followed.broken:
            raise ReportsLost("a report was lost on its way")
        if followed.reported < len(token_ids):
            return None
        # Past a stop string vLLM may have decoded on.
        steps = [step for step in followed.steps if step.step < len(token_ids)]
        if any(step.chosen_id != token_ids[step.step] for step in steps):
            raise ReportsLost("reports and tokens do not belong together")
        return steps

    async def take_steps(self, key: int, token_ids: list[int]) -> list[GuidedStep]:
        """As `guided_steps`; waits for reports that are still on their way: they travel beside the tokens, by a thread
        and a socket of their own. Raises ReportsLost after REPORT_S, too."""
        try:
            return await self._until(key, lambda: self.guided_steps(key, token_ids))
        except TimeoutError as error:
            raise ReportsLost(f"no report of the last token came within {REPORT_S:g} s") from error

    def forget(self, key: int) -> None:
        for kept in (self._latest, self._choices, self._entropies, self._followed):
            kept.pop(key, None)

    def close(self) -> None:
        self._socket.close()
        self._folder.cleanup()
