"""Kills in one run (`make chaos` has thirty): nothing lost, twice, changed or left behind."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest
from chaos import INTERRUPTED, ChaosRun, await_end, family, unleash, victims


def test_a_run_survives_the_death_of_its_driver_and_a_worker(smollm2, command_run, tmp_path):
    """Of an engine: test_decoder.py. Of all parts of an inline run: the next test."""
    kills = ["driver", "worker"]
    calm = command_run.output
    result = unleash(smollm2, tmp_path, kills, rows=16, seed=0, calm=calm, delay_s=0.5, to_the_last=False)
    assert not result["kills_left"]
    assert result["launches"] == 2
    assert result["faults"]["worker_restarts"] >= 1


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_inline_run_survives_the_death_of_each_part(smollm2, command_run, tmp_path):
    """Against a run with a worker; `make chaos SCORER=inline` has thirty kills. Small parts: with more of them durable
    three kills fit sixteen rows."""
    kills, small = ["driver", "actor", "actor"], ("--part-rows", "2")
    calm = command_run.output
    result = unleash(smollm2, tmp_path, kills, rows=16, seed=0, calm=calm, delay_s=0.5, scorer="inline", options=small)
    assert not result["kills_left"]
    assert result["faults"]["engine_restarts"] >= 2


def everybody(driver: psutil.Process, number: int) -> None:
    """As systemd does it, by control group."""
    for process in family(driver):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def driver_and_group(driver: psutil.Process, number: int) -> None:
    """As `timeout` does it."""
    driver.send_signal(number)
    os.killpg(driver.pid, number)


def group(driver: psutil.Process, number: int) -> None:
    os.killpg(driver.pid, number)


def alone(driver: psutil.Process, number: int) -> None:
    driver.send_signal(number)


# More than a tiny model decodes until it is told to end.
MANY = 2000
WAYS = [
    (everybody, signal.SIGTERM),
    (everybody, signal.SIGHUP),
    (driver_and_group, signal.SIGTERM),
    (group, signal.SIGHUP),
    (group, signal.SIGINT),
    (alone, signal.SIGTERM),
    (alone, signal.SIGINT),
]


def ways(short: int) -> list:
    """All, but for that one in `make long`."""
    return [pytest.param(*way, marks=[] if number == short else pytest.mark.long) for number, way in enumerate(WAYS)]


@pytest.mark.parametrize(("tell", "number"), ways(0))
def test_a_run_that_is_told_to_end_while_it_loads_leaves_nothing_behind(tiny_smollm2, tmp_path, tell, number):
    run = ChaosRun(tiny_smollm2, tmp_path / "run", 5)
    driver = run.start()
    deadline = time.monotonic() + 120
    while not victims("actor", driver):
        assert time.monotonic() < deadline and driver.is_running(), run.log()
        time.sleep(0.2)
    time.sleep(5)  # in the middle of what the engine imports and loads
    ends_in_order(run, driver, lambda: tell(driver, number))
    assert json.loads((run.output / "summary.json").read_text())["rows"] == 0


@pytest.mark.parametrize(("tell", "number"), ways(2))
def test_a_run_that_is_told_to_end_while_it_decodes_keeps_what_it_has(tiny_smollm2, tmp_path, tell, number):
    run = ChaosRun(tiny_smollm2, tmp_path / "run", MANY)
    driver = run.start()
    deadline = time.monotonic() + 180
    while not run.rows():
        assert time.monotonic() < deadline and driver.is_running(), run.log()
        time.sleep(0.2)
    before = run.rows()
    ends_in_order(run, driver, lambda: tell(driver, number))
    assert json.loads((run.output / "summary.json").read_text())["rows"] == run.rows() >= before
    assert run.rows() < MANY and list(run.output.glob("steps/*.parquet"))


def ends_in_order(run: ChaosRun, driver: psutil.Process, tell: Callable[[], None]) -> None:
    """Within seconds, with the one line, and nobody is left."""
    seen = family(driver)
    told = time.monotonic()
    tell()
    assert driver.wait(60) == 1, run.log()
    await_end([process for process in seen if process.pid != driver.pid], timeout=5)
    assert time.monotonic() - told < 30
    assert run.log().splitlines()[-1] == INTERRUPTED
    assert len([line for line in run.log().splitlines() if line.startswith("agd-vllm:")]) == 1
