"""The numbers over a whole run: what its cards, its histogram and its table of parameters show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from agd_vllm.output.run_reader import RunReader
from agd_vllm.output.summary import count_outputs

BINS = 28
# What `summary.json` counts and measures: shown as cards, not as parameters.
_MEASURED = (
    *("rows", "decoded", "failed", "prompt_tokens", "output_tokens", "guided_steps", "changed_tokens"),
    *("seconds", "load_seconds", "tokens_per_second", "faults", "versions"),
)


@dataclass(frozen=True, slots=True)
class Bar:
    """One bin of the histogram, entropies [low, high): guided steps there, and those of them that changed the token."""

    low: float
    high: float
    guided: int
    changed: int


@dataclass(frozen=True, slots=True)
class Card:
    """One figure of a run, ready to print."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one run in a report."""

    cards: list[Card]
    histogram: list[Bar]
    parameters: list[tuple[str, str]]
    tau: float | None


def figures(run: RunReader) -> Figures:
    """Counts what is on disk, so that a run that goes on or was broken off has its figures, too."""
    counts, ran = count_outputs(run.directory), run.parameters()
    return Figures(_cards(counts, ran), _histogram(run), _parameters(ran), ran.get("tau"))


def _cards(counts: dict[str, int], ran: dict[str, Any]) -> list[Card]:
    tokens = counts["output_tokens"]
    failed = f"{counts['failed']:,} failed" if counts["failed"] else "none failed"
    cards = [
        Card("rows decoded", f"{counts['decoded']:,}", failed),
        Card("output tokens", f"{tokens:,}", f"{counts['prompt_tokens']:,} prompt tokens"),
        Card("guided steps", _share(counts["guided_steps"], tokens), f"{counts['guided_steps']:,} of the tokens"),
        Card("changed tokens", _share(counts["changed_tokens"], tokens), f"{counts['changed_tokens']:,} of the tokens"),
    ]
    if ran.get("tokens_per_second"):
        note = f"{ran['seconds']:,.1f} s decoding, {ran['load_seconds']:,.1f} s loading"
        cards.append(Card("tokens per second", f"{ran['tokens_per_second']:,.1f}", note))
    return cards


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _histogram(run: RunReader) -> list[Bar]:
    entropies, changed = [np.zeros(0)], [np.zeros(0, bool)]
    for table in run.step_columns(["entropy", "chosen_id", "greedy_id"]):
        entropies.append(table["entropy"].to_numpy())
        changed.append(table["chosen_id"].to_numpy() != table["greedy_id"].to_numpy())
    values, moved = np.concatenate(entropies), np.concatenate(changed)
    if not len(values):
        return []
    guided, edges = np.histogram(values, BINS)
    changes, _ = np.histogram(values[moved], edges)
    return [
        Bar(float(low), float(high), int(all_), int(some))
        for low, high, all_, some in zip(edges[:-1], edges[1:], guided, changes, strict=True)
    ]


def _parameters(ran: dict[str, Any]) -> list[tuple[str, str]]:
    ran = {"faults": {}, "versions": {}} | ran
    shown = [(name, _plain(value)) for name, value in ran.items() if name not in _MEASURED]
    if "tau" in ran and ran["tau"] is None:
        shown.append(("tau", "infinite"))
    shown += [
        (name, ", ".join(f"{key} {value}" for key, value in ran[name].items())) for name in ("faults", "versions")
    ]
    return [(name, value) for name, value in shown if value]


def _plain(value: Any) -> str:
    """A parameter as text; an empty one where it is not set."""
    if value in (None, {}, []):
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
