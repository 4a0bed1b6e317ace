"""Context-aware decoding (arXiv 2305.14739)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agd_vllm.records import PreparedRow, RowRefused
from agd_vllm.strategies.greedy import decode_greedily
from agd_vllm.strategies.strategy import Penalized, option

if TYPE_CHECKING:
    from agd_vllm.strategies.row_decoding import RowDecoding


@dataclass(frozen=True, kw_only=True)
class Cad(Penalized):
    """argmax of (1 + alpha) * logits - alpha * logits without the region's tokens in the prompt, at every step
    (arXiv 2305.14739, eq. 2). Rows without a region are decoded greedily."""

    cad_alpha: float = option(0.5, "(1 + alpha) * logits with the region - alpha * logits without; 0 is greedy.")
    name = "cad"
    summary = (
        "the token that the region makes more probable than the same prompt without it (--cad-alpha), at every step "
        "(arXiv 2305.14739)"
    )
    by_own_logits = False

    def checks(self) -> Iterator[tuple[bool, str]]:
        yield from super().checks()
        yield self.cad_alpha >= 0, f"cad_alpha {self.cad_alpha}: must be a finite number, 0 or more"

    @property
    def processors(self) -> tuple[str, ...]:
        from agd_vllm.engine.engine import CONTRAST_PROCESSOR

        return (CONTRAST_PROCESSOR,)

    def passes(self, tokens: int, scored: int) -> float | None:
        return 2.0

    async def decode(self, decoding: RowDecoding) -> str:
        without = prompt_without_region(decoding.row)
        if len(without) == len(decoding.row.prompt_token_ids):
            return await decode_greedily(decoding, self.repetition_penalty)
        if not without:
            raise RowRefused(
                "region_is_prompt",
                "the region is the whole prompt, so that nothing is left to contrast with; name a part of it as roi",
            )
        return await decoding.in_sessions(lambda: self._session(decoding, without))

    async def _session(self, decoding: RowDecoding, without: list[int]) -> str:
        given = (decoding.row, without, self.cad_alpha, decoding.stops, self.repetition_penalty)
        async with decoding.engine.pair(*given) as pair:
            return (await pair.run()).reason


def prompt_without_region(row: PreparedRow) -> list[int]:
    """The prompt's tokens but for those of weighted spans."""
    region = {at for span in row.roi.spans if span.weight for at in range(span.start, span.end)}
    return [token_id for at, token_id in enumerate(row.prompt_token_ids) if at not in region]
