"""`python -m benchmarks.pause` on a few steps of a tiny random model."""

import json
import subprocess
import sys

import pytest
from conftest import CHECKOUT

from agd_vllm.trace import Span
from benchmarks.pause import PARTS, waits


def step(begun: float, seconds: float, rows: int) -> Span:
    return Span("vLLM", "engine step", begun, seconds, {"rows": rows})


def test_a_wait_is_from_a_pass_that_paused_a_row_to_the_next_one_that_takes_it_up():
    """Two rows: both pause at 1, go on at 3 and 4, pause at 3.5 and 4.25 and go on together at 7."""
    passes = [step(7, 1, 2), step(0, 1, 2), step(3, 0.5, 1), step(4, 0.25, 1)]
    assert waits(passes, 2) == [2, 3, 3.5, 2.75]


@pytest.mark.long
def test_every_step_of_every_row_is_guided_and_timed(tmp_path, smollm2):
    output = tmp_path / "pause.json"
    command = [sys.executable, "-m", "benchmarks.pause", "--model", str(smollm2), "--json", str(output)]
    command += ["--rows", "1,3", "--steps", "12", "--turns", "1"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, together = json.loads(output.read_text())["points"]
    assert (alone["rows"], alone["guided_steps"], alone["rows_per_pass"]) == (1, 12, 1)
    assert (together["rows"], together["guided_steps"]) == (3, 12)
    for point in (alone, together):
        assert 0 < point["loop_milliseconds"] < point["actor_milliseconds"]
        assert 0 < point["pause_to_resume_milliseconds"] <= point["pause_to_resume_p90_milliseconds"]
        assert set(point["parts"]) == {*PARTS, "other"}
        assert sum(point["parts"].values()) == pytest.approx(1, abs=0.01)
        assert all(share > 0 for part, share in point["parts"].items() if part != "other")
    # A row alone waits from each pass to the next.
    assert alone["pause_to_resume_milliseconds"] < alone["milliseconds"]
