"""The table of an evaluation: one object a strategy, as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agd_vllm.evaluation.bootstrap import Interval, paired_difference
from agd_vllm.evaluation.outcomes import Outcome
from agd_vllm.evaluation.quality import repetition_rate
from agd_vllm.evaluation.rules import PROHIBITIONS, kind_of
from agd_vllm.evaluation.scoring import Scored

Rows = Mapping[str, Scored]


def record(
    strategy: str,
    scored: Mapping[str, Rows],
    reference: str,
    outcomes: Mapping[str, Outcome],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """One object of table.json: accuracies, their differences to those of strategy `reference`, quality and speed.

    `scored` are every strategy's scored rows, `outcomes` all that this one decoded, `run` what the caller measured
    (`failed`, `perplexity`, `tokens_per_second`, `forward_passes`) and whether its steps' scores are relevance
    (`relevance`). Shares of nothing are null, and so are the reference's differences.
    """
    rows = scored[strategy]
    rules = [rule for row in rows.values() for rule in row.rules]
    exact = [row.exact_match for row in rows.values() if row.exact_match is not None]
    lengths = [len(outcome.token_ids) for outcome in outcomes.values()]
    steps = [step for outcome in outcomes.values() for step in outcome.steps]
    accuracy = _mean([row.all_kept for row in rows.values()])
    repetition = _mean([repetition_rate(outcome.token_ids) for outcome in outcomes.values()])
    prompt, instruction = _differences(rows, scored[reference]) if strategy != reference else (None, None)
    return {
        "strategy": strategy,
        "reference": reference,
        "rows": len(outcomes),
        "failed": run["failed"],
        "scored_rows": len(rows),
        "prompt_accuracy": accuracy,
        "instruction_accuracy": _mean([kept for _, kept in rules]),
        "exact_match": _mean(exact),
        **_interval("", prompt),
        **_interval("instruction_", instruction),
        "perplexity": run["perplexity"],
        "repetition_rate": repetition,
        "composite": None if accuracy is None or repetition is None else accuracy * (1 - repetition),
        "mean_length": _mean(lengths),
        "guided_share": len(steps) / sum(lengths) if lengths else None,
        "changed_share": sum(step.changed for step in steps) / sum(lengths) if lengths else None,
        "tokens_per_second": run["tokens_per_second"],
        "forward_passes": run["forward_passes"],
        "kinds": _kinds(rules),
        "negative_greedy": _negative_greedy(rows, outcomes) if run["relevance"] else NO_RELEVANCE,
    }


def _differences(rows: Rows, reference: Rows) -> tuple[Interval | None, Interval | None]:
    """Prompt-level and instruction-level difference over the rows that both have decoded."""
    both = [id for id in rows if id in reference]
    ours, theirs = [rows[id] for id in both], [reference[id] for id in both]
    return (
        paired_difference([r.all_kept for r in ours], [r.all_kept for r in theirs], [1] * len(both)),
        paired_difference(
            [sum(kept for _, kept in row.rules) for row in ours],
            [sum(kept for _, kept in row.rules) for row in theirs],
            [len(row.rules) for row in ours],
        ),
    )


def _interval(prefix: str, interval: Interval | None) -> dict[str, float | None]:
    values = (interval.difference, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip((f"{prefix}difference", f"{prefix}ci_low", f"{prefix}ci_high"), values, strict=True))


def _kinds(rules: Sequence[tuple[str, bool]]) -> dict[str, dict[str, Any]]:
    """Kind of rule to how many there are and the share that is kept, prohibitions first."""
    kinds = sorted({kind_of(id) for id, _ in rules}, key=lambda kind: (kind != "prohibition", kind))
    of_kind = {kind: [kept for id, kept in rules if kind_of(id) == kind] for kind in kinds}
    return {kind: {"rules": len(kept), "kept": _mean(kept)} for kind, kept in of_kind.items()}


NO_RELEVANCE = {"prohibition": None, "other": None}


def _negative_greedy(rows: Rows, outcomes: Mapping[str, Outcome]) -> dict[str, float | None]:
    """Of the steps at which another token than the greedy one was chosen: how often the greedy one's score was
    negative, that is, the region spoke against it; in rows with a prohibition and in all others."""
    scores: dict[str, list[bool]] = {"prohibition": [], "other": []}
    for id, outcome in outcomes.items():
        prohibited = id in rows and any(rule in PROHIBITIONS for rule, _ in rows[id].rules)
        scores["prohibition" if prohibited else "other"] += [
            step.greedy_score < 0 for step in outcome.steps if step.changed
        ]
    return {kind: _mean(negative) for kind, negative in scores.items()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


COLUMNS = {
    "strategy": "strategy",
    "rows": "rows",
    "prompt_accuracy": "prompt acc.",
    "instruction_accuracy": "instr. acc.",
    "exact_match": "exact match",
    "difference": "prompt acc. - {reference} [95 %]",
    "instruction_difference": "instr. acc. - {reference} [95 %]",
    "perplexity": "perplexity",
    "repetition_rate": "repetition",
    "composite": "composite",
    "mean_length": "tokens",
    "guided_share": "guided",
    "changed_share": "changed",
    "tokens_per_second": "tokens/s",
    "forward_passes": "passes/token",
}
_PLAIN = {
    "perplexity": ".2f",
    "mean_length": ".1f",
    "tokens_per_second": ".1f",
    "forward_passes": ".2f",
    "composite": ".3f",
}


def markdown(title: str, records: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """Two tables, strategies and kinds of rules, and what must be known to read them."""
    named = {key: name.format(reference=records[0]["reference"]) for key, name in COLUMNS.items()}
    shown = {key: name for key, name in named.items() if any(record[key] is not None for record in records)}
    parts = [f"# {title}", _table(list(shown.values()), [[_cell(r, key) for key in shown] for r in records])]
    kinds = dict.fromkeys(kind for record in records for kind in record["kinds"])
    rows = [[kind, *(_kept(record["kinds"].get(kind)) for record in records)] for kind in kinds]
    if any(record["changed_share"] for record in records):
        for kind in ("prohibition", "other"):
            shares = [_number(record["negative_greedy"][kind], ".1%") for record in records]
            rows.append([f"greedy token's score negative at changed steps, rows with {_WITH[kind]}", *shares])
    parts.append(_table(["rules kept", *(record["strategy"] for record in records)], rows))
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


_WITH = {"prohibition": "a prohibition", "other": "none"}


def _cell(record: Mapping[str, Any], key: str) -> str:
    if key in ("difference", "instruction_difference"):
        prefix = key.removesuffix("difference")
        if record[key] is None:
            return "-"
        low, high = record[f"{prefix}ci_low"], record[f"{prefix}ci_high"]
        return f"{100 * record[key]:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    if key == "rows" and record["failed"]:
        return f"{record['rows']} ({record['failed']} failed)"
    return record[key] if isinstance(record[key], str) else _number(record[key], _PLAIN.get(key, ".1%"), whole="d")


def _kept(kind: Mapping[str, Any] | None) -> str:
    return "-" if kind is None else f"{kind['kept']:.1%} of {kind['rules']}"


def _number(value: float | None, form: str, whole: str = "d") -> str:
    if value is None:
        return "-"
    return format(value, whole if isinstance(value, int) else form)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
