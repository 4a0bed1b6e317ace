"""What threshold the gate needs: the entropies of a greedy decode and a percentile of them (`agd-vllm calibrate`)."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from agd_vllm.input.reader import check_inputs, read_rows
from agd_vllm.output.claim import claimed, is_of_a_claim
from agd_vllm.output.storage import OutputDirectory
from agd_vllm.output.summary import OutputUnusable
from agd_vllm.pipeline.decoder import Decoder
from agd_vllm.pipeline.options import DecoderOptions
from agd_vllm.pipeline.progress import ProgressLine, say
from agd_vllm.records import DecodedRow, InputRow, RowError

ENTROPIES, PLOT, TAU = "entropy.parquet", "entropy.png", "tau.json"
SCHEMA = pa.schema([("id", pa.string()), ("step", pa.int32()), ("entropy", pa.float32())])
TOKENS_PER_GROUP = 1 << 16
ERRORS_SHOWN = 10
PLOT_BINS = 100


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """Where rows come from and files go, and which percentile of the entropies, 0 to 100, is the threshold."""

    inputs: tuple[str, ...]
    output: str
    percentile: float = 80.0
    limit: int | None = None


def calibrate(settings: CalibrationSettings, options: DecoderOptions) -> int:
    """Decodes greedily, writes the three files and prints the threshold; returns how many rows failed.

    The files replace those of an earlier calibration once all rows are decoded.
    Raises ValueError, InputUnusable or OutputUnusable for what cannot be used, later OutputFailed or RuntimeError.
    """
    if not 0 <= settings.percentile <= 100:
        raise ValueError(f"percentile {settings.percentile:g}: must lie between 0 and 100")
    check_inputs(settings.inputs)
    decoder = Decoder(options=options)
    output = _usable(settings.output)
    failures = _Failures()
    rows = _valid(settings, failures)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"no row can be decoded: {failures}")
    notes = Console(stderr=True)
    say(notes, f"loading {decoder.model.path} ...")
    with claimed(output) as held:
        if held.exclusive:
            output.remove_temporaries()
        with output.create(ENTROPIES) as file:
            table = _EntropyTable(output, file)
            _decode(decoder, itertools.chain([first], rows), table, failures, notes)
            entropies = table.close()
            if not entropies.size:
                raise ValueError(f"no token was decoded: {failures}")
            if broken := np.count_nonzero(np.isnan(entropies)):
                raise RuntimeError(f"{broken} of {entropies.size} entropies are no numbers; try --dtype float32")
            held.confirm()
        tau = float(np.percentile(entropies, settings.percentile))
        output.write(PLOT, _plot(entropies, settings.percentile, tau))
        result = {"percentile": settings.percentile, "tau": tau, "tokens": entropies.size}
        output.write_json(TAU, result)
    console = Console()
    told = f"tau {tau:.3f} nats: percentile {settings.percentile:g} of the entropies of {entropies.size:,} tokens"
    say(console, told)
    say(console, f"output: {settings.output}")
    failures.print(notes)
    return failures.count


def _usable(directory: str) -> OutputDirectory:
    """The output directory, where it holds nothing else than a calibration."""
    output = OutputDirectory(directory)
    if output.is_file():
        raise OutputUnusable(f"output {directory} is a file; give a directory")
    if {name for name in output.names() if not is_of_a_claim(name)} - {ENTROPIES, PLOT, TAU}:
        raise OutputUnusable(f"output {directory} holds something else than a calibration; give another directory")
    return output


def _valid(settings: CalibrationSettings, failures: _Failures) -> Iterator[InputRow]:
    for row in itertools.islice(read_rows(settings.inputs), settings.limit):
        if isinstance(row, RowError):
            failures.add(row)
        else:
            yield row


def _decode(
    decoder: Decoder, rows: Iterator[InputRow], table: _EntropyTable, failures: _Failures, notes: Console
) -> None:
    progress = ProgressLine(notes)
    with decoder, progress:
        say(notes, decoder.layout)
        for outcome in decoder.outcomes(rows):
            if isinstance(outcome, RowError):
                failures.add(outcome)
            elif outcome is not None:
                table.add(outcome)
            if outcome is not None:
                progress.count(outcome)
            progress.show(decoder.waiting_for_attribution)


class _Failures:
    """Rows that were not decoded: how many, and why the first ones were not."""

    def __init__(self):
        self.count = 0
        self._first: list[str] = []

    def add(self, error: RowError) -> None:
        self.count += 1
        if len(self._first) < ERRORS_SHOWN:
            name = "" if error.id is None else f" ({error.id})"
            self._first.append(f"line {error.line}{name}: {error.message}")

    def __str__(self) -> str:
        return f"{self.count} rows failed, the first at {self._first[0]}" if self._first else "there is no row"

    def print(self, console: Console) -> None:
        if not self.count:
            return
        say(console, f"{self.count} rows failed and are left out:")
        for line in self._first:
            say(console, f"  {line}")
        if self.count > len(self._first):
            say(console, f"  ... and {self.count - len(self._first):,} more")


class _EntropyTable:
    """Writes (id, step, entropy) in groups of rows as they come; only the entropies stay in memory, 4 bytes each."""

    def __init__(self, output: OutputDirectory, file: BinaryIO):
        self._output = output
        with output.faults(ENTROPIES):
            self._writer = pq.ParquetWriter(file, SCHEMA, compression="zstd")
        self._pending: list[tuple[str, np.ndarray]] = []
        self._tokens = 0
        self._written: list[np.ndarray] = []

    def add(self, row: DecodedRow) -> None:
        self._pending.append((row.id, np.asarray(row.entropies, np.float32)))
        self._tokens += len(row.entropies)
        if self._tokens >= TOKENS_PER_GROUP:
            self._write()

    def close(self) -> np.ndarray:
        """Ends the file; all entropies, float32."""
        self._write()
        with self._output.faults(ENTROPIES):
            self._writer.close()
        return np.concatenate([np.empty(0, np.float32), *self._written])

    def _write(self) -> None:
        if not self._pending:
            return
        lengths = [len(entropies) for _, entropies in self._pending]
        entropies = np.concatenate([entropies for _, entropies in self._pending])
        columns = {
            "id": np.repeat(np.array([id for id, _ in self._pending], object), lengths),
            "step": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            "entropy": entropies,
        }
        with self._output.faults(ENTROPIES):
            self._writer.write_table(pa.table(columns, schema=SCHEMA))
        self._written.append(entropies)
        self._pending, self._tokens = [], 0


def _plot(entropies: np.ndarray, percentile: float, tau: float) -> bytes:
    """A histogram with the threshold marked, as PNG."""
    # Takes a second to import. Without pyplot there is no display and no state of others to heed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(entropies, bins=PLOT_BINS, color="tab:blue")
    axes.set_yscale("log")
    axes.axvline(tau, color="tab:red", label=f"tau {tau:.3f} (percentile {percentile:g})")
    axes.set_xlabel("entropy of the next-token distribution (nats)")
    axes.set_ylabel("tokens")
    axes.set_title(f"{entropies.size:,} tokens, decoded greedily")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
