"""The ways to choose a row's tokens, all on the same engine: greedy, AGD and its random control, contrasts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from agd_vllm.dola.arguments import engine_args as dola_engine_args
from agd_vllm.engine.arguments import OWN
from agd_vllm.engine.engine import CONTRAST_PROCESSOR, ENTROPY_PROCESSOR
from agd_vllm.engine.events import Finished
from agd_vllm.inline.arguments import PROCESSOR as INLINE_PROCESSOR
from agd_vllm.inline.arguments import cache_planes
from agd_vllm.inline.arguments import engine_args as inline_engine_args
from agd_vllm.inline.supported import check_arguments as check_inline_arguments
from agd_vllm.models.gpu_memory import KEYS_AND_VALUES
from agd_vllm.models.inspect import ModelInfo
from agd_vllm.pipeline.draws import Draws
from agd_vllm.pipeline.row_decoding import RowDecoding
from agd_vllm.records import Gate, GuidedStep, PreparedRow, Roi, RowRefused
from agd_vllm.steering.arguments import engine_args as steering_engine_args


class Strategy(ABC):
    """One object serves all rows of an engine. It is sent to the engine's actor."""

    name: ClassVar[str]
    # What the run needs: rows' regions, a special token to pause with, attribution workers.
    regions: ClassVar[bool] = True
    pauses: ClassVar[bool] = True
    attribution: ClassVar[bool] = False
    # Whether it chooses by the logits of the model itself, which are what attribution of a run explains.
    by_own_logits: ClassVar[bool] = True
    # Whether rows' regions are said again in their prompts.
    emphasized: ClassVar[bool] = False
    # Whether its rows are plain requests of an engine that attributes by itself.
    inline: ClassVar[bool] = False

    @property
    def processors(self) -> tuple[str, ...]:
        """The logits processors that the engine needs beside the gate."""
        return ()

    @property
    def kv_planes(self) -> int:
        """Vectors of each head that the engine's KV cache has for a token: keys and values."""
        return KEYS_AND_VALUES

    @property
    def steering_strength(self) -> float | None:
        """What the engine's vectors are multiplied with; None where it has none."""
        return None

    def engine_args(self, model: ModelInfo, dtype: str, given: dict[str, Any]) -> dict[str, Any]:
        """vLLM's engine arguments that it needs, beside the `given` ones.

        Raises ValueError, in one line, for a model, a dtype or arguments that it has no code for.
        """
        return {}

    @abstractmethod
    async def decode(self, decoding: RowDecoding) -> str:
        """Decodes a row to its end, filling in `decoding`; returns the finish reason. Raises as `decode_row`."""


@dataclass(frozen=True, slots=True)
class Greedy(Strategy):
    """The most probable token at every step; with `entropies` these are recorded, one a token."""

    entropies: bool = False
    name = "greedy"
    regions = False
    pauses = False

    @property
    def processors(self) -> tuple[str, ...]:
        return (ENTROPY_PROCESSOR,) if self.entropies else ()

    async def decode(self, decoding: RowDecoding) -> str:
        return await decoding.in_sessions(lambda: self._session(decoding))

    async def _session(self, decoding: RowDecoding) -> str:
        if not self.entropies:
            async with decoding.engine.session(decoding.row, False, decoding.stops) as session:
                return (await session.next()).reason
        if decoding.entropies is None:
            decoding.entropies = []
        tokens, entropies = decoding.stops.token_ids, decoding.entropies
        async with decoding.engine.session(decoding.row, False, decoding.stops, entropies=True) as session:
            try:
                return (await session.next()).reason
            finally:
                entropies += session.entropies(range(len(entropies), len(tokens)))


class Scores(Protocol):
    """What chooses among the candidates of a gate; an AttributionPool is one."""

    async def score(self, sequence: str, token_ids: list[int], roi: Roi, gate: Gate) -> list[float]: ...

    def prefill(self, sequence: str, token_ids: list[int], roi: Roi) -> None: ...

    def release(self, sequence: str) -> None: ...


class Gated(Strategy):
    """At gated steps the candidate of the highest score, elsewhere the greedy token (arXiv 2509.26307, algorithm 1).

    Rows without a region are decoded greedily.
    """

    @abstractmethod
    def scores(self, decoding: RowDecoding) -> Scores | None:
        """Who scores; None for nobody: the row is then decoded greedily."""

    async def decode(self, decoding: RowDecoding) -> str:
        scores, row = self.scores(decoding), decoding.row
        if scores is None or not row.roi:
            return await Greedy().decode(decoding)
        try:
            return await decoding.in_sessions(lambda: self._session(decoding, scores))
        finally:
            scores.release(row.id)

    async def _session(self, decoding: RowDecoding, scores: Scores) -> str:
        row, stops = decoding.row, decoding.stops
        async with decoding.engine.session(row, True, stops) as session:
            scores.prefill(row.id, row.prompt_token_ids, row.roi)
            event = await session.next()
            while not isinstance(event, Finished):
                with decoding.engine.occupancy.pause():
                    scored = await scores.score(row.id, row.prompt_token_ids + stops.token_ids, row.roi, event)
                step = GuidedStep.of(event, scored)
                if any(map(math.isnan, scored)):
                    decoding.faults.record("nan_scores", row=row.id, step=step.step)
                decoding.steps.append(step)
                event = session.select(step.chosen_id) or await session.next()
            return event.reason


@dataclass(frozen=True, slots=True)
class Agd(Gated):
    """The relevance of each candidate to the region, by the attribution workers (arXiv 2509.26307)."""

    name = "agd"
    attribution = True

    def scores(self, decoding: RowDecoding) -> Scores | None:
        return decoding.pool


AGD = Agd()


@dataclass(frozen=True, slots=True)
class InlineAgd(Strategy):
    """As Agd, with relevance and choice inside vLLM's own forward pass (`inline`): no row pauses."""

    rule: str
    tau: float
    top_k: int
    min_prob: float
    repetition_penalty: float = 1.0
    name = Agd.name
    pauses = False
    inline = True

    @property
    def processors(self) -> tuple[str, ...]:
        return (INLINE_PROCESSOR,)

    @property
    def kv_planes(self) -> int:
        return cache_planes(self.rule)

    def engine_args(self, model: ModelInfo, dtype: str, given: dict[str, Any]) -> dict[str, Any]:
        check_inline_arguments(dtype, given)
        source = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        args = inline_engine_args(model.path, self.rule, dtype, **source)
        return {key: value for key, value in args.items() if key not in OWN | source.keys()}

    async def decode(self, decoding: RowDecoding) -> str:
        if not decoding.row.roi:
            return await Greedy().decode(decoding)
        return await decoding.with_all_reports(lambda: self._request(decoding))

    async def _request(self, decoding: RowDecoding) -> str:
        from agd_vllm.inline.params import inline_params_of

        roi = decoding.row.roi
        gate = (self.rule, self.tau, self.top_k, self.min_prob, self.repetition_penalty)
        async with decoding.engine.request(
            decoding.row, decoding.stops, lambda key: inline_params_of(roi, key, *gate)
        ) as request:
            finished = await request.next()
            steps = await request.guided_steps()
        for step in steps:
            if any(map(math.isnan, step.scores)):
                decoding.faults.record("nan_scores", row=decoding.row.id, step=step.step)
        decoding.steps.extend(steps)
        return finished.reason


@dataclass(frozen=True, slots=True)
class RandomCandidate(Gated):
    """AGD's control: the same gate and candidates, a random choice among them."""

    seed: int = 0
    name = "random-candidate"

    def scores(self, decoding: RowDecoding) -> Scores | None:
        return Draws(self.seed)


@dataclass(frozen=True, slots=True)
class Cad(Strategy):
    """Context-aware decoding: argmax of (1 + alpha) * logits - alpha * logits without the region's tokens in the
    prompt, at every step (arXiv 2305.14739, eq. 2). Rows without a region are decoded greedily."""

    alpha: float = 0.5
    name = "cad"
    by_own_logits = False

    @property
    def processors(self) -> tuple[str, ...]:
        return (CONTRAST_PROCESSOR,)

    async def decode(self, decoding: RowDecoding) -> str:
        without = prompt_without_region(decoding.row)
        if len(without) == len(decoding.row.prompt_token_ids):
            return await Greedy().decode(decoding)
        if not without:
            raise RowRefused(
                "region_is_prompt",
                "the region is the whole prompt, so that nothing is left to contrast with; name a part of it as roi",
            )
        return await decoding.in_sessions(lambda: self._session(decoding, without))

    async def _session(self, decoding: RowDecoding, without: list[int]) -> str:
        async with decoding.engine.pair(decoding.row, without, self.alpha, decoding.stops) as pair:
            return (await pair.run()).reason


class Greedily(Strategy):
    """The most probable token of another model, or of another prompt."""

    regions = False
    pauses = False

    async def decode(self, decoding: RowDecoding) -> str:
        return await Greedy().decode(decoding)


@dataclass(frozen=True, slots=True)
class Dola(Greedily):
    """DoLa: the token that the last layer makes more probable than an earlier one does, which is chosen at each step
    among `layers`, of those that the last layer gives `relative_top` of the greatest probability (arXiv 2309.03883)."""

    layers: str = "low"
    relative_top: float = 0.1
    name = "dola"
    by_own_logits = False

    def engine_args(self, model: ModelInfo, dtype: str, given: dict[str, Any]) -> dict[str, Any]:
        return dola_engine_args(model, self.layers, self.relative_top, given)


@dataclass(frozen=True, slots=True)
class Steer(Greedily):
    """Greedy, with `strength` times the vectors of a `file` added to the streams of their layers; with `norm` a token's
    stream keeps its length (arXiv 2507.18043)."""

    file: str
    strength: float = 1.0
    norm: bool = True
    name = "steer"
    by_own_logits = False

    def engine_args(self, model: ModelInfo, dtype: str, given: dict[str, Any]) -> dict[str, Any]:
        return steering_engine_args(model, self.file, self.norm, given)

    @property
    def steering_strength(self) -> float | None:
        return self.strength


@dataclass(frozen=True, slots=True)
class Emphasize(Greedily):
    """Greedy, with the region said again at the end of the last user message: AGD's baseline without attribution."""

    name = "emphasize"
    emphasized = True


def prompt_without_region(row: PreparedRow) -> list[int]:
    """The prompt's tokens but for those of weighted spans."""
    region = {at for span in row.roi.spans if span.weight for at in range(span.start, span.end)}
    return [token_id for at, token_id in enumerate(row.prompt_token_ids) if at not in region]


STRATEGIES: dict[str, type[Strategy]] = {
    each.name: each for each in (Agd, Greedy, Cad, Dola, Steer, Emphasize, RandomCandidate)
}
