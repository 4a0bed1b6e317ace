"""One run as a report shows it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

from agd_vllm.output.run_reader import RunReader
from agd_vllm.pipeline.explicable import is_explicable
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
        if ran.get("steering"):
            # As `fingerprint` has it: the name, then size and digest.
            parts.append(ran["steering"].rsplit(", ", 2)[0])
            if layers := ran.get("steering_layers"):
                parts.append(f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}")
            parts.append(f"strength {ran.get('steering_strength', 1.0):g}")
        return " · ".join(filter(None, parts))

    def attribute_command(self) -> str | None:
        """What makes heat maps; None where nothing does."""
        if not is_explicable(self.reader.parameters()):
            return None
        return f"agd-vllm attribute --run {shlex.quote(self.reader.directory)} --max-steps 16"
