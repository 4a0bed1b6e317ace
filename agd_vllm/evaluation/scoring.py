"""Answers scored: which of a row's rules each answer keeps, over all strategies by the same rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agd_vllm.evaluation.answers import contains_answer, exact_match
from agd_vllm.evaluation.outcomes import Outcome
from agd_vllm.evaluation.rules import DataMissing, check_rule, followed

CONTAINS_ANSWER = "qa:contains_answer"
EXACT_MATCH = "qa:exact_match"


@dataclass(frozen=True, slots=True)
class Scored:
    """A row's rules with whether the answer keeps them, in their order. `exact_match`: of a question, else None."""

    rules: tuple[tuple[str, bool], ...]
    exact_match: bool | None = None

    @property
    def all_kept(self) -> bool:
        return all(kept for _, kept in self.rules)


@dataclass(slots=True)
class Scores:
    """`rows` by strategy and row id; rows of which no rule can be checked are left out.

    `left_out`: rule to the data that its checker misses. `tripped`: rule to how many answers its checker failed on;
    these count as not kept.
    """

    rows: dict[str, dict[str, Scored]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    tripped: Counter[str] = field(default_factory=Counter)


def check_metadata(rows: Iterable[tuple[str | None, Mapping[str, Any]]]) -> None:
    """Raises ValueError for the first row (id, metadata) with a rule that cannot be checked, before it is decoded."""
    for id, metadata in rows:
        for rule, kwargs in _rules(metadata):
            try:
                check_rule(rule, kwargs)
            except ValueError as error:
                raise ValueError(f"row {id}: {error}") from error


def score(outcomes: Mapping[str, Mapping[str, Outcome]]) -> Scores:
    """Scores the outcomes of every strategy. A rule that any answer cannot be checked by is left out for all."""
    scores = Scores()
    for strategy, rows in outcomes.items():
        scores.rows[strategy] = {id: _scored(outcome, scores) for id, outcome in rows.items()}
    for strategy, rows in scores.rows.items():
        kept = {
            id: Scored(tuple(rule for rule in row.rules if rule[0] not in scores.left_out), row.exact_match)
            for id, row in rows.items()
        }
        scores.rows[strategy] = {id: row for id, row in kept.items() if row.rules}
    for rule in scores.left_out:
        del scores.tripped[rule]
    return scores


def _scored(outcome: Outcome, scores: Scores) -> Scored:
    if "answers" in outcome.metadata:
        answers = outcome.metadata["answers"]
        contained = contains_answer(outcome.text, answers)
        return Scored(((CONTAINS_ANSWER, contained),), exact_match(outcome.text, answers))
    rules = []
    for rule, kwargs in _rules(outcome.metadata):
        kept = False
        try:
            kept = followed(rule, kwargs, outcome.text)
        except DataMissing as missing:
            scores.left_out[rule] = str(missing)
        except Exception:  # checkers trip over answers that their authors did not foresee
            scores.tripped[rule] += 1
        rules.append((rule, kept))
    return Scored(tuple(rules))


def _rules(metadata: Mapping[str, Any]) -> Sequence[tuple[str, dict[str, Any]]]:
    """(rule, arguments); arguments that are null are absent, as the benchmarks spell them out."""
    return [
        (rule, {key: value for key, value in (kwargs or {}).items() if value is not None})
        for rule, kwargs in zip(metadata.get("instruction_id_list", ()), metadata.get("kwargs", ()), strict=True)
    ]
