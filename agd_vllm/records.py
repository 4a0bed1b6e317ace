"""Typed records that travel between reader, engine, attribution and writer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FLOAT32_MAX = 3.4028234663852886e38  # weights of tokens are float32 in the output


@dataclass(frozen=True, slots=True)
class Selector:
    """One region of interest as the user names it; exactly one place, of the row's own words only.

    `role`: every message of that role. `message`: the message at that index; with `text`, every occurrence of
    `text` in it, with `chars`, its characters [start, end). For `prompt` rows `text` or `chars` stand alone.
    """

    role: str | None = None
    message: int | None = None
    text: str | None = None
    chars: tuple[int, int] | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Span:
    """Prompt tokens [start, end) with the weight that their relevance takes in the score."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Roi:
    """A region of interest as scorers see it: weighted prompt tokens, attention heads (layer, head), or both."""

    spans: tuple[Span, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.spans or self.heads)


@dataclass(frozen=True, slots=True)
class InputRow:
    """One valid row of the input file. Exactly one of `messages` and `prompt` is set.

    `roi` is None where the row names no region (the run's default applies). `raw` is the row as it was given, `line`
    its 1-based physical line (or Parquet row) and `file` its input: for `errors.jsonl`, if the row fails later on.
    """

    id: str
    messages: tuple[dict[str, str], ...] | None = None
    prompt: str | None = None
    roi: tuple[Selector, ...] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    metadata: str = "null"
    raw: Any = None
    line: int = 0
    file: str | None = None


@dataclass(frozen=True, slots=True)
class RowError:
    """One object of `errors.jsonl`: what was given, where it stood, and what is wrong with it."""

    input: Any
    line: int
    id: str | None
    type: str
    message: str
    file: str | None = None

    @classmethod
    def of(cls, row: InputRow, type: str, message: str) -> RowError:
        """A valid row that failed later on."""
        return cls(row.raw, row.line, row.id, type, message, row.file)


class RowRefused(Exception):
    """A row that cannot be decoded. `type` is a short stable name, the message says what, where, how to mend."""

    def __init__(self, type: str, message: str):
        super().__init__(message)
        self.type = type

    def __reduce__(self):
        return (RowRefused, (self.type, str(self)))


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """A row ready for the engine: tokens in place of text, token spans in place of selectors."""

    id: str
    prompt_token_ids: list[int]
    roi: Roi
    max_tokens: int
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Gate:
    """What vLLM's side reports of a paused step: the decision's inputs, before any attribution.

    `step` counts output tokens before this one, `entropy` is in nats over the full next-token distribution,
    `candidate_ids` are in descending order of probability, so the first is the greedy token.
    """

    step: int
    entropy: float
    candidate_ids: tuple[int, ...]
    candidate_probs: tuple[float, ...]


def best_candidate(scores: Sequence[float]) -> int:
    """Where the highest score stands, the more probable candidate's among equals; 0, the greedy token's place, where a
    score is NaN."""
    return 0 if any(map(math.isnan, scores)) else max(range(len(scores)), key=scores.__getitem__)


@dataclass(frozen=True, slots=True)
class GuidedStep:
    """One row of `steps/`: a step at which the gate opened and the candidate of the highest score was taken.

    `scores` are relevances to the region, or the draws of `--strategy random-candidate`.
    """

    step: int
    entropy: float
    candidate_ids: list[int]
    candidate_probs: list[float]
    scores: list[float]
    chosen_id: int
    greedy_id: int

    @classmethod
    def of(cls, gate: Gate, scores: list[float]) -> GuidedStep:
        return cls(
            step=gate.step,
            entropy=gate.entropy,
            candidate_ids=list(gate.candidate_ids),
            candidate_probs=list(gate.candidate_probs),
            scores=scores,
            chosen_id=gate.candidate_ids[best_candidate(scores)],
            greedy_id=gate.candidate_ids[0],
        )

    @property
    def changed(self) -> bool:
        """Whether guidance chose another token than the most probable one."""
        return self.chosen_id != self.greedy_id


@dataclass(frozen=True, slots=True)
class DecodedRow:
    """One row of `results/` with its guided steps, and where they are recorded the entropy of every step (nats)."""

    id: str
    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    roi_spans: tuple[Span, ...]
    finish_reason: str
    steps: list[GuidedStep]
    metadata: str = "null"
    entropies: list[float] | None = None

    @property
    def num_guided(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One guided step to score.

    `sequence` names the row for scorers that keep state. `token_ids` are prompt and output tokens from position
    `start` on, up to and including the last one before the step; `start` is 0 for a whole sequence. Scores are
    S(c, R) = sum over the region's components w of r_w(c), one for each of `candidate_ids`, in their order, where r
    is the relevance of the pre-softmax logit of c (arXiv 2509.26307).
    """

    sequence: str
    start: int
    token_ids: list[int]
    roi: Roi
    candidate_ids: tuple[int, ...]
