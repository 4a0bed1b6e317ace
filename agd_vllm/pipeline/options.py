"""What a run can be asked for, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from agd_vllm.attribution.scorer import RULES
from agd_vllm.attribution.scorer import SCORERS as WORKER_SCORERS
from agd_vllm.dola.arguments import check_layers
from agd_vllm.engine.channel import MAX_TOP_K
from agd_vllm.engine.settings import GateSettings
from agd_vllm.pipeline.numbers import check_real, check_whole
from agd_vllm.pipeline.strategies import (
    STRATEGIES,
    Agd,
    Cad,
    Dola,
    Emphasize,
    Greedy,
    InlineAgd,
    RandomCandidate,
    Steer,
    Strategy,
)

DTYPES = ("auto", "float32", "bfloat16")
INLINE = "inline"
# And AGD inline; the gate of a session that pauses would see logits before vLLM's penalty.
PENALIZED = (Greedy.name, Cad.name, Dola.name, Steer.name, Emphasize.name)
SCORERS = (*WORKER_SCORERS, INLINE)


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """All that a run can be asked for; the names are the command line's. Raises ValueError with one line each."""

    model: str | None = None
    strategy: str = "agd"
    tau: float = 1.734
    top_k: int = 5
    min_prob: float = 0.05
    roi: str | None = None
    roi_heads: str | None = None
    scorer: str = "forward"
    rule: str = "attnlrp"
    cad_alpha: float = 0.5
    dola_layers: str = "low"
    dola_relative_top: float = 0.1
    steering: str | None = None
    steering_strength: float = 1.0
    steering_norm: bool = True
    repetition_penalty: float = 1.0
    entropies: bool = False
    engines: int = 1
    attribution_workers: int | None = None
    max_tokens: int = 256
    max_model_len: int | None = None
    dtype: str = "auto"
    attribution_dtype: str | None = None
    seed: int = 0
    engine_args: dict[str, Any] = field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    log_json: str | None = None
    trace: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        checks = (
            (isinstance(self.model, str) and self.model != "", "model is missing; name a folder or a Hugging Face id"),
            (self.scorer in SCORERS, f"scorer {self.scorer!r}: choose one of {', '.join(SCORERS)}"),
            (self.rule in RULES, f"rule {self.rule!r}: choose one of {', '.join(RULES)}"),
            (self.dtype in DTYPES, f"dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}"),
            (
                self.attribution_dtype in (None, *DTYPES),
                f"attribution_dtype {self.attribution_dtype!r}: choose one of {', '.join(DTYPES)}",
            ),
            (self.strategy in STRATEGIES, f"strategy {self.strategy!r}: choose one of {', '.join(STRATEGIES)}"),
            (
                not (self.strategy == Cad.name and self.roi_heads),
                "roi_heads: strategy cad takes the region out of the prompt, which heads are not in; leave it out",
            ),
            (
                not (self.strategy == Emphasize.name and self.roi_heads),
                "roi_heads: strategy emphasize says the region again, and heads have no text; leave it out",
            ),
            (
                not self.entropies or self.strategy == Greedy.name,
                f"entropies: recorded with strategy greedy only, not with {self.strategy}",
            ),
            (
                self.cad_alpha >= 0,
                f"cad_alpha {self.cad_alpha}: must be a finite number, 0 or more",
            ),
            (
                0 <= self.dola_relative_top <= 1,
                f"dola_relative_top {self.dola_relative_top}: must lie between 0 and 1",
            ),
            (
                self.steering is None or self.strategy == Steer.name,
                f"steering: strategy {self.strategy} cannot be steered"
                + (" (attribution would explain a model that is not)" if self.strategy == Agd.name else "")
                + "; leave it out, or take strategy steer",
            ),
            (
                self.steering or self.strategy != Steer.name,
                "steering is missing; name a file of vectors for strategy steer (`agd-vllm vectors` makes one)",
            ),
            (
                self.repetition_penalty > 0,
                f"repetition_penalty {self.repetition_penalty}: must be a finite number above 0; 1 is none",
            ),
            (
                self.repetition_penalty == 1 or self.strategy in PENALIZED or self.inline,
                f"repetition_penalty: strategy {self.strategy} has none"
                + (" with attribution workers" if self.strategy == Agd.name else "")
                + f"; leave it out, or take {', '.join(PENALIZED)}, or agd with scorer inline",
            ),
            (
                self.repetition_penalty == 1 or not self.entropies,
                "repetition_penalty: entropies are recorded without one; leave it out",
            ),
            (self.tau >= 0, f"tau {self.tau}: must be 0 or more (nats)"),
            (2 <= self.top_k <= MAX_TOP_K, f"top_k {self.top_k}: a choice is among 2 to {MAX_TOP_K} candidates"),
            (0 <= self.min_prob <= 1, f"min_prob {self.min_prob}: must lie between 0 and 1"),
            (self.engines >= 1, f"engines {self.engines}: at least 1"),
            (
                self.attribution_workers is None or self.attribution_workers >= 1,
                f"attribution_workers {self.attribution_workers}: at least 1",
            ),
            (
                not self.inline or self.attribution_workers is None,
                "attribution_workers: scorer inline has none; leave it out, or take scorer forward",
            ),
            (
                not self.inline or self.attribution_dtype in (None, self.dtype),
                f"attribution_dtype {self.attribution_dtype!r}: scorer inline attributes in the engine's dtype; leave "
                "it out, or take scorer forward",
            ),
            (
                self.scorer != INLINE or self.strategy != Cad.name,
                "scorer inline: strategy cad contrasts two sequences and attributes nothing; leave scorer out",
            ),
            (self.max_tokens >= 1, f"max_tokens {self.max_tokens}: at least 1"),
            (self.max_model_len is None or self.max_model_len >= 1, f"max_model_len {self.max_model_len}: at least 1"),
        )
        for fine, message in checks:
            if not fine:
                raise ValueError(message)
        check_layers(self.dola_layers)

    def _check_numbers(self) -> None:
        """Whatever the strategy: Python passes on what the command line would not read as a number."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.type == "float":
                check_real(option.name, value)
            elif option.type == "int" or (option.type == "int | None" and value is not None):
                check_whole(option.name, value)

    @property
    def gate(self) -> GateSettings:
        return GateSettings(self.tau, self.top_k, self.min_prob)

    @property
    def inline(self) -> bool:
        """Whether the run attributes inside vLLM, without workers."""
        return self.scorer == INLINE and self.strategy == Agd.name

    @property
    def workers(self) -> int:
        """Attribution workers of strategies that need them."""
        return 1 if self.attribution_workers is None else self.attribution_workers

    @property
    def default_roi(self) -> str:
        """The region of rows that name none: the system prompt, but for a head set, which is a region of its own."""
        if self.roi is not None:
            return self.roi
        return "none" if self.roi_heads else "role=system"

    def make_strategy(self) -> Strategy:
        inline = InlineAgd(self.rule, self.tau, self.top_k, self.min_prob, self.repetition_penalty)
        made = {
            Agd.name: inline if self.inline else Agd(),
            Greedy.name: Greedy(self.entropies),
            Cad.name: Cad(self.cad_alpha),
            Emphasize.name: Emphasize(),
            Dola.name: Dola(self.dola_layers, self.dola_relative_top),
            Steer.name: Steer(self.steering, self.steering_strength, self.steering_norm),
            RandomCandidate.name: RandomCandidate(self.seed),
        }
        return made[self.strategy]
