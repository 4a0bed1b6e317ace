"""Selectors to weighted token spans: which prompt tokens make up a row's region of interest."""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal

from agd_vllm.prompts.template import Place, Rendered
from agd_vllm.prompts.tokenizer import Tokens
from agd_vllm.records import FLOAT32_MAX, Roi, RowRefused, Selector, Span


def region(selectors: Iterable[Selector], rendered: Rendered, tokens: Tokens) -> Roi:
    """Maps selectors to token spans, sorted, disjoint, each a maximal run of one non-zero weight.

    A token belongs to a selector if it overlaps its characters, once however many of them it overlaps; selectors that
    share tokens add their weights. Raises RowRefused for a selector that selects no token, and for weights that cancel.
    """
    # Empty tokens (added by the tokenizer) lie nowhere in the text; without them both ends are in ascending order.
    lying = [(index, start, end) for index, (start, end) in enumerate(tokens.offsets) if start < end]
    starts = [start for _, start, _ in lying]
    ends = [end for _, _, end in lying]
    weights: defaultdict[int, Decimal] = defaultdict(Decimal)
    for selector in selectors:
        # Decimal, so that weights of 0.1, 0.2 and -0.3 cancel as they read.
        weight = Decimal(str(selector.weight))
        chosen: set[int] = set()
        for start, end in _ranges(selector, rendered):
            chosen.update(range(bisect_right(ends, start), bisect_left(starts, end)))
        if not chosen:
            raise _refused(selector, "no token covers these characters")
        for position in chosen:
            weights[lying[position][0]] += weight
    if not weights:
        raise RowRefused("roi", "roi names no selector; name one, or leave roi out")
    spans: list[Span] = []
    for index in sorted(weights):
        weight = float(weights[index])
        if weight == 0:
            continue
        if abs(weight) > FLOAT32_MAX:
            raise RowRefused("roi", "the weights of the roi's selectors add up beyond float32; make them smaller")
        if spans and spans[-1].end == index and spans[-1].weight == weight:
            spans[-1] = Span(spans[-1].start, index + 1, weight)
        else:
            spans.append(Span(index, index + 1, weight))
    if not spans:
        raise RowRefused("roi", "the weights of the roi's selectors cancel on every token; change a weight")
    return Roi(spans=tuple(spans))


def positive_texts(selectors: Iterable[Selector], rendered: Rendered) -> list[str]:
    """What the region says: its characters of positive weight, verbatim and in order, one text a run of them.

    Selectors that share characters add their weights. Raises RowRefused for a selector that selects none.
    """
    changes: defaultdict[int, Decimal] = defaultdict(Decimal)
    for selector in selectors:
        # A character counts once for a selector, however often it names it.
        for start, end in _disjoint(_ranges(selector, rendered)):
            changes[start] += Decimal(str(selector.weight))
            changes[end] -= Decimal(str(selector.weight))
    texts, weight, begun = [], Decimal(0), None
    for at in sorted(changes):
        weight += changes[at]
        if weight > 0 and begun is None:
            begun = at
        elif weight <= 0 and begun is not None:
            texts.append(rendered.text[begun:at])
            begun = None
    return texts


def _disjoint(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _ranges(selector: Selector, rendered: Rendered) -> list[tuple[int, int]]:
    """Character ranges [start, end) of a selector in the rendered text, at least one."""
    ranges: list[tuple[int, int]] = []
    trimmed = False
    for i in _messages(selector, rendered):
        content = rendered.contents[i]
        if selector.chars is not None:
            wanted = [selector.chars]
            if not 0 <= selector.chars[0] < selector.chars[1] <= len(content):
                raise _refused(
                    selector, f"{_name(i, rendered)} has {len(content)} characters; chars are [start, end), start < end"
                )
        elif selector.text is not None:
            wanted = _occurrences(selector.text, content)
        else:
            wanted = [(0, len(content))]
        if wanted and i in rendered.faults:
            raise _refused(selector, f"{_name(i, rendered)} {rendered.faults[i]}")
        for start, end in wanted:
            placed = _placed(start, end, rendered.places[i])
            trimmed = trimmed or not placed
            ranges += placed
    if not ranges:
        if trimmed:
            reason = "the chat template trims these characters"
        elif rendered.is_chat and selector.message is None:
            reason = "no message holds this text"
        else:
            reason = f"{_name(selector.message, rendered)} does not hold this text"
        raise _refused(selector, reason)
    return ranges


def _messages(selector: Selector, rendered: Rendered) -> Iterable[int]:
    """Indices of the contents that a selector speaks of; `text` alone speaks of every message."""
    count = len(rendered.contents)
    if not rendered.is_chat:
        if selector.role is not None or selector.message is not None:
            raise _refused(selector, "a prompt row has no messages; select by text or chars")
        return [0]
    if selector.message is not None:
        if not 0 <= selector.message < count:
            raise _refused(selector, f"the row has {count} messages, numbered from 0")
        return [selector.message]
    if selector.role is not None:
        indices = [i for i, role in enumerate(rendered.roles) if role == selector.role]
        if not indices:
            raise _refused(selector, "no message has this role")
        return indices
    if selector.chars is not None:
        raise _refused(selector, "chars need a message to count in")
    return range(count)


def _occurrences(text: str, content: str) -> list[tuple[int, int]]:
    """Every occurrence of `text`, from left to right; one that overlaps the one before does not count."""
    return [match.span() for match in re.finditer(re.escape(text), content)]


def _placed(start: int, end: int, places: Iterable[Place]) -> list[tuple[int, int]]:
    """Characters [start, end) of a content, as ranges of the rendered text, in each place and as far as it has them."""
    ranges = []
    for place in places:
        first = place.start + max(start - place.offset, 0)
        last = min(place.start + end - place.offset, place.end)
        if first < last:
            ranges.append((first, last))
    return ranges


def _name(i: int | None, rendered: Rendered) -> str:
    return f"message {i} ({rendered.roles[i]})" if rendered.is_chat else "the prompt"


def _refused(selector: Selector, reason: str) -> RowRefused:
    fields = ("role", "message", "text", "chars")
    shown = {name: getattr(selector, name) for name in fields if getattr(selector, name) is not None}
    if "text" in shown and len(shown["text"]) > 60:
        shown["text"] = shown["text"][:57] + "..."
    return RowRefused("roi", f"roi selector {json.dumps(shown, ensure_ascii=False)}: {reason}")
