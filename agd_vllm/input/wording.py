"""How a place within a row, and a value there, stand in a message: on one line, and short whatever they are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

MAX_PLACE = 200  # characters


def place_text(parts: Iterable[str | int]) -> str:
    """('messages', 1, 'content') as messages[1].content, on one line, and short whatever the keys."""
    text = "".join(_step(part) for part in parts).removeprefix(".")
    return text if len(text) <= MAX_PLACE else f"{text[: MAX_PLACE // 2]}...{text[-MAX_PLACE // 2 :]}"


def _step(part: str | int) -> str:
    if isinstance(part, int):
        return f"[{part}]"
    return f".{part}" if part.isidentifier() and len(part) <= 60 else f"[{shown(part)}]"


def shown(value: Any) -> str:
    """A value in a message: on one line, and short whatever its size."""
    if isinstance(value, dict):
        return "an object" if value else "{}"
    if isinstance(value, list):
        return "a list" if value else "[]"
    text = json.dumps(value[:60] if isinstance(value, str) else value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."
