"""`--dry-run`: what a run would decode, and which tokens of the first rows would guide it, without a model."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from agd_vllm.prompts.prepare import Preparer
from agd_vllm.prompts.tokenizer import Tokens
from agd_vllm.records import InputRow, PreparedRow, Roi, RowError, RowRefused

OPEN, CLOSE, BOUNDARY = "⟦", "⟧", "│"
_REASONS_SHOWN = 5
_PLAIN_SHOWN = 400  # characters of an unguided stretch that are shown before its middle is left out


@dataclass(slots=True)
class DryRun:
    """Counts of a dry run; `usable` and `refused` add up to `rows`. Token counts are over usable rows."""

    rows: int = 0
    usable: int = 0
    refused: int = 0
    without_region: int = 0
    prompt_tokens: int = 0
    region_tokens: int = 0
    region_min: int = 0
    region_max: int = 0

    def add(self, prepared: PreparedRow) -> None:
        """Counts a usable row; a row without a region does not enter the region's figures."""
        self.usable += 1
        self.prompt_tokens += len(prepared.prompt_token_ids)
        size = region_size(prepared.roi)
        if not prepared.roi:
            self.without_region += 1
            return
        self.region_min = size if self.region_tokens == 0 else min(self.region_min, size)
        self.region_max = max(self.region_max, size)
        self.region_tokens += size


def region_size(roi: Roi) -> int:
    """Tokens that a region covers."""
    return sum(span.end - span.start for span in roi.spans)


def dry_run(items: Iterable[InputRow | RowError], preparer: Preparer, console: Console, show: int = 3) -> DryRun:
    """Prepares every row, prints the first `show` usable ones with their region, then counts; returns the counts.

    Nothing that a row says acts on the terminal: its text is never read as markup, and control characters are escaped.
    """
    counts = DryRun()
    warnings: list[str] = []
    preparer.warn = warnings.append
    refusals: list[tuple[int, str | None, str]] = []
    kinds: Counter[str] = Counter()
    for item in items:
        counts.rows += 1
        if isinstance(item, RowError):
            line, row_id, kind, reason = item.line, item.id, item.type, item.message
        else:
            try:
                prepared = preparer.prepare(item)
            except RowRefused as refusal:
                line, row_id, kind, reason = item.line, item.id, refusal.type, str(refusal)
            else:
                counts.add(prepared)
                preparer.warn_of_region(item, prepared)
                if counts.usable <= show:
                    _print_row(item, prepared, preparer, console)
                continue
        counts.refused += 1
        kinds[kind] += 1
        if len(refusals) < _REASONS_SHOWN:
            refusals.append((line, row_id, reason))
    _print_counts(counts, refusals, kinds, preparer.guided, console)
    for warning in warnings:
        _print(console, Text(f"  warning: {_inert(warning)}", style="yellow"))
    return counts


def highlight(text: str, tokens: Tokens, roi: Roi) -> Text:
    """The text with its region between ⟦ and ⟧, a │ at each token boundary within.

    A weight other than 1 stands in front, as in ⟦0.5*│words⟧. Tokens that share a character (its bytes) show it once,
    with the first of them.
    """
    shown = Text()
    at = 0
    for span in roi.spans:
        first = max(at, tokens.offsets[span.start][0])
        shown.append(_inert(_shortened(text[at:first])))
        at = first
        shown.append(OPEN, style="bold")
        if span.weight != 1:
            shown.append(f"{span.weight:g}*{BOUNDARY}", style="bold")
        style = "white on dark_green" if span.weight > 0 else "white on dark_red"
        for index in range(span.start, span.end):
            if index > span.start:
                shown.append(BOUNDARY, style="dim")
            end = tokens.offsets[index][1]
            shown.append(_inert(text[at:end]), style=style)
            at = end
        shown.append(CLOSE, style="bold")
    shown.append(_inert(_shortened(text[at:])))
    return shown


def _print_row(row: InputRow, prepared: PreparedRow, preparer: Preparer, console: Console) -> None:
    rendered, tokens = preparer.encode(row)
    sizes = f"{len(tokens.ids)} prompt tokens, {region_size(prepared.roi)} in the region"
    _print(console, Text(f"── row {_inert(row.id)} (line {row.line}): {sizes}", style="bold"))
    _print(console, highlight(rendered.text, tokens, prepared.roi))
    console.print()


def _print_counts(
    counts: DryRun,
    refusals: list[tuple[int, str | None, str]],
    kinds: Counter[str],
    guided: bool,
    console: Console,
) -> None:
    _print(console, Text(f"rows             {counts.rows:,}"))
    _print(console, Text(f"usable           {counts.usable:,}"))
    by_kind = ", ".join(f"{_inert(kind)} {count:,}" for kind, count in kinds.most_common())
    _print(console, Text(f"refused          {counts.refused:,}" + (f" ({by_kind})" if by_kind else "")))
    _print(console, Text(f"prompt tokens    {counts.prompt_tokens:,}"))
    with_region = counts.usable - counts.without_region
    if not guided:
        _print(console, Text("region tokens    regions are ignored (nothing is guided)"))
    else:
        sizes = "none"
        if with_region:
            mean = counts.region_tokens / with_region
            sizes = f"min {counts.region_min:,}, mean {mean:,.1f}, max {counts.region_max:,} a row"
        _print(console, Text(f"region tokens    {sizes}"))
        _print(console, Text(f"without a region {counts.without_region:,} (decoded unguided)"))
    for line, row_id, reason in refusals:
        name = "" if row_id is None else f" ({_inert(row_id)})"
        _print(console, Text(f"  line {line}{name}: {_inert(reason)}", style="red"))
    if counts.refused > len(refusals):
        _print(console, Text(f"  ... and {counts.refused - len(refusals):,} more", style="red"))


def _print(console: Console, text: Text) -> None:
    # Soft wrap: in a pipe a line stays a line, on a terminal the terminal wraps it.
    console.print(text, soft_wrap=True, highlight=False)


def _shortened(text: str) -> str:
    if len(text) <= _PLAIN_SHOWN:
        return text
    half = _PLAIN_SHOWN // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"


def _inert(text: str) -> str:
    """Text that cannot act on a terminal nor pass for our own marks; a line feed shows as \\n and breaks the line."""
    return "".join(_shown(char) for char in text)


def _shown(char: str) -> str:
    if char == "\n":
        return "\\n\n"
    # Other, which holds controls, bidirectional marks, surrogates and unassigned ones, and line separators.
    if unicodedata.category(char)[0] == "C" or char in "\u2028\u2029" or char in (OPEN, CLOSE, BOUNDARY):
        return char.encode("unicode_escape").decode()
    return char
