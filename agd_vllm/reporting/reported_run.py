"""One run as a report shows it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

from agd_vllm.output.run_reader import RunReader
from agd_vllm.records import DecodedRow
from agd_vllm.reporting.figures import Figures
from agd_vllm.reporting.texts import TokenTexts

# Step to token id to `encoded` relevance, of one row.
Relevance = dict[int, dict[int, list[Any]]]


@dataclass(slots=True)
class ReportedRun:
    """One run of a report; `left_out` heat maps found no room."""

    reader: RunReader
    name: str
    figures: Figures
    texts: TokenTexts
    rows: dict[str, DecodedRow] = field(default_factory=dict)
    relevance: dict[str, Relevance] = field(default_factory=dict)
    left_out: int = 0

    def subtitle(self) -> str:
        ran = self.reader.parameters()
        parts = [str(ran.get("model", "")), str(ran.get("strategy", ""))]
        if ran.get("strategy") == "agd":
            tau = "∞" if ran.get("tau") is None else f"{ran['tau']:g}"
            parts += [f"τ = {tau}", str(ran.get("rule", ""))]
        return " · ".join(filter(None, parts))

    def attribute_command(self) -> str:
        return f"agd-vllm attribute --run {shlex.quote(self.reader.directory)} --max-steps 16"
