"""Kills in one run (`make chaos` has thirty): nothing lost, twice, changed or left behind."""

import signal
import time

import pytest
from chaos import INTERRUPTED, ChaosRun, await_end, family, undisturbed, unleash, victims


def test_a_run_survives_the_death_of_its_driver_and_a_worker(smollm2, command_run, tmp_path):
    """Of an engine: test_decoder.py. Of each part in one run, which takes minutes: below."""
    kills = ["driver", "worker"]
    result = unleash(smollm2, tmp_path, kills, rows=16, seed=0, calm=command_run.output, delay_s=0.5)
    assert not result["kills_left"]
    assert result["launches"] == 2
    assert result["faults"]["worker_restarts"] >= 1


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_survives_the_death_of_each_part(smollm2, tmp_path):
    calm = undisturbed(smollm2, tmp_path, rows=30)
    result = unleash(smollm2, tmp_path, ["driver", "worker", "actor"], rows=30, seed=0, calm=calm)
    assert not result["kills_left"]
    assert result["launches"] == 2
    assert result["faults"]["worker_restarts"] >= 1
    assert result["faults"]["engine_restarts"] >= 1


def test_an_interrupt_while_the_model_loads_leaves_nothing_behind(smollm2, tmp_path):
    run = ChaosRun(smollm2, tmp_path / "run", 5)
    driver = run.start()
    deadline = time.monotonic() + 120
    while not victims("actor", driver):
        assert time.monotonic() < deadline and driver.is_running(), run.log()
        time.sleep(0.2)
    time.sleep(5)  # in the middle of what the engine imports and loads
    seen = family(driver)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) == 1, run.log()
    assert run.log().splitlines()[-1] == INTERRUPTED
    await_end([process for process in seen if process.pid != driver.pid], timeout=60)
