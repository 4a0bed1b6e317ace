"""What a person sees of a run: a live line on a terminal, plain lines in a pipe, a table at the end."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agd_vllm.records import DecodedRow, RowError

LIVE_SECONDS, PLAIN_SECONDS = 0.25, 10.0


def say(console: Console, line: str) -> None:
    """A line as it is: nothing in it is markup, numbers get no colours, and in a pipe it stays one line."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


class ProgressLine:
    """Use as a context around the decoding loop; writes to stderr, so that stdout holds results only."""

    def __init__(self, console: Console):
        self._console = console
        self._live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
        self._interval = LIVE_SECONDS if self._live else PLAIN_SECONDS
        self._begun: float | None = None
        self._ended: float | None = None
        self.rows = self.failed = self.tokens = self.guided = 0

    def __enter__(self) -> ProgressLine:
        self._begun = self._shown = time.monotonic()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended = time.monotonic()
        if self._live:
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Seconds of decoding so far, or in all."""
        if self._begun is None:
            return 0.0
        return (self._ended or time.monotonic()) - self._begun

    def count(self, outcome: DecodedRow | RowError) -> None:
        self.rows += 1
        if isinstance(outcome, RowError):
            self.failed += 1
        else:
            self.tokens += len(outcome.token_ids)
            self.guided += outcome.num_guided

    def show(self, waiting: int) -> None:
        """Writes the line if it is due; `waiting` rows wait for attribution now."""
        now = time.monotonic()
        if now - self._shown < self._interval:
            return
        self._shown = now
        line = (
            f"{self.rows} rows ({self.failed} failed), {self.tokens / self.seconds:.1f} tokens/s, "
            f"{self.guided / max(self.tokens, 1):.1%} guided, {waiting} waiting for attribution"
        )
        if self._live:
            self._live.update(Text(line), refresh=True)
        else:
            say(self._console, line)


def print_summary(console: Console, summary: dict[str, Any], output: str) -> None:
    """The final table and where the results lie."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    tokens = max(summary["output_tokens"], 1)
    for name, value in (
        ("rows", f"{summary['rows']}"),
        ("decoded", f"{summary['decoded']}"),
        ("failed", f"{summary['failed']}"),
        ("output tokens", f"{summary['output_tokens']}"),
        ("guided steps", f"{summary['guided_steps']} ({summary['guided_steps'] / tokens:.1%})"),
        ("changed tokens", f"{summary['changed_tokens']} ({summary['changed_tokens'] / tokens:.1%})"),
        ("seconds decoding", f"{summary['seconds']:.1f}"),
        ("seconds loading", f"{summary['load_seconds']:.1f}"),
        ("tokens/s", f"{summary['tokens_per_second']:.1f}"),
        *((fault.replace("_", " "), f"{count}") for fault, count in summary["faults"].items()),
    ):
        table.add_row(name, value)
    console.print(table)
    say(console, f"output: {output}")
    if summary["failed"]:
        say(console, f"failed rows, with reasons: {output.rstrip('/')}/errors.jsonl")
