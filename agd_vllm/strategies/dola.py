"""DoLa: decoding by contrasting layers (arXiv 2309.03883)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agd_vllm.dola.layers import names_layers
from agd_vllm.strategies.greedy import Greedily
from agd_vllm.strategies.strategy import option

if TYPE_CHECKING:
    from agd_vllm.models.inspect import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Dola(Greedily):
    """The token that the last layer makes more probable than an earlier one does, which is chosen at each step among
    `dola_layers`, of those that the last layer gives `dola_relative_top` of the greatest probability."""

    dola_layers: str = option(
        "low",
        "The layers to contrast with: every other one of the lower or upper half, or by number (0: the embeddings).",
        metavar="low|high|I,J,...",
    )
    dola_relative_top: float = option(0.1, "Only tokens with this share of the greatest probability; 1 is greedy.")
    name = "dola"
    summary = (
        "the token that the last layer makes more probable than an earlier layer (--dola-layers), at every step; "
        "regions are ignored (arXiv 2309.03883)"
    )
    by_own_logits = False

    def checks(self) -> Iterator[tuple[bool, str]]:
        yield from super().checks()
        yield 0 <= self.dola_relative_top <= 1, f"dola_relative_top {self.dola_relative_top}: must lie between 0 and 1"
        yield (
            names_layers(self.dola_layers),
            f"dola_layers {self.dola_layers!r}: low, high, or numbers of layers such as 2,4,6",
        )

    def engine_args(self, model: ModelInfo, dtype: str, given: dict[str, Any]) -> dict[str, Any]:
        from agd_vllm.dola.arguments import engine_args

        return engine_args(model, self.dola_layers, self.dola_relative_top, given)
