"""Activation steering (arXiv 2507.18043)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agd_vllm.strategies.greedy import Greedily
from agd_vllm.strategies.strategy import option

if TYPE_CHECKING:
    from agd_vllm.models.inspect import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Steer(Greedily):
    """Greedy, with `steering_strength` times the vectors of the file `steering` added to the streams of their layers;
    with `steering_norm` a token's stream keeps its length."""

    steering: str | None = option(
        None,
        "Vectors by layer, which `agd-vllm vectors` makes; a local file or any fsspec URL.",
        metavar="FILE",
    )
    steering_strength: float = option(
        1.0, "How often the vector is added; 0 is greedy, below 0 away from the preferred answers."
    )
    steering_norm: bool = option(True, "Whether each token's stream keeps its length.")
    name = "steer"
    summary = (
        "the most probable token of a model whose streams have a vector added (--steering), at every step; regions are "
        "ignored (arXiv 2507.18043)"
    )
    by_own_logits = False

    def checks(self) -> Iterator[tuple[bool, str]]:
        yield from super().checks()
        yield (
            self.steering is not None and self.steering != "",
            "steering is missing; name a file of vectors for strategy steer (`agd-vllm vectors` makes one)",
        )

    @property
    def file(self) -> str:
        """The file of vectors, which `checks` requires."""
        return self.steering or ""

    def identity(self) -> dict[str, Any]:
        from agd_vllm.input.fingerprint import fingerprint

        # Files may change under their names.
        return {**super().identity(), "steering": fingerprint(self.file)}

    def described(self) -> dict[str, Any]:
        from agd_vllm.steering.vector_file import read_vectors

        return {"steering_layers": [*read_vectors(self.file).layers]}

    def engine_args(self, model: ModelInfo, dtype: str, given: dict[str, Any]) -> dict[str, Any]:
        from agd_vllm.steering.arguments import engine_args

        return engine_args(model, self.file, self.steering_norm, given)

    @property
    def strength(self) -> float | None:
        return self.steering_strength
