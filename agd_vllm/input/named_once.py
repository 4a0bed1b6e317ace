"""Names that are given twice: a set of values in which the last silently wins is refused."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from agd_vllm.input.wording import place_text


class NamedTwice(ValueError):
    """`name`, as a message shows it, stands twice where one value is wanted. One line."""

    def __init__(self, key: str):
        self.name = place_text([key])
        super().__init__(f"{self.name} is named twice; keep one of the two")


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict, also for json's `object_pairs_hook`. Raises NamedTwice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise NamedTwice(next(key for key, _ in pairs if counts[key] > 1))
    return found


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, but an object that names a key twice raises NamedTwice."""
    return json.loads(text, object_pairs_hook=named_once)
