"""The HTML file: a template, its style and its script in one, with the rows as data that nothing can act from."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from agd_vllm.reporting.reported_run import ReportedRun
from agd_vllm.reporting.texts import TextTable

PAGE_ROWS = 20

# Within a script element `<` could end it, and these line ends are none in JSON but are in older JavaScript.
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def page(
    runs: Sequence[ReportedRun],
    table: TextTable,
    rows: list[dict[str, Any]],
    relevance: list[Any],
    rows_in_all: int,
) -> str:
    """The whole file. It loads nothing, and its policy lets no script run but its own."""
    style, script = _read("page.css"), _read("inspector.js") + _read("page.js")
    data = {
        "texts": table.texts,
        "special": table.special,
        "rows": len(rows),
        "page": PAGE_ROWS,
        "runs": [{"name": run.name, "command": run.attribute_command(), "maps": bool(run.relevance)} for run in runs],
        "entropy": [_ends(run) for run in runs],
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json"] = _json
    template = environment.from_string(_read("page.html"))
    return template.render(
        runs=runs,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=data,
        rows=rows,
        relevance=relevance,
        rows_in_all=rows_in_all,
    )


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _ends(run: ReportedRun) -> list[float]:
    """Between which entropies the shades run."""
    bars = run.figures.histogram
    return [bars[0].low, bars[-1].high] if bars else [0.0, 1.0]


def _json(value: Any) -> Markup:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_ESCAPES))


def _hash(content: str) -> str:
    return "sha256-" + b64encode(sha256(content.encode()).digest()).decode()
