"""What a run is asked for, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agd_vllm.strategies.agd import Agd
from agd_vllm.strategies.numbers import check_numbers
from agd_vllm.strategies.registry import OPTIONS, make_strategy
from agd_vllm.strategies.strategy import DTYPES, Strategy


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """The options that all strategies have in common, and the strategy with its own; `of` makes both of flat names,
    which are the command line's.

    Raises ValueError, in one line, for a value that cannot be used.
    """

    model: str | None = None
    strategy: Strategy = field(default_factory=Agd)
    roi: str | None = None
    engines: int = 1
    attribution_workers: int | None = None
    max_tokens: int = 256
    max_model_len: int | None = None
    dtype: str = "auto"
    seed: int = 0
    engine_args: dict[str, Any] = field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    log_json: str | None = None
    trace: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        checks = (
            (isinstance(self.model, str) and self.model != "", "model is missing; name a folder or a Hugging Face id"),
            (self.dtype in DTYPES, f"dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}"),
            (self.engines >= 1, f"engines {self.engines}: at least 1"),
            (
                self.attribution_workers is None or self.attribution_workers >= 1,
                f"attribution_workers {self.attribution_workers}: at least 1",
            ),
            (self.max_tokens >= 1, f"max_tokens {self.max_tokens}: at least 1"),
            (self.max_model_len is None or self.max_model_len >= 1, f"max_model_len {self.max_model_len}: at least 1"),
        )
        for fine, message in checks:
            if not fine:
                raise ValueError(message)
        self.strategy.check_run(self.dtype, self.attribution_workers)

    @classmethod
    def of(cls, model: str | None = None, strategy: str = Agd.name, **flat: Any) -> DecoderOptions:
        """Options by their flat names, those of the named strategy among them.

        Raises ValueError, in one line, for an option of another strategy or a value that cannot be used; TypeError for
        a name that no option has.
        """
        own = {name: value for name, value in flat.items() if name in OPTIONS}
        common = {name: value for name, value in flat.items() if name not in OPTIONS}
        return cls(model, make_strategy(strategy, own), **common)

    @property
    def workers(self) -> int:
        """Attribution workers: none where the strategy has none."""
        if self.strategy.attribution(self.dtype, self.max_model_len) is None:
            return 0
        return 1 if self.attribution_workers is None else self.attribution_workers

    @property
    def default_roi(self) -> str:
        """The region of rows that name none: the system prompt, but for a head set, which is a region of its own."""
        if self.roi is not None:
            return self.roi
        return "none" if self.strategy.heads else "role=system"
