"""A run whose driver, engine and worker are killed or told to end at random moments, and started again until it is
finished.

    python tests/chaos.py --model M --kills 30 --seed 0 --json OUT.json

Afterwards its output must be that of an undisturbed run. Raises AssertionError where it is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import psutil
import pyarrow.parquet as pq

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO_ROWS = CHECKOUT / "examples/demo.jsonl"
# What a process of each part is called; the driver is the command line itself, killed, interrupted (Ctrl-C), or told to
# end with all of its process group, as by schedulers and lost terminals.
PARTS = {
    "driver": None,
    "interrupt": None,
    "terminate": None,
    "hangup": None,
    "worker": "ray::AttributionWorker",
    "engine": "VLLM::EngineCore",
    "actor": "ray::Replica",
}
ENDINGS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "hangup": signal.SIGHUP}
# Of which the driver alone hears.
ALONE = ("interrupt",)
INTERRUPTED = "agd-vllm: interrupted; the same command resumes the run"
# Ray's agents outlive a driver that was killed outright: they try for 60 seconds (fixed in Ray) to tell it of that.
RAY_AGENTS, RAY_AGENTS_STAY_S = ("ray::DashboardAgent", "ray::RuntimeEnvAgent"), 90


def demo_rows(count: int) -> list[dict[str, Any]]:
    """Short demo rows with their numbers as ids; in each dozen, the longer the later."""
    demo = [row for row in map(json.loads, DEMO_ROWS.read_text().splitlines()) if "messages" in row]
    rows = enumerate(itertools.islice(itertools.cycle(demo), count))
    return [row | {"id": f"{index}", "max_tokens": 12 + 3 * (index % 12)} for index, row in rows]


class ChaosRun:
    """`agd-vllm decode` on short demo rows into `folder`."""

    def __init__(self, model: Path, folder: Path, rows: int, *options: str, scorer: str = "forward"):
        folder.mkdir()
        # Of an inline run the engine is stepped in its actor, and nobody else scores.
        self.parts_alive = ("actor",) if scorer == "inline" else ("engine", "worker")
        self.output = folder / "out"
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in demo_rows(rows)))
        self._log, self._faults = folder / "log.txt", folder / "faults.jsonl"
        self._command = [sys.executable, "-m", "agd_vllm", "decode", str(data), "--output", str(self.output)]
        self._command += ["--model", str(model), "--dtype", "float32", "--max-model-len", "1024", "--part-rows", "5"]
        # The default is not named: another strategy has no scorer.
        self._command += ["--log-json", str(self._faults), *(["--scorer", scorer] if scorer != "forward" else [])]
        self._command += options
        for arg in ("enforce_eager=true", "kv_cache_memory_bytes=268435456", "max_num_seqs=8"):
            self._command += ["--engine-arg", arg]

    def start(self) -> psutil.Process:
        with self._log.open("a") as log:
            return psutil.Popen(
                self._command, stdout=log, stderr=log, cwd=CHECKOUT, start_new_session=True, preexec_fn=heed_interrupts
            )

    def parts(self) -> dict[Path, str]:
        """Every part that is durable by now, by its content; steps count once their rows are there, which come last."""
        paths = [
            path for path in self.output.glob("*/part-*.parquet") if (self.output / "results" / path.name).exists()
        ]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def rows(self) -> int:
        return sum(pq.read_metadata(path).num_rows for path in self.output.glob("results/part-*.parquet"))

    def faults(self) -> list[str]:
        """The kind of every fault that was logged, over all launches."""
        return [json.loads(line)["kind"] for line in self._faults.read_text().splitlines()]

    def log(self) -> str:
        return self._log.read_text()


def decoded(output: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens and guided steps of every row of a run. A row that is there twice fails."""
    rows = pq.read_table(output / "results").to_pylist()
    steps = sorted((step["id"], step["step"]) for step in pq.read_table(output / "steps").to_pylist())
    assert len(set(steps)) == len(steps), "a guided step twice"
    found = {row["id"]: (row["token_ids"], []) for row in rows}
    assert len(found) == len(rows), "a row twice"
    for name, step in steps:
        found[name][1].append(step)
    return found


def heed_interrupts() -> None:
    """A process that was started in the background ignores Ctrl-C, and its children would, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def family(driver: psutil.Process) -> list[psutil.Process]:
    """The driver and all that it and Ray have started for it; Ray's daemons are its children, too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [driver, *driver.children(recursive=True)]
    return []


def victims(part: str, driver: psutil.Process) -> list[psutil.Process]:
    name, found = PARTS[part], []
    for process in family(driver):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid == driver.pid if name is None else process.cmdline()[:1] and name in process.cmdline()[0]:
                found.append(process)
    return found


def strike(part: str, run: ChaosRun, driver: psutil.Process, at_rows: int, delay: float) -> list[psutil.Process]:
    """Kills the part once the run has that many rows on disk, after `delay` seconds more.

    Returns all processes of the run as they were then; none where the run ended before.
    """
    while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:
        if run.rows() >= at_rows and all(victims(name, driver) for name in run.parts_alive):
            time.sleep(delay)
            alive, targets = family(driver), victims(part, driver)
            if part in ENDINGS and part not in ALONE:
                os.killpg(driver.pid, ENDINGS[part])
                return alive
            for target in targets:
                with contextlib.suppress(psutil.NoSuchProcess):
                    target.send_signal(ENDINGS.get(part, signal.SIGKILL))
            if targets:
                return alive
        time.sleep(0.2)
    return []


def await_end(processes: list[psutil.Process], timeout: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout)
    assert not alive, f"left behind: {[process.name() for process in alive]}"


def undisturbed(model: Path, folder: Path, rows: int) -> Path:
    """The output with two engines and two workers, which batch otherwise: the rows must not depend on that either."""
    calm = ChaosRun(model, folder / "calm", rows, "--engines", "2", "--attribution-workers", "2")
    assert calm.start().wait() == 0, calm.log()
    return calm.output


def unleash(
    model: Path,
    folder: Path,
    kills: list[str],
    rows: int,
    seed: int,
    calm: Path,
    delay_s: float = 2,
    scorer: str = "forward",
    to_the_last: bool = True,
    options: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Runs with `kills` (names of PARTS, in this order, each at most `delay_s` after rows have become durable),
    compares with the rows in the output `calm`, which may hold others, too; returns what happened. Waits `to_the_last`
    of Ray's agents, for a minute, where the driver was killed."""
    rng = random.Random(seed)
    stormy = ChaosRun(model, folder / "stormy", rows, *options, scorer=scorer)
    waiting, launches, agents = list(kills), 0, []
    begun = time.monotonic()
    status = None
    while status != 0:
        launches += 1
        driver, seen, last = stormy.start(), [], None
        before = stormy.parts()
        while waiting and (last is None or PARTS[last] is not None):
            alive = strike(waiting[0], stormy, driver, at_rows=stormy.rows() + 1, delay=rng.uniform(0, delay_s))
            if not alive:
                break
            last = waiting.pop(0)
            print(f"{time.monotonic() - begun:6.0f} s  killed {last} at {stormy.rows()} rows", flush=True)
            seen += alive
            before |= stormy.parts()
        status = driver.wait()
        if status == 1:
            assert last in ENDINGS, stormy.log()
            assert stormy.log().splitlines()[-1] == INTERRUPTED
        else:
            assert status == 0 or (status == -signal.SIGKILL and last == "driver"), stormy.log()
        still = [process for process in seen if process.pid != driver.pid and process.is_running()]
        agents += [process for process in still if process.name() in RAY_AGENTS]
        await_end([process for process in still if process not in agents], timeout=60)
        after = stormy.parts()
        assert all(after.get(path) == content for path, content in before.items()), "a durable part has changed"
    if to_the_last:
        await_end(agents, RAY_AGENTS_STAY_S)
    summary = json.loads((stormy.output / "summary.json").read_text())
    logged = Counter(stormy.faults())
    # An invocation that is killed outright counts what it logged up to some seconds before.
    assert summary["faults"] == logged or ("driver" in kills[1:] and Counter(summary["faults"]) <= logged)
    ours, theirs = decoded(stormy.output), decoded(calm)
    assert ours.keys() == {row["id"] for row in demo_rows(rows)}, "rows are missing"
    different = [name for name in ours if ours[name] != theirs[name]]
    assert not different, f"rows differ: {different}"
    return {
        "rows": rows,
        "kills": {part: kills.count(part) for part in PARTS if part in kills},
        "kills_left": waiting,
        "launches": launches,
        "rows_lost": 0,
        "rows_different": 0,
        "faults": dict(logged),
        "seconds": time.monotonic() - begun,
    }


@click.command(help=__doc__)
@click.option("--model", required=True, type=click.Path(path_type=Path))
@click.option("--kills", type=int, default=30, show_default=True)
@click.option("--rows", type=int, default=400, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--scorer", type=click.Choice(["forward", "inline"]), default="forward", show_default=True)
@click.option("--json", "output", required=True)
def main(model, kills, rows, seed, scorer, output):
    from benchmarks.machine import write_result

    parts = [part for part in PARTS if scorer != "inline" or part not in ("worker", "engine")]
    order = [random.Random(seed + index).choice(parts) for index in range(kills)]
    with tempfile.TemporaryDirectory() as folder:
        model, folder = model.absolute(), Path(folder)
        calm = undisturbed(model, folder, rows)
        result = unleash(model, folder, order, rows, seed, calm, scorer=scorer) | {"scorer": scorer}
    if result["kills_left"]:
        raise click.ClickException(f"the run ended before {len(result['kills_left'])} kills; raise --rows")
    write_result(output, result)
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(CHECKOUT))
    main()
