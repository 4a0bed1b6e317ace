"""The most probable token at every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agd_vllm.strategies.strategy import Penalized, option

if TYPE_CHECKING:
    from agd_vllm.strategies.row_decoding import RowDecoding


@dataclass(frozen=True, kw_only=True)
class Greedily(Penalized):
    """The most probable token, be it of another model or after another prompt."""

    regions = False

    @property
    def pauses(self) -> bool:
        return False

    async def decode(self, decoding: RowDecoding) -> str:
        return await decode_greedily(decoding, self.repetition_penalty)


@dataclass(frozen=True, kw_only=True)
class Greedy(Greedily):
    """The most probable token at every step; with `entropies` these are recorded, one a token."""

    entropies: bool = option(False, "Record the entropy of every token's distribution.", flag=False)
    name = "greedy"
    summary = "the most probable token at every step; regions are ignored"

    def checks(self) -> Iterator[tuple[bool, str]]:
        yield from super().checks()
        yield (
            self.repetition_penalty == 1 or not self.entropies,
            "repetition_penalty: entropies are recorded without one; leave it out",
        )

    @property
    def processors(self) -> tuple[str, ...]:
        from agd_vllm.engine.engine import ENTROPY_PROCESSOR

        return (ENTROPY_PROCESSOR,) if self.entropies else ()

    async def decode(self, decoding: RowDecoding) -> str:
        if not self.entropies:
            return await super().decode(decoding)
        return await decoding.in_sessions(lambda: self._recorded(decoding))

    async def _recorded(self, decoding: RowDecoding) -> str:
        if decoding.entropies is None:
            decoding.entropies = []
        tokens, entropies = decoding.stops.token_ids, decoding.entropies
        async with decoding.engine.session(decoding.row, decoding.stops, entropies=True) as session:
            try:
                return (await session.next()).reason
            finally:
                entropies += session.entropies(range(len(entropies), len(tokens)))


async def decode_greedily(decoding: RowDecoding, repetition_penalty: float = 1.0) -> str:
    """Decodes a row without guidance; returns the finish reason. Raises as `decode_row`."""

    async def session() -> str:
        engine = decoding.engine
        async with engine.session(decoding.row, decoding.stops, repetition_penalty=repetition_penalty) as session:
            return (await session.next()).reason

    return await decoding.in_sessions(session)
