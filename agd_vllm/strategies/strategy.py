"""What every strategy is: a frozen dataclass whose fields are its options, and a way to decode a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from agd_vllm.strategies.numbers import check_numbers

if TYPE_CHECKING:
    from agd_vllm.attribution.worker import AttributionSettings
    from agd_vllm.models.inspect import ModelInfo
    from agd_vllm.strategies.row_decoding import RowDecoding

DTYPES = ("auto", "float32", "bfloat16")


def option(
    default: Any, help: str, *, choices: tuple[str, ...] = (), metavar: str | None = None, flag: bool = True
) -> Any:
    """A field that is an option: by its name a keyword of Decoder and, with `flag`, a flag of decode."""
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar, "flag": flag})


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """One object serves all rows of an engine. It is sent to the engine's actor.

    Making one raises ValueError, in one line, for an option that it cannot use.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # one line of --help
    # Whether the run needs the rows' regions.
    regions: ClassVar[bool] = True
    # Whether it chooses by the logits of the model itself, which are what attribution of a run explains.
    by_own_logits: ClassVar[bool] = True
    # Whether prompts repeat the region.
    emphasized: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_numbers(self)
        for option in fields(self):
            value, choices = getattr(self, option.name), option.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ValueError(f"{option.name} {value!r}: choose one of {', '.join(choices)}")
        for fine, message in self.checks():
            if not fine:
                raise ValueError(message)

    def checks(self) -> Iterator[tuple[bool, str]]:
        """Whether its options are usable, one by one, each with the line for where it is not."""
        yield from ()

    def check_run(self, dtype: str, attribution_workers: int | None) -> None:
        """Raises ValueError, in one line, where it cannot use these options of the run."""
        return None

    def identity(self) -> dict[str, Any]:
        """Its options, by name: what decides the tokens of a run beside what all strategies have in common."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def described(self) -> dict[str, Any]:
        """What a summary names of it beside its identity."""
        return {}

    def attribution(self, dtype: str, max_model_len: int | None) -> AttributionSettings | None:
        """What attribution workers are started with; None where it has none."""
        return None

    @property
    def pauses(self) -> bool:
        """Whether rows pause at gated steps, for which the tokenizer must have a spare special token."""
        return True

    @property
    def inline(self) -> bool:
        """Whether its rows are plain requests of an engine that attributes by itself."""
        return False

    @property
    def heads(self) -> str | None:
        """A file of attention heads, the region of every row."""
        return None

    @property
    def layout(self) -> str:
        """What the line about where a run computes says of it."""
        return ""

    @property
    def processors(self) -> tuple[str, ...]:
        """The logits processors that the engine needs beside the gate."""
        return ()

    @property
    def kv_planes(self) -> int:
        """Vectors of each head that the engine's KV cache has for a token: keys and values."""
        from agd_vllm.models.gpu_memory import KEYS_AND_VALUES

        return KEYS_AND_VALUES

    @property
    def strength(self) -> float | None:
        """What the engine's steering vectors are multiplied with; None where it has none."""
        return None

    def engine_args(self, model: ModelInfo, dtype: str, given: dict[str, Any]) -> dict[str, Any]:
        """vLLM's engine arguments that it needs, beside the `given` ones.

        Raises ValueError, in one line, for a model, a dtype or arguments that it has no code for.
        """
        return {}

    def passes(self, tokens: int, scored: int) -> float | None:
        """Passes through the model's layers for each output token, prompts apart; values and tangents count one each.

        `tokens`: of all answers; `scored`: those before the last guided step of their row. None where it is unknown.
        """
        return 1.0

    @abstractmethod
    async def decode(self, decoding: RowDecoding) -> str:
        """Decodes a row to its end, filling in `decoding`; returns the finish reason. Raises as `decode_row`."""


@dataclass(frozen=True, kw_only=True)
class Penalized(Strategy):
    """A strategy that takes the repetition penalty of the published scripts."""

    repetition_penalty: float = option(
        1.0,
        "Logits of tokens that prompt or answer contain are divided by it, negative ones multiplied, before anything "
        "is chosen (the published DoLa scripts take 1.2); 1 is none. AGD has it with scorer inline only.",
    )

    def checks(self) -> Iterator[tuple[bool, str]]:
        yield from super().checks()
        yield (
            self.repetition_penalty > 0,
            f"repetition_penalty {self.repetition_penalty}: must be a finite number above 0; 1 is none",
        )
