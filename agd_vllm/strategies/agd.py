"""Attribution-guided decoding (arXiv 2509.26307): candidates scored by attribution workers, or inline by the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agd_vllm.attribution.scorer import RULES
from agd_vllm.attribution.scorer import SCORERS as WORKER_SCORERS
from agd_vllm.attribution.worker import AttributionSettings
from agd_vllm.strategies.gated import CandidateScorer, Gated, record_nan
from agd_vllm.strategies.greedy import decode_greedily
from agd_vllm.strategies.strategy import DTYPES, Penalized, option

if TYPE_CHECKING:
    from agd_vllm.models.inspect import ModelInfo
    from agd_vllm.strategies.row_decoding import RowDecoding

INLINE = "inline"


@dataclass(frozen=True, kw_only=True)
class Agd(Gated, Penalized):
    """The candidate of the highest relevance to the region. With scorer inline relevance and choice are inside vLLM's
    own forward pass: no row pauses, and there are no workers."""

    scorer: str = option(
        "forward",
        "forward: forward-mode AttnLRP on attribution workers; inline: the same inside vLLM's own forward pass, "
        "without workers and pauses; lxt: the reference, in reverse mode.",
        choices=(*WORKER_SCORERS, INLINE),
    )
    rule: str = option("attnlrp", "Attribution rule.", choices=RULES)
    attribution_dtype: str | None = option(None, "[default: as --dtype]", choices=DTYPES)
    name = "agd"
    summary = (
        "where the next token is uncertain (--tau), the candidate that the region supports most (arXiv 2509.26307); "
        "the most probable token elsewhere"
    )

    def checks(self) -> Iterator[tuple[bool, str]]:
        yield from super().checks()
        # The gate of a session that pauses would see logits before vLLM's penalty.
        yield (
            self.repetition_penalty == 1 or self.inline,
            "repetition_penalty: strategy agd has none with attribution workers; leave it out, or take scorer inline",
        )

    def check_run(self, dtype: str, attribution_workers: int | None) -> None:
        if not self.inline:
            return
        if attribution_workers is not None:
            raise ValueError("attribution_workers: scorer inline has none; leave it out, or take scorer forward")
        if self.attribution_dtype not in (None, dtype):
            raise ValueError(
                f"attribution_dtype {self.attribution_dtype!r}: scorer inline attributes in the engine's dtype; leave "
                "it out, or take scorer forward"
            )

    @property
    def layout(self) -> str:
        return f"; scorer {self.scorer}"

    @property
    def inline(self) -> bool:
        return self.scorer == INLINE

    @property
    def pauses(self) -> bool:
        return not self.inline

    def attribution(self, dtype: str, max_model_len: int | None) -> AttributionSettings | None:
        if self.inline:
            return None
        return AttributionSettings(self.scorer, self.rule, self.attribution_dtype or dtype, max_model_len=max_model_len)

    @property
    def processors(self) -> tuple[str, ...]:
        from agd_vllm.inline.arguments import PROCESSOR

        return (PROCESSOR,) if self.inline else ()

    @property
    def kv_planes(self) -> int:
        from agd_vllm.inline.arguments import cache_planes

        return cache_planes(self.rule) if self.inline else super().kv_planes

    def engine_args(self, model: ModelInfo, dtype: str, given: dict[str, Any]) -> dict[str, Any]:
        if not self.inline:
            return {}
        from agd_vllm.engine.arguments import OWN
        from agd_vllm.inline.arguments import engine_args
        from agd_vllm.inline.supported import check_arguments

        check_arguments(dtype, given)
        source = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        args = engine_args(model.path, self.rule, dtype, **source)
        return {key: value for key, value in args.items() if key not in OWN | source.keys()}

    def passes(self, tokens: int, scored: int) -> float | None:
        if self.inline:
            return 2.0
        # lxt goes through the prompt again at every step.
        return 1 + 2 * scored / tokens if self.scorer == "forward" and tokens else None

    def scorer_of(self, decoding: RowDecoding) -> CandidateScorer | None:
        return decoding.pool

    async def decode(self, decoding: RowDecoding) -> str:
        if not self.inline:
            return await super().decode(decoding)
        if not decoding.row.roi:
            return await decode_greedily(decoding, self.repetition_penalty)
        return await decoding.with_all_reports(lambda: self._request(decoding))

    async def _request(self, decoding: RowDecoding) -> str:
        from agd_vllm.inline.params import inline_params_of

        roi, penalty = decoding.row.roi, self.repetition_penalty
        gate = (self.rule, self.tau, self.top_k, self.min_prob, penalty)
        async with decoding.engine.request(
            decoding.row, decoding.stops, lambda key: inline_params_of(roi, key, *gate), penalty
        ) as request:
            finished = await request.next()
            steps = await request.guided_steps()
        for step in steps:
            record_nan(decoding, step)
        decoding.steps.extend(steps)
        return finished.reason
